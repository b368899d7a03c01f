//! The daemon as a process that exports images over NBD, and the programs that are held against it.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Names another daemon with the same command line, to see that the tests themselves are right.
const OTHER_DAEMON: &str = "LIVEBLK_TEST_DAEMON";

/// How long the daemon may take to come up or go down.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running daemon; stopped cleanly by [`stop`](Self::stop), killed if a test fails.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Daemon {
    /// Export the node `n` of these `--blockdev` options, writable or not.
    pub(crate) fn serve(directory: &Path, blockdev: &str, writable: bool) -> Self {
        let socket = directory.join("nbd.sock");
        // Left there by a daemon that was killed: it would look as if this one were up.
        let _ = std::fs::remove_file(&socket);
        let program = std::env::var(OTHER_DAEMON)
            .unwrap_or_else(|_| env!("CARGO_BIN_EXE_liveblkd").to_owned());
        let writable = if writable { "on" } else { "off" };
        let pidfile = directory.join("pid");
        let _ = std::fs::remove_file(&pidfile);
        let child = Command::new(&program)
            .args(["--blockdev", blockdev])
            .args(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"])
            .args([
                "--export",
                &format!("type=nbd,id=n,node-name=n,writable={writable}"),
            ])
            .args(["--pidfile", "pid"])
            .current_dir(directory)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let mut daemon = Self { child, socket };
        daemon.wait_until("the daemon is not up", |_| pidfile.exists());
        daemon
    }

    /// NBD URI of the export.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///n?socket={}", self.socket.display())
    }

    /// Ask it to end, and see that it ends well.
    pub(crate) fn stop(mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        self.wait_until("the daemon does not end", |child| {
            child.try_wait().unwrap().is_some()
        });
        let status = self.child.wait().unwrap();
        assert!(status.success(), "the daemon ended with {status}");
    }

    fn wait_until(&mut self, complaint: &str, holds: impl Fn(&mut Child) -> bool) {
        let begun = Instant::now();
        while !holds(&mut self.child) {
            assert!(begun.elapsed() < PATIENCE, "{complaint}");
            if complaint.ends_with("up")
                && let Some(status) = self.child.try_wait().unwrap()
            {
                panic!("{complaint}: {status}");
            }
            sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Run a program in a directory; its standard output. It must succeed.
pub(crate) fn run<S: AsRef<str>>(directory: &Path, program: &str, arguments: &[S]) -> String {
    match try_run(directory, program, arguments) {
        Ok(output) => output,
        Err(complaint) => {
            let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
            panic!("{program} {}:\n{complaint}", arguments.join(" "))
        }
    }
}

/// Run a program in a directory: its output if it succeeds, all it said if not.
pub(crate) fn try_run<S: AsRef<str>>(
    directory: &Path,
    program: &str,
    arguments: &[S],
) -> Result<String, String> {
    let output = Command::new(program)
        .args(arguments.iter().map(AsRef::as_ref))
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.success() {
        true => Ok(text(&output.stdout)),
        false => Err(text(&output.stdout) + &text(&output.stderr)),
    }
}
