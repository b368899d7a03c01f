//! `qom-get` and `qom-set`, for the objects that there are; and the properties of throttle groups.

use serde_json::{Map, Value, json};

use super::{Context, Outcome, iothread};
use crate::filter::ThrottleLimits;
use crate::qmp::error::{ErrorClass, QmpError};
use crate::qmp::schema::{Args, Dialect, LIMITS_PROPERTY, check};

/// A throttle group with the properties that `object-add` gives it.
pub(super) fn add_throttle_group(context: &Context, args: Args<'_>) -> Result<(), QmpError> {
    let mut limits = ThrottleLimits::default();
    if let Some(given) = args.object("limits") {
        set_all(&mut limits, given);
    }
    for (name, _) in limits.properties() {
        match args.i64(&format!("x-{name}")) {
            Some(value) if value < 0 => {
                return Err(QmpError::generic("Property values cannot be negative"));
            }
            Some(value) => drop(limits.set(&name, value)),
            None => {}
        }
    }
    limits.check()?;
    let id = args.required_str("id");
    context.blockdev.add_throttle_group(id, limits);
    Ok(())
}

fn set_all(limits: &mut ThrottleLimits, given: Args<'_>) {
    for (name, _) in limits.properties() {
        if let Some(value) = given.i64(&name) {
            limits.set(&name, value);
        }
    }
}

/// `qom-get`.
pub(super) fn read(context: &Context, args: Args<'_>) -> Outcome {
    let (id, kind) = find(context, args.required_str("path"))?;
    let property = args.required_str("property");
    if property == "type" {
        return Ok(kind.into());
    }
    if let Some(policy) = context.objects.policy(id) {
        return iothread::property(policy, property).ok_or_else(|| missing(kind, property));
    }
    let groups = context.blockdev.throttle_groups();
    let limits = groups.find(id).map(|group| group.limits());
    match (property, limits) {
        ("limits", Some(limits)) => Ok(all(&limits)),
        (property, Some(limits)) => {
            let value = property
                .strip_prefix("x-")
                .and_then(|name| limits.property(name));
            value
                .map(Value::from)
                .ok_or_else(|| missing(kind, property))
        }
        _ => Err(missing(kind, property)),
    }
}

fn all(limits: &ThrottleLimits) -> Value {
    let values = limits.properties().into_iter();
    let values: Map<String, Value> = values.map(|(name, value)| (name, value.into())).collect();
    values.into()
}

/// `qom-set`.
pub(super) fn write(context: &Context, args: Args<'_>) -> Outcome {
    let (id, kind) = find(context, args.required_str("path"))?;
    let property = args.required_str("property");
    if property == "type" {
        let text = format!("Property '{kind}.type' is not writable");
        return Err(QmpError::generic(text));
    }
    let value = args.value("value").cloned().unwrap_or_default();
    if context.objects.policy(id).is_some() {
        let set = iothread::set_property(context, id, property, value);
        return set.unwrap_or_else(|| Err(missing(kind, property)));
    }
    let Some(group) = context.blockdev.throttle_groups().find(id) else {
        return Err(missing(kind, property));
    };
    let mut limits = group.limits();
    if property != "limits" {
        let known = property
            .strip_prefix("x-")
            .is_some_and(|name| limits.property(name).is_some());
        return Err(match known {
            true => QmpError::generic("Property cannot be set after initialization"),
            false => missing(kind, property),
        });
    }
    let value = check(&LIMITS_PROPERTY, json!({"limits": value}), Dialect::Json)?;
    set_all(&mut limits, Args::new(&value["limits"]));
    limits.check()?;
    group.set_limits(limits);
    Ok(json!({}))
}

/// The id and the type of the object at a path: `/objects/ID`, or `ID` alone.
fn find<'a>(context: &Context, path: &'a str) -> Result<(&'a str, &'static str), QmpError> {
    let id = path.strip_prefix("/objects/").unwrap_or(path);
    match context.objects.kind(id) {
        Some(kind) => Ok((id, kind)),
        None => Err(QmpError::new(
            ErrorClass::DeviceNotFound,
            format!("Device '{path}' not found"),
        )),
    }
}

fn missing(kind: &str, property: &str) -> QmpError {
    QmpError::generic(format!("Property '{kind}.{property}' not found"))
}
