//! The table of layers of `ARCHITECTURE.md`: which module may import which, read from the sources.
//!
//! Comments and strings do not count; paths inside code do, not only `use`. Code under `#[cfg(test)]` may reach
//! further (a node's test needs a ring and a disk), but never up to the control socket.

use crate::imports::{imports, tokens};
use crate::source::{Source, line_of, sources};

const LEAVES: &[&str] = &["error", "range", "buffer"];

/// A row: the layer, what its code may import besides itself and the leaves, what its tests may import besides.
struct Layer {
    name: &'static str,
    may: &'static [&'static str],
    tests: &'static [&'static str],
}

const fn layer(
    name: &'static str,
    may: &'static [&'static str],
    tests: &'static [&'static str],
) -> Layer {
    Layer { name, may, tests }
}

/// From the bottom up. `runtime::sync` means that module of the layer only.
const LAYERS: &[Layer] = &[
    layer("error", &[], &[]),
    layer("range", &[], &[]),
    layer("buffer", &[], &[]),
    layer("runtime", &[], &[]),
    layer("nbd", &[], &[]),
    layer(
        "block",
        &["runtime::sync", "runtime::clock"],
        &["runtime", "testing"],
    ),
    layer("protocol", &["block", "runtime", "nbd"], &["testing"]),
    layer("format", &["block", "runtime"], &["protocol", "testing"]),
    layer(
        "filter",
        &["block", "runtime"],
        &["protocol", "format", "testing"],
    ),
    layer("testing", &["block", "runtime"], &[]),
    layer(
        "blockdev",
        &["block", "protocol", "format", "filter", "nbd", "runtime"],
        &["testing"],
    ),
    layer(
        "job",
        &["block", "filter", "runtime"],
        &["protocol", "format", "testing"],
    ),
    layer(
        "export",
        &["block", "runtime", "nbd"],
        &["protocol", "format", "testing"],
    ),
    layer(
        "qmp",
        &[
            "job", "export", "blockdev", "filter", "format", "protocol", "nbd", "block", "runtime",
        ],
        &["testing"],
    ),
    layer(
        "daemon",
        &[
            "qmp", "job", "export", "blockdev", "filter", "format", "protocol", "nbd", "block",
            "runtime",
        ],
        &["testing"],
    ),
    layer(
        "cli",
        &[
            "daemon", "qmp", "job", "export", "blockdev", "filter", "format", "protocol", "nbd",
            "block", "runtime",
        ],
        &["testing"],
    ),
];

/// Foreign crates that only some layers may name (invariants 9 and 11 of `ARCHITECTURE.md`).
const FOREIGN: &[(&str, &[&str])] = &[
    ("serde_json", &["qmp", "daemon", "cli"]),
    ("clap", &["daemon", "cli"]),
    ("libublk", &["export"]),
    ("io_uring", &["runtime", "export"]),
    ("signal_hook", &["cli", "daemon"]),
];

#[test]
fn no_module_imports_upwards() {
    let found: Vec<String> = sources().iter().flat_map(violations).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn foreign_crates_stay_in_their_layers() {
    let found: Vec<String> = sources().iter().flat_map(foreign_violations).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn the_table_itself_points_downwards() {
    for (row, layer) in LAYERS.iter().enumerate() {
        for target in layer.may {
            let target = target.split("::").next().unwrap_or_default();
            let below = LAYERS[..row].iter().any(|lower| lower.name == target);
            assert!(
                below,
                "{} may import {target}, which is not below it",
                layer.name
            );
        }
    }
}

/// The canary: each way to write an upward import is caught, and what is allowed is not.
#[test]
fn upward_imports_are_caught() {
    let count = |path: &str, text: &str| violations(&Source::new(path, text)).len();
    for text in [
        "use crate::export::ublk;",
        "use crate::{error::Error, export::{self, nbd}};",
        "fn f() { crate :: export::serve() }",
        "use crate::runtime::ring::Ring;",
        "use crate::runtime;",
        "use crate::{runtime::{clock::Clock, ring}};",
        "use super::super::export;",
        "mod inner { use super::super::super::export; }",
        "pub(in crate::block) fn f() { crate::job::run() }",
    ] {
        assert_ne!(count("src/block/child.rs", text), 0, "{text}");
    }
    assert_eq!(count("src/block/mod.rs", "use super::export;"), 1);
    assert_eq!(
        count("src/unheard/mod.rs", ""),
        1,
        "a layer that the table does not know"
    );
    for text in [
        "use crate::{error::Error, block::node::Node};",
        "use crate::runtime::{clock, sync};",
        "use super::node::Node;",
        "mod inner { use super::super::node; }",
        "// use crate::export;",
        "fn f() -> &'static str { \"crate::export\" }",
        "#[cfg(test)]\nmod tests { use super::*; use crate::testing::disk; }",
    ] {
        assert_eq!(count("src/block/child.rs", text), 0, "{text}");
    }
    let in_test = "#[cfg(test)]\nmod tests { use crate::qmp::session; }";
    assert_eq!(
        count("src/block/child.rs", in_test),
        1,
        "tests do not reach the socket"
    );
}

#[test]
fn foreign_crates_out_of_place_are_caught() {
    let count = |path: &str, text: &str| foreign_violations(&Source::new(path, text)).len();
    assert_eq!(count("src/format/raw.rs", "use serde_json::Value;"), 1);
    assert_eq!(
        count("src/format/raw.rs", "fn f() { ::serde_json::to_string(1) }"),
        1
    );
    assert_eq!(
        count(
            "src/format/raw.rs",
            "// serde_json::Value\nfn my_serde_json() {}"
        ),
        0
    );
    assert_eq!(count("src/qmp/json.rs", "use serde_json::Value;"), 0);
}

fn violations(source: &Source) -> Vec<String> {
    let module = source.module();
    let Some(own) = module.first() else {
        return Vec::new(); // lib.rs and the binaries are on top of everything
    };
    let Some(layer) = LAYERS.iter().find(|layer| layer.name == own.as_str()) else {
        return vec![format!(
            "{}: layer '{own}' is not in the table",
            source.path
        )];
    };
    let shipped = imports(&source.shipped_code(), module.len());
    let anywhere = imports(&source.code, module.len());
    let forbidden =
        |tests: bool| move |import: &&(usize, String)| !allowed(layer, &import.1, tests);
    let in_code = shipped.iter().filter(forbidden(false));
    let in_tests = anywhere
        .iter()
        .filter(|import| !shipped.contains(import))
        .filter(forbidden(true));
    in_code
        .chain(in_tests)
        .map(|(offset, target)| {
            let line = line_of(&source.code, *offset);
            format!("{}:{line}: '{own}' imports '{target}'", source.path)
        })
        .collect()
}

/// `target` is `layer` or `layer::module`.
fn allowed(layer: &Layer, target: &str, tests: bool) -> bool {
    let head = target.split("::").next().unwrap_or_default();
    let lists = |row: &&str| *row == head || *row == target;
    head == layer.name
        || LEAVES.contains(&head)
        || layer.may.iter().any(lists)
        || (tests && layer.tests.iter().any(lists))
}

fn foreign_violations(source: &Source) -> Vec<String> {
    let module = source.module();
    let Some(own) = module.first() else {
        return Vec::new();
    };
    let code = source.shipped_code();
    let tokens = tokens(&code);
    let mut found = Vec::new();
    for (at, (offset, token)) in tokens.iter().enumerate() {
        let Some((_, layers)) = FOREIGN.iter().find(|(name, _)| name == token) else {
            continue;
        };
        let is_path = tokens.get(at + 1).is_some_and(|next| next.1 == "::");
        if is_path && !layers.contains(&own.as_str()) {
            let line = line_of(&code, *offset);
            found.push(format!(
                "{}:{line}: '{own}' names crate '{token}'",
                source.path
            ));
        }
    }
    found
}
