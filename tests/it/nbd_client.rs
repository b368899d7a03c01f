//! The NBD client node: against our own server, and servers that die, cut connections or lie.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use liveblk::block::{Child, Driver, ExtentKind, Node, NodeOptions, WriteFlags, ZeroFlags};
use liveblk::buffer::MemorySlice;
use liveblk::export::nbd::{InetAddress, NbdServerOptions, ServerAddress};
use liveblk::protocol::nbd::{Nbd, NbdAddress, NbdOptions};
use liveblk::range::ByteRange;
use liveblk::runtime::{Config, Runtime};
use liveblk::testing::{Random, Subject, attach, check_contract, full_access, insert};
use nix::errno::Errno;

use crate::nbd_raw::{option_reply, reply_chunk};
use crate::nbd_server::{Site, memory, serve, serve_with};

const SIZE: u64 = 1 << 20;

fn options(socket: &Path, export: &str) -> NbdOptions {
    NbdOptions {
        address: NbdAddress::Unix(socket.to_str().expect("a plain path").to_owned()),
        export: export.to_owned(),
        reconnect_delay: Duration::ZERO,
        open_timeout: Duration::ZERO,
        writable: true,
        auto_read_only: false,
    }
}

/// A node in memory, exported as `n`.
fn exported(site: &Site) -> Rc<Node> {
    let options = NodeOptions {
        discard: liveblk::block::DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let node = site.node("n", SIZE, options);
    site.export(&node, true);
    node
}

async fn connected(site: &Site, options: NbdOptions) -> Rc<Child> {
    let driver = Nbd::open(&site.handle, options).await.expect("a server");
    attach(
        &site.graph,
        &insert(&site.graph, "client", Box::new(driver)),
        full_access(),
    )
}

#[test]
fn our_own_server_keeps_the_contract() {
    serve(|site| async move {
        exported(&site);
        for seed in 0..4 {
            let guest = connected(&site, options(&site.socket(), "n")).await;
            let all = ByteRange::between(0, SIZE);
            guest
                .write_zeroes(all, ZeroFlags::MAY_UNMAP)
                .await
                .expect("zeroes");
            let subject = Subject {
                name: "nbd".to_owned(),
                guest: guest.clone(),
                content: vec![0; SIZE as usize],
                stores: true,
                kernel_pages: true,
                resizable: None,
                unit: 4096,
            };
            check_contract(subject, seed).await;
            site.graph.detach(&guest).await.expect("it closes");
        }
    });
}

#[test]
fn what_is_sparse_there_is_sparse_here() {
    serve(|site| async move {
        let node = exported(&site);
        let guest = connected(&site, options(&site.socket(), "n")).await;
        let data = MemorySlice::from_bytes(&[7; 65536]);
        guest
            .write(65536, data.into(), WriteFlags::FUA)
            .await
            .expect("written");
        assert!(memory(&node).flushes.get() > 0, "FUA reaches the node");
        let hole = guest
            .block_status(ByteRange::between(0, SIZE))
            .await
            .expect("status");
        assert_eq!(hole.length, 65536);
        assert!(matches!(hole.kind, ExtentKind::Zero { .. }), "{hole:?}");
        let data = guest
            .block_status(ByteRange::between(65536, SIZE))
            .await
            .expect("status");
        assert_eq!(data.length, 65536);
        assert!(matches!(data.kind, ExtentKind::Data { .. }), "{data:?}");
        site.graph.detach(&guest).await.expect("it closes");
    });
}

#[test]
fn what_cannot_be_opened_is_told_as_by_qemu() {
    serve(|site| async move {
        exported(&site);
        let read_only = site.node("ro", SIZE, NodeOptions::default());
        site.export(&read_only, false);
        for (socket, export, expected) in [
            (site.socket(), "nosuch", "Requested export not available"),
            (
                "nosock".into(),
                "n",
                "Failed to connect to 'nosock': No such file or directory",
            ),
            (
                site.socket(),
                "ro",
                "request on write denied without write permission",
            ),
        ] {
            let opened = Nbd::open(&site.handle, options(&socket, export)).await;
            let error = opened.err().expect("it is refused");
            assert_eq!(error.message(), expected);
        }
    });
}

/// Passes bytes on between a client and a server, and cuts after some of them, again and again.
fn cutting_proxy(front: &Path, server: PathBuf, seed: u64, cuts: usize) {
    let listener = UnixListener::bind(front).expect("bound");
    let mut random = Random::new(seed);
    std::thread::spawn(move || {
        for round in 0.. {
            let Ok((client, _)) = listener.accept() else {
                return;
            };
            let Ok(server) = UnixStream::connect(&server) else {
                return;
            };
            let most = |random: &mut Random| match round < cuts {
                true => random.below(200_000),
                false => u64::MAX,
            };
            let (up, down) = (most(&mut random), most(&mut random));
            let (from, to) = (
                client.try_clone().expect("cloned"),
                server.try_clone().expect("cloned"),
            );
            let upward = std::thread::spawn(move || pass(from, to, up));
            pass(server, client, down);
            // The server has answered all that it got before there is another connection.
            upward.join().expect("it ends");
        }
    });
}

fn pass(mut from: UnixStream, mut to: UnixStream, mut most: u64) {
    let mut buffer = [0; 4096];
    while most > 0 {
        let length = most.min(buffer.len() as u64) as usize;
        match from.read(&mut buffer[..length]) {
            Ok(0) | Err(_) => break,
            Ok(read) => {
                most -= read as u64;
                if to.write_all(&buffer[..read]).is_err() {
                    break;
                }
            }
        }
    }
    // Both sides see the end; what is still sent is taken, so that nobody hangs.
    let _ = to.shutdown(std::net::Shutdown::Write);
    let _ = from.shutdown(std::net::Shutdown::Write);
    while matches!(from.read(&mut buffer), Ok(read) if read > 0) {}
}

#[test]
fn cuts_at_any_byte_lose_nothing() {
    const BLOCK: u64 = 8192;
    for seed in 0..6 {
        serve(|site| async move {
            let node = exported(&site);
            let front = site.directory().join("front.sock");
            cutting_proxy(&front, site.socket(), seed, 40);
            let mut options = options(&front, "n");
            options.reconnect_delay = Duration::from_secs(15);
            options.open_timeout = Duration::from_secs(15);
            let guest = connected(&site, options).await;
            let mut random = Random::new(seed);
            let mut model = vec![0u8; SIZE as usize];
            let mut losses = 0;
            for round in 0..60u64 {
                let first = random.below(SIZE / BLOCK - 8);
                let mut tasks = Vec::new();
                for block in first..first + 8 {
                    let (offset, value) = (block * BLOCK, (round * 8 + block) as u8 | 1);
                    let zero = random.percent(20);
                    let guest = guest.clone();
                    let range = offset as usize..(offset + BLOCK) as usize;
                    model[range].fill(if zero { 0 } else { value });
                    tasks.push(site.handle.spawn(async move {
                        if zero {
                            let range = ByteRange::between(offset, offset + BLOCK);
                            return guest.write_zeroes(range, ZeroFlags::empty()).await;
                        }
                        let data = MemorySlice::zeroed(BLOCK as usize);
                        data.fill(0, BLOCK as usize, value);
                        guest.write(offset, data.into(), WriteFlags::empty()).await
                    }));
                }
                for task in tasks {
                    task.await.expect("held until the connection is back");
                }
                if round % 5 == 0 {
                    losses += u32::from(guest.flush().await.is_err());
                }
                let start = random.below(SIZE - 3 * BLOCK);
                let read = MemorySlice::zeroed(3 * BLOCK as usize);
                guest.read(start, read.clone().into()).await.expect("read");
                let expected = &model[start as usize..][..3 * BLOCK as usize];
                assert!(read.to_vec() == expected, "seed {seed}, round {round}");
            }
            assert!(losses > 0, "seed {seed}: no flush has told of a cut");
            assert!(memory(&node).content(0, SIZE as usize) == model);
            site.graph.detach(&guest).await.expect("it closes");
        });
    }
}

/// A request whose future is dropped is run to its end, and the others are answered.
#[test]
fn dropped_requests_leave_the_stream_in_step() {
    serve(|site| async move {
        let node = exported(&site);
        let guest = connected(&site, options(&site.socket(), "n")).await;
        memory(&node).delay.set(Some(Duration::from_millis(5)));
        for round in 0..20u8 {
            let data = MemorySlice::from_bytes(&[round; 65536]);
            let write = guest.write(0, data.into(), WriteFlags::empty());
            let limit = Duration::from_micros(u64::from(round) * 300);
            let _ = site.handle.timeout(limit, write).await;
            let read = MemorySlice::zeroed(100_000);
            let dropped = guest.read(1 << 19, read.clone().into());
            let _ = site.handle.timeout(limit, dropped).await;
        }
        let read = MemorySlice::zeroed(4096);
        guest
            .read(1 << 19, read.clone().into())
            .await
            .expect("still in step");
        assert!(read.is_zero());
        site.graph.detach(&guest).await.expect("it closes");
    });
}

#[test]
fn without_a_delay_requests_fail_at_once_and_later_ones_try_anew() {
    serve(|site| async move {
        exported(&site);
        let front = site.directory().join("front.sock");
        let listener = UnixListener::bind(&front).expect("bound");
        let server = site.socket();
        let (cut, cutting) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            for _ in 0..2 {
                let (client, _) = listener.accept().expect("a client");
                let server = UnixStream::connect(&server).expect("the server");
                let ends = (
                    client.try_clone().expect("cloned"),
                    server.try_clone().expect("cloned"),
                );
                let (other, another) = (
                    client.try_clone().expect("cloned"),
                    server.try_clone().expect("cloned"),
                );
                std::thread::spawn(move || pass(ends.0, ends.1, u64::MAX));
                std::thread::spawn(move || pass(server, other, u64::MAX));
                if cutting.recv().is_ok() {
                    let _ = client.shutdown(std::net::Shutdown::Both);
                    let _ = another.shutdown(std::net::Shutdown::Both);
                }
            }
        });
        let guest = connected(&site, options(&front, "n")).await;
        let write = || {
            let data = MemorySlice::from_bytes(&[1; 512]);
            guest.write(0, data.into(), WriteFlags::empty())
        };
        write().await.expect("connected");
        cut.send(()).expect("the proxy listens");
        site.handle.sleep(Duration::from_millis(300)).await;
        // The write before the cut was answered and not flushed.
        let error = guest.flush().await.expect_err("it may be lost");
        assert_eq!(error.errno(), Errno::EIO);
        write().await.expect("it is tried anew");
        guest.flush().await.expect("told once");
        drop(cut);
        site.graph.detach(&guest).await.expect("it closes");
    });
}

/// A change of the graph does not wait for a server that is gone: the request does not, either.
#[test]
fn drained_sections_do_not_wait_for_a_connection() {
    serve(|site| async move {
        exported(&site);
        let mut options = options(&site.socket(), "n");
        options.reconnect_delay = Duration::from_secs(600);
        let guest = connected(&site, options).await;
        site.service.stop().await.expect("it stops");
        let write = site.handle.spawn({
            let guest = guest.clone();
            async move {
                let data = MemorySlice::from_bytes(&[1; 512]);
                guest.write(0, data.into(), WriteFlags::empty()).await
            }
        });
        site.handle.sleep(Duration::from_millis(300)).await;
        assert!(!write.is_finished(), "it waits for the server");
        let nodes = [guest.node()];
        let section = site
            .handle
            .timeout(Duration::from_secs(5), site.graph.drain(&nodes));
        drop(section.await.expect("it does not wait").expect("drained"));
        let error = write.await.expect_err("it was cut short");
        assert_eq!(error.errno(), Errno::EIO);
        site.graph.detach(&guest).await.expect("it closes");
    });
}

#[test]
fn tcp_is_spoken() {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port();
    let listen = |options: &mut NbdServerOptions| {
        options.address = ServerAddress::Inet(InetAddress {
            host: "127.0.0.1".to_owned(),
            port,
            ..InetAddress::default()
        });
    };
    serve_with(listen, |site| async move {
        let node = exported(&site);
        let mut options = options(Path::new(""), "n");
        options.address = NbdAddress::Inet {
            host: "localhost".to_owned(),
            port,
            ipv4: None,
            ipv6: None,
            numeric: false,
        };
        let guest = connected(&site, options).await;
        let data = MemorySlice::from_bytes(&[5; 200_000]);
        let written = guest.write(777, data.into(), WriteFlags::empty()).await;
        written.expect("written");
        assert_eq!(memory(&node).content(777, 200_000), [5; 200_000]);
        let read = MemorySlice::zeroed(200_000);
        guest.read(777, read.clone().into()).await.expect("read");
        assert_eq!(read.to_vec(), [5; 200_000]);
        site.graph.detach(&guest).await.expect("it closes");
    });
}

/// Servers that say something wrong at some byte of a handshake or a reply: an error each time, soon.
#[test]
fn lying_servers_are_given_up() {
    let runtime = Runtime::new(&Config::default()).expect("a ring");
    let folder = tempfile::tempdir().expect("a folder");
    let good = good_conversation();
    runtime.block_on(async {
        let handle = runtime.handle();
        let mut random = Random::new(1);
        for round in 0..60 {
            let socket = folder.path().join(format!("s{round}"));
            let mut bytes = good.clone();
            let at = random.below(bytes.len() as u64) as usize;
            match round % 3 {
                0 => bytes.truncate(at),
                1 => bytes[at] ^= 1 << random.below(8),
                _ => bytes[at] = random.choose(&[0, 0xff, 0x80]),
            }
            say(&socket, bytes);
            let opening = Nbd::open(&handle, options(&socket, "n"));
            let limit = Duration::from_secs(20);
            let opened = handle.timeout(limit, opening).await.expect("it ends");
            let Ok(nbd) = opened else { continue };
            let memory = MemorySlice::zeroed(4096);
            let read = nbd.read(0, memory.into());
            // It lies about the content, or it fails; it does not hang.
            let _ = handle.timeout(limit, read).await.expect("it ends");
            nbd.close().await.expect("it closes");
        }
    });
}

/// What a server says for a handshake without block sizes and the first read of 4096 bytes.
fn good_conversation() -> Vec<u8> {
    let export = [&[0, 0][..], &SIZE.to_be_bytes(), &[0, 0x0d]].concat();
    let data = [&0u64.to_be_bytes()[..], &[9; 4096]].concat();
    [
        b"NBDMAGICIHAVEOPT\0\x03".to_vec(),
        option_reply(8, 1, b""),
        option_reply(10, 4, b"\0\0\0\x01base:allocation"),
        option_reply(10, 1, b""),
        option_reply(7, 3, &export),
        option_reply(7, 1, b""),
        reply_chunk(1, 1, 1, &data),
    ]
    .concat()
}

/// A server that says this to whoever comes, piece by piece as it is asked, and closes.
fn say(socket: &Path, bytes: Vec<u8>) {
    let listener = UnixListener::bind(socket).expect("bound");
    std::thread::spawn(move || {
        let Ok((mut client, _)) = listener.accept() else {
            return;
        };
        client
            .set_read_timeout(Some(Duration::from_millis(300)))
            .expect("set");
        let mut heard = [0; 4096];
        // Greeting, answers of the handshake, the reply: each after what the client says.
        let cuts = [18, 38, 97, 149, bytes.len()];
        let mut start = 0;
        for end in cuts.map(|cut| cut.min(bytes.len())) {
            if client.write_all(&bytes[start..end]).is_err() {
                return;
            }
            start = end;
            if !matches!(client.read(&mut heard), Ok(length) if length > 0) {
                return;
            }
        }
    });
}

/// The canary of the test above: unchanged, its conversation is understood.
#[test]
fn the_unchanged_conversation_is_understood() {
    let runtime = Runtime::new(&Config::default()).expect("a ring");
    let folder = tempfile::tempdir().expect("a folder");
    let socket = folder.path().join("s");
    say(&socket, good_conversation());
    runtime.block_on(async {
        let nbd = Nbd::open(&runtime.handle(), options(&socket, "n"))
            .await
            .expect("a server");
        let memory = MemorySlice::zeroed(4096);
        nbd.read(0, memory.clone().into())
            .await
            .expect("it answers");
        assert_eq!(memory.to_vec(), [9; 4096]);
        nbd.close().await.expect("it closes");
    });
}
