//! Block status: extents of the metadata contexts that a client selected.

use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::nbd::{ReplyTo, Request};
use crate::range::ByteRange;

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
    let (to, range) = (
        ReplyTo::from(request),
        ByteRange::between(request.offset, request.offset + request.length),
    );
    for (number, place) in places.iter().enumerate() {
        let selected = &connection.contexts[*place];
        let context = connection.export.context(selected);
        let list = context.describe(connection.root(), range, one).await?;
        let last = number + 1 == places.len();
        reply.extend(
            connection
                .writer
                .block_status(to, selected.id, list.extents(), last),
        );
    }
    Ok(reply)
}
