//! The last step of a job that shortens a chain: another backing file, in the header and in the graph.

use std::rc::Rc;

use super::Workshop;
use crate::block::{Node, Role};
use crate::error::Result;

/// What an overlay's header is to say.
pub(super) struct Link {
    /// Instead of the base's own name.
    pub(super) backing_file: Option<String>,
    /// A base that is a protocol node is called `raw`.
    pub(super) mask_protocol: bool,
}

impl Link {
    /// Lets `overlay` have `base` as its backing file, or none. All data that the overlay needs is
    /// durable. The header is durable before the graph changes.
    ///
    /// # Errors
    /// The header could not be written: nothing has changed. The graph refuses: the header is changed,
    /// and shows the same content.
    pub(super) async fn make(
        &self,
        workshop: &Workshop,
        overlay: &Rc<Node>,
        base: Option<&Rc<Node>>,
    ) -> Result<()> {
        let before = overlay.child(Role::Backing).map(|edge| edge.node());
        if base.is_none() && before.is_none() {
            return Ok(());
        }
        let drained = workshop.graph.drain(std::slice::from_ref(overlay)).await?;
        let was_read_only = overlay.options().read_only;
        if was_read_only {
            workshop.images.make_writable(overlay).await?;
        }
        let mut done = self.write_header(workshop, overlay, base).await;
        if done.is_ok() {
            done = workshop.graph.set_backing(&drained, overlay, base);
        }
        if was_read_only {
            let closed = workshop.images.make_read_only(overlay).await;
            done = done.and(closed);
        }
        drop(drained);
        workshop.images.backing_changed(overlay);
        if let Some(before) = before {
            // A user's filter between the layers goes with what it filtered.
            if let Err(error) = workshop.graph.release(&before).await {
                tracing::error!(node = before.name(), %error, "an image was not closed cleanly");
            }
        }
        done
    }

    async fn write_header(
        &self,
        workshop: &Workshop,
        overlay: &Rc<Node>,
        base: Option<&Rc<Node>>,
    ) -> Result<()> {
        let Some(base) = base.map(|base| base.without_filters()) else {
            return overlay.driver().change_backing_reference(None).await;
        };
        let is_protocol = base.children().is_empty();
        let format = if is_protocol && self.mask_protocol {
            "raw"
        } else {
            base.driver().driver_name()
        };
        let own = || workshop.images.name_for_header(&base);
        let name = self.backing_file.clone().unwrap_or_else(own);
        let reference = Some((name.as_str(), format));
        overlay.driver().change_backing_reference(reference).await
    }
}
