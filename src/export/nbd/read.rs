//! Reads: one piece of data, or data and holes.

use crate::block::{Extent, ExtentKind};
use crate::error::Result;
use crate::nbd::{ReplyTo, Request};
use crate::range::ByteRange;

use super::request::Connection;

/// A hole shorter than this, in bytes, is sent as data; reads shorter than this are not looked into.
const SHORTEST_HOLE: u64 = 32 << 10;

/// A part of a read that is answered by one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    length: u32,
    hole: bool,
}

/// Carry out a read and answer it.
pub(super) async fn read(connection: &Connection, request: &Request, dont_fragment: bool) {
    let to = ReplyTo::from(request);
    let result = if request.length == 0 {
        empty(connection, to).await
    } else if connection.writer.has_chunks() && !dont_fragment && request.length >= SHORTEST_HOLE {
        sparse(connection, request, to).await
    } else {
        let whole = Piece {
            offset: request.offset,
            length: request.length as u32,
            hole: false,
        };
        send_piece(connection, to, whole, true).await
    };
    if let Err(error) = result {
        connection.fail(to, &error).await;
    }
}

async fn empty(connection: &Connection, to: ReplyTo) -> Result<()> {
    let reply = connection
        .payload(0)
        .with_header(&connection.writer.done(to));
    connection.send(reply).await;
    Ok(())
}

/// Answer in chunks; an error after the first ones ends the reply with an error chunk.
async fn sparse(connection: &Connection, request: &Request, to: ReplyTo) -> Result<()> {
    let extents = extents(connection, request).await?;
    let pieces = pieces(request.offset, &extents);
    for (number, piece) in pieces.iter().enumerate() {
        send_piece(connection, to, *piece, number + 1 == pieces.len()).await?;
    }
    Ok(())
}

async fn extents(connection: &Connection, request: &Request) -> Result<Vec<Extent>> {
    let (mut offset, end) = (request.offset, request.offset + request.length);
    let mut extents = Vec::new();
    while offset < end {
        let rest = ByteRange::between(offset, end);
        let extent = connection.root().status_through(rest, None).await?.extent;
        offset += extent.length;
        extents.push(extent);
    }
    Ok(extents)
}

/// Consecutive pieces from `offset`: neighbours of one sort joined, short holes filled.
fn pieces(offset: u64, extents: &[Extent]) -> Vec<Piece> {
    let mut joined: Vec<(u64, bool)> = Vec::new();
    push_all(
        &mut joined,
        extents
            .iter()
            .map(|extent| (extent.length, is_zero(extent))),
    );
    let mut filled: Vec<(u64, bool)> = Vec::new();
    let short = |(length, hole): (u64, bool)| (length, hole && length >= SHORTEST_HOLE);
    push_all(&mut filled, joined.into_iter().map(short));
    let mut offset = offset;
    let piece = |(length, hole): (u64, bool)| {
        let start = offset;
        offset += length;
        // No longer than the request, which is below 4 GiB.
        Piece {
            offset: start,
            length: length as u32,
            hole,
        }
    };
    filled.into_iter().map(piece).collect()
}

fn push_all(list: &mut Vec<(u64, bool)>, parts: impl Iterator<Item = (u64, bool)>) {
    for (length, hole) in parts {
        match list.last_mut() {
            Some(last) if last.1 == hole => last.0 += length,
            _ => list.push((length, hole)),
        }
    }
}

/// Seen through the whole chain, what no layer has reads as zeroes.
fn is_zero(extent: &Extent) -> bool {
    matches!(
        extent.kind,
        ExtentKind::Zero { .. } | ExtentKind::Unallocated
    )
}

async fn send_piece(connection: &Connection, to: ReplyTo, piece: Piece, last: bool) -> Result<()> {
    if piece.hole {
        let chunk = connection.writer.hole(to, piece.offset, piece.length, last);
        connection
            .send(connection.payload(0).with_header(&chunk))
            .await;
        return Ok(());
    }
    let payload = connection.payload(piece.length as usize);
    connection
        .root()
        .read(piece.offset, payload.data().into())
        .await?;
    let header = connection.writer.data(to, piece.offset, piece.length, last);
    connection.send(payload.with_header(&header)).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_holes_are_data_and_neighbours_are_joined() {
        const K: u64 = 1 << 10;
        let extents = [
            Extent::data(4 * K, 0),
            Extent::zero(8 * K),
            Extent::data(4 * K, 0),
            Extent::zero(16 * K),
            Extent::unallocated(16 * K),
        ];
        let expected = [
            Piece {
                offset: 512,
                length: 16 << 10,
                hole: false,
            },
            Piece {
                offset: 512 + 16 * K,
                length: 32 << 10,
                hole: true,
            },
        ];
        assert_eq!(pieces(512, &extents), expected);
    }
}
