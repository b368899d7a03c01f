//! The NBD server against clients that speak the protocol byte by byte: removal, limits, and clients that misbehave.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use liveblk::block::NodeOptions;
use liveblk::export::RemoveMode;
use liveblk::range::ByteRange;

use crate::nbd_server::{memory, serve, serve_with};

const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
const DISCONNECT: u16 = 2;
const FLUSH: u16 = 3;
const WRITE_ZEROES: u16 = 6;
const FAST_ZERO: u16 = 1 << 4;
const EIO: u32 = 5;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

/// What a server answers to an option.
pub(crate) fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    [
        &0x0003_e889_0455_65a9_u64.to_be_bytes()[..],
        &option.to_be_bytes(),
        &kind.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

/// A chunk of a server's structured reply; `last` is 1 for the last.
pub(crate) fn reply_chunk(last: u16, kind: u16, cookie: u64, data: &[u8]) -> Vec<u8> {
    [
        &0x668e_33ef_u32.to_be_bytes()[..],
        &last.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &(data.len() as u32).to_be_bytes(),
        data,
    ]
    .concat()
}

/// A client without any extension.
pub(crate) struct RawClient(pub(crate) UnixStream);

impl RawClient {
    fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        let mut greeting = [0; 18];
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream.read_exact(&mut greeting).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        Self(stream)
    }

    pub(crate) fn enter(socket: &Path, export: &str) -> Self {
        let mut client = Self::connect(socket);
        client.send_option(1, export.as_bytes());
        let mut size_and_flags = [0; 10];
        client.0.read_exact(&mut size_and_flags).unwrap();
        client
    }

    fn send_option(&mut self, option: u32, data: &[u8]) {
        let length = (data.len() as u32).to_be_bytes();
        self.0
            .write_all(&[b"IHAVEOPT", &option.to_be_bytes()[..], &length, data].concat())
            .unwrap();
    }

    pub(crate) fn send(&mut self, flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) {
        let header = [
            &0x2560_9513u32.to_be_bytes()[..],
            &flags.to_be_bytes(),
            &kind.to_be_bytes(),
            &cookie.to_be_bytes(),
            &offset.to_be_bytes(),
            &length.to_be_bytes(),
        ];
        self.0.write_all(&header.concat()).unwrap();
    }

    /// Error and cookie of the next reply.
    fn reply(&mut self) -> (u32, u64) {
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        (error, u64::from_be_bytes(reply[8..].try_into().unwrap()))
    }

    /// The error of one request without data.
    fn ask(&mut self, flags: u16, kind: u16, offset: u64, length: u32) -> u32 {
        self.send(flags, kind, 9, offset, length);
        let (error, cookie) = self.reply();
        assert_eq!(cookie, 9);
        error
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.send(0, WRITE, 9, offset, data.len() as u32);
        self.0.write_all(data).unwrap();
        self.reply().0
    }

    fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.ask(0, READ, offset, length) {
            0 => {
                let mut data = vec![0; length as usize];
                self.0.read_exact(&mut data).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }

    /// The server has closed the connection.
    pub(crate) fn ends_closed(mut self) -> bool {
        let mut rest = Vec::new();
        match self.0.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn requests_fail_with_the_protocols_errors_and_the_connection_lives_on() {
    serve(|site| async move {
        let node = site.node("n", 1 << 20, NodeOptions::default());
        site.export(&node, true);
        memory(&node).bad.set(ByteRange::new(0x2000, 0x1000));
        memory(&node).slow_zeroes.set(true);
        let socket = site.socket();
        let mut client = site
            .outside(move || {
                let mut client = RawClient::enter(&socket, "n");
                assert_eq!(client.write(5, b"hello"), 0);
                assert_eq!(client.read(4, 7).unwrap(), b"\0hello\0");
                assert_eq!(client.read(0x2800, 1), Err(EIO));
                assert_eq!(client.write(0x2fff, b"xy"), EIO);
                assert_eq!(client.read(1 << 20, 1), Err(EINVAL));
                assert_eq!(client.write((1 << 20) - 1, b"xy"), ENOSPC);
                assert_eq!(client.read(u64::MAX, u32::MAX), Err(EINVAL));
                assert_eq!(client.ask(1 << 15, READ, 0, 512), EINVAL);
                assert_eq!(client.ask(0, 77, 0, 512), EINVAL);
                assert_eq!(client.ask(FAST_ZERO, WRITE_ZEROES, 0, 512), ENOTSUP);
                assert_eq!(client.ask(0, WRITE_ZEROES, 0, 512), 0);
                assert_eq!(client.read(0, 20).unwrap(), [0; 20]);
                assert!(client.read(0, 0).unwrap().is_empty());
                client
            })
            .await;
        memory(&node).full.set(true);
        let done = site.outside(move || {
            assert_eq!(client.write(0, b"x"), ENOSPC);
            assert_eq!(client.ask(0, FLUSH, 0, 0), 0);
            client.send(0, DISCONNECT, 0, 0, 0);
            assert!(client.ends_closed());
        });
        done.await;
        assert_eq!(memory(&node).flushes.get(), 1);
    });
}

#[test]
fn answers_come_out_of_order_and_all_of_them_before_the_end() {
    serve(|site| async move {
        let node = site.node("n", 1 << 20, NodeOptions::default());
        site.export(&node, true);
        memory(&node).delay.set(Some(Duration::from_millis(100)));
        let socket = site.socket();
        let order = site.outside(move || {
            let mut client = RawClient::enter(&socket, "n");
            for cookie in 0..200 {
                client.send(0, WRITE, cookie, cookie * 512, 512);
                client.0.write_all(&[7; 512]).unwrap();
            }
            client.send(0, READ, 1000, 0, 0);
            client.send(0, DISCONNECT, 0, 0, 0);
            (0..201).map(|_| client.reply().1).collect::<Vec<_>>()
        });
        let mut order = order.await;
        order.sort_unstable();
        assert_eq!(order, (0..200).chain([1000]).collect::<Vec<_>>());
        assert_eq!(node.statistics().writes, 200);
    });
}

#[test]
fn removal_spares_clients_unless_it_is_hard() {
    serve(|site| async move {
        let node = site.node("n", 1 << 20, NodeOptions::default());
        site.export(&node, true);
        let socket = site.socket();
        let path = socket.clone();
        let mut client = site.outside(move || RawClient::enter(&path, "n")).await;
        let error = site
            .exports
            .remove("n", RemoveMode::Safe)
            .await
            .unwrap_err();
        assert_eq!(error.message(), "export 'n' still in use");
        client = site
            .outside(move || {
                assert_eq!(client.write(0, b"still served"), 0);
                client
            })
            .await;
        site.exports.remove("n", RemoveMode::Hard).await.unwrap();
        assert!(site.outside(move || client.ends_closed()).await);
        while site.deleted.borrow().is_empty() {
            site.handle.yield_now().await;
        }
        assert_eq!(*site.deleted.borrow(), ["n"]);
        assert_eq!(node.parents().len(), 0);
        let error = site
            .exports
            .remove("n", RemoveMode::Safe)
            .await
            .unwrap_err();
        assert_eq!(error.message(), "Export 'n' is not found");
        let gone = site.outside(move || {
            let mut client = RawClient::connect(&socket);
            client.send_option(1, b"n");
            client.ends_closed()
        });
        assert!(gone.await);
    });
}

#[test]
fn stop_disconnects_clients_and_announces_exports_newest_first() {
    serve(|site| async move {
        for name in ["a", "b", "c"] {
            let node = site.node(name, 1 << 20, NodeOptions::default());
            site.export(&node, true);
            memory(&node).delay.set(Some(Duration::from_millis(50)));
        }
        let socket = site.socket();
        let client = site.outside(move || {
            let shaking = RawClient::connect(&socket);
            let mut client = RawClient::enter(&socket, "b");
            client.send(0, WRITE_ZEROES, 1, 0, 512);
            (client, shaking)
        });
        let (client, shaking) = client.await;
        site.service.stop().await.unwrap();
        assert_eq!(*site.deleted.borrow(), ["c", "b", "a"]);
        assert!(
            site.outside(move || client.ends_closed() && shaking.ends_closed())
                .await
        );
    });
}

#[test]
fn a_request_in_a_drained_section_waits_and_then_reaches_the_new_node() {
    serve(|site| async move {
        let old = site.node("old", 1 << 20, NodeOptions::default());
        let new = site.node("new", 1 << 20, NodeOptions::default());
        site.export(&old, true);
        let socket = site.socket();
        let mut client = site.outside(move || RawClient::enter(&socket, "old")).await;
        let drained = site.graph.drain(std::slice::from_ref(&old)).await.unwrap();
        let asked = site
            .handle
            .spawn(site.handle.blocking(move || client.write(0, b"late")));
        site.handle.sleep(Duration::from_millis(50)).await;
        assert_eq!(old.statistics().writes + new.statistics().writes, 0);
        let root = site.exports.find("old").unwrap().export.root().clone();
        site.graph.redirect(&drained, &[root], &new).unwrap();
        drop(drained);
        assert_eq!(asked.await, 0);
        assert_eq!((old.statistics().writes, new.statistics().writes), (0, 1));
        let status = site.exports.find("old").unwrap();
        assert_eq!(status.export.root().node().name(), "new");
    });
}

#[test]
fn at_the_limit_a_client_waits_until_another_leaves() {
    serve_with(
        |options| options.max_connections = 1,
        |site| async move {
            let node = site.node("n", 1 << 20, NodeOptions::default());
            site.export(&node, true);
            let socket = site.socket();
            site.outside(move || {
                let first = RawClient::enter(&socket, "n");
                let mut second = UnixStream::connect(&socket).unwrap();
                second
                    .set_read_timeout(Some(Duration::from_millis(200)))
                    .unwrap();
                let mut greeting = [0; 18];
                assert!(second.read_exact(&mut greeting).is_err());
                drop(first);
                second
                    .set_read_timeout(Some(Duration::from_secs(10)))
                    .unwrap();
                second.read_exact(&mut greeting).unwrap();
            })
            .await;
        },
    );
}

#[test]
fn a_slow_handshake_is_ended() {
    serve_with(
        |options| options.handshake_limit = Some(Duration::from_millis(100)),
        |site| async move {
            let node = site.node("n", 1 << 20, NodeOptions::default());
            site.export(&node, true);
            let socket = site.socket();
            site.outside(move || {
                assert!(RawClient::connect(&socket).ends_closed());
                // A handshake that was ended in time has no limit after it.
                let mut client = RawClient::enter(&socket, "n");
                std::thread::sleep(Duration::from_millis(250));
                assert_eq!(client.write(0, b"x"), 0);
            })
            .await;
        },
    );
}

#[test]
fn hostile_clients_are_thrown_out_and_others_do_not_notice() {
    serve(|site| async move {
        let node = site.node("n", 1 << 20, NodeOptions::default());
        site.export(&node, true);
        let socket = site.socket();
        site.outside(move || {
            let mut good = RawClient::enter(&socket, "n");
            for garbage in hostile_handshakes() {
                let mut stream = UnixStream::connect(&socket).unwrap();
                // The server may close before it has read everything.
                let _ = stream.write_all(&garbage);
                assert!(RawClient(stream).ends_closed());
            }
            for garbage in hostile_requests() {
                let mut client = RawClient::enter(&socket, "n");
                let _ = client.0.write_all(&garbage);
                assert!(client.ends_closed());
            }
            unread_replies(&socket);
            assert_eq!(good.write(0, b"fine"), 0);
        })
        .await;
    });
}

fn hostile_handshakes() -> Vec<Vec<u8>> {
    let flags = 3u32.to_be_bytes();
    let option = |length: u32| [&flags[..], b"IHAVEOPT\0\0\0\x07", &length.to_be_bytes()].concat();
    vec![
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(),
        u32::MAX.to_be_bytes().to_vec(),
        [&flags[..], &[0; 100]].concat(),
        option(u32::MAX),
        [&flags[..], b"IHAVEOPT\0\0\0\x01\0\0\x20\0", &[b'x'; 0x2000]].concat(),
    ]
}

fn hostile_requests() -> Vec<Vec<u8>> {
    let header = |magic: u32, kind: u16, length: u32| {
        let fields = [0, kind].map(u16::to_be_bytes).concat();
        [
            &magic.to_be_bytes()[..],
            &fields,
            &[0; 16],
            &length.to_be_bytes(),
        ]
        .concat()
    };
    vec![
        vec![0; 64],
        header(0x2560_9514, READ, 512),
        header(0x2560_9513, WRITE, u32::MAX),
    ]
}

/// A client that asks for much, reads nothing, and goes.
fn unread_replies(socket: &Path) {
    let mut client = RawClient::enter(socket, "n");
    client
        .0
        .set_write_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    for cookie in 0..1000u64 {
        let mut header = Vec::from(0x2560_9513u32.to_be_bytes());
        header.extend([0; 4]);
        header.extend(cookie.to_be_bytes());
        header.extend([0; 8]);
        header.extend((1u32 << 20).to_be_bytes());
        if client.0.write_all(&header).is_err() {
            return;
        }
    }
}
