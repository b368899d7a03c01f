//! The consistency check: finds what `qemu-img check` finds, and changes nothing.
//!
//! Every reference in the image's metadata is counted and compared with the refcounts that are
//! stored. A refcount that is too high is a leak, one that is too low a corruption, as are entries
//! that lead nowhere and COPIED flags that do not say what the refcount says. Memory grows with the
//! metadata that there is, not with the size of file or disk.

mod bitmaps;
mod counts;
mod references;
mod stored;

use crate::block::Child;
use crate::buffer::MemorySlice;
use crate::error::Result;

use super::header::{Header, V2_LENGTH};
use super::layout::HostCluster;
use counts::Counts;
use stored::StoredRefcounts;

/// Findings that are kept with their words; more are only counted.
const MOST_FINDINGS: usize = 1000;

/// What kind of finding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// Space is held that nothing uses.
    Leak,
    /// A cluster is copied before it changes although nobody else uses it: its COPIED flag is missing. A
    /// corruption in the counts, as in qemu-img's.
    NeedlessCopy,
    /// Data is or will be lost.
    Corruption,
    /// Something could not be read.
    Error,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub kind: FindingKind,
    /// What it is.
    pub message: String,
}

/// The outcome, with the counts that `qemu-img check --output=json` has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Things that could not be read.
    pub check_errors: u64,
    /// Corruptions.
    pub corruptions: u64,
    /// Of these, COPIED flags that are missing.
    pub needless_copies: u64,
    /// Leaked clusters.
    pub leaks: u64,
    /// One past the last host byte in use, in whole clusters.
    pub image_end_offset: u64,
    /// Guest clusters.
    pub total_clusters: u64,
    /// Guest clusters that have space in the image.
    pub allocated_clusters: u64,
    /// Of these, the ones that do not follow the one before; compressed ones never do.
    pub fragmented_clusters: u64,
    /// Of these, the compressed ones.
    pub compressed_clusters: u64,
    /// The first findings, in words.
    pub findings: Vec<Finding>,
}

impl CheckResult {
    /// Nothing is wrong.
    pub fn is_clean(&self) -> bool {
        self.check_errors + self.corruptions + self.leaks == 0
    }

    /// Nothing is wrong but that space is held in vain.
    pub fn is_safe(&self) -> bool {
        self.check_errors + self.corruptions == 0
    }

    /// Nothing is wrong but that space is held, and clusters are copied, in vain.
    pub fn is_harmless(&self) -> bool {
        self.check_errors == 0 && self.corruptions == self.needless_copies
    }

    fn add(&mut self, kind: FindingKind, message: String) {
        match kind {
            FindingKind::Leak => self.leaks += 1,
            FindingKind::NeedlessCopy => {
                self.corruptions += 1;
                self.needless_copies += 1;
            }
            FindingKind::Corruption => self.corruptions += 1,
            FindingKind::Error => self.check_errors += 1,
        }
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(Finding { kind, message });
        }
    }

    fn corruption(&mut self, message: String) {
        self.add(FindingKind::Corruption, message);
    }
}

/// Checks the active state of an image: all writes to it have been written out.
///
/// # Errors
/// The header cannot be read or is malformed. Whatever is wrong after it is a finding.
pub async fn check(file: &Child) -> Result<CheckResult> {
    let header = read_header(file).await?;
    let mut check = Check::new(file, header);
    check.count_references().await;
    check.compare().await;
    Ok(check.result)
}

async fn read_header(file: &Child) -> Result<Header> {
    let start = MemorySlice::zeroed(V2_LENGTH);
    file.read(0, start.clone().into()).await?;
    let length = Header::cluster_size(&start.to_vec())?.min(file.node().size());
    let cluster = MemorySlice::zeroed(length as usize);
    file.read(0, cluster.clone().into()).await?;
    Header::parse(&cluster.to_vec())
}

/// A check under way.
struct Check<'a> {
    file: &'a Child,
    file_size: u64,
    header: Header,
    counts: Counts,
    stored: StoredRefcounts<'a>,
    result: CheckResult,
}

impl<'a> Check<'a> {
    fn new(file: &'a Child, header: Header) -> Check<'a> {
        let geometry = header.geometry;
        let result = CheckResult {
            total_clusters: geometry.clusters_for(header.size).0,
            ..CheckResult::default()
        };
        Check {
            file,
            file_size: file.node().size(),
            counts: Counts::default(),
            stored: StoredRefcounts::new(file, geometry),
            header,
            result,
        }
    }

    /// Clusters that the file has, the last perhaps in part.
    fn clusters_in_file(&self) -> u64 {
        self.header.geometry.clusters_for(self.file_size).0
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let bytes = MemorySlice::zeroed(length as usize);
        self.file.read(offset, bytes.clone().into()).await?;
        Ok(bytes.to_vec())
    }

    /// Reads big-endian words; a finding where that fails.
    async fn read_words(&mut self, what: &str, offset: u64, count: u64) -> Option<Vec<u64>> {
        match self.read(offset, count * 8).await {
            Ok(bytes) => Some(words(&bytes)),
            Err(error) => {
                let message = format!("ERROR: could not read {what} at {offset:#x}: {error}");
                self.result.add(FindingKind::Error, message);
                None
            }
        }
    }

    /// Counts clusters as in use by something.
    fn refer(&mut self, what: &str, offset: u64, length: u64) {
        if length == 0 {
            return;
        }
        let cluster_size = self.header.geometry.cluster_size();
        let end = offset.saturating_add(length);
        if end.saturating_sub(self.file_size) >= cluster_size && end > self.file_size {
            self.result.corruption(format!(
                "ERROR: {what} at {offset:#x}+{length:#x} lies past the end of the file at {:#x}",
                self.file_size
            ));
            return;
        }
        let bits = self.header.geometry.cluster_bits;
        for cluster in offset >> bits..=(end - 1) >> bits {
            self.counts.add(cluster);
        }
    }

    /// Compares what was counted with what is stored, block by block.
    async fn compare(&mut self) {
        let limit = self.clusters_in_file().max(self.counts.end());
        let geometry = self.header.geometry;
        let entries = geometry.refcount_block_entries();
        let blocks = limit.div_ceil(entries);
        let mut interesting = self.counts.touched(entries);
        interesting.extend(self.stored.blocks_present(blocks));
        for block in interesting {
            if self.stored.load(block).await.is_err() {
                let message = format!("ERROR: could not read refcount block {block}");
                self.result.add(FindingKind::Error, message);
                continue;
            }
            let first = block * entries;
            for cluster in first..limit.min(first + entries) {
                let stored = self.stored.in_loaded(block, HostCluster(cluster));
                self.compare_one(cluster, stored);
            }
        }
    }

    fn compare_one(&mut self, cluster: u64, stored: u64) {
        let counted = self.counts.of(cluster);
        if stored > 0 || counted > 0 {
            let end = (cluster + 1) << self.header.geometry.cluster_bits;
            self.result.image_end_offset = self.result.image_end_offset.max(end);
        }
        let (kind, word) = match stored.cmp(&counted) {
            std::cmp::Ordering::Equal => return,
            std::cmp::Ordering::Greater => (FindingKind::Leak, "Leaked"),
            std::cmp::Ordering::Less => (FindingKind::Corruption, "ERROR"),
        };
        let message = format!("{word} cluster {cluster} refcount={stored} reference={counted}");
        self.result.add(kind, message);
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let word = |chunk: &[u8]| {
        chunk
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    };
    bytes.chunks_exact(8).map(word).collect()
}

#[cfg(test)]
#[path = "check/tests.rs"]
mod tests;
