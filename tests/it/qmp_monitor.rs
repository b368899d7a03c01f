//! Monitors: clients that come, go, misbehave, and share events.

use std::net::TcpStream;
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::qmp_daemon::{Client, Daemon, liveblkd, poll};

#[test]
fn quit_is_answered_then_the_connection_ends() {
    let mut daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    assert_eq!(client.execute("quit", json!({})), json!({}));
    assert_eq!(client.receive_line(), "");
    assert!(daemon.wait().success());
}

#[test]
fn clients_of_one_monitor_are_served_one_after_the_other() {
    let daemon = Daemon::start(&[]);
    let mut first = daemon.client();
    let mut second = daemon.connect("m.sock");
    let timeout = |duration| second.writer.set_read_timeout(Some(duration)).unwrap();
    timeout(Duration::from_millis(200));
    let mut byte = [0];
    let waiting = std::io::Read::read(&mut &second.writer, &mut byte);
    assert!(waiting.is_err(), "the second client is greeted too early");
    timeout(Duration::from_secs(20));
    first.execute("query-version", json!({}));
    drop(first);
    assert!(second.receive()["QMP"].is_object());
    let refused = second.call("query-version", json!({}));
    assert_eq!(
        refused["error"]["class"], "CommandNotFound",
        "it negotiates anew"
    );
}

#[test]
fn events_go_to_every_client_that_has_negotiated() {
    let other = [
        "--chardev",
        "socket,id=n,path=n.sock,server=on,wait=off",
        "--monitor",
        "n",
    ];
    let late = [
        "--chardev",
        "socket,id=l,path=l.sock,server=on,wait=off",
        "--monitor",
        "l",
    ];
    let daemon = Daemon::start(&[&other[..], &late].concat());
    let mut first = daemon.client();
    let mut second = daemon.connect("n.sock");
    second.receive();
    second.execute("qmp_capabilities", json!({}));
    let mut silent = daemon.connect("l.sock");
    assert!(silent.receive()["QMP"].is_object());
    first.execute("stop", json!({}));
    let event = second.receive();
    assert_eq!(event["event"], "STOP");
    assert!(event["timestamp"]["seconds"].is_u64());
    assert_eq!(event.get("data"), None);
    second.execute("stop", json!({}));
    second.execute("cont", json!({}));
    assert_eq!(
        first.receive()["event"],
        "RESUME",
        "stopping twice says nothing"
    );
    silent.execute("qmp_capabilities", json!({}));
}

#[test]
fn a_client_that_goes_away_in_the_middle_harms_nobody() {
    let daemon = Daemon::start(&[]);
    for leave in [
        &b"{\"execute\": \"qmp_cap"[..],
        b"{'execute': 'qmp_capabilities'}{'execute': 'query-qmp-schema'}{'execute': 'query-qmp-schema'}",
        b"\xff\xff\xff{{{{[[[[",
        b"",
    ] {
        let mut client = daemon.connect("m.sock");
        client.receive();
        client.send(leave);
        drop(client);
    }
    let mut client = daemon.client();
    assert!(
        client
            .execute("query-qmp-schema", json!({}))
            .as_array()
            .unwrap()
            .len()
            > 100
    );
}

#[test]
fn replies_keep_the_order_of_requests_in_one_write() {
    let daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    let requests: String = (0..200)
        .map(|id| json!({"execute": "query-version", "id": id}).to_string())
        .collect();
    client.send(requests.as_bytes());
    for id in 0..200 {
        assert_eq!(client.receive()["id"], id);
    }
}

#[test]
fn a_pretty_monitor_indents() {
    let options = [
        "--chardev",
        "socket,id=p,path=p.sock,server=on,wait=off",
        "--monitor",
        "p,pretty=on",
    ];
    let daemon = Daemon::start(&options);
    let mut client = daemon.connect("p.sock");
    assert_eq!(client.receive_line(), "{");
    assert_eq!(client.receive_line(), "    \"QMP\": {");
}

#[test]
fn standard_input_and_output_are_a_monitor_whose_end_ends_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let options = [
        "--chardev",
        "stdio,id=s",
        "--monitor",
        "s",
        "--pidfile",
        "pid",
    ];
    let mut child = liveblkd(directory.path(), &options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (output, input) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    let mut client = Client::new(output, input);
    assert!(client.receive()["QMP"].is_object());
    client.execute("qmp_capabilities", json!({}));
    drop(client);
    std::thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "the daemon lives on");
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(!directory.path().join("pid").exists());
}

#[test]
fn the_daemon_may_be_the_one_that_connects() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("c.sock")).unwrap();
    let options = ["--chardev", "socket,id=c,path=c.sock", "--monitor", "c"];
    let mut child = liveblkd(directory.path(), &options).spawn().unwrap();
    let (stream, _) = listener.accept().unwrap();
    let mut client = Client::new(stream.try_clone().unwrap(), stream);
    client.receive();
    client.execute("qmp_capabilities", json!({}));
    client.execute("quit", json!({}));
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_monitor_may_listen_on_tcp() {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let chardev = format!("socket,id=t,host=127.0.0.1,port={port},server=on,wait=off");
    let _daemon = Daemon::start(&["--chardev", &chardev, "--monitor", "t"]);
    let stream = poll(|| TcpStream::connect(("127.0.0.1", port)).ok());
    let mut client = Client::new(stream.try_clone().unwrap(), stream);
    assert!(client.receive()["QMP"].is_object());
}

#[test]
fn starting_up_can_wait_for_the_first_client() {
    let directory = tempfile::tempdir().unwrap();
    let options = [
        "--chardev",
        "socket,id=w,path=w.sock,server=on",
        "--monitor",
        "w",
        "--pidfile",
        "pid",
    ];
    let child = liveblkd(directory.path(), &options)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut daemon = Daemon { directory, child };
    let mut client = daemon.connect("w.sock");
    assert!(client.receive()["QMP"].is_object());
    poll(|| daemon.path("pid").exists().then_some(()));
    client.execute("qmp_capabilities", json!({}));
    client.execute("quit", json!({}));
    assert!(daemon.wait().success());
}

/// Every byte that may be wrong is answered or dropped; the stream is usable afterwards.
#[test]
fn garbage_is_answered_and_survived() {
    let daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    for byte in 0..=255_u8 {
        client.send(&[b'"', byte, b'\n', 0xff, b'\n']);
        client.send(&[byte, b' ', 0xff, b'\n']);
    }
    client.send(b"{\"execute\": \"query-version\", \"id\": \"end\"}\n");
    let answered = |message: &Value| message["error"]["class"] == "GenericError";
    let mut message = client.receive();
    while message["id"] != "end" {
        assert!(answered(&message), "{message}");
        message = client.receive();
    }
    assert!(message["return"].is_object());
}
