//! `copy-before-write`: what a guest is about to change is saved in a target before, so that the content
//! of the child at the moment when the filter was put in stays readable ([`Snapshot`]).
//!
//! A guest's change waits until the clusters that it touches are saved, each once; its reads do not wait.
//! What was saved is at the target when the change goes on, and is not flushed: a snapshot does not
//! outlive a crash, and the guest's own data is in the child as without the filter.

mod snapshot;

use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use super::passed_limits;
use crate::block::{
    Child, Driver, Extent, Forward, IoFuture, Limits, Permission, Permissions, Role, Transfer,
    TransferKind, WriteFlags, ZeroFlags,
};
use crate::buffer::Payload;
use crate::error::{Error, ErrorKind, Result};
use crate::range::ByteRange;
use crate::runtime::Handle;

pub use snapshot::{Snapshot, SnapshotEvent};

/// Bytes of a cluster where neither the user nor the target wants more.
const LEAST_CLUSTER: u64 = 64 << 10;

/// Largest cluster that may be asked for.
const MOST_CLUSTER: u64 = 1 << 30;

/// Longest wait of a guest's change before the snapshot is given up for it, where nobody says otherwise.
const PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of a guest's change where saving what it replaces fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCbwError {
    /// It fails; the snapshot stays whole.
    #[default]
    BreakGuestWrite,
    /// It goes on; that is the end of the snapshot.
    BreakSnapshot,
}

/// Options of a [`CopyBeforeWrite`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CbwOptions {
    /// Where saving fails.
    pub on_error: OnCbwError,
    /// Longest time that a guest's change waits: then saving has failed. Zero: as long as it takes. Not
    /// given: as long as it takes, but 30 seconds where the snapshot ends rather than the guest suffers.
    pub timeout: Option<Duration>,
    /// Bytes that are saved at once, at least; a power of two, or 0.
    pub min_cluster_size: u64,
}

impl CbwOptions {
    /// # Errors
    /// The cluster size is none; in QEMU's words.
    pub fn check(&self) -> Result<()> {
        let wanted = self.min_cluster_size;
        let text = if wanted > MOST_CLUSTER {
            // QEMU has only the first of these bounds, and ends at what it can not allocate.
            let bound = [i64::MAX as u64, MOST_CLUSTER];
            let bound = bound[usize::from(wanted <= bound[0])];
            format!("min-cluster-size too large: {wanted} > {bound}")
        } else if wanted != 0 && !wanted.is_power_of_two() {
            "min-cluster-size needs to be a power of 2".to_owned()
        } else {
            return Ok(());
        };
        let text = format!("Cannot create block-copy-state: {text}");
        Err(Error::new(ErrorKind::InvalidArgument, text))
    }
}

/// The driver.
pub struct CopyBeforeWrite {
    handle: Handle,
    options: CbwOptions,
    snapshot: Rc<Snapshot>,
    /// Needed of the child besides what the users need.
    claimed: Cell<Permission>,
}

impl CopyBeforeWrite {
    /// Above the node of `file`, whose content as of now is kept with the help of the node of `target`. The
    /// options were checked.
    pub fn new(
        handle: &Handle,
        file: Rc<Child>,
        target: Rc<Child>,
        options: CbwOptions,
    ) -> CopyBeforeWrite {
        let cluster = cluster_size(&target, options.min_cluster_size);
        CopyBeforeWrite {
            handle: handle.clone(),
            options,
            snapshot: Rc::new(Snapshot::new(file, target, cluster)),
            claimed: Cell::new(Permission::empty()),
        }
    }

    /// What the child held when the filter was put in.
    pub fn snapshot(&self) -> &Rc<Snapshot> {
        &self.snapshot
    }

    /// Needs this of the child, too, once permissions are refreshed: who works with the snapshot is no user
    /// of the filter.
    pub fn claim(&self, permission: Permission) {
        self.claimed.set(permission);
    }

    fn file(&self) -> &Rc<Child> {
        self.snapshot.file()
    }

    /// The range is about to change.
    ///
    /// # Errors
    /// It must not: what it replaces could not be saved.
    async fn before_change(&self, range: ByteRange) -> Result<()> {
        if !self.snapshot.is_live(range) {
            return Ok(());
        }
        let Err(error) = self.save(range).await else {
            return Ok(());
        };
        match self.options.on_error {
            OnCbwError::BreakGuestWrite => Err(error),
            OnCbwError::BreakSnapshot => {
                self.snapshot.break_off(error);
                Ok(())
            }
        }
    }

    async fn save(&self, range: ByteRange) -> Result<()> {
        let snapshot = self.snapshot.clone();
        let limit = match (self.options.timeout, self.options.on_error) {
            (Some(limit), _) => limit,
            (None, OnCbwError::BreakGuestWrite) => Duration::ZERO,
            (None, OnCbwError::BreakSnapshot) => PATIENCE,
        };
        if limit.is_zero() {
            return snapshot.save(range).await;
        }
        // It goes on when nobody waits any more: requests are not taken back.
        let saving = self.handle.spawn(async move { snapshot.save(range).await });
        let in_time = self.handle.timeout(limit, saving);
        match self.snapshot.unless_broken(in_time).await? {
            Ok(saved) => saved,
            Err(_) => Err(Errno::ETIMEDOUT.into()),
        }
    }
}

/// The larger of what is asked for and what the target has.
fn cluster_size(target: &Child, wanted: u64) -> u64 {
    let of_target = target.node().driver().limits().optimal_transfer;
    let of_target = u64::from(of_target).max(1).next_power_of_two();
    LEAST_CLUSTER.max(wanted).max(of_target)
}

impl Driver for CopyBeforeWrite {
    fn driver_name(&self) -> &'static str {
        "copy-before-write"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.file().node().size()
    }

    fn limits(&self) -> Limits {
        passed_limits(self.file())
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.file().read(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        Box::pin(async move {
            self.before_change(range).await?;
            self.file().write(offset, payload, flags).await
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.before_change(range).await?;
            self.file().write_zeroes(range, flags).await
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.before_change(range).await?;
            self.file().discard(range).await
        })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.file().flush())
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(self.file().block_status(range))
    }

    /// Reads, and writes of what is saved.
    fn forward(&self, transfer: &Transfer) -> Option<Forward> {
        let waits = transfer.kind != TransferKind::Read && self.snapshot.is_live(transfer.range());
        (!waits).then(|| Forward {
            child: self.file().clone(),
            offset: transfer.offset,
            guard: None,
        })
    }

    /// Nobody changes the child past the filter once it has a user. The target may be written by others:
    /// it may well have the child, which its guest writes, in its backing chain.
    fn child_permissions(&self, role: Role, users: Permissions, _writable: bool) -> Permissions {
        if role == Role::Target {
            return Permissions {
                required: Permission::WRITE,
                shared: Permission::all() - Permission::RESIZE,
            };
        }
        let required = users.required | self.claimed.get();
        if required.is_empty() {
            return users;
        }
        let changes = Permission::WRITE | Permission::RESIZE;
        Permissions {
            required: required | Permission::CONSISTENT_READ,
            shared: users.shared - changes,
        }
    }

    fn drain_begin(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            self.snapshot.until_quiet().await;
            Ok(())
        })
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async {
            self.snapshot.until_idle().await;
            Ok(())
        })
    }

    fn is_filter(&self) -> bool {
        true
    }
}
