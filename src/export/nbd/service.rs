//! The process's one NBD server, which may run or not.

use std::cell::RefCell;
use std::rc::Rc;

use crate::error::{Error, ErrorKind, Result};
use crate::export::Exports;

use super::{NbdExport, NbdExportSpec, NbdServer, NbdServerOptions};

/// What `nbd-server-start` and `-stop` act on. Cheap to clone: a handle.
#[derive(Clone)]
pub struct NbdService {
    exports: Exports,
    state: Rc<RefCell<State>>,
}

enum State {
    Stopped,
    /// Starting or stopping.
    Changing,
    Running(NbdServer),
}

impl NbdService {
    /// No server yet. Its exports will be registered with `exports`.
    pub fn new(exports: Exports) -> Self {
        Self {
            exports,
            state: Rc::new(RefCell::new(State::Stopped)),
        }
    }

    /// Whether a server runs.
    pub fn is_running(&self) -> bool {
        matches!(&*self.state.borrow(), State::Running(_))
    }

    /// Start the server.
    ///
    /// # Errors
    ///
    /// It runs already; as [`NbdServer::start`].
    pub async fn start(&self, options: NbdServerOptions) -> Result<()> {
        if !matches!(&*self.state.borrow(), State::Stopped) {
            return Err(Error::new(ErrorKind::InUse, "NBD server already running"));
        }
        self.state.replace(State::Changing);
        let (state, result) = match NbdServer::start(self.exports.handle(), options).await {
            Ok(server) => (State::Running(server), Ok(())),
            Err(error) => (State::Stopped, Err(error)),
        };
        self.state.replace(state);
        result
    }

    /// Stop the server; its exports are gone and announced as deleted when this returns.
    ///
    /// # Errors
    ///
    /// None runs.
    pub async fn stop(&self) -> Result<()> {
        let server = match self.state.replace(State::Changing) {
            State::Running(server) => server,
            other => {
                self.state.replace(other);
                return Err(not_running());
            }
        };
        let (exports, state) = (self.exports.clone(), self.state.clone());
        let stopping = async move {
            server.stop(&exports).await;
            state.replace(State::Stopped);
        };
        // A task of its own, which goes on if nobody waits for it any more.
        self.exports.handle().spawn(stopping).await;
        Ok(())
    }

    /// Export a node.
    ///
    /// # Errors
    ///
    /// No server runs; as [`NbdServer::add`].
    pub fn add(&self, spec: NbdExportSpec) -> Result<Rc<NbdExport>> {
        match &*self.state.borrow() {
            State::Running(server) => server.add(&self.exports, spec),
            // What is wrong with the export itself is said first.
            _ => Err(self
                .exports
                .check(&spec.common)
                .err()
                .unwrap_or_else(not_running)),
        }
    }
}

fn not_running() -> Error {
    Error::new(ErrorKind::InvalidArgument, "NBD server not running")
}
