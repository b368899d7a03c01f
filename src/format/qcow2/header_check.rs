//! Every field of a header within its bounds, and the features that are supported.

use crate::error::{Error, Result};

use super::extension::{FeatureName, Features};
use super::header::{CompressionType, Header, Incompatible, invalid, unsupported};
use super::layout::{HostOffset, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES};

/// Most internal snapshots that QEMU reads.
const MAX_SNAPSHOTS: u32 = 65536;

impl Header {
    pub(super) fn check_features(&self) -> Result<()> {
        let known = Incompatible::DIRTY
            | Incompatible::CORRUPT
            | Incompatible::DATA_FILE
            | Incompatible::COMPRESSION
            | Incompatible::EXTENDED_L2;
        let unknown = self.incompatible.bits() & !known.bits();
        if unknown != 0 {
            return Err(unsupported_features(&self.feature_names, unknown));
        }
        if self.geometry.refcount_order > 6 {
            let message = "Reference count entry width too large; may not exceed 64 bits";
            return Err(invalid(message));
        }
        match self.encryption {
            0 => {}
            1 => {
                return Err(unsupported(
                    "AES-CBC encrypted qcow2 images are not supported",
                ));
            }
            2 => return Err(unsupported("LUKS encrypted qcow2 images are not supported")),
            other => {
                return Err(unsupported(format!(
                    "Unsupported encryption method {other}"
                )));
            }
        }
        for feature in [Incompatible::DATA_FILE, Incompatible::EXTENDED_L2] {
            if self.incompatible.contains(feature) {
                return Err(unsupported_features(&self.feature_names, feature.bits()));
            }
        }
        Ok(())
    }

    /// The type and its feature bit say the same.
    pub(super) fn check_compression(&mut self, number: u8) -> Result<()> {
        self.compression = match number {
            0 => CompressionType::Deflate,
            1 => CompressionType::Zstd,
            other => {
                let message = format!("qcow2: unknown compression type: {other}");
                return Err(unsupported(message));
            }
        };
        let flagged = self.incompatible.contains(Incompatible::COMPRESSION);
        match (self.compression, flagged) {
            (CompressionType::Deflate, true) => Err(invalid(
                "qcow2: Compression type incompatible feature bit must not be set",
            )),
            (CompressionType::Zstd, false) => Err(invalid(
                "qcow2: Compression type incompatible feature bit must be set",
            )),
            _ => Ok(()),
        }
    }

    /// Tables within what an image may have; whether they are inside the file is for who knows it.
    pub(super) fn check_tables(&self) -> Result<()> {
        let table_bytes = u64::from(self.refcount_table_clusters) << self.geometry.cluster_bits;
        self.check_table(
            "Reference count table",
            self.refcount_table_offset,
            table_bytes,
            MAX_REFCOUNT_TABLE_BYTES,
        )?;
        if self.refcount_table_clusters == 0 {
            return Err(invalid("Image does not contain a reference count table"));
        }
        if self.snapshots > MAX_SNAPSHOTS {
            return Err(invalid("Snapshot table too large"));
        }
        self.check_table("Snapshot table", self.snapshots_offset, 0, u64::MAX)?;
        let l1_bytes = u64::from(self.l1_entries) * 8;
        self.check_table("Active L1 table", self.l1_offset, l1_bytes, MAX_L1_BYTES)?;
        let needed = self.geometry.l1_entries_for(self.size);
        if self.size > i64::MAX as u64 || needed > i32::MAX as u64 {
            return Err(invalid("Image is too big"));
        }
        if u64::from(self.l1_entries) < needed {
            return Err(invalid("L1 table is too small"));
        }
        if self.l1_entries > 0 && self.l1_offset.0 == 0 {
            return Err(invalid("Active L1 table offset invalid"));
        }
        Ok(())
    }

    fn check_table(&self, what: &str, offset: HostOffset, bytes: u64, most: u64) -> Result<()> {
        if bytes > most {
            return Err(invalid(format!("{what} too large")));
        }
        let beyond = (i64::MAX as u64 - bytes) < offset.0;
        if beyond || self.geometry.in_cluster(offset.0) != 0 {
            return Err(invalid(format!("{what} offset invalid")));
        }
        Ok(())
    }
}

fn unsupported_features(names: &[FeatureName], mask: u64) -> Error {
    let mut left = mask;
    let mut list: Vec<String> = Vec::new();
    for feature in names {
        let bit = 1u64.checked_shl(u32::from(feature.bit)).unwrap_or(0);
        if feature.kind == Features::Incompatible && left & bit != 0 {
            list.push(feature.name.clone());
            left &= !bit;
        }
    }
    if left != 0 {
        list.push(format!("Unknown incompatible feature: {left:x}"));
    }
    unsupported(format!("Unsupported qcow2 feature(s): {}", list.join(", ")))
}
