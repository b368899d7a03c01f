//! The daemon's command line, held against what qemu-storage-daemon 10.0.2 said to the same words.

use std::process::Output;

use crate::qmp_daemon::{Daemon, liveblkd, poll, run_to_end};

fn run(arguments: &[&str]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    run_to_end(directory.path(), arguments)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A wrong command line: one message that names the option, exit status 1, nothing on stdout.
#[test]
fn wrong_options_are_named() {
    let monitor = "socket,id=mon,path=m.sock,server=on,wait=off";
    for (arguments, message) in [
        (&["stray"][..], "stray: Unexpected argument"),
        (&["--nosuch"], "unrecognized option '--nosuch'"),
        (&["--blockdev"], "option '--blockdev' requires an argument"),
        (
            &["--blockdev", "help"],
            "--blockdev help: Help is not available for this option",
        ),
        (
            &["--blockdev", "driver=nosuch,node-name=f"],
            "--blockdev driver=nosuch,node-name=f: Parameter 'driver' does not accept value 'nosuch'",
        ),
        (
            &["--blockdev", "node-name=f,filename=a.qcow2"],
            "--blockdev node-name=f,filename=a.qcow2: Parameter 'driver' is missing",
        ),
        (
            &["--blockdev", "{\"driver\": \"file\", "],
            "--blockdev {\"driver\": \"file\", : JSON parse error, premature EOI",
        ),
        (
            &["--nbd-server", "unix:n.sock"],
            "--nbd-server unix:n.sock: Invalid parameter 'unix:n.sock'",
        ),
        (
            &["--nbd-server", "addr.type=unix,addr.path=nodir/n.sock"],
            "--nbd-server addr.type=unix,addr.path=nodir/n.sock: Failed to bind socket to nodir/n.sock: No such file or directory",
        ),
        (
            &[
                "--nbd-server",
                "addr.type=unix,addr.path=n",
                "--nbd-server",
                "addr.type=unix,addr.path=n",
            ],
            "--nbd-server addr.type=unix,addr.path=n: NBD server already running",
        ),
        (
            &["--export", "nbd,id=e,node-name=q"],
            "--export nbd,id=e,node-name=q: Cannot find device='' nor node-name='q'",
        ),
        (
            &["--export", "nbd,node-name=q"],
            "--export nbd,node-name=q: Parameter 'id' is missing",
        ),
        (
            &["--monitor", "chardev=mon"],
            "--monitor chardev=mon: chardev \"mon\" not found",
        ),
        (
            &["--chardev", monitor, "--monitor", "mon,mode=readline"],
            "--monitor mon,mode=readline: Only QMP is supported",
        ),
        (
            &["--chardev", monitor, "--monitor", "mon", "--monitor", "mon"],
            "--monitor mon: chardev 'mon' is already in use",
        ),
        (
            &["--object", "nosuch,id=x"],
            "--object nosuch,id=x: Parameter 'qom-type' does not accept value 'nosuch'",
        ),
        (
            &["--object", "iothread"],
            "--object iothread: Parameter 'id' is missing",
        ),
        (
            &["--pidfile", "nodir/p.pid"],
            "cannot create PID file: Could not create 'nodir/p.pid': No such file or directory",
        ),
        (
            &["--daemonize", "--monitor", "mon"],
            "--monitor mon: chardev \"mon\" not found",
        ),
    ] {
        let output = run(arguments);
        assert_eq!(
            text(&output.stderr),
            format!("liveblkd: {message}\n"),
            "{arguments:?}"
        );
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
    }
}

#[test]
fn help_and_version_are_shown_on_stdout() {
    for (arguments, start) in [
        (&["--version"][..], "liveblkd version "),
        (&["-V"], "liveblkd version "),
        (&["--help"], "Usage: liveblkd [options]"),
        (
            &["--object", "help"],
            "List of user creatable objects:\n  iothread\n  secret\n",
        ),
        (
            &["--chardev", "help"],
            "Available chardev backend types: \n",
        ),
    ] {
        let output = run(arguments);
        assert!(text(&output.stdout).starts_with(start), "{arguments:?}");
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{arguments:?}"
        );
    }
}

/// The parent returns when all is set up; the PID file and the socket are there then.
#[test]
fn in_the_background_everything_is_ready_when_the_parent_returns() {
    let directory = tempfile::tempdir().unwrap();
    let options = [
        "--daemonize",
        "--pidfile",
        "p.pid",
        "--chardev",
        "socket,id=m,path=m.sock,server=on,wait=off",
        "--monitor",
        "m",
    ];
    let child = liveblkd(directory.path(), &options).spawn().unwrap();
    let mut daemon = Daemon { directory, child };
    assert!(daemon.wait().success());
    let pid: i32 = std::fs::read_to_string(daemon.path("p.pid"))
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert_ne!(pid, daemon.child.id() as i32);
    drop(daemon.client());
    let working_directory = std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap();
    assert_eq!(working_directory.to_str(), Some("/"));
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    poll(|| (!daemon.path("p.pid").exists()).then_some(()));
}

#[test]
fn each_of_the_three_signals_ends_the_daemon_cleanly() {
    use nix::sys::signal::{Signal, kill};
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let mut daemon = Daemon::start(&["--pidfile", "p.pid"]);
        poll(|| daemon.path("p.pid").exists().then_some(()));
        kill(nix::unistd::Pid::from_raw(daemon.child.id() as i32), signal).unwrap();
        assert!(daemon.wait().success(), "{signal}");
        assert!(!daemon.path("p.pid").exists(), "{signal}");
    }
}
