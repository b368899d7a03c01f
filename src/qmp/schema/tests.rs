use std::collections::{HashMap, HashSet};

use serde_json::{Value, json};

use super::*;

fn check_arguments(name: &str, arguments: Value) -> Result<Value, String> {
    let command = command(name).unwrap();
    check(command.args, arguments, Dialect::Json).map_err(|error| error.desc)
}

#[test]
fn checked_arguments_come_in_schema_order_with_nothing_added() {
    let given = json!({"file": "f", "node-name": "n", "driver": "raw"});
    let checked = check_arguments("blockdev-add", given.clone()).unwrap();
    assert_eq!(checked, given);
    let names: Vec<_> = checked.as_object().unwrap().keys().collect();
    assert_eq!(names, ["driver", "node-name", "file"]);
}

#[test]
fn nested_problems_are_named_by_their_path() {
    let add = |file| check_arguments("blockdev-add", json!({"driver": "qcow2", "file": file}));
    for (file, error) in [
        (
            json!(5),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (json!({}), "Parameter 'file.driver' is missing"),
        (
            json!({"driver": "file"}),
            "Parameter 'file.filename' is missing",
        ),
        (
            json!({"driver": "file", "filename": "x", "bogus": 1}),
            "Parameter 'file.bogus' is unexpected",
        ),
        (
            json!({"driver": "file", "filename": "x", "cache": {"direct": 1}}),
            "Invalid parameter type for 'file.cache.direct', expected: boolean",
        ),
        (
            json!({"driver": "file", "filename": "x", "aio": "x"}),
            "Parameter 'aio' does not accept value 'x'",
        ),
    ] {
        assert_eq!(add(file), Err(error.into()));
    }
    let reopen = json!({"options": [{"driver": "raw"}]});
    assert_eq!(
        check_arguments("blockdev-reopen", reopen),
        Err("Parameter 'options[0].file' is missing".into())
    );
}

#[test]
fn integers_keep_the_range_of_their_c_type() {
    let start = |connections| {
        let addr = json!({"type": "unix", "data": {"path": "p"}});
        let arguments = json!({"addr": addr, "max-connections": connections});
        check_arguments("nbd-server-start", arguments)
    };
    assert!(start(json!(u32::MAX)).is_ok());
    let range = "Parameter 'max-connections' expects uint32_t";
    assert_eq!(start(json!(-1)), Err(range.into()));
    assert_eq!(start(json!(1_u64 << 32)), Err(range.into()));
    let ty = "Invalid parameter type for 'max-connections', expected: integer";
    assert_eq!(start(json!(1.0)), Err(ty.into()));
    let null = |latency| {
        check_arguments(
            "blockdev-add",
            json!({"driver": "null-co", "latency-ns": latency}),
        )
    };
    assert_eq!(null(json!(-1)).unwrap()["latency-ns"], json!(u64::MAX));
}

#[test]
fn null_is_not_absent() {
    let error = "Invalid parameter type for 'node-name', expected: string";
    assert_eq!(
        check_arguments("blockdev-del", json!({"node-name": null})),
        Err(error.into())
    );
    let backing = json!({"driver": "qcow2", "file": "f", "backing": null});
    assert_eq!(
        check_arguments("blockdev-add", backing.clone()),
        Ok(backing)
    );
}

#[test]
fn refused_members_say_why() {
    let given = json!({"driver": "qcow2", "file": "f", "data-file": "d"});
    let error = "Parameter 'data-file' is not supported: external data files cannot be opened";
    assert_eq!(check_arguments("blockdev-add", given), Err(error.into()));
}

#[test]
fn names_are_unique_and_tags_are_enums() {
    let mut seen = HashSet::new();
    for command in commands() {
        assert!(seen.insert(command.name), "{} is there twice", command.name);
    }
    let types = introspect();
    assert!(types.as_array().unwrap().len() > 100);
}

/// Every name that an entry mentions is an entry, and none is there twice.
#[test]
fn introspection_is_closed() {
    let entries = introspect();
    let entries = entries.as_array().unwrap();
    let name = |entry: &Value| entry["name"].as_str().unwrap().to_owned();
    let names: HashSet<String> = entries.iter().map(name).collect();
    assert_eq!(names.len(), entries.len());
    for entry in entries {
        for mentioned in mentioned_types(entry) {
            assert!(names.contains(&mentioned), "{entry} mentions {mentioned}");
        }
    }
}

/// What QEMU 10.0.2 has under the same name has the same members and the same ones mandatory, as far as
/// we have them: a client that was written for QEMU is understood.
#[test]
fn arguments_agree_with_qemu() {
    let scope: Value = serde_json::from_str(include_str!("../testdata/arguments.json")).unwrap();
    let mut compared = 0;
    for command in commands() {
        let Some(theirs) = scope.get(command.name) else {
            continue;
        };
        agree(command.name, command.args, theirs);
        compared += 1;
    }
    assert!(compared >= 20, "only {compared} commands compared");
}

/// Members and variants of commands that QEMU has without them.
const OURS: &[(&str, &str)] = &[
    ("block-commit", "copy-mode"),
    ("block-job-change", "commit"),
    ("blockdev-backup", "on-cbw-error"),
    ("blockdev-backup", "cbw-timeout"),
];

/// `theirs`: member name, `?` if optional, to type; an object type is an object, a union has `<union on TAG>`.
fn agree(path: &str, ours: &'static Object, theirs: &Value) {
    let members = theirs.as_object().expect(path);
    let known: HashMap<&str, bool> = members
        .keys()
        .map(|name| (name.trim_end_matches('?'), name.ends_with('?')))
        .collect();
    let own: Vec<_> = ours.all_members();
    for member in &own {
        if OURS.contains(&(path, member.name)) {
            continue;
        }
        let optional = known.get(member.name).copied();
        assert_eq!(optional, Some(member.optional), "{path}.{}", member.name);
        let name = format!("{}{}", member.name, if member.optional { "?" } else { "" });
        if let (Type::Object(object), Some(inner)) = (member.ty, members[&name].get("object")) {
            agree(&format!("{path}.{name}"), object, inner);
        }
    }
    for (name, optional) in known.iter().filter(|(name, _)| !name.starts_with('<')) {
        let present = own.iter().any(|member| member.name == *name);
        assert!(present, "{path}: QEMU has {name} (optional: {optional})");
    }
    let Some(variants) = ours.variants else {
        return;
    };
    let union = &members[&format!("<union on {}>", variants.tag)];
    let in_qemu = |case: &str| case != "ublk" && !OURS.contains(&(path, case));
    for (case, branch) in variants.branches.iter().filter(|(case, _)| in_qemu(case)) {
        agree(&format!("{path}({case})"), branch, &union[*case]);
    }
}

fn mentioned_types(entry: &Value) -> Vec<String> {
    let members = ["members", "variants"]
        .into_iter()
        .filter_map(|list| entry[list].as_array());
    let inner = members.flatten().filter_map(|member| member.get("type"));
    let direct = ["arg-type", "ret-type", "element-type"];
    let direct = direct.into_iter().filter_map(|name| entry.get(name));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    inner.chain(direct).map(text).collect()
}
