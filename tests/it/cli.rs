//! What tests of `liveblk` share: running it, QEMU's tools, and daemons for it to talk to.
//!
//! Everything happens in one directory, which also holds the control sockets.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Longest time that anything here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `liveblk`.
pub(crate) fn liveblk(directory: &Path, arguments: &[&str]) -> Output {
    // What should have failed may serve for ever.
    Command::new("timeout")
        .args(["60", env!("CARGO_BIN_EXE_liveblk")])
        .args(arguments)
        .current_dir(directory)
        .env("LIVEBLK_RUNTIME_DIR", directory)
        .output()
        .expect("liveblk can be started")
}

/// stdout of a run that must succeed and say nothing on stderr.
pub(crate) fn result(directory: &Path, arguments: &[&str]) -> String {
    let (result, progress) = waited(directory, arguments);
    assert_eq!(progress, "", "{arguments:?}");
    result
}

/// stdout and stderr of a run that must succeed.
pub(crate) fn waited(directory: &Path, arguments: &[&str]) -> (String, String) {
    let output = liveblk(directory, arguments);
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {stderr}");
    (text(&output.stdout), stderr)
}

/// The error of a run that must fail with this status and say nothing on stdout.
pub(crate) fn failure(directory: &Path, status: i32, arguments: &[&str]) -> String {
    let output = liveblk(directory, arguments);
    let stderr = text(&output.stderr);
    assert_eq!(
        output.status.code(),
        Some(status),
        "{arguments:?}: {stderr}"
    );
    assert_eq!(text(&output.stdout), "", "{arguments:?}");
    stderr
        .strip_prefix("liveblk: ")
        .unwrap_or(&stderr)
        .to_string()
}

/// Runs a tool of QEMU that must succeed.
pub(crate) fn qemu(directory: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .output();
    let output = output.expect("QEMU's tools are installed");
    let all = text(&output.stdout) + &text(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {all}");
    text(&output.stdout)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Waits until `holds`.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// A process that is killed when dropped.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.0.id().cast_signed());
        kill(pid, signal).expect("the process is there");
    }

    /// Its exit status, once it has ended.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        let mut status = None;
        until("the process ends", || {
            status = self.0.try_wait().expect("our child");
            status.is_some()
        });
        status?.code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running `liveblk serve`.
pub(crate) struct Served {
    pub(crate) process: Running,
    /// What it printed.
    pub(crate) places: Vec<String>,
}

impl Served {
    /// Starts it and waits until it has printed as many lines as it was given images.
    pub(crate) fn start(directory: &Path, images: usize, arguments: &[&str]) -> Served {
        let process = Command::new(env!("CARGO_BIN_EXE_liveblk"))
            .arg("serve")
            .args(arguments)
            .current_dir(directory)
            .env("LIVEBLK_RUNTIME_DIR", directory)
            .stdout(Stdio::piped())
            .spawn();
        let mut process = Running(process.expect("liveblk can be started"));
        let mut stdout = process.0.stdout.take().expect("piped");
        let mut printed = Vec::new();
        let mut byte = [0];
        while printed.iter().filter(|byte| **byte == b'\n').count() < images {
            let length = stdout.read(&mut byte).expect("readable");
            assert!(length > 0, "serve ended: {:?}", process.ended());
            printed.push(byte[0]);
        }
        let places = text(&printed).lines().map(str::to_string).collect();
        Served { process, places }
    }

    /// Stops it by a signal; gives the exit status.
    pub(crate) fn stop(mut self, signal: Signal) -> Option<i32> {
        self.process.signal(signal);
        self.process.ended()
    }
}

const DAEMON: &[&str] = &[
    "--chardev",
    "socket,id=mon,path=d.sock,server=on,wait=off",
    "--monitor",
    "chardev=mon",
    "--blockdev",
    "node-name=top,driver=qcow2,file.driver=file,file.filename=top.qcow2",
    "--nbd-server",
    "addr.type=unix,addr.path=nbd",
    "--export",
    "nbd,id=e0,node-name=top,writable=on",
];

/// Starts a daemon (`liveblkd` or QEMU's) that serves `top.qcow2` as the export `e0`, with `d.sock`.
pub(crate) fn daemon(program: &str, directory: &Path) -> Running {
    let mut command = Command::new(program);
    command
        .args(DAEMON)
        .current_dir(directory)
        .stdout(Stdio::null());
    let daemon = Running(command.spawn().expect("the daemon can be started"));
    until("the daemon comes up", || {
        directory.join("nbd").exists() && directory.join("d.sock").exists()
    });
    daemon
}
