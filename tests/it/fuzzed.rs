//! What fuzzers do with a string of bytes: it may be anything, and is dealt with in an answer or an error,
//! the same whatever pieces it arrives in. `fuzz/` has a libFuzzer target for each of these functions;
//! `mutations` runs them over changed seeds in every test run.

use liveblk::nbd::{
    ALLOCATION_CONTEXT, Answer, BlockSizes, Body, Catalog, ClientHandshake, ClientStep, Command,
    ExportInfo, Handshake, Incoming, Question, ReplyHeader, RequestReader, Step, Terms, Told,
};
use liveblk::qmp::keyval::parse_option;
use liveblk::qmp::schema::option::{BLOCKDEV, EXPORT, MONITOR, NBD_SERVER};
use liveblk::qmp::session;
use liveblk::range::ByteRange;

/// A client's whole conversation with the QMP monitor.
pub(crate) fn qmp_session(bytes: &[u8]) {
    let whole = qmp_steps(bytes, bytes.len().max(1));
    assert_eq!(whole, qmp_steps(bytes, 3), "answers depend on the pieces");
}

fn qmp_steps(bytes: &[u8], piece: usize) -> Vec<String> {
    let mut client = session::Session::default();
    let mut steps = Vec::new();
    for piece in bytes.chunks(piece) {
        client.receive(piece);
        while let Some(step) = client.next_step() {
            steps.push(match step {
                session::Step::Answer(answer) => {
                    let is_answer = answer.get("error").is_some() || answer.get("return").is_some();
                    assert!(is_answer, "{answer} is no answer");
                    answer.to_string()
                }
                session::Step::Run(request) => {
                    let (name, arguments, _) = request.into_parts();
                    format!("{name} {arguments}")
                }
            });
        }
    }
    steps
}

/// A value of `--blockdev`, `--export`, `--nbd-server` and `--monitor`.
pub(crate) fn option_value(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    for (options, implied) in [
        (&BLOCKDEV, Some("driver")),
        (&EXPORT, Some("type")),
        (&NBD_SERVER, None),
        (&MONITOR, Some("chardev")),
    ] {
        if let Err(error) = parse_option(&text, implied, options) {
            assert!(error.to_string().len() > 5, "'{error}' says nothing");
        }
    }
}

struct OneExport;

impl Catalog for OneExport {
    fn list(&self) -> Vec<(String, Option<String>)> {
        vec![("disk".to_owned(), Some("a disk".to_owned()))]
    }

    fn find(&self, name: &str) -> Option<ExportInfo> {
        (name.is_empty() || name == "disk").then(|| ExportInfo {
            description: None,
            size: 1 << 30,
            read_only: false,
            multi_conn: true,
            block_sizes: BlockSizes {
                minimum: 1,
                preferred: 4096,
            },
            contexts: vec![ALLOCATION_CONTEXT.to_owned()],
        })
    }
}

/// A client's whole connection to the NBD server: handshake, then requests.
pub(crate) fn nbd_connection(bytes: &[u8]) {
    let whole = nbd_steps(bytes, bytes.len().max(1));
    assert_eq!(whole, nbd_steps(bytes, 5), "answers depend on the pieces");
}

/// What a server says to our client: handshake, then replies to a read, a status and a flush.
pub(crate) fn nbd_server(bytes: &[u8]) {
    let mut handshake = ClientHandshake::new("disk");
    for (at, byte) in bytes.iter().enumerate() {
        handshake.input(&[*byte]);
        loop {
            match handshake.step() {
                Ok(ClientStep::Receive) => break,
                Ok(ClientStep::Proceed) => {}
                Ok(ClientStep::Enter(terms)) => return nbd_replies(&terms, &bytes[at + 1..]),
                Err(error) => {
                    assert!(error.to_string().len() > 5, "'{error}' says nothing");
                    return;
                }
            }
        }
    }
}

/// Places in memory that a reply names lie in the memory of its request.
fn nbd_replies(terms: &Terms, mut bytes: &[u8]) {
    let range = ByteRange::between(4096, 12288);
    let questions = [Question::Flush, Question::Read, Question::BlockStatus];
    let fresh = |question| Answer::new(question, range, terms.mode, 0);
    let mut answers = questions.map(fresh);
    while let Some((magic, rest)) = bytes.split_first_chunk::<4>() {
        let Ok(length) = ReplyHeader::rest_length(terms.mode, *magic) else {
            return;
        };
        let Some((header, rest)) = rest.split_at_checked(length) else {
            return;
        };
        bytes = rest;
        let Ok(header) = ReplyHeader::decode(header) else {
            return;
        };
        let which = header.cookie as usize % answers.len();
        let answer = &mut answers[which];
        let (body, held) = match answer.begin(&header) {
            Err(_) => return,
            Ok(body) => (body, range.length() as usize),
        };
        let length = match body {
            Body::Nothing => 0,
            Body::Whole => held,
            Body::Data(length) => 8 + length,
            Body::Small(length) => length,
        };
        let Some((payload, rest)) = bytes.split_at_checked(length) else {
            return;
        };
        bytes = rest;
        let place = match body {
            Body::Data(length) => {
                let mut offset = [0; 8];
                offset.copy_from_slice(&payload[..8]);
                answer.data(offset, length).map(|at| Some((at, length)))
            }
            Body::Small(_) => answer.payload(payload),
            _ => Ok(None),
        };
        match place {
            Err(_) => return,
            Ok(Some((at, length))) => assert!(at + length <= held, "outside of the request"),
            Ok(None) => {}
        }
        if header.last {
            if let Ok(Told::Extent(extent)) = answer.finish() {
                assert!(extent.length > 0 && extent.length <= range.length());
            }
            *answer = fresh(questions[which]);
        }
    }
}

/// What the server said, and which requests it found.
fn nbd_steps(bytes: &[u8], piece: usize) -> (Vec<u8>, Vec<String>) {
    let mut handshake = Handshake::new();
    let mut said = Vec::new();
    let mut pieces = bytes.chunks(piece);
    let session = loop {
        let step = handshake.step(&OneExport);
        said.extend(handshake.take_output());
        match step {
            Step::Answered => {}
            Step::Enter(session) => break session,
            Step::Close(reason) => return (said, vec![format!("{reason:?}")]),
            Step::Receive => match pieces.next() {
                Some(piece) => handshake.input(piece),
                None => return (said, Vec::new()),
            },
        }
    };
    let mut reader = RequestReader::new(session);
    let mut found = Vec::new();
    let mut payload = 0;
    let rest = handshake.into_rest();
    for mut input in std::iter::once(&rest[..]).chain(pieces) {
        while !input.is_empty() {
            let skipped = payload.min(input.len());
            (payload, input) = (payload - skipped, &input[skipped..]);
            let (taken, incoming) = reader.read(input);
            assert!(
                taken > 0 || incoming.is_some() || input.is_empty(),
                "it is stuck"
            );
            input = &input[taken..];
            let Some(incoming) = incoming else { continue };
            found.push(format!("{incoming:?}"));
            match incoming {
                Incoming::Request(request) if matches!(request.command, Command::Write) => {
                    payload = request.length as usize;
                }
                Incoming::Disconnect | Incoming::Violation(_) => return (said, found),
                _ => {}
            }
        }
    }
    (said, found)
}
