//! Opening a backing chain, one layer at a time: no recursion, as a hostile chain may be long.

use std::rc::Rc;

use crate::block::Node;
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::Qcow2;
use crate::protocol::file::{File, Identity};

use super::backing_name::{self, file_below};
use super::description::BackingDescription;
use super::effective::Source;
use super::origin::Origin;
use super::{Blockdev, file_name};

/// Layers in a chain at most.
const MOST_LAYERS: usize = 1000;

/// What is put before the error of each layer below the first.
const CONTEXT: &str = "Could not open backing file";

/// A layer that was opened, and whether its header is followed further down.
struct Layer {
    node: Rc<Node>,
    goes_on: bool,
}

impl Blockdev {
    /// Opens and attaches everything below `top`, as its description and the headers say.
    ///
    /// # Errors
    /// Prefixed for each layer; what was attached stays so, and goes when `top` is released.
    pub(super) async fn open_chain(&self, top: &Rc<Node>) -> Result<()> {
        let mut seen: Vec<Identity> = identity_of(top).into_iter().collect();
        let mut overlay = top.clone();
        for depth in 1.. {
            let opened = match self.open_backing(&overlay, &mut seen).await {
                Ok(opened) => opened,
                Err(error) => return Err(prefixed(error, depth)),
            };
            let Some(layer) = opened else { return Ok(()) };
            if depth > MOST_LAYERS {
                self.discard_failed(&layer.node).await;
                let message = format!("The backing chain has more than {MOST_LAYERS} layers");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            let attached = self.attach_backing(&overlay, &layer.node).await;
            if let Err(error) = attached {
                self.discard_failed(&layer.node).await;
                return Err(error);
            }
            if !layer.goes_on {
                return Ok(());
            }
            overlay = layer.node;
        }
        Ok(())
    }

    async fn open_backing(
        &self,
        overlay: &Rc<Node>,
        seen: &mut Vec<Identity>,
    ) -> Result<Option<Layer>> {
        let Some(origin) = Origin::of(overlay) else {
            return Ok(None);
        };
        let backing = origin.given.borrow().driver.backing().cloned();
        match backing {
            None => Ok(None),
            Some(BackingDescription::Nothing) => {
                note_automatic(overlay);
                file_name::refresh(overlay);
                Ok(None)
            }
            Some(BackingDescription::Child(child)) => {
                note_automatic(overlay);
                let is_inline = matches!(child, super::ChildDescription::Inline(_));
                let source = Source::BackingOf(overlay.options());
                let node = self.open_child(child, source).await?;
                if is_inline {
                    Origin::adopt(overlay, &node);
                }
                let goes_on = false;
                Ok(Some(Layer { node, goes_on }))
            }
            Some(BackingDescription::FromHeader) => self.open_from_header(overlay, seen).await,
        }
    }

    async fn open_from_header(
        &self,
        overlay: &Rc<Node>,
        seen: &mut Vec<Identity>,
    ) -> Result<Option<Layer>> {
        let Some(reference) = header_reference(overlay) else {
            return Ok(None);
        };
        let description = backing_name::describe(&self.handle, overlay, &reference).await?;
        let filename = backing_name::resolve(overlay, &reference.file)?;
        if let Ok(identity) = Identity::of_path(&filename) {
            if seen.contains(&identity) {
                let message = format!("Backing file '{filename}' creates an infinite loop.");
                return Err(Error::new(ErrorKind::InvalidImage, message));
            }
            seen.push(identity);
        }
        let source = Source::BackingOf(overlay.options());
        let node = self.open_alone(description, source).await?;
        if reference.format.is_none()
            && let Err(error) = backing_name::check_undeclared(&node).await
        {
            self.discard_failed(&node).await;
            return Err(error);
        }
        Origin::adopt(overlay, &node);
        if let Some(origin) = Origin::of(overlay) {
            *origin.automatic_backing.borrow_mut() = Some(node.file_name());
        }
        let goes_on = true;
        Ok(Some(Layer { node, goes_on }))
    }

    /// Puts `backing` under `overlay`; both are open.
    pub(super) async fn attach_backing(
        &self,
        overlay: &Rc<Node>,
        backing: &Rc<Node>,
    ) -> Result<()> {
        let drained = self.graph.drain(std::slice::from_ref(overlay)).await?;
        self.graph.set_backing(&drained, overlay, Some(backing))?;
        drop(drained);
        file_name::refresh(overlay);
        Ok(())
    }
}

/// `node` is `top` or below it in its backing chain.
pub fn chain_contains(top: &Rc<Node>, node: &Rc<Node>) -> bool {
    let mut next = Some(top.without_filters());
    while let Some(layer) = next {
        if Rc::ptr_eq(&layer, node) {
            return true;
        }
        next = layer.backing();
    }
    false
}

/// The layer below `top` that this file name means: the same file as seen from the layer above, or
/// just the layer's own name where something else is attached than the header says.
pub fn find_in_chain(top: &Rc<Node>, name: &str) -> Option<Rc<Node>> {
    let mut overlay = top.clone();
    while let Some(layer) = overlay.backing() {
        let found = if file_name::is_overridden(&overlay) {
            layer.file_name() == name
        } else {
            let named = Identity::of_path(&backing_name::combine(&overlay, name)).ok();
            layer.file_name() == name || (named.is_some() && named == identity_of(&layer))
        };
        if found {
            return Some(layer);
        }
        overlay = layer;
    }
    None
}

/// The header's name counts as what would be attached, as long as nothing else is.
pub(super) fn note_automatic(overlay: &Node) {
    if let Some(origin) = Origin::of(overlay) {
        let name = header_reference(overlay).map(|reference| reference.file);
        *origin.automatic_backing.borrow_mut() = name;
    }
}

/// The backing reference in a node's header.
pub(super) fn header_reference(
    node: &Node,
) -> Option<crate::format::qcow2::header::BackingReference> {
    let image: &Qcow2 = node.driver_as()?;
    image.info().backing
}

/// Which file a node reads, where it is one.
pub(super) fn identity_of(node: &Node) -> Option<Identity> {
    let below = file_below(node)?;
    let file: &File = below.driver_as()?;
    file.identity().ok()
}

fn prefixed(error: Error, depth: usize) -> Error {
    (0..depth).fold(error, |error, _| error.context(CONTEXT))
}
