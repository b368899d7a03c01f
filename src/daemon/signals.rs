//! Signals that end the daemon, as something to wait for.

use std::os::unix::net::UnixStream;
use std::rc::Rc;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::runtime::Handle;
use crate::runtime::ring::RingFile;

/// SIGINT, SIGHUP and SIGTERM.
pub(super) struct Signals {
    handle: Handle,
    arrived: Rc<RingFile>,
}

impl Signals {
    /// From now on the signals do not kill.
    pub(super) fn catch(handle: &Handle) -> Result<Signals> {
        let (arrived, notify) = UnixStream::pair()?;
        for signal in [SIGINT, SIGHUP, SIGTERM] {
            signal_hook::low_level::pipe::register(signal, notify.try_clone()?)?;
        }
        Ok(Signals {
            handle: handle.clone(),
            arrived: handle.ring().file(arrived.into()),
        })
    }

    /// Waits for one.
    pub(super) async fn wait(&self) {
        let byte = MemorySlice::zeroed(1);
        if let Err(error) = self.handle.ring().recv(&self.arrived, byte).await {
            tracing::error!(%error, "cannot wait for signals");
            std::future::pending().await
        }
    }
}
