//! A running daemon and clients of its monitors: what tests of the control socket start from.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);

/// The program under test, not yet started.
pub(crate) fn liveblkd(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_liveblkd"));
    command
        .current_dir(directory)
        .args(arguments)
        .stdin(Stdio::null())
        .env_remove("LIVEBLK_LOG");
    command
}

/// Runs the program to its end.
pub(crate) fn run_to_end(directory: &Path, arguments: &[&str]) -> Output {
    let child = liveblkd(directory, arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.expect("liveblkd starts");
    wait_for_end(&mut child);
    child.wait_with_output().expect("output is collected")
}

/// A daemon in a directory of its own; killed when dropped.
pub(crate) struct Daemon {
    pub(crate) directory: TempDir,
    pub(crate) child: Child,
}

impl Daemon {
    /// Started with a monitor at `m.sock` and more options.
    pub(crate) fn start(arguments: &[&str]) -> Daemon {
        let mut all = vec![
            "--chardev",
            "socket,id=m,path=m.sock,server=on,wait=off",
            "--monitor",
            "m",
        ];
        all.extend(arguments);
        let directory = tempfile::tempdir().expect("temporary directory");
        let child = liveblkd(directory.path(), &all)
            .spawn()
            .expect("liveblkd starts");
        Daemon { directory, child }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A client of the monitor at `m.sock`, negotiated.
    pub(crate) fn client(&self) -> Client<UnixStream> {
        let mut client = self.connect("m.sock");
        assert!(client.receive()["QMP"].is_object(), "greeting");
        client.execute("qmp_capabilities", json!({}));
        client
    }

    /// A client of a UNIX socket, not greeted yet.
    pub(crate) fn connect(&self, name: &str) -> Client<UnixStream> {
        let path = self.path(name);
        let stream = poll(|| UnixStream::connect(&path).ok());
        stream
            .set_read_timeout(Some(LIMIT))
            .expect("timeout is set");
        Client::new(stream.try_clone().expect("socket is cloned"), stream)
    }

    /// Waits for the daemon's end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait_for_end(&mut self.child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already in most tests.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_for_end(child: &mut Child) -> ExitStatus {
    poll(|| child.try_wait().expect("child can be waited for"))
}

/// Tries until there is a result.
pub(crate) fn poll<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(start.elapsed() < LIMIT, "nothing happened for {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// One end of a conversation.
pub(crate) struct Client<W> {
    reader: BufReader<Box<dyn Read>>,
    pub(crate) writer: W,
}

impl<W: Write> Client<W> {
    pub(crate) fn new(reader: impl Read + 'static, writer: W) -> Client<W> {
        Client {
            reader: BufReader::new(Box::new(reader)),
            writer,
        }
    }

    pub(crate) fn send(&mut self, bytes: &[u8]) {
        self.writer.write_all(bytes).expect("daemon reads");
        self.writer.flush().expect("daemon reads");
    }

    /// The next line, without its end; empty where there is none.
    pub(crate) fn receive_line(&mut self) -> String {
        let mut line = String::new();
        self.reader
            .read_line(&mut line)
            .expect("daemon answers in time");
        assert!(line.is_empty() || line.ends_with("\r\n"), "{line:?}");
        line.trim_end().to_owned()
    }

    /// The next message.
    pub(crate) fn receive(&mut self) -> Value {
        let line = self.receive_line();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
    }

    /// Sends a command and gives its reply; events before it are dropped.
    pub(crate) fn call(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        self.send(format!("{request}\n").as_bytes());
        loop {
            let message = self.receive();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    /// As [`Client::call`], for a command that succeeds.
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let mut reply = self.call(command, arguments);
        match reply.get_mut("return") {
            Some(result) => result.take(),
            None => panic!("{command}: {reply}"),
        }
    }
}
