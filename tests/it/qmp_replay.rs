//! The scenarios recorded from QEMU, played against the daemon: `tests/replay/replay.py` says how they are compared.

use std::path::Path;
use std::process::Command;

/// Every reply, event and image is QEMU's but for the listed deviations, and every listed one is there.
///
/// To see what differs: `tests/replay/replay.py target/debug/liveblkd SCENARIO`; `--update` rewrites the list.
#[test]
fn recorded_scenarios_are_answered_as_by_qemu() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if let Some(missing) = ["python3", "qemu-img", "qemu-io"]
        .into_iter()
        .find(|tool| !runs(tool))
    {
        eprintln!("SKIPPED: {missing} is not installed, which the recorded scenarios use");
        return;
    }
    let output = Command::new("python3")
        .arg(root.join("tests/replay/replay.py"))
        .arg(env!("CARGO_BIN_EXE_liveblkd"))
        // As QEMU has none.
        .env("STATE_DIRECTORY", "")
        .output()
        .expect("python3 starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    let scenarios = text.lines().filter(|line| line.starts_with("ok ")).count();
    assert_eq!(scenarios, 60, "{text}");
}

fn runs(tool: &str) -> bool {
    let output = Command::new(tool).arg("--version").output();
    output.is_ok_and(|output| output.status.success())
}
