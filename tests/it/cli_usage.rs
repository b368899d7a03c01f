//! `liveblk`'s command line: what goes where, and the exit status.

use crate::cli::{failure, result};

#[test]
fn help_goes_to_stdout_and_shows_examples() {
    let place = tempfile::tempdir().expect("a directory");
    for command in [
        "snapshot",
        "chain",
        "stream",
        "commit",
        "jobs",
        "job",
        "qmp",
        "image create",
        "image info",
        "image check",
    ] {
        let words: Vec<&str> = command.split(' ').chain(["--help"]).collect();
        let help = result(place.path(), &words);
        let example = format!("\n  liveblk {command}");
        assert!(help.contains(&example), "{help}");
        assert!(help.ends_with('\n'), "{help}");
    }
    let version = result(place.path(), &["--version"]);
    assert_eq!(version, format!("liveblk {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_wrong_command_line_is_status_2() {
    let place = tempfile::tempdir().expect("a directory");
    for (arguments, wanted) in [
        (&[][..], "Usage: liveblk <COMMAND>"),
        (&["nosuch"], "unrecognized subcommand 'nosuch'"),
        (
            &["snapshot"],
            "the following required arguments were not provided",
        ),
        (
            &["chain", "--output", "x"],
            "invalid value 'x' for '--output",
        ),
        (
            &["chain", "--name", "a", "--socket", "b"],
            "cannot be used with",
        ),
        (&["qmp"], "<COMMAND>"),
        (&["job", "pause"], "<ID>"),
        (&["stream", "--speed", "fast"], "'fast' is not a size"),
        (&["commit", "--on-error", "x"], "invalid value 'x'"),
    ] {
        let error = failure(place.path(), 2, arguments);
        assert!(error.contains(wanted), "{arguments:?}: {error}");
    }
}

#[test]
fn a_daemon_that_is_not_there_is_status_1() {
    let place = tempfile::tempdir().expect("a directory");
    let error = failure(place.path(), 1, &["chain", "--socket", "s"]);
    assert_eq!(error, "cannot connect to 's': No such file or directory\n");
    let error = failure(place.path(), 1, &["chain"]);
    assert!(error.starts_with("no control socket in "), "{error}");
    let error = failure(place.path(), 1, &["qmp", "--name", "../x", "quit"]);
    assert!(error.starts_with("'../x' cannot be the name"), "{error}");
}

#[test]
fn the_target_of_a_snapshot_may_be_left_out() {
    let place = tempfile::tempdir().expect("a directory");
    std::fs::write(place.path().join("there"), "").expect("written");
    for arguments in [&["snapshot", "there"][..], &["snapshot", "e0", "there"]] {
        let error = failure(place.path(), 1, arguments);
        assert!(error.contains("/there' exists"), "{error}");
    }
}
