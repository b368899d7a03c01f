//! Block status: extents of the metadata contexts that a client selected.

use crate::block::{ChainStatus, Extent, ExtentKind};
use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::nbd::{ExtentList, ReplyTo, Request, STATE_HOLE, STATE_ZERO, SelectedContext};
use crate::range::ByteRange;

use super::export::Context;
use super::request::Connection;

/// Carry out BLOCK_STATUS for the contexts at these places of the session's list, and answer it.
pub(super) async fn block_status(
    connection: &Connection,
    request: &Request,
    one: bool,
    places: &[usize],
) {
    let to = ReplyTo::from(request);
    match chunks(connection, request, one, places).await {
        Ok(reply) => connection.send(MemorySlice::from_bytes(&reply)).await,
        Err(error) => connection.fail(to, &error).await,
    }
}

/// One chunk per context, of which the last ends the reply.
async fn chunks(
    connection: &Connection,
    request: &Request,
    one: bool,
    places: &[usize],
) -> Result<Vec<u8>> {
    let mut reply = Vec::new();
    for (number, place) in places.iter().enumerate() {
        let SelectedContext { id, name } = &connection.contexts[*place];
        let context = connection.export.context(name);
        let list = describe(connection, request, one, context).await?;
        let last = number + 1 == places.len();
        let to = ReplyTo::from(request);
        reply.extend(
            connection
                .writer
                .block_status(to, *id, list.extents(), last),
        );
    }
    Ok(reply)
}

async fn describe(
    connection: &Connection,
    request: &Request,
    one: bool,
    context: Context,
) -> Result<ExtentList> {
    let (mut offset, end) = (request.offset, request.offset + request.length);
    let mut list = ExtentList::new();
    while offset < end && !list.is_full() && !(one && list.length() > 0) {
        let rest = ByteRange::between(offset, end);
        let ChainStatus { extent, depth, .. } =
            connection.root().status_through(rest, None).await?;
        let flags = match context {
            Context::Allocation => allocation(&extent),
            Context::AllocationDepth => u32::try_from(depth).unwrap_or(u32::MAX),
        };
        list.push(extent.length, flags);
        offset += extent.length;
    }
    Ok(list)
}

/// State in `base:allocation`, of an extent seen through the whole chain.
fn allocation(extent: &Extent) -> u32 {
    match extent.kind {
        ExtentKind::Data { .. } => 0,
        ExtentKind::Zero {
            host_offset: Some(_),
        } => STATE_ZERO,
        ExtentKind::Zero { host_offset: None } | ExtentKind::Unallocated => STATE_HOLE | STATE_ZERO,
    }
}
