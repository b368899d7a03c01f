//! The fuzzers' functions over seeds that were changed at random, the same in every run. (libFuzzer goes
//! deeper: see `fuzz/`. Mutated images are in `hostile`.)

use liveblk::testing::{Random, for_each_seed};

use super::fuzzed::{nbd_connection, nbd_server, option_value, qmp_session};
use super::nbd_raw::{option_reply, reply_chunk};

const QMP: &[&str] = &[
    r#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": 1}"#,
    r#"{"execute": "qmp_capabilities"} {"execute": "query-version", "id": {"a": [1, 2.5e3, null]}}"#,
    r#"{"execute": "qmp_capabilities"}
       {"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "a",
        "file": {"driver": "file", "filename": "x\u00e4\ud83d\ude00", "locking": "auto"}}}
       {'execute': 'quit', 'id': 'single'}"#,
    r#"{"execute": "qmp_capabilities"}{"exec-oob": "query-commands"}[]{}"x" 7 nosuch}{"#,
];

const OPTIONS: &[&str] = &[
    "driver=qcow2,node-name=a,file.driver=file,file.filename=x,,y,discard=unmap",
    "qcow2,node-name=a,file=b,backing=c,l2-cache-size=1M,read-only=on",
    "type=ublk,id=e0,node-name=q,writable=on,queues=2,zero-copy=auto",
    "nbd,id=e,node-name=n,name=x,bitmaps.0=a,bitmaps.1=b",
    r#"{"driver": "null-co", "node-name": "n", "size": 1048576, "latency-ns": 7}"#,
    "addr.type=inet,addr.host=::1,addr.port=10809,max-connections=3",
    "help",
];

/// Handshakes and requests that a client may send.
fn nbd_seeds() -> Vec<Vec<u8>> {
    let option = |number: u32, data: &[u8]| {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend((data.len() as u32).to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let request = |command: u16, offset: u64, length: u32, data: &[u8]| {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend([0, 0]);
        bytes.extend(command.to_be_bytes());
        bytes.extend(7u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend(data);
        bytes
    };
    let flags = 3u32.to_be_bytes().to_vec();
    let contexts = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
    let go = option(7, b"\0\0\0\x04disk\0\0");
    let requests = [
        request(0, 512, 1024, b""),
        request(1, 0, 16, &[9; 16]),
        request(3, 0, 0, b""),
        request(6, 4096, 4096, b""),
        request(7, 0, 65536, b""),
        request(2, 0, 0, b""),
    ]
    .concat();
    let structured = [
        &flags[..],
        &option(8, b""),
        &option(10, contexts),
        &go,
        &requests,
    ]
    .concat();
    let plain = [&flags[..], &option(3, b""), &option(1, b"disk"), &requests].concat();
    vec![
        structured,
        plain,
        [flags, go, requests].concat(),
        option(2, b""),
    ]
}

/// Some changes of the kinds that break parsers.
fn mutate(random: &mut Random, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..random.below(6) {
        let at = random.below(bytes.len() as u64 + 1) as usize;
        let end = (at + random.below(9) as usize).min(bytes.len());
        match random.below(7) {
            0 => drop(bytes.drain(at..end)),
            1 => bytes.truncate(at),
            2 => bytes.extend_from_within(at..end),
            3 => drop(bytes.splice(at..at, other[..at.min(other.len())].iter().copied())),
            4 => bytes[at..end].fill(random.choose(&[0, 0xff, 0x80, b'{', b'"', b'.', b','])),
            _ if at < end => bytes[at] ^= 1 << random.below(8),
            _ => {}
        }
    }
    bytes
}

fn run(name: &str, seeds: &[Vec<u8>], check: fn(&[u8])) {
    for seed in seeds {
        check(seed);
    }
    for_each_seed(name, 3000, |seed| {
        let mut random = Random::new(seed);
        let one = &seeds[random.below(seeds.len() as u64) as usize];
        let two = &seeds[random.below(seeds.len() as u64) as usize];
        check(&mutate(&mut random, one, two));
    });
}

fn bytes_of(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

#[test]
fn qmp_sessions() {
    run("mutations::qmp_sessions", &bytes_of(QMP), qmp_session);
}

#[test]
fn option_values() {
    run("mutations::option_values", &bytes_of(OPTIONS), option_value);
}

#[test]
fn nbd_connections() {
    run("mutations::nbd_connections", &nbd_seeds(), nbd_connection);
}

/// What servers say: a handshake with and without structured replies, and replies to what `nbd_server` asks.
fn server_seeds() -> Vec<Vec<u8>> {
    let greeting = b"NBDMAGICIHAVEOPT\0\x03".to_vec();
    let export = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 0x6d]].concat();
    let sizes = [0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0];
    let go = [
        option_reply(7, 3, &export),
        option_reply(7, 3, &sizes),
        option_reply(7, 1, b""),
    ]
    .concat();
    let context = [
        option_reply(10, 4, b"\0\0\0\0base:allocation"),
        option_reply(10, 1, b""),
    ];
    let data = [&4096u64.to_be_bytes()[..], &[9; 4096]].concat();
    let hole = [&8192u64.to_be_bytes()[..], &4096u32.to_be_bytes()].concat();
    let status = [0u32, 4096, 3].map(u32::to_be_bytes).concat();
    let replies = [
        reply_chunk(1, 0, 3, b""),
        reply_chunk(0, 1, 4, &data),
        reply_chunk(1, 2, 4, &hole),
        reply_chunk(1, 5, 5, &status),
        reply_chunk(1, 0x8001, 4, b"\0\0\0\x05\0\x03bad"),
    ]
    .concat();
    let mut simple = 0x6744_6698_u32.to_be_bytes().to_vec();
    simple.extend([0, 0, 0, 0]);
    simple.extend(4u64.to_be_bytes());
    simple.extend([9; 8192]);
    let refused = option_reply(8, 1 << 31 | 1, b"no");
    vec![
        [
            greeting.clone(),
            option_reply(8, 1, b""),
            context.concat(),
            go.clone(),
            replies,
        ]
        .concat(),
        [greeting, refused, go, simple].concat(),
    ]
}

#[test]
fn nbd_servers() {
    run("mutations::nbd_servers", &server_seeds(), nbd_server);
}
