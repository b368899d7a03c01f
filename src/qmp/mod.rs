//! The control socket: QMP as qemu-storage-daemon speaks it.
//!
//! JSON lives here (and in the configuration) only. [`json`] reads and writes it, [`session`] is one
//! client's conversation as a state machine without I/O or clock, [`schema`] says which commands there
//! are and checks their arguments, [`commands`] carries them out, [`monitor`] serves clients, [`events`]
//! reaches them. [`keyval`] and [`chardev`] read the command line's other notations.
//!
//! Invariants:
//! - A command runs only with arguments that were checked against the schema.
//! - One command runs at a time, whichever monitor it came from, and to its end, whether or not its
//!   client is still there.
//! - Every request is answered once, in order; events stand between replies.

use std::future::Future;
use std::pin::Pin;

pub mod chardev;
pub mod commands;
mod connection;
pub mod endpoint;
pub mod error;
pub mod events;
pub mod json;
pub mod keyval;
mod limited_events;
pub mod monitor;
pub mod schema;
pub mod session;

/// A future on the daemon's own thread.
pub type LocalFuture<T> = Pin<Box<dyn Future<Output = T>>>;
