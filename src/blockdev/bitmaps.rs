//! Dirty bitmaps by name: making and finding them.

use std::rc::Rc;

use sha2::{Digest, Sha256};

use crate::block::{Bitmap, BitmapFlags, DirtyBitmap, Node};
use crate::error::{Error, ErrorKind, Result};
use crate::format::raw::Raw;

use super::value::invalid;
use super::{Blockdev, names};

/// The finest granularity.
const FINEST: u32 = 512;

/// A bitmap as `block-dirty-bitmap-add` asks for it.
#[derive(Clone, Debug)]
pub struct NewBitmap {
    /// Device or node.
    pub node: String,
    /// Its name.
    pub name: String,
    /// Bytes that a bit stands for; by the node's clusters where it is not given.
    pub granularity: Option<u32>,
    /// Stored with the image.
    pub persistent: bool,
    /// It does not record until it is enabled.
    pub disabled: bool,
}

impl Blockdev {
    /// A new bitmap of a node, in memory.
    ///
    /// # Errors
    /// In QEMU's words.
    pub(super) fn make_bitmap(&self, new: &NewBitmap) -> Result<(Rc<Node>, Rc<Bitmap>)> {
        let node = names::find_either(&self.graph, &new.node)?;
        if new.name.is_empty() {
            return Err(invalid("Bitmap name cannot be empty"));
        }
        let granularity = granularity(&node, new.granularity)?;
        if new.persistent {
            check_persistent(&node, &new.name, granularity)?;
        }
        check_name(&node, &new.name)?;
        check_bits(node.size(), granularity)?;
        let bits = DirtyBitmap::new(node.size(), granularity);
        let mut flags = BitmapFlags::empty();
        flags.set(BitmapFlags::ENABLED, !new.disabled);
        flags.set(BitmapFlags::PERSISTENT, new.persistent);
        let bitmap = Rc::new(Bitmap::new(new.name.clone(), flags, bits));
        node.bitmaps().add(bitmap.clone());
        Ok((node, bitmap))
    }

    /// `x-debug-block-dirty-bitmap-sha256`: the digest of the bits, in hexadecimal.
    ///
    /// # Errors
    /// There is no such bitmap.
    pub fn bitmap_sha256(&self, node: &str, name: &str) -> Result<String> {
        let (_, bitmap) = self.graph.find_bitmap(node, name)?;
        let mut digest = Sha256::new();
        bitmap.with_bits(|bits| {
            for word in bits.words() {
                digest.update(word.to_le_bytes());
            }
        });
        let bytes = digest.finalize();
        Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

fn granularity(node: &Rc<Node>, given: Option<u32>) -> Result<u64> {
    match given {
        Some(bytes) if bytes.is_power_of_two() && bytes >= FINEST => Ok(bytes.into()),
        Some(_) => Err(invalid("Granularity must be power of 2 and at least 512")),
        None => Ok(node.default_granularity()),
    }
}

fn check_persistent(node: &Rc<Node>, name: &str, granularity: u64) -> Result<()> {
    if let Some(store) = node.driver().bitmap_store() {
        return store.check_new(name, granularity);
    }
    let why = match node.driver_as::<Raw>() {
        Some(_) => "there is no state directory for them (option --state-dir)",
        None => "Operation not supported",
    };
    let node = node.name();
    let message = format!("Can't store persistent bitmaps to {node}: {why}");
    Err(Error::new(ErrorKind::Unsupported, message))
}

fn check_name(node: &Rc<Node>, name: &str) -> Result<()> {
    if node.bitmaps().find(name).is_some() {
        return Err(invalid(format!("Bitmap already exists: {name}")));
    }
    if name.len() > Bitmap::LONGEST_NAME {
        return Err(invalid(format!("Bitmap name too long: {name}")));
    }
    Ok(())
}

fn check_bits(size: u64, granularity: u64) -> Result<()> {
    if size.div_ceil(granularity) <= Bitmap::MOST_BITS {
        return Ok(());
    }
    let message = format!(
        "A bitmap of {granularity} bytes granularity for {size:#x} bytes takes too much memory. Use larger \
         granularity"
    );
    Err(invalid(message))
}
