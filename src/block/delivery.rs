//! What an edge's changing requests become for the driver below: zero detection, alignment, pieces,
//! fallbacks, FUA.

use std::rc::Rc;

use nix::errno::Errno;

use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

use super::bitmaps::Recording;
use super::padding;
use super::{DetectZeroes, DiscardMode, Limits, LockMode, Node, WriteFlags, ZeroFlags};

/// Zero detection and FUA, then the driver.
pub(super) async fn deliver_write(
    node: &Rc<Node>,
    limits: &Limits,
    offset: u64,
    payload: Payload,
    flags: WriteFlags,
) -> Result<()> {
    let detect = node.options().detect_zeroes;
    if detect != DetectZeroes::Off && payload.is_zero()? {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        let mut zero = ZeroFlags::empty();
        zero.set(ZeroFlags::MAY_UNMAP, detect == DetectZeroes::Unmap);
        zero.set(ZeroFlags::FUA, flags.contains(WriteFlags::FUA));
        return deliver_zeroes(node, range, zero).await;
    }
    let range = ByteRange::between(offset, offset + payload.length() as u64);
    let recording = Recording::begin(node, range).await?;
    let flush_after = flags.contains(WriteFlags::FUA) && !limits.native_fua;
    let flags = if flush_after {
        flags - WriteFlags::FUA
    } else {
        flags
    };
    padding::write(node, limits, offset, payload, flags).await?;
    drop(recording);
    if flush_after {
        node.flush().await
    } else {
        Ok(())
    }
}

pub(super) async fn deliver_zeroes(
    node: &Rc<Node>,
    range: ByteRange,
    flags: ZeroFlags,
) -> Result<()> {
    let mut driver_flags = flags - ZeroFlags::FUA;
    if node.options().discard == DiscardMode::Ignore {
        driver_flags -= ZeroFlags::MAY_UNMAP;
    }
    node.count(|statistics| {
        statistics.highest_written = statistics.highest_written.max(range.end());
    });
    let _recording = Recording::begin(node, range).await?;
    let limits = node.driver().limits();
    let alignment = u64::from(limits.request_alignment);
    let Some(middle) = range.align_inward(alignment) else {
        write_zero_data(node, range).await?;
        return finish(node, flags).await;
    };
    let head = ByteRange::between(range.start(), middle.start());
    let tail = ByteRange::between(middle.end(), range.end());
    write_zero_data(node, head).await?;
    write_zero_data(node, tail).await?;
    let mut start = middle.start();
    while start < middle.end() {
        let end = middle.end().min(start.saturating_add(limits.max_zeroes));
        zero_piece(node, ByteRange::between(start, end), driver_flags).await?;
        start = end;
    }
    finish(node, flags).await
}

async fn finish(node: &Rc<Node>, flags: ZeroFlags) -> Result<()> {
    if flags.contains(ZeroFlags::FUA) {
        node.flush().await
    } else {
        Ok(())
    }
}

async fn zero_piece(node: &Rc<Node>, range: ByteRange, flags: ZeroFlags) -> Result<()> {
    let padding = padding::hold(node, range, LockMode::Shared).await;
    let result = node
        .driver()
        .write_zeroes(range, flags - ZeroFlags::NO_FALLBACK)
        .await;
    drop(padding);
    match result {
        Err(error)
            if error.errno() == Errno::EOPNOTSUPP && !flags.contains(ZeroFlags::NO_FALLBACK) =>
        {
            write_zero_data(node, range).await
        }
        other => other,
    }
}

/// Zeroes as data, in pieces.
async fn write_zero_data(node: &Rc<Node>, range: ByteRange) -> Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    let piece = range.length().min(ZERO_PIECE);
    let zeroes = MemorySlice::zeroed(piece as usize);
    let limits = node.driver().limits();
    let mut start = range.start();
    while start < range.end() {
        let length = piece.min(range.end() - start);
        let payload = Payload::from(zeroes.slice(0, length as usize));
        padding::write(node, &limits, start, payload, WriteFlags::empty()).await?;
        start += length;
    }
    Ok(())
}

const ZERO_PIECE: u64 = 1 << 20;

pub(super) async fn deliver_discard(node: &Rc<Node>, range: ByteRange) -> Result<()> {
    if node.options().discard == DiscardMode::Ignore {
        return Ok(());
    }
    let _recording = Recording::begin(node, range).await?;
    let limits = node.driver().limits();
    let Some(range) = range.align_inward(u64::from(limits.request_alignment)) else {
        return Ok(());
    };
    let mut start = range.start();
    while start < range.end() {
        let end = range.end().min(start.saturating_add(limits.max_zeroes));
        let piece = ByteRange::between(start, end);
        let padding = padding::hold(node, piece, LockMode::Shared).await;
        let result = node.driver().discard(piece).await;
        drop(padding);
        match result {
            Err(error) if error.errno() == Errno::EOPNOTSUPP => return Ok(()),
            result => result?,
        }
        start = end;
    }
    Ok(())
}
