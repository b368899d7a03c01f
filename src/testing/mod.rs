//! What tests stand on: a simulated disk, fault rules, a reference model, a seeded workload and the
//! contract that every driver keeps.
//!
//! Compiled for tests and with the feature `testing` only; knows no format and no protocol. All
//! time is the runtime's virtual clock and all chance comes from a seed, so a failing run is its
//! seed (see [`for_each_seed`]).

mod concurrent;
mod contract;
mod disk;
mod disk_driver;
mod fault;
mod kernel_pages;
mod model;
mod power;
mod random;
mod replay;
mod setup;
mod simulated_shelf;
mod source_file;
mod volatile_store;
mod workload;

pub use contract::{Subject, check_contract, check_reading};
pub use disk::{DiskOptions, SimulatedDisk};
pub use fault::{DiskOperation, Fault};
pub use kernel_pages::KernelPages;
pub use model::{Mismatch, Model, Pending, PendingFlush, stamped};
pub use power::Power;
pub use random::Random;
pub use replay::{SCALE_VARIABLE, SEED_VARIABLE, for_each_seed, scale};
pub use setup::{
    attach, attach_file, disk_of, full_access, insert, insert_with, simulate, writable,
};
pub use simulated_shelf::{ShelfContent, SimulatedShelf};
pub use source_file::file_slice_of;
pub use volatile_store::{SECTOR, VolatileStore};
pub use workload::{Request, Workload, WorkloadOptions};
