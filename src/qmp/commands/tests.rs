use std::collections::HashSet;

use super::*;

/// What clients are told exists is there, and nothing else is.
#[test]
fn every_command_of_the_schema_has_code() {
    let described: HashSet<&str> = schema::commands()
        .map(|command| command.name)
        .filter(|name| *name != "qmp_capabilities")
        .collect();
    let coded: HashSet<&str> = HANDLERS.iter().map(|(name, _)| *name).collect();
    assert_eq!(described, coded);
}
