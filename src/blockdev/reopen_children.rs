//! What a reopened node's description means for its children, and what it may not change.

use std::rc::Rc;

use crate::block::{Child, Graph, Node, NodeOptions, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Qcow2;

use super::chain::header_reference;
use super::description::{
    BackingDescription, ChildDescription, Description, DriverOptions, SharedOptions,
};
use super::effective::{Source, resolve};
use super::filter_description::{FilterDescription, FilterOptions};
use super::open::{check_aio, check_qcow2};
use super::origin::Origin;
use super::reopen::{Change, Replacement};
use super::{names, value};

/// Everything that a reopen changes.
pub(super) struct Plan<'a> {
    graph: &'a Graph,
    pub(super) changes: Vec<Change>,
    pub(super) replacements: Vec<Replacement>,
}

impl<'a> Plan<'a> {
    pub(super) fn new(graph: &'a Graph) -> Plan<'a> {
        Plan {
            graph,
            changes: Vec::new(),
            replacements: Vec::new(),
        }
    }

    /// A node of the list.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn add_listed(&mut self, node: &Rc<Node>, given: Description) -> Result<()> {
        self.add(node, given, Source::Defaults)
    }

    fn add(&mut self, node: &Rc<Node>, given: Description, source: Source) -> Result<()> {
        let options = resolve(&given.shared, source)?;
        check_fixed(node, &given, &options)?;
        let has_backing = node.child(Role::Backing).is_some() || header_reference(node).is_some();
        if has_backing && matches!(given.driver.backing(), Some(BackingDescription::FromHeader)) {
            return Err(value::invalid(format!(
                "backing is missing for '{}'",
                node.name()
            )));
        }
        let file = given.driver.file().cloned();
        let role = given.driver.file_role();
        let backing = given.driver.backing().cloned();
        let shared = given.shared;
        self.changes.push(Change::new(node, given, options));
        if let Some(backing) = backing {
            self.add_backing(node, backing, shared, options)?;
        }
        if let Some(file) = file {
            let source = Source::FileOf(options);
            self.add_child(node, role, file, shared, source)?;
        }
        Ok(())
    }

    fn add_backing(
        &mut self,
        node: &Rc<Node>,
        backing: BackingDescription,
        shared: SharedOptions,
        options: NodeOptions,
    ) -> Result<()> {
        match backing {
            BackingDescription::FromHeader => Ok(()),
            BackingDescription::Nothing => {
                if let Some(edge) = node.child(Role::Backing) {
                    check_link(node, Role::Backing, &edge.node())?;
                    self.replacements.push(Replacement {
                        parent: node.clone(),
                        role: Role::Backing,
                        new: None,
                    });
                }
                Ok(())
            }
            BackingDescription::Child(child) => {
                let shared = SharedOptions {
                    read_only: None,
                    auto_read_only: None,
                    ..shared
                };
                let source = Source::BackingOf(options);
                self.add_child(node, Role::Backing, child, shared, source)
            }
        }
    }

    /// `shared`: what the parent's description says and the child inherits.
    fn add_child(
        &mut self,
        node: &Rc<Node>,
        role: Role,
        child: ChildDescription,
        shared: SharedOptions,
        source: Source,
    ) -> Result<()> {
        let current = node.child(role).map(|edge| edge.node());
        match (child, current) {
            (ChildDescription::Reference(name), current) => {
                let new = names::find_node(self.graph, &name)?;
                match current {
                    Some(current) if Rc::ptr_eq(&current, &new) => {
                        self.keep_child(node, &current, shared)
                    }
                    Some(current) => {
                        check_link(node, role, &current)?;
                        self.replace_child(node, role, new)
                    }
                    None => self.replace_child(node, role, new),
                }
            }
            (ChildDescription::Inline(given), Some(current))
                if Origin::is_adopted(node, &current) =>
            {
                self.add(&current, *given, source)
            }
            (ChildDescription::Inline(_), _) => {
                Err(cannot_change(&format!("{}.driver", role.name())))
            }
        }
    }

    fn replace_child(&mut self, node: &Rc<Node>, role: Role, new: Rc<Node>) -> Result<()> {
        if reaches(&new, node) {
            return Err(value::invalid(format!(
                "Making '{}' a {} child of '{}' would create a cycle",
                new.name(),
                role.name(),
                node.name()
            )));
        }
        match role {
            Role::Backing => new.check_content_stays()?,
            // What is written past a job's filter the job would not see.
            _ => new.check_unoccupied()?,
        }
        self.replacements.push(Replacement {
            parent: node.clone(),
            role,
            new: Some(new),
        });
        Ok(())
    }

    /// A child that was opened for `parent` keeps its options but for those that the parent's
    /// description now gives and its own does not.
    fn keep_child(
        &mut self,
        parent: &Rc<Node>,
        child: &Rc<Node>,
        shared: SharedOptions,
    ) -> Result<()> {
        let Some(origin) = Origin::of(child) else {
            return Ok(());
        };
        if !Origin::is_adopted(parent, child) {
            return Ok(());
        }
        let given = origin.given.borrow().clone();
        let own = given.shared;
        let mut options = child.options();
        let pick = |own: Option<bool>, inherited: Option<bool>, now: bool| {
            own.or(inherited).unwrap_or(now)
        };
        options.read_only = pick(own.read_only, shared.read_only, options.read_only);
        options.auto_read_only = pick(
            own.auto_read_only,
            shared.auto_read_only,
            options.auto_read_only,
        );
        options.force_share = pick(own.force_share, shared.force_share, options.force_share);
        options.cache_direct = pick(own.cache_direct, shared.cache_direct, options.cache_direct);
        options.cache_no_flush = pick(
            own.cache_no_flush,
            shared.cache_no_flush,
            options.cache_no_flush,
        );
        if options != child.options() {
            self.changes.push(Change::new(child, given, options));
        }
        Ok(())
    }
}

/// A job that works on a stretch of chain goes by the links there, and finds its filter where it has put it.
///
/// # Errors
/// In QEMU's words, which has these links frozen, too.
fn check_link(parent: &Rc<Node>, role: Role, child: &Rc<Node>) -> Result<()> {
    let (link, name) = (role.name(), parent.name());
    if child.is_implicit() {
        let text = format!("Cannot replace implicit {link} child of {name}");
        return Err(Error::new(ErrorKind::InUse, text));
    }
    if child.driver().is_filter() {
        child.check_unoccupied()?;
    }
    let is_on_stretch = |edge: &Rc<Child>| {
        let role = edge.role();
        matches!(
            role,
            Role::ActiveNode | Role::IntermediateNode | Role::Source
        )
    };
    if role == Role::Backing && parent.parents().iter().any(is_on_stretch) {
        let child = child.name();
        let text = format!("Cannot change frozen '{link}' link from '{name}' to '{child}'");
        return Err(Error::new(ErrorKind::InUse, text));
    }
    Ok(())
}

/// Options that stay as they are as long as the node lives.
fn check_fixed(node: &Rc<Node>, given: &Description, options: &NodeOptions) -> Result<()> {
    let Some(origin) = Origin::of(node) else {
        let text = format!("Node '{}' cannot be reopened", node.name());
        return Err(Error::new(ErrorKind::Unsupported, text));
    };
    if given.driver.name() != node.driver().driver_name() {
        return Err(cannot_change("driver"));
    }
    if given
        .node_name
        .as_deref()
        .is_some_and(|name| name != node.name())
    {
        return Err(cannot_change("node-name"));
    }
    if options.force_share != node.options().force_share {
        return Err(cannot_change("force-share"));
    }
    check_fixed_of_driver(node, &origin.given.borrow().driver, &given.driver, options)
}

fn check_fixed_of_driver(
    node: &Node,
    before: &DriverOptions,
    now: &DriverOptions,
    options: &NodeOptions,
) -> Result<()> {
    match (before, now) {
        (DriverOptions::File(before), DriverOptions::File(now)) => {
            check_aio(now, options)?;
            if before.filename != now.filename {
                return Err(cannot_change("filename"));
            }
            if before.locking != now.locking {
                return Err(cannot_change("locking"));
            }
        }
        (DriverOptions::Nbd(before), DriverOptions::Nbd(now)) => {
            if let Some(option) = before.difference(now) {
                return Err(cannot_change(option));
            }
        }
        (DriverOptions::Null(before), DriverOptions::Null(now)) if before != now => {
            let option = if before.size != now.size {
                "size"
            } else if before.read_zeroes != now.read_zeroes {
                "read-zeroes"
            } else {
                "latency-ns"
            };
            return Err(cannot_change(option));
        }
        (
            DriverOptions::Qcow2 {
                options: before, ..
            },
            DriverOptions::Qcow2 { options: now, .. },
        ) => {
            if let Some(image) = node.driver_as::<Qcow2>() {
                check_qcow2(now, image)?;
            }
            if before.caches != now.caches {
                return Err(cannot_change("cache-size"));
            }
            if before.discard_no_unref != now.discard_no_unref {
                return Err(cannot_change("discard-no-unref"));
            }
        }
        (DriverOptions::Filter(before), DriverOptions::Filter(now)) => {
            check_filter(node, before, now)?;
        }
        _ => {}
    }
    Ok(())
}

fn check_filter(node: &Node, before: &FilterDescription, now: &FilterDescription) -> Result<()> {
    match (&before.options, &now.options) {
        (FilterOptions::Blkdebug(before), FilterOptions::Blkdebug(now)) => {
            match before.difference(now) {
                Some(option) => Err(cannot_change(&option)),
                None => Ok(()),
            }
        }
        (
            _,
            FilterOptions::CopyOnRead { .. }
            | FilterOptions::CopyBeforeWrite(_)
            | FilterOptions::SnapshotAccess,
        ) => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "Block format '{}' used by node '{}' does not support reopening files",
                now.name(),
                node.name()
            ),
        )),
        _ => Ok(()),
    }
}

fn cannot_change(option: &str) -> Error {
    value::invalid(format!("Cannot change the option '{option}'"))
}

/// `to` is `from` or somewhere below it.
fn reaches(from: &Rc<Node>, to: &Rc<Node>) -> bool {
    Rc::ptr_eq(from, to) || from.children().iter().any(|edge| reaches(&edge.node(), to))
}
