//! What the systemd unit counts on: readiness is told when it is true, and the unit is one that systemd takes.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::source::root;

const UNIT: &str = "systemd/liveblkd@.service";

#[test]
fn the_service_manager_is_told_when_the_daemon_is_ready_and_when_it_stops() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    let manager = UnixDatagram::bind(place.join("notify")).expect("bound");
    manager
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("set");
    let state = || {
        let mut bytes = [0; 64];
        let length = manager.recv(&mut bytes).expect("told in time");
        String::from_utf8(bytes[..length].to_vec()).expect("UTF-8")
    };
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_liveblkd"))
        .args(["--blockdev", "null-co,node-name=n"])
        .args([
            "--chardev",
            "socket,id=c,path=c.sock,server=on,wait=off",
            "--monitor",
            "c",
        ])
        .current_dir(place)
        .env("NOTIFY_SOCKET", place.join("notify"))
        .stdout(Stdio::null())
        .spawn()
        .expect("liveblkd can be started");
    assert_eq!(state(), "READY=1");
    assert!(place.join("c.sock").exists());
    kill(Pid::from_raw(daemon.id().cast_signed()), Signal::SIGTERM).expect("it is there");
    assert_eq!(state(), "STOPPING=1");
    assert!(daemon.wait().expect("our child").success());
}

#[test]
fn systemd_takes_the_unit() {
    let place = tempfile::tempdir().expect("a directory");
    let text = fs::read_to_string(root().join(UNIT)).expect("the unit");
    let path = place.path().join("liveblkd@t.service");
    // Neither the program nor its manual page is installed where tests run.
    let program = env!("CARGO_BIN_EXE_liveblkd");
    let text = text.replace("/usr/local/bin/liveblkd", program);
    let text = text.replace("Documentation=man:liveblkd(1)\n", "");
    let verify = |text: &str| {
        fs::write(&path, text).expect("written");
        Command::new("systemd-analyze")
            .arg("verify")
            .arg(&path)
            .output()
    };
    let Ok(output) = verify(&text) else {
        eprintln!("skipped: systemd-analyze is not installed");
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && !said.contains("liveblkd@t"),
        "{said}"
    );

    let broken = verify(&text.replace("PrivateMounts", "PrivatMounts")).expect("as before");
    let said = String::from_utf8_lossy(&broken.stderr).into_owned();
    assert!(said.contains("PrivatMounts"), "the check can fail: {said}");
}
