//! Reading arguments that were checked.

use serde_json::{Map, Value};

/// A view of an object that [`check`](super::check) let through.
///
/// The readers give `None` for what is absent. A member of another type than asked for is a bug (schema
/// and reader disagree), not bad input: that is asserted.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a> {
    members: &'a Map<String, Value>,
}

impl<'a> Args<'a> {
    /// A view of a checked value, which is an object.
    pub fn new(value: &'a Value) -> Args<'a> {
        match value {
            Value::Object(members) => Args { members },
            other => unreachable!("checked arguments are an object, found {other}"),
        }
    }

    /// The raw member.
    pub fn value(&self, name: &str) -> Option<&'a Value> {
        self.members.get(name)
    }

    /// A string or enum.
    pub fn str(&self, name: &str) -> Option<&'a str> {
        self.read(name, Value::as_str)
    }

    /// A string or enum that the schema makes mandatory.
    pub fn required_str(&self, name: &str) -> &'a str {
        match self.str(name) {
            Some(text) => text,
            None => unreachable!("the schema makes '{name}' mandatory"),
        }
    }

    /// A boolean.
    pub fn bool(&self, name: &str) -> Option<bool> {
        self.read(name, Value::as_bool)
    }

    /// An integer of a signed type.
    pub fn i64(&self, name: &str) -> Option<i64> {
        self.read(name, Value::as_i64)
    }

    /// An integer of an unsigned type.
    pub fn u64(&self, name: &str) -> Option<u64> {
        self.read(name, Value::as_u64)
    }

    /// An integer of type `uint32_t`.
    pub fn u32(&self, name: &str) -> Option<u32> {
        self.read(name, |value| value.as_u64()?.try_into().ok())
    }

    /// An integer of type `uint16_t`.
    pub fn u16(&self, name: &str) -> Option<u16> {
        self.read(name, |value| value.as_u64()?.try_into().ok())
    }

    /// A nested object.
    pub fn object(&self, name: &str) -> Option<Args<'a>> {
        self.value(name).map(Args::new)
    }

    /// An array.
    pub fn array(&self, name: &str) -> Option<&'a [Value]> {
        self.read(name, |value| value.as_array().map(Vec::as_slice))
    }

    fn read<T>(&self, name: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Option<T> {
        let value = self.members.get(name)?;
        match convert(value) {
            Some(value) => Some(value),
            None => unreachable!("'{name}' is read as another type than the schema's: {value}"),
        }
    }
}
