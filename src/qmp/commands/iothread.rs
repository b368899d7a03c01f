//! `iothread` objects: their properties say how long the I/O thread looks for events before it sleeps.
//!
//! There is one I/O thread. It goes by the object that lets it poll longest; without any, by the default.

use serde_json::Value;

use super::{Context, Outcome};
use crate::qmp::error::QmpError;
use crate::qmp::schema::{Args, Dialect, POLL_PROPERTIES, check};
use crate::runtime::PollPolicy;

/// The properties of an object that `args` describes.
///
/// # Errors
/// A negative value.
pub(super) fn policy(args: Args<'_>) -> Result<PollPolicy, QmpError> {
    let mut policy = PollPolicy::default();
    set_all(&mut policy, args)?;
    Ok(policy)
}

fn set_all(policy: &mut PollPolicy, args: Args<'_>) -> Result<(), QmpError> {
    for name in property_names() {
        if let (Some(value), Some(place)) = (args.i64(name), place(policy, name)) {
            *place = in_range(name, value)?;
        }
    }
    Ok(())
}

fn property_names() -> impl Iterator<Item = &'static str> {
    let members = POLL_PROPERTIES.members.iter();
    members.map(|member| member.name)
}

fn place<'a>(policy: &'a mut PollPolicy, name: &str) -> Option<&'a mut u64> {
    match name {
        "poll-max-ns" => Some(&mut policy.max_ns),
        "poll-grow" => Some(&mut policy.grow),
        "poll-shrink" => Some(&mut policy.shrink),
        _ => None,
    }
}

fn in_range(name: &str, value: i64) -> Result<u64, QmpError> {
    u64::try_from(value).map_err(|_| {
        let text = format!("{name} value must be in range [0, {}]", i64::MAX);
        QmpError::generic(text)
    })
}

/// The value of a property; `None` where there is none of this name.
pub(super) fn property(mut policy: PollPolicy, name: &str) -> Option<Value> {
    place(&mut policy, name).map(|value| (*value).into())
}

/// `qom-set`: `None` where there is no property of this name.
pub(super) fn set_property(
    context: &Context,
    id: &str,
    name: &str,
    value: Value,
) -> Option<Outcome> {
    let name = property_names().find(|known| *known == name)?;
    Some(set(context, id, name, value))
}

fn set(context: &Context, id: &str, name: &'static str, value: Value) -> Outcome {
    let given = [(name.to_owned(), value)].into_iter().collect();
    let checked = check(&POLL_PROPERTIES, Value::Object(given), Dialect::Json)?;
    context
        .objects
        .change_policy(id, |policy| set_all(policy, Args::new(&checked)))?;
    apply(context);
    Ok(Value::Object(Default::default()))
}

/// Lets the I/O thread go by the objects that there are now.
pub(super) fn apply(context: &Context) {
    let policy = context.objects.poll_policy();
    context.handle.set_poll_policy(policy);
}
