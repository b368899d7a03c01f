//! Reading guest data.

use std::rc::Rc;

use crate::block::{DebugEvent, InFlight};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::compressed::decompress;
use super::join::{Piece, join};
use super::layout::{CompressedExtent, HostOffset, Mapping};
use super::lookup::{Purpose, Run};

/// Decompressed clusters kept, so that small reads do not decompress a cluster once each.
const KEPT: usize = 8;

/// The last decompressed clusters, by where they lie in the file.
#[derive(Default)]
pub(super) struct Decompressed {
    clusters: Vec<(HostOffset, MemorySlice)>,
}

impl Decompressed {
    fn find(&self, offset: HostOffset) -> Option<MemorySlice> {
        let found = self.clusters.iter().find(|(place, _)| *place == offset);
        found.map(|(_, bytes)| bytes.clone())
    }

    fn keep(&mut self, offset: HostOffset, bytes: &MemorySlice) {
        self.clusters.retain(|(place, _)| *place != offset);
        if self.clusters.len() == KEPT {
            self.clusters.remove(0);
        }
        self.clusters.push((offset, bytes.clone()));
    }

    /// Its mapping is gone; other bytes may come to lie there.
    pub(super) fn forget(&mut self, offset: HostOffset) {
        self.clusters.retain(|(place, _)| *place != offset);
    }
}

impl Qcow2 {
    pub(super) async fn read_guest(&self, offset: u64, payload: Payload) -> Result<()> {
        let range = ByteRange::between(offset, offset + payload.length() as u64);
        let (run, guard) = self.find(range, Purpose::Read).await?;
        if run.range == range {
            return self.read_run(run, guard, payload).await;
        }
        let mut pieces: Vec<Piece<'_>> = Vec::new();
        let (mut run, mut guard) = (run, guard);
        loop {
            let start = (run.range.start() - range.start()) as usize;
            let part = payload.slice(start, run.range.length() as usize);
            let end = run.range.end();
            pieces.push(Box::pin(self.read_run(run, guard, part)));
            if end == range.end() {
                return join(pieces).await;
            }
            let left = ByteRange::between(end, range.end());
            (run, guard) = self.find(left, Purpose::Read).await?;
        }
    }

    async fn read_run(&self, run: Run, guard: InFlight, payload: Payload) -> Result<()> {
        let _guard = guard;
        let inside = self.geometry.in_cluster(run.range.start());
        match run.mapping {
            Mapping::Data(host) => {
                self.tell(DebugEvent::ReadAio);
                self.file().read(host.plus(inside).0, payload).await
            }
            Mapping::Zero | Mapping::ZeroAllocated(_) => payload.fill_zero(),
            Mapping::Unallocated => self.read_backing(run.range, payload).await,
            Mapping::Compressed(extent) => {
                let cluster = self.read_compressed(extent).await?;
                payload.copy_in(0, &cluster.slice(inside as usize, payload.length()))
            }
        }
    }

    /// What the backing file has for a range; zeroes past its end, and where there is none.
    pub(super) async fn read_backing(&self, range: ByteRange, payload: Payload) -> Result<()> {
        let backing = self.backing();
        let size = backing.as_ref().map_or(0, |backing| backing.node().size());
        let inside = size.clamp(range.start(), range.end()) - range.start();
        if inside < range.length() {
            let rest = range.length() - inside;
            payload.slice(inside as usize, rest as usize).fill_zero()?;
        }
        match backing {
            Some(backing) if inside > 0 => {
                let payload = payload.slice(0, inside as usize);
                self.tell(DebugEvent::ReadBackingAio);
                backing.read(range.start(), payload).await
            }
            _ => Ok(()),
        }
    }

    /// A whole cluster that is stored compressed. The caller is counted in the epoch.
    pub(super) async fn read_compressed(&self, extent: CompressedExtent) -> Result<MemorySlice> {
        if let Some(cluster) = self.decompressed.borrow().find(extent.offset) {
            return Ok(cluster);
        }
        let length = extent.length as usize;
        self.tell(DebugEvent::ReadCompressed);
        let data = self.read_metadata(extent.offset, length).await?;
        let mut bytes = vec![0; self.geometry.cluster_size() as usize];
        let kind = self.header.borrow().compression;
        decompress(kind, &data, &mut bytes).map_err(|error| {
            let place = extent.offset;
            error.context(format!("node '{}', host offset {place}", self.node_name))
        })?;
        let cluster = MemorySlice::from_bytes(&bytes);
        self.decompressed.borrow_mut().keep(extent.offset, &cluster);
        Ok(cluster)
    }

    /// The edge and offset where a whole run can be read as it is, if there is one.
    pub(super) fn read_target(&self, run: &Run) -> Option<(Rc<crate::block::Child>, u64)> {
        match run.mapping {
            Mapping::Data(host) => {
                let inside = self.geometry.in_cluster(run.range.start());
                Some((self.file(), host.plus(inside).0))
            }
            Mapping::Unallocated => {
                let backing = self.backing()?;
                let fits = run.range.end() <= backing.node().size();
                fits.then(|| (backing, run.range.start()))
            }
            _ => None,
        }
    }
}
