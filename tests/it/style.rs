//! What of `ARCHITECTURE.md` and the code rules a test can see: file length, panics, names, where `unsafe` may stand.

use std::fs;

use crate::source::{Source, line_of, root, sources, walk};

/// Lines of a file without its tests. Files read well up to 300; this is where a file must be split.
const LINE_LIMIT: usize = 450;

/// Files over the limit and the length they have: a row may shrink or go, nothing else.
const LONGER: &[(&str, usize)] = &[("src/block/child.rs", 560)];

/// Names that say nothing about what is in the module.
const EMPTY_NAMES: &[&str] = &[
    "io", "util", "utils", "common", "misc", "types", "helper", "helpers",
];

/// Where `unsafe` may stand.
const UNSAFE_PLACES: &[&str] = &[
    "src/buffer.rs",
    "src/runtime/",
    "src/export/ublk/",
    "src/protocol/file/device.rs",
];

type Check = fn(&Source) -> Vec<String>;

const CHECKS: &[Check] = &[
    too_long,
    panics,
    empty_names,
    undocumented_modules,
    misplaced_unsafe,
    unowned_notes,
];

#[test]
fn the_sources_keep_the_rules() {
    let sources = sources();
    let found: Vec<String> = CHECKS
        .iter()
        .flat_map(|check| sources.iter().flat_map(check))
        .collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn no_file_names_a_place_of_one_machine() {
    let mut files = Vec::new();
    walk(&root(), &mut files);
    let found: Vec<String> = files
        .iter()
        .filter_map(|path| Some((path, fs::read_to_string(path).ok()?)))
        .flat_map(|(path, text)| machine_paths(&path.to_string_lossy(), &text))
        .collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

/// The canary: each check fails on what it is there for, and on nothing else.
#[test]
fn each_check_can_fail() {
    let long = "fn f() {}\n".repeat(LINE_LIMIT + 1);
    let cases: &[(Check, &str, &str, usize)] = &[
        (too_long, "src/a.rs", &long, 1),
        (too_long, "src/a_tests.rs", &long, 0),
        (
            panics,
            "src/a.rs",
            "fn f() { a.unwrap(); b.expect(\"c\") }",
            2,
        ),
        (
            panics,
            "src/a.rs",
            "fn f() { a.expect(b'c') /* .unwrap() */ }",
            0,
        ),
        (
            panics,
            "src/a.rs",
            "#[cfg(test)]\nmod tests { fn f() { a.unwrap() } }",
            0,
        ),
        (empty_names, "src/block/util.rs", "", 1),
        (empty_names, "src/helpers/mod.rs", "", 1),
        (empty_names, "src/block/a.rs", "mod common { }", 1),
        (
            empty_names,
            "src/block/a.rs",
            "use std::io; mod iostat {}",
            0,
        ),
        (undocumented_modules, "src/a/mod.rs", "mod b;", 1),
        (undocumented_modules, "src/a/mod.rs", "//! What.\nmod b;", 0),
        (
            misplaced_unsafe,
            "src/qmp/a.rs",
            "fn f() { unsafe { g() } }",
            1,
        ),
        (
            misplaced_unsafe,
            "src/buffer.rs",
            "fn f() { unsafe { g() } }",
            0,
        ),
        (
            misplaced_unsafe,
            "src/qmp/a.rs",
            "#![deny(unsafe_code)] // unsafe",
            0,
        ),
        (
            unowned_notes,
            "src/a.rs",
            &format!("// {}: later", concat!("TO", "DO")),
            1,
        ),
    ];
    for (check, path, text, wanted) in cases {
        let found = check(&Source::new(path, text));
        assert_eq!(found.len(), *wanted, "{path}: {text:.60}: {found:?}");
    }
    let place = format!("see {}someone/x", concat!("/ho", "me/"));
    assert_eq!(machine_paths("a", &place).len(), 1);
    assert_eq!(machine_paths("a", "see /run/liveblk").len(), 0);
}

fn too_long(source: &Source) -> Vec<String> {
    let shipped = source.shipped_code();
    let lines = match shipped.trim_end().is_empty() {
        true => 0,
        false => shipped.trim_end().lines().count(),
    };
    let row = LONGER.iter().find(|(path, _)| *path == source.path);
    let limit = row.map_or(LINE_LIMIT, |(_, lines)| *lines);
    match lines > limit {
        true => vec![format!("{}: {lines} lines, limit {limit}", source.path)],
        false => Vec::new(),
    }
}

fn panics(source: &Source) -> Vec<String> {
    let code = source.shipped_code();
    [".unwrap()", ".expect(\""]
        .iter()
        .flat_map(|needle| code.match_indices(needle))
        .map(|(offset, what)| format!("{}:{}: {what}", source.path, line_of(&code, offset)))
        .collect()
}

fn empty_names(source: &Source) -> Vec<String> {
    let mut found: Vec<String> = source
        .module()
        .into_iter()
        .filter(|part| EMPTY_NAMES.contains(&part.as_str()))
        .map(|part| format!("{}: a module named '{part}'", source.path))
        .collect();
    let words: Vec<&str> = source.code.split_whitespace().collect();
    for pair in words.windows(2).filter(|pair| pair[0] == "mod") {
        let name = pair[1].trim_end_matches([';', '{']);
        if EMPTY_NAMES.contains(&name) {
            found.push(format!("{}: declares module '{name}'", source.path));
        }
    }
    found
}

fn undocumented_modules(source: &Source) -> Vec<String> {
    let opens_with_docs = source.text.starts_with("//!");
    match source.path.ends_with("/mod.rs") && !opens_with_docs {
        true => vec![format!("{}: does not open with what it is", source.path)],
        false => Vec::new(),
    }
}

fn misplaced_unsafe(source: &Source) -> Vec<String> {
    if UNSAFE_PLACES
        .iter()
        .any(|place| source.path.starts_with(place))
    {
        return Vec::new();
    }
    source
        .code
        .match_indices("unsafe ")
        .map(|(offset, _)| {
            let line = line_of(&source.code, offset);
            format!("{}:{line}: unsafe outside of its places", source.path)
        })
        .collect()
}

fn unowned_notes(source: &Source) -> Vec<String> {
    [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ]
    .iter()
    .flat_map(|note| source.text.match_indices(note))
    .map(|(offset, note)| format!("{}:{}: {note}", source.path, line_of(&source.text, offset)))
    .collect()
}

fn machine_paths(path: &str, text: &str) -> Vec<String> {
    [
        concat!("/ho", "me/"),
        concat!("/wo", "rk/"),
        concat!("/Use", "rs/"),
    ]
    .iter()
    .flat_map(|place| text.match_indices(place))
    .map(|(offset, place)| format!("{path}:{}: {place}", line_of(text, offset)))
    .collect()
}
