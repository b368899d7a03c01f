//! NBD exports: a server that carries the protocol of [`crate::nbd`] over sockets to nodes of the block graph.
//!
//! [`NbdServer`] listens, and holds the exports by name; each client is a task that first shakes hands and then reads
//! requests, each of which is a task of its own and answers when it is done, in any order. What the bytes mean is
//! decided in [`crate::nbd`]; what happens to nodes, in [`crate::block`].
//!
//! Invariants:
//!
//! 1. A request that was read is run to its end, whatever becomes of its client.
//! 2. A client holds at most [`MAX_REQUESTS`] requests and [`MAX_REQUEST_BYTES`] of their data in memory; beyond that
//!    its socket is not read.
//! 3. What a client sends or does not read delays itself only.

mod address;
mod client;
mod context;
mod export;
mod payload;
mod read;
mod request;
mod server;
mod service;
mod socket;
mod status;

pub use address::{InetAddress, ServerAddress};
pub use context::BitmapReference;
pub use export::{NbdExport, NbdExportSpec};
pub use server::{NbdServer, NbdServerOptions};
pub use service::NbdService;

/// Most requests of one client in flight.
const MAX_REQUESTS: usize = 64;

/// Most bytes of data of one client's requests in flight; two of the largest requests.
const MAX_REQUEST_BYTES: usize = 64 << 20;
