//! Images whose metadata turned out to be wrong.

use crate::block::BlockEvent;
use crate::error::{Error, ErrorKind};

use super::Qcow2;
use super::header::Incompatible;

/// Whether the image may still be written.
#[derive(Debug, Default)]
pub(super) enum Health {
    /// It may.
    #[default]
    Good,
    /// Not since this happened.
    Failed(String),
}

impl Health {
    pub(super) fn failure(&self) -> Option<&str> {
        match self {
            Health::Good => None,
            Health::Failed(reason) => Some(reason),
        }
    }
}

impl Qcow2 {
    /// The image is not written any more; reads go on.
    pub(super) fn stop_writing(&self, reason: &str) {
        self.writable.set(false);
        if self.health.borrow().failure().is_none() {
            tracing::error!(
                node = self.node_name,
                reason,
                "image is not written any more"
            );
            self.health.replace(Health::Failed(reason.to_owned()));
        }
    }

    /// Hands an error through. If it says that metadata is wrong, users are told, and an image that
    /// was open for writing is marked corrupt and not written any more.
    pub(super) async fn report_corruption(&self, error: Error) -> Error {
        let known = self.health.borrow().failure().is_some();
        if error.kind() != ErrorKind::Corrupt || known {
            return error;
        }
        let fatal = !self.read_only.get();
        self.stop_writing(error.message());
        if fatal {
            self.mark_corrupt().await;
        }
        if let Some(graph) = &self.graph {
            graph.emit(BlockEvent::ImageCorrupted {
                node_name: self.node_name.clone(),
                message: error.message().to_owned(),
                offset: None,
                size: None,
                fatal,
            });
        }
        error
    }

    async fn mark_corrupt(&self) {
        if self.version < 3 {
            return;
        }
        let mark = self.update_header(|header| header.incompatible |= Incompatible::CORRUPT);
        if let Err(error) = mark.await {
            tracing::error!(node = self.node_name, %error, "image could not be marked corrupt");
        }
    }
}
