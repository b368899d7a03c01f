//! Long work on the graph: what moves data between nodes while they are in use.
//!
//! A job never names a format: it asks nodes. It knows no export and no monitor.

pub mod copy;
