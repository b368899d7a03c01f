//! Objects: I/O threads (there is one only, which they tune), secrets and throttle groups.

use std::cell::RefCell;

use serde_json::{Value, json};

use super::{Context, Outcome, iothread, qom};
use crate::qmp::chardev::is_identifier;
use crate::qmp::error::QmpError;
use crate::qmp::schema::Args;
use crate::runtime::PollPolicy;

/// All objects, in the order in which they were made.
#[derive(Default)]
pub struct Objects {
    objects: RefCell<Vec<Object>>,
}

struct Object {
    id: String,
    kind: Kind,
}

enum Kind {
    /// All I/O is on the daemon's one thread; the name is what exports may refer to.
    IoThread(PollPolicy),
    Secret(Vec<u8>),
    /// What it is stands in `blockdev`'s list of groups.
    ThrottleGroup,
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Kind::IoThread(_) => "iothread",
            Kind::Secret(_) => "secret",
            Kind::ThrottleGroup => "throttle-group",
        }
    }
}

/// `object-add` and `--object`.
pub(super) fn add(context: &Context, args: Args<'_>) -> Outcome {
    let added = context
        .objects
        .add(args, || qom::add_throttle_group(context, args))?;
    iothread::apply(context);
    Ok(added)
}

/// `object-del`.
pub(super) fn remove(context: &Context, id: &str) -> Outcome {
    let groups = context.blockdev.throttle_groups();
    if groups.find(id).is_some_and(|group| group.is_used()) {
        let text = format!("object '{id}' is in use, can not be deleted");
        return Err(QmpError::generic(text));
    }
    context.objects.remove(id)?;
    groups.remove(id);
    iothread::apply(context);
    Ok(json!({}))
}

impl Objects {
    /// One more object; `add_group` makes a throttle group.
    fn add(
        &self,
        args: Args<'_>,
        add_group: impl FnOnce() -> Result<(), QmpError>,
    ) -> Result<Value, QmpError> {
        let id = args.required_str("id");
        if !is_identifier(id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        if self.kind(id).is_some() {
            let text =
                format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(QmpError::generic(text));
        }
        let kind = match args.required_str("qom-type") {
            "iothread" => Kind::IoThread(iothread::policy(args)?),
            "secret" => Kind::Secret(secret(args)?),
            "throttle-group" => {
                add_group()?;
                Kind::ThrottleGroup
            }
            other => unreachable!("the schema has no object type '{other}'"),
        };
        self.objects.borrow_mut().push(Object {
            id: id.into(),
            kind,
        });
        Ok(json!({}))
    }

    /// The type of an object.
    pub(super) fn kind(&self, id: &str) -> Option<&'static str> {
        let objects = self.objects.borrow();
        let found = objects.iter().find(|object| object.id == id);
        found.map(|object| object.kind.name())
    }

    fn remove(&self, id: &str) -> Result<Value, QmpError> {
        let mut objects = self.objects.borrow_mut();
        match objects.iter().position(|object| object.id == id) {
            Some(index) => {
                objects.remove(index);
                Ok(json!({}))
            }
            None => Err(QmpError::generic(format!("object '{id}' not found"))),
        }
    }

    /// # Errors
    /// There is no I/O thread of this name.
    pub(super) fn check_iothread(&self, id: &str) -> Result<(), QmpError> {
        let objects = self.objects.borrow();
        let mut threads = objects
            .iter()
            .filter(|object| matches!(object.kind, Kind::IoThread(_)));
        match threads.any(|object| object.id == id) {
            true => Ok(()),
            false => Err(QmpError::generic(format!("iothread \"{id}\" not found"))),
        }
    }

    /// What the properties of an I/O thread are; `None` where the object is another or not there.
    pub(super) fn policy(&self, id: &str) -> Option<PollPolicy> {
        let objects = self.objects.borrow();
        objects.iter().find_map(|object| match object.kind {
            Kind::IoThread(policy) if object.id == id => Some(policy),
            _ => None,
        })
    }

    /// Changes the properties of an I/O thread that there is; a change that fails leaves them.
    pub(super) fn change_policy(
        &self,
        id: &str,
        change: impl FnOnce(&mut PollPolicy) -> Result<(), QmpError>,
    ) -> Result<(), QmpError> {
        let mut objects = self.objects.borrow_mut();
        let found = objects.iter_mut().find(|object| object.id == id);
        if let Some(Kind::IoThread(policy)) = found.map(|object| &mut object.kind) {
            let mut changed = *policy;
            change(&mut changed)?;
            *policy = changed;
        }
        Ok(())
    }

    /// What the I/O thread goes by: the object that lets it poll longest, if there is one.
    pub(super) fn poll_policy(&self) -> Option<PollPolicy> {
        let objects = self.objects.borrow();
        let policies = objects.iter().filter_map(|object| match object.kind {
            Kind::IoThread(policy) => Some(policy),
            _ => None,
        });
        policies.max_by_key(|policy| policy.max_ns)
    }

    /// The bytes of a secret, for who needs one by name.
    pub fn secret(&self, id: &str) -> Option<Vec<u8>> {
        let objects = self.objects.borrow();
        objects.iter().find_map(|object| match &object.kind {
            Kind::Secret(bytes) if object.id == id => Some(bytes.clone()),
            _ => None,
        })
    }
}

fn secret(args: Args<'_>) -> Result<Vec<u8>, QmpError> {
    let bytes = match (args.str("data"), args.str("file")) {
        (Some(_), Some(_)) => {
            return Err(QmpError::generic(
                "'file' and 'data' are mutually exclusive",
            ));
        }
        (None, None) => {
            return Err(QmpError::generic(
                "Either 'file' or 'data' must be provided",
            ));
        }
        (Some(data), None) => data.as_bytes().to_vec(),
        (None, Some(file)) => std::fs::read(file)
            .map_err(|error| QmpError::generic(format!("Unable to read {file}: {error}")))?,
    };
    match args.str("format") {
        Some("base64") => {
            base64(&bytes).ok_or_else(|| QmpError::generic("The secret is not valid base64"))
        }
        _ => Ok(bytes),
    }
}

/// RFC 4648 with padding; white space is skipped.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let text: Vec<u8> = text
        .iter()
        .copied()
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let end = text
        .iter()
        .position(|byte| *byte == b'=')
        .unwrap_or(text.len());
    let padding = text.len() - end;
    if !text.len().is_multiple_of(4) || padding > 2 || text[end..].iter().any(|byte| *byte != b'=')
    {
        return None;
    }
    let mut bytes = Vec::new();
    for group in text[..end].chunks(4) {
        let mut bits = 0_u32;
        for index in 0..4 {
            let digit = group
                .get(index)
                .map_or(Some(0), |byte| base64_digit(*byte))?;
            bits = bits << 6 | digit;
        }
        bytes.extend(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

fn base64_digit(byte: u8) -> Option<u32> {
    let digit = match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(digit.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(objects: &Objects, value: Value) -> Result<Value, String> {
        let none = || unreachable!("no throttle group is added here");
        let added = objects.add(Args::new(&value), none);
        added.map_err(|error| error.desc)
    }

    #[test]
    fn objects_have_unique_ids_and_go() {
        let objects = Objects::default();
        let thread = json!({"qom-type": "iothread", "id": "t"});
        assert!(add(&objects, thread.clone()).is_ok());
        let text = "attempt to add duplicate property 't' to object (type 'container')";
        assert_eq!(add(&objects, thread), Err(text.into()));
        assert!(objects.check_iothread("t").is_ok());
        assert!(objects.remove("t").is_ok());
        let error = objects.check_iothread("t").unwrap_err();
        assert_eq!(error.desc, "iothread \"t\" not found");
        assert_eq!(
            objects.remove("t").unwrap_err().desc,
            "object 't' not found"
        );
        let bad = json!({"qom-type": "iothread", "id": "1"});
        let text = "Parameter 'id' expects an identifier";
        assert_eq!(add(&objects, bad), Err(text.into()));
    }

    #[test]
    fn secrets_come_from_data_or_file() {
        let objects = Objects::default();
        let secret = |more: Value| {
            let mut value = json!({"qom-type": "secret", "id": "s"});
            value
                .as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            value
        };
        let none = add(&objects, secret(json!({})));
        assert_eq!(none, Err("Either 'file' or 'data' must be provided".into()));
        let both = add(&objects, secret(json!({"data": "x", "file": "y"})));
        assert_eq!(both, Err("'file' and 'data' are mutually exclusive".into()));
        let encoded = json!({"data": "bGV0bWVpbg==", "format": "base64"});
        assert!(add(&objects, secret(encoded)).is_ok());
        assert_eq!(objects.secret("s").as_deref(), Some(&b"letmein"[..]));
        assert_eq!(objects.secret("t"), None);
    }

    #[test]
    fn base64_is_strict() {
        assert_eq!(base64(b"Zm9v\n").as_deref(), Some(&b"foo"[..]));
        assert_eq!(base64(b"Zg==").as_deref(), Some(&b"f"[..]));
        for bad in [&b"Zg="[..], b"Zg", b"Z===", b"Zm9*", b"=Zm9"] {
            assert_eq!(base64(bad), None, "{bad:?}");
        }
    }
}
