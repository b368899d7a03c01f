//! Node-names made of file names.

use std::path::Path;

/// Longest node-name that QMP accepts, in bytes.
const NODE_NAME_MAX: usize = 31;

/// Room for `-` and a number.
const NUMBER_MAX: usize = 5;

/// A well-formed node-name made of the file's stem, with a number if it is taken.
pub(super) fn node_name(file: &Path, taken: impl Fn(&str) -> bool) -> String {
    let stem = file.file_stem().unwrap_or_default().to_string_lossy();
    let allowed = |c: char| match c.is_ascii_alphanumeric() || "-._".contains(c) {
        true => c,
        false => '-',
    };
    let mut base: String = stem.chars().map(allowed).collect();
    if !base.starts_with(|c: char| c.is_ascii_alphabetic()) {
        base.insert_str(0, "n-");
    }
    base.truncate(NODE_NAME_MAX - NUMBER_MAX);
    let mut name = base.clone();
    let mut number = 2;
    while taken(&name) {
        name = format!("{base}-{number}");
        number += 1;
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stem_is_made_well_formed_and_unused() {
        let name =
            |file: &str| node_name(Path::new(file), |name| name == "disk" || name == "disk-2");
        assert_eq!(name("/d/monday.qcow2"), "monday");
        assert_eq!(name("disk.qcow2"), "disk-3");
        assert_eq!(name("2026 ä.qcow2"), "n-2026--");
        assert_eq!(name(&"a".repeat(200)).len(), NODE_NAME_MAX - NUMBER_MAX);
    }
}
