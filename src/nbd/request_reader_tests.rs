use proptest::prelude::*;

use super::*;
use crate::nbd::meta_context::SelectedContext;
use crate::nbd::protocol::{EXTENDED_REQUEST_MAGIC, REQUEST_MAGIC, TransmissionFlags};
use crate::nbd::request::Command;

const SIZE: u64 = 100 << 20;

fn session(mode: ReplyMode, read_only: bool) -> Session {
    let mut flags = TransmissionFlags::HAS_FLAGS;
    flags.set(TransmissionFlags::READ_ONLY, read_only);
    let context = |id, name: &str| SelectedContext {
        id,
        name: name.into(),
    };
    let contexts = vec![
        context(3, "base:allocation"),
        context(5, "qemu:allocation-depth"),
    ];
    Session {
        export: "disk".into(),
        size: SIZE,
        flags,
        mode,
        contexts,
    }
}

fn header(mode: ReplyMode, flags: u16, kind: u16, offset: u64, length: u64) -> Vec<u8> {
    let extended = mode == ReplyMode::Extended;
    let magic = if extended {
        EXTENDED_REQUEST_MAGIC
    } else {
        REQUEST_MAGIC
    };
    let mut bytes = Vec::from(magic.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(77u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    if extended {
        bytes.extend(length.to_be_bytes());
    } else {
        bytes.extend((length as u32).to_be_bytes());
    }
    bytes
}

fn read_one(reader: &mut RequestReader, bytes: &[u8]) -> Option<Incoming> {
    let (taken, incoming) = reader.read(bytes);
    assert_eq!(taken, bytes.len());
    incoming
}

/// The error of a lone request, or none if it is accepted.
fn error(mode: ReplyMode, flags: u16, kind: u16, offset: u64, length: u64) -> Option<ErrorCode> {
    let mut reader = RequestReader::new(session(mode, false));
    match read_one(&mut reader, &header(mode, flags, kind, offset, length)) {
        Some(Incoming::Request(_)) => None,
        Some(Incoming::Refused {
            error, cookie: 77, ..
        }) => Some(error),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bounds_are_checked_without_overflow() {
    use ErrorCode::{Invalid, NoSpace};
    let compact = ReplyMode::Structured;
    assert_eq!(error(compact, 0, cmd::READ, SIZE - 512, 512), None);
    assert_eq!(error(compact, 0, cmd::READ, SIZE, 0), None);
    assert_eq!(error(compact, 0, cmd::READ, SIZE - 512, 513), Some(Invalid));
    assert_eq!(error(compact, 0, cmd::READ, u64::MAX, 512), Some(Invalid));
    assert_eq!(
        error(compact, 0, cmd::READ, 0, u64::from(MAX_PAYLOAD) + 1),
        Some(Invalid)
    );
    assert_eq!(error(compact, 0, cmd::WRITE, SIZE, 512), Some(NoSpace));
    assert_eq!(error(compact, 0, cmd::TRIM, SIZE, 512), Some(Invalid));
    assert_eq!(error(compact, 0, cmd::FLUSH, 0, 512), Some(Invalid));
    assert_eq!(error(compact, 0, cmd::BLOCK_STATUS, 0, 0), Some(Invalid));
    let extended = ReplyMode::Extended;
    assert_eq!(
        error(extended, 0, cmd::WRITE_ZEROES, 512, u64::MAX),
        Some(NoSpace)
    );
    assert_eq!(error(extended, 0, cmd::WRITE_ZEROES, 0, SIZE), None);
}

#[test]
fn flags_must_fit_command_and_mode() {
    use ErrorCode::Invalid;
    for (mode, flags, kind, expected) in [
        (ReplyMode::Simple, 4, cmd::READ, Some(Invalid)),
        (ReplyMode::Structured, 4, cmd::READ, None),
        (ReplyMode::Structured, 4, cmd::WRITE_ZEROES, Some(Invalid)),
        (ReplyMode::Structured, 1 | 2 | 16, cmd::WRITE_ZEROES, None),
        (ReplyMode::Structured, 2, cmd::TRIM, Some(Invalid)),
        (ReplyMode::Structured, 1, cmd::CACHE, None),
        (ReplyMode::Structured, 8, cmd::BLOCK_STATUS, None),
        (ReplyMode::Structured, 1 << 9, cmd::READ, Some(Invalid)),
        (ReplyMode::Structured, 0, 99, Some(Invalid)),
    ] {
        assert_eq!(
            error(mode, flags, kind, 0, 512),
            expected,
            "{mode:?} {flags:#x} {kind}"
        );
    }
}

#[test]
fn read_only_exports_refuse_writes_and_skip_their_data() {
    let mut reader = RequestReader::new(session(ReplyMode::Simple, true));
    let mut bytes = header(ReplyMode::Simple, 0, cmd::WRITE, 0, 3);
    bytes.extend(b"xyz");
    bytes.extend(header(ReplyMode::Simple, 0, cmd::DISC, 0, 0));
    let (taken, incoming) = reader.read(&bytes);
    assert!(matches!(
        incoming,
        Some(Incoming::Refused {
            error: ErrorCode::Perm,
            ..
        })
    ));
    assert_eq!(
        read_one(&mut reader, &bytes[taken..]),
        Some(Incoming::Disconnect)
    );
    assert_eq!(read_one(&mut reader, b"whatever"), None);
}

#[test]
fn a_lost_frame_closes() {
    let mut reader = RequestReader::new(session(ReplyMode::Extended, false));
    let compact = [header(ReplyMode::Simple, 0, cmd::READ, 0, 512), vec![0; 4]].concat();
    assert!(matches!(
        read_one(&mut reader, &compact),
        Some(Incoming::Violation(_))
    ));
    let mut reader = RequestReader::new(session(ReplyMode::Simple, false));
    let huge = header(
        ReplyMode::Simple,
        0,
        cmd::WRITE,
        0,
        u64::from(MAX_PAYLOAD) + 1,
    );
    assert!(matches!(
        read_one(&mut reader, &huge),
        Some(Incoming::Violation(_))
    ));
}

#[test]
fn fua_counts_only_where_something_is_written() {
    for (kind, fua) in [(cmd::TRIM, true), (cmd::READ, false)] {
        let mut reader = RequestReader::new(session(ReplyMode::Simple, false));
        let bytes = header(ReplyMode::Simple, 1, kind, 0, 512);
        let Some(Incoming::Request(request)) = read_one(&mut reader, &bytes) else {
            panic!()
        };
        assert_eq!(request.fua, fua);
    }
}

#[test]
fn block_status_payload_narrows_the_contexts() {
    let mode = ReplyMode::Extended;
    let status = |payload: &[u8]| {
        let mut reader = RequestReader::new(session(mode, false));
        let length = payload.len() as u64;
        let mut bytes = header(mode, 32, cmd::BLOCK_STATUS, 4096, length);
        bytes.extend(payload);
        reader.read(&bytes).1
    };
    let effect = 8192u64.to_be_bytes();
    let Some(Incoming::Request(request)) = status(&[&effect[..], &[0, 0, 0, 5]].concat()) else {
        panic!()
    };
    assert_eq!((request.offset, request.length), (4096, 8192));
    assert_eq!(
        request.command,
        Command::BlockStatus {
            one: false,
            contexts: vec![1]
        }
    );
    for payload in [
        &effect[..],
        &[&effect[..], &[0, 0, 0, 4]].concat(),
        &[&effect[..], &[0, 0, 0, 5, 0, 0, 0, 5]].concat(),
        &[&effect[..], &[0, 0, 5]].concat(),
        &[&[0xff; 8][..], &[0, 0, 0, 5]].concat(),
        &[0; 4000],
    ] {
        assert!(
            matches!(
                status(payload),
                Some(Incoming::Refused {
                    error: ErrorCode::Invalid,
                    ..
                })
            ),
            "{payload:?}"
        );
    }
}

/// Everything found in the stream, fed in pieces; payloads of writes are stepped over.
fn found(mode: ReplyMode, bytes: &[u8], cuts: &[usize]) -> Vec<Incoming> {
    let mut reader = RequestReader::new(session(mode, false));
    let mut found = Vec::new();
    let mut payload = 0;
    let mut rest = bytes;
    let mut cuts = cuts.iter();
    while !rest.is_empty() {
        let length = cuts.next().copied().unwrap_or(rest.len()).min(rest.len());
        let (mut piece, later) = rest.split_at(length);
        rest = later;
        while !piece.is_empty() {
            let skipped = payload.min(piece.len());
            payload -= skipped;
            let (taken, incoming) = reader.read(&piece[skipped..]);
            piece = &piece[skipped + taken..];
            if let Some(Incoming::Request(request)) = &incoming
                && request.command == Command::Write
            {
                payload = request.length as usize;
            }
            found.extend(incoming);
        }
    }
    found
}

/// Headers with likely and unlikely fields, and some payload.
fn requestish(mode: ReplyMode) -> impl Strategy<Value = Vec<u8>> {
    let edge = prop_oneof![0u64..600, Just(SIZE), SIZE - 9..SIZE + 9, any::<u64>()];
    let one = (
        0u16..64,
        0u16..9,
        edge.clone(),
        edge,
        prop::collection::vec(any::<u8>(), 0..40),
    )
        .prop_map(move |(flags, kind, offset, length, payload)| {
            [header(mode, flags, kind, offset, length), payload].concat()
        });
    prop_oneof![
        4 => prop::collection::vec(one, 0..6).prop_map(|requests| requests.concat()),
        1 => prop::collection::vec(any::<u8>(), 0..200),
    ]
}

proptest! {
    #[test]
    fn any_input_in_any_chunks_gives_the_same_requests(
        (mode, bytes) in prop_oneof![Just(ReplyMode::Simple), Just(ReplyMode::Structured), Just(ReplyMode::Extended)]
            .prop_flat_map(|mode| (Just(mode), requestish(mode))),
        cuts in prop::collection::vec(1usize..40, 0..60),
    ) {
        let whole = found(mode, &bytes, &[]);
        for incoming in &whole {
            if let Incoming::Request(request) = incoming {
                prop_assert!(request.offset.checked_add(request.length).is_some_and(|end| end <= SIZE));
            }
        }
        prop_assert_eq!(whole, found(mode, &bytes, &cuts));
    }
}
