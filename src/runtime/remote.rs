//! What other threads hold of a runtime.

use std::sync::Arc;

use super::handle::Handle;
use super::ready::ReadyQueue;

/// Reaches a runtime's thread from any thread.
#[derive(Clone)]
pub struct Remote {
    ready: Arc<ReadyQueue>,
}

impl Remote {
    pub(super) fn new(ready: Arc<ReadyQueue>) -> Remote {
        Remote { ready }
    }

    /// Runs a job on the runtime's thread, soon, between its tasks; jobs of one thread run in
    /// order. False where the runtime is gone: the job is dropped unrun.
    pub fn post(&self, job: Box<dyn FnOnce(&Handle) + Send>) -> bool {
        self.ready.push_job(job)
    }
}
