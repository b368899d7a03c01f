use nix::errno::Errno;

use super::*;
use crate::nbd::{ReplyTo, ReplyWriter};

const COOKIE: u64 = 7;
const MODE: ReplyMode = ReplyMode::Structured;

fn range() -> ByteRange {
    ByteRange::between(0x1000, 0x3000)
}

fn to() -> ReplyTo {
    ReplyTo {
        cookie: COOKIE,
        offset: range().start(),
    }
}

/// Feeds a reply as it comes from a server, data left out; what is told in the end.
fn take(answer: &mut Answer, mode: ReplyMode, chunks: &[Vec<u8>]) -> Result<Told> {
    for bytes in chunks {
        let (magic, rest) = bytes.split_first_chunk::<4>().expect("a magic");
        let (header, body) = rest.split_at(ReplyHeader::rest_length(mode, *magic)?);
        let header = ReplyHeader::decode(header)?;
        assert_eq!(header.cookie, COOKIE);
        match answer.begin(&header)? {
            Body::Nothing | Body::Whole => assert!(body.is_empty()),
            Body::Data(length) => {
                let offset = body.try_into().expect("an offset");
                let at = answer.data(offset, length)?;
                assert!(at + length <= range().length() as usize);
            }
            Body::Small(length) => {
                assert_eq!(length, body.len());
                if let Some((at, length)) = answer.payload(body)? {
                    assert!(at + length <= range().length() as usize);
                }
            }
        }
        if header.last {
            return answer.finish();
        }
    }
    panic!("no last chunk")
}

fn told(question: Question, chunks: &[Vec<u8>]) -> Result<Told> {
    take(&mut Answer::new(question, range(), MODE, 3), MODE, chunks)
}

#[test]
fn reads_come_in_any_order_and_whole() {
    let writer = ReplyWriter::new(MODE);
    let tail = writer.data(to(), 0x2000, 0x1000, false);
    let head = writer.hole(to(), 0x1000, 0x800, false);
    let middle = writer.data(to(), 0x1800, 0x800, true);
    let done = told(
        Question::Read,
        &[tail.clone(), head.clone(), middle.clone()],
    );
    assert!(matches!(done, Ok(Told::Done)), "{done:?}");
    for wrong in [
        vec![tail.clone(), middle.clone()],
        vec![writer.done(to())],
        vec![tail.clone(), tail, head, middle],
        vec![writer.data(to(), 0x1000, 0x2001, true)],
        vec![writer.data(to(), 0xfff, 2, true)],
        vec![writer.hole(to(), 0x2fff, 2, true)],
        vec![writer.hole(to(), u64::MAX, 2, true)],
        vec![writer.hole(to(), 0x1000, 0, true)],
    ] {
        assert!(told(Question::Read, &wrong).is_err(), "{wrong:?}");
    }
}

#[test]
fn a_simple_reply_belongs_to_a_simple_session() {
    let simple = ReplyMode::Simple;
    let writer = ReplyWriter::new(simple);
    let data = [writer.data(to(), 0x1000, 0x2000, true)];
    let mut answer = Answer::new(Question::Read, range(), simple, 0);
    let done = take(&mut answer, simple, &data);
    assert!(matches!(done, Ok(Told::Done)), "{done:?}");
    assert!(told(Question::Read, &data).is_err());
    let flushed = told(Question::Flush, &[writer.done(to())]);
    assert!(matches!(flushed, Ok(Told::Done)), "{flushed:?}");
}

#[test]
fn errors_keep_their_errno() {
    let writer = ReplyWriter::new(MODE);
    for (code, errno) in [
        (ErrorCode::NoSpace, Errno::ENOSPC),
        (ErrorCode::Io, Errno::EIO),
        (ErrorCode::Perm, Errno::EPERM),
    ] {
        let failed = told(Question::Read, &[writer.error(to(), code, "why")]);
        let Ok(Told::Failed(error)) = failed else {
            panic!("{failed:?}")
        };
        assert_eq!(error.errno(), errno);
        assert!(error.message().contains("why"), "{error}");
    }
}

#[test]
fn status_is_that_of_the_context_and_within_the_range() {
    let writer = ReplyWriter::new(MODE);
    let extents = [(1 << 20, 3), (5, 0)].map(|(length, flags)| Extent { length, flags });
    let status = told(
        Question::BlockStatus,
        &[writer.block_status(to(), 3, &extents, true)],
    );
    let Ok(Told::Extent(extent)) = status else {
        panic!("{status:?}")
    };
    assert_eq!((extent.length, extent.flags), (0x2000, 3));
    for wrong in [
        writer.block_status(to(), 4, &extents, true),
        writer.block_status(to(), 3, &[], true),
        writer.done(to()),
    ] {
        assert!(told(Question::BlockStatus, &[wrong]).is_err());
    }
    let unasked = writer.block_status(to(), 3, &extents, true);
    assert!(told(Question::Flush, &[unasked]).is_err());
}
