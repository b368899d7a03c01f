//! Exchanges recorded between real clients and qemu-nbd 10.0.2 (export `disk`, 8 MiB, 64 KiB of data at 1 MiB): given
//! the same requests, our side must say the same, byte for byte.

use super::*;

/// Extents of the recorded image: length and status.
const IMAGE: [(u64, u32); 3] = [
    (1 << 20, STATE_HOLE | STATE_ZERO),
    (64 << 10, 0),
    ((7 << 20) - (64 << 10), STATE_HOLE | STATE_ZERO),
];

struct Disk;

impl Catalog for Disk {
    fn list(&self) -> Vec<(String, Option<String>)> {
        vec![("disk".into(), Some("a disk".into()))]
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name == "disk").then(|| ExportInfo {
            description: Some("a disk".into()),
            size: 8 << 20,
            read_only: false,
            multi_conn: true,
            block_sizes: BlockSizes {
                minimum: 1,
                preferred: 4096,
            },
            contexts: vec![ALLOCATION_CONTEXT.into()],
        })
    }
}

/// One side's bytes between two of the other's.
struct Turn {
    from_client: bool,
    bytes: Vec<u8>,
}

fn parse(recording: &str) -> Vec<Turn> {
    let byte = |line: &str, at: usize| u8::from_str_radix(&line[at..at + 2], 16).unwrap();
    recording
        .lines()
        .map(|line| Turn {
            from_client: line.starts_with('C'),
            bytes: (2..line.len())
                .step_by(2)
                .map(|at| byte(line, at))
                .collect(),
        })
        .collect()
}

fn replay(recording: &str) {
    let mut turns = parse(recording).into_iter();
    let mut handshake = Handshake::new();
    let mut said = handshake.take_output();
    let session = loop {
        let Some(turn) = turns.next() else { return };
        if !turn.from_client {
            assert_eq!(said, turn.bytes);
            said.clear();
            continue;
        }
        handshake.input(&turn.bytes);
        let step = loop {
            match handshake.step(&Disk) {
                Step::Answered => {}
                step => break step,
            }
        };
        said.extend(handshake.take_output());
        match step {
            Step::Enter(session) => break session,
            Step::Close(reason) => assert_eq!(reason, CloseReason::Aborted),
            Step::Receive | Step::Answered => {}
        }
    };
    assert_eq!(said, turns.next().unwrap().bytes);
    replay_transmission(RequestReader::new(session), turns);
}

fn replay_transmission(mut reader: RequestReader, turns: impl Iterator<Item = Turn>) {
    let mut said = Vec::new();
    for turn in turns {
        if !turn.from_client {
            assert_eq!(said, turn.bytes);
            continue;
        }
        said = match reader.read(&turn.bytes).1 {
            Some(Incoming::Request(request)) => describe(&request, reader.session()),
            Some(Incoming::Disconnect) => return,
            other => panic!("{other:?}"),
        };
    }
    panic!("the recording ends without a disconnect");
}

fn describe(request: &Request, session: &Session) -> Vec<u8> {
    let Command::BlockStatus { one, contexts } = &request.command else {
        panic!("{request:?}")
    };
    assert_eq!(contexts, &[0]);
    let (mut start, end) = (0, request.offset + request.length);
    let mut list = ExtentList::new();
    for (length, flags) in IMAGE {
        let (from, to) = (request.offset.max(start), end.min(start + length));
        if from < to && !(*one && list.length() > 0) {
            list.push(to - from, flags);
        }
        start += length;
    }
    let writer = ReplyWriter::new(session.mode);
    writer.block_status(request.into(), session.contexts[0].id, list.extents(), true)
}

#[test]
fn qemu_img_map_with_extended_headers() {
    replay(include_str!("recorded/qemu-img-map.txt"));
}

#[test]
fn nbdinfo_map_with_structured_replies() {
    replay(include_str!("recorded/nbdinfo-map.txt"));
}

#[test]
fn nbdinfo_list() {
    replay(include_str!("recorded/nbdinfo-list.txt"));
}

#[test]
fn qemu_nbd_list() {
    replay(include_str!("recorded/qemu-nbd-list.txt"));
}
