//! The schema: which commands and events there are, and what their arguments and results look like.
//!
//! It is data. [`check`](fn@check) holds arguments against it with QEMU's error texts, [`introspect`]
//! turns it into the answers of `query-commands` and `query-qmp-schema`, [`Args`] reads checked
//! arguments. What is not in here does not exist for a client; a member that QEMU has and we refuse
//! says why. The folder's other files hold the types by subject.

mod args;
mod bitmap;
mod check;
mod control;
mod device;
mod export;
mod filter;
mod introspect;
mod job;
mod node;
mod node_info;
mod object;
mod snapshot;
mod transaction;

pub use args::Args;
pub use check::{Dialect, check};
pub use filter::LIMITS_PROPERTY;
pub use introspect::introspect;
pub use object::POLL_PROPERTIES;

/// A type of a member, an argument or a result.
#[derive(Clone, Copy, Debug)]
pub enum Type {
    /// A string.
    Str,
    /// An integer with the range of a C type.
    Int(Int),
    /// A number, with or without a fraction.
    Number,
    /// `true` or `false`.
    Bool,
    /// `null`.
    Null,
    /// Any value.
    Any,
    /// One of a set of strings.
    Enum(&'static Enum),
    /// An object; a union if it has a tag.
    Object(&'static Object),
    /// One of several types that JSON can tell apart.
    Alternate(&'static Alternate),
    /// An array of one type.
    Array(&'static Type),
}

/// The C types of integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int {
    /// The plain `int`: 64 bits, signed.
    I64,
    /// `uint8_t`.
    U8,
    /// `uint16_t`.
    U16,
    /// `uint32_t`.
    U32,
    /// `uint64_t`; negative numbers wrap around, as in QEMU.
    U64,
    /// As `U64`; on the command line with a suffix (K, M, G, T, P, E).
    Size,
}

/// A set of strings.
#[derive(Debug)]
pub struct Enum {
    /// Name in this source, unknown to clients.
    pub name: &'static str,
    /// The strings, in the order shown.
    pub values: &'static [&'static str],
}

/// An object type.
#[derive(Debug)]
pub struct Object {
    /// Name in this source, unknown to clients.
    pub name: &'static str,
    /// A type whose members come first.
    pub base: Option<&'static Object>,
    /// Its own members, in the order in which they are checked.
    pub members: &'static [Member],
    /// What makes it a union.
    pub variants: Option<Variants>,
}

/// The variant part of a union.
#[derive(Clone, Copy, Debug)]
pub struct Variants {
    /// The member (an enum, in base or members) that selects.
    pub tag: &'static str,
    /// Further members by value of the tag; values that are not listed add none.
    pub branches: &'static [(&'static str, &'static Object)],
}

/// A member of an object.
#[derive(Clone, Copy, Debug)]
pub struct Member {
    /// Its name.
    pub name: &'static str,
    /// Its type.
    pub ty: Type,
    /// Whether it may be left out.
    pub optional: bool,
    /// Its features, as introspection shows them.
    pub features: &'static [&'static str],
    /// Set for a member that QEMU has and this program refuses: why.
    pub refused: Option<&'static str>,
}

/// A choice between types.
#[derive(Debug)]
pub struct Alternate {
    /// Name that error texts show as the expected type.
    pub name: &'static str,
    /// The types.
    pub types: &'static [Type],
}

/// A command.
#[derive(Debug)]
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub args: &'static Object,
    /// Its result.
    pub result: Type,
    /// Its features, as introspection shows them.
    pub features: &'static [&'static str],
}

/// An event.
#[derive(Debug)]
pub struct Event {
    /// Its name.
    pub name: &'static str,
    /// Its data.
    pub data: &'static Object,
}

/// The object without members: arguments of commands that take none, result of those that give none.
pub static EMPTY: Object = Object {
    name: "Empty",
    base: None,
    members: &[],
    variants: None,
};

const EMPTY_RESULT: Type = Type::Object(&EMPTY);

/// All commands.
pub fn commands() -> impl Iterator<Item = &'static Command> {
    [
        control::COMMANDS,
        node::COMMANDS,
        node_info::COMMANDS,
        device::COMMANDS,
        snapshot::COMMANDS,
        transaction::COMMANDS,
        bitmap::COMMANDS,
        export::COMMANDS,
        job::COMMANDS,
        object::COMMANDS,
    ]
    .into_iter()
    .flatten()
}

/// The command of this name.
pub fn command(name: &str) -> Option<&'static Command> {
    commands().find(|command| command.name == name)
}

/// All events.
pub fn events() -> impl Iterator<Item = &'static Event> {
    [control::EVENTS, node::EVENTS, export::EVENTS, job::EVENTS]
        .into_iter()
        .flatten()
}

/// The argument types of the daemon's command-line options.
pub mod option {
    pub use super::control::MONITOR_OPTIONS as MONITOR;
    pub use super::export::{EXPORT_OPTIONS as EXPORT, NBD_SERVER_OPTIONS as NBD_SERVER};
    pub use super::node::BLOCKDEV_OPTIONS as BLOCKDEV;
    pub use super::object::OBJECT_OPTIONS as OBJECT;
    pub use super::object::object_types;
}

impl Int {
    /// What introspection and error texts call it.
    pub fn c_name(self) -> &'static str {
        match self {
            Int::I64 => "int64_t",
            Int::U8 => "uint8_t",
            Int::U16 => "uint16_t",
            Int::U32 => "uint32_t",
            Int::U64 | Int::Size => "uint64_t",
        }
    }
}

impl Object {
    const fn new(name: &'static str, members: &'static [Member]) -> Object {
        Object {
            name,
            base: None,
            members,
            variants: None,
        }
    }

    const fn based(mut self, base: &'static Object) -> Object {
        self.base = Some(base);
        self
    }

    const fn union(
        mut self,
        tag: &'static str,
        branches: &'static [(&'static str, &'static Object)],
    ) -> Object {
        self.variants = Some(Variants { tag, branches });
        self
    }

    /// Members of the bases and its own, outermost base first.
    pub fn all_members(&self) -> Vec<&'static Member> {
        let mut members = self.base.map(Object::all_members).unwrap_or_default();
        members.extend(self.members);
        members
    }

    /// The type that a value of the tag adds.
    pub fn branch(&self, case: &str) -> Option<&'static Object> {
        let branches = self.variants?.branches;
        branches
            .iter()
            .find(|(name, _)| *name == case)
            .map(|(_, object)| *object)
    }
}

impl Member {
    const fn features(mut self, features: &'static [&'static str]) -> Member {
        self.features = features;
        self
    }
}

const fn req(name: &'static str, ty: Type) -> Member {
    Member {
        name,
        ty,
        optional: false,
        features: &[],
        refused: None,
    }
}

const fn opt(name: &'static str, ty: Type) -> Member {
    Member {
        optional: true,
        ..req(name, ty)
    }
}

/// A member that QEMU has and that is refused for this reason.
const fn refused(name: &'static str, why: &'static str) -> Member {
    Member {
        refused: Some(why),
        ..opt(name, Type::Any)
    }
}

const fn cmd(name: &'static str, args: &'static Object, result: Type) -> Command {
    Command {
        name,
        args,
        result,
        features: &[],
    }
}

const STR: Type = Type::Str;
const BOOL: Type = Type::Bool;
const INT: Type = Type::Int(Int::I64);
const U16: Type = Type::Int(Int::U16);
const U32: Type = Type::Int(Int::U32);
const U64: Type = Type::Int(Int::U64);
const SIZE: Type = Type::Int(Int::Size);

#[cfg(test)]
mod tests;
