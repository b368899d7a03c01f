//! Requests that a driver cannot take as they are: unaligned, too long, or in unaligned memory.

use std::rc::Rc;

use crate::buffer::{MEMORY_ALIGNMENT, MemorySlice, Payload};
use crate::error::Result;
use crate::range::{ByteRange, align_down};

use super::{DebugEvent, Limits, LockMode, Node, RangeGuard, WriteFlags};

/// Reads through the node's driver within its limits.
pub(super) async fn read(
    node: &Rc<Node>,
    limits: &Limits,
    offset: u64,
    payload: Payload,
) -> Result<()> {
    if fits(limits, offset, &payload) {
        return node.driver().read(offset, payload).await;
    }
    for (offset, piece) in pieces(limits, offset, &payload) {
        if fits(limits, offset, &piece) {
            node.driver().read(offset, piece).await?;
        } else {
            read_padded(node, limits, offset, piece).await?;
        }
    }
    Ok(())
}

/// Writes through the node's driver within its limits; a padded write holds off others to the
/// same blocks.
pub(super) async fn write(
    node: &Rc<Node>,
    limits: &Limits,
    offset: u64,
    payload: Payload,
    flags: WriteFlags,
) -> Result<()> {
    if limits.request_alignment == 1 && fits(limits, offset, &payload) {
        return node.driver().write(offset, payload, flags).await;
    }
    for (offset, piece) in pieces(limits, offset, &payload) {
        if is_aligned(limits, offset, &piece) {
            let range = ByteRange::between(offset, offset + piece.length() as u64);
            let _held = hold(node, range, LockMode::Shared).await;
            let piece = in_aligned_memory(limits, piece)?;
            node.driver().write(offset, piece, flags).await?;
        } else {
            write_padded(node, limits, offset, piece, flags).await?;
        }
    }
    Ok(())
}

/// Keeps padded writes off the range; no lock where the driver takes any alignment.
pub(super) async fn hold(node: &Rc<Node>, range: ByteRange, mode: LockMode) -> Option<RangeGuard> {
    if node.driver().limits().request_alignment == 1 {
        return None;
    }
    match node.padding.try_lock(range, mode) {
        Some(guard) => Some(guard),
        None => Some(node.padding.lock(range, mode).await),
    }
}

async fn read_padded(
    node: &Rc<Node>,
    limits: &Limits,
    offset: u64,
    payload: Payload,
) -> Result<()> {
    let alignment = u64::from(limits.request_alignment);
    let range = ByteRange::between(offset, offset + payload.length() as u64);
    let outer = range.align_outward(alignment);
    let bounce = MemorySlice::zeroed(outer.length() as usize);
    node.driver()
        .read(outer.start(), bounce.clone().into())
        .await?;
    let skip = (offset - outer.start()) as usize;
    payload.copy_in(0, &bounce.slice(skip, payload.length()))
}

async fn write_padded(
    node: &Rc<Node>,
    limits: &Limits,
    offset: u64,
    payload: Payload,
    flags: WriteFlags,
) -> Result<()> {
    let alignment = u64::from(limits.request_alignment);
    let range = ByteRange::between(offset, offset + payload.length() as u64);
    let outer = range.align_outward(alignment);
    let _held = hold(node, outer, LockMode::Exclusive).await;
    let bounce = MemorySlice::zeroed(outer.length() as usize);
    let (head, tail) = (range.start() > outer.start(), range.end() < outer.end());
    let tell = |unaligned: bool, event| {
        if unaligned {
            node.driver().debug_event(event);
        }
    };
    tell(head, DebugEvent::PwritevRmwHead);
    tell(tail, DebugEvent::PwritevRmwTail);
    node.driver()
        .read(outer.start(), bounce.clone().into())
        .await?;
    tell(head, DebugEvent::PwritevRmwAfterHead);
    tell(tail, DebugEvent::PwritevRmwAfterTail);
    let skip = (offset - outer.start()) as usize;
    payload.copy_out(0, &bounce.slice(skip, payload.length()))?;
    node.driver()
        .write(outer.start(), bounce.into(), flags)
        .await
}

fn is_aligned(limits: &Limits, offset: u64, payload: &Payload) -> bool {
    (offset | payload.length() as u64) & (u64::from(limits.request_alignment) - 1) == 0
}

fn fits(limits: &Limits, offset: u64, payload: &Payload) -> bool {
    is_aligned(limits, offset, payload)
        && payload.length() as u64 <= u64::from(limits.max_transfer)
        && memory_fits(limits, payload)
}

fn memory_fits(limits: &Limits, payload: &Payload) -> bool {
    let alignment = limits.memory_alignment as usize;
    match payload {
        Payload::Memory(slice) => slice.is_aligned(alignment),
        Payload::Kernel(slice) => slice.start() & (alignment - 1) == 0,
        // Not in memory: who writes it takes memory as the file wants it.
        Payload::File(_) => true,
    }
}

/// The bytes of a write in memory that the driver takes.
fn in_aligned_memory(limits: &Limits, payload: Payload) -> Result<Payload> {
    debug_assert!(limits.memory_alignment as usize <= MEMORY_ALIGNMENT);
    if memory_fits(limits, &payload) {
        return Ok(payload);
    }
    let bounce = MemorySlice::zeroed(payload.length());
    payload.copy_out(0, &bounce)?;
    Ok(bounce.into())
}

/// The request cut at the largest aligned length that the driver takes.
fn pieces(
    limits: &Limits,
    offset: u64,
    payload: &Payload,
) -> impl Iterator<Item = (u64, Payload)> + use<> {
    let most = u64::from(limits.max_transfer.max(limits.request_alignment));
    let end = offset + payload.length() as u64;
    let payload = payload.clone();
    let alignment = u64::from(limits.request_alignment);
    let mut start = offset;
    std::iter::from_fn(move || {
        if start >= end {
            return None;
        }
        let cut = align_down(start, alignment).saturating_add(most).min(end);
        let piece = payload.slice((start - offset) as usize, (cut - start) as usize);
        let at = std::mem::replace(&mut start, cut);
        Some((at, piece))
    })
}
