//! Block status: what this layer says of a range.

use crate::block::{Extent, ExtentKind};
use crate::error::Result;
use crate::range::ByteRange;

use super::Qcow2;
use super::layout::Mapping;
use super::lookup::{Purpose, Run};

/// Runs looked at for one answer.
const MOST_RUNS: usize = 64;

impl Qcow2 {
    pub(super) async fn status(&self, range: ByteRange) -> Result<Extent> {
        let (run, _) = self.find(range, Purpose::Read).await?;
        let mut extent = Extent {
            length: run.range.length(),
            kind: self.kind_of(&run),
        };
        for _ in 1..MOST_RUNS {
            let start = range.start() + extent.length;
            if start == range.end() {
                break;
            }
            let left = ByteRange::between(start, range.end());
            let (next, _) = self.find(left, Purpose::Read).await?;
            if self.kind_of(&next) != continued(extent) {
                break;
            }
            extent.length += next.range.length();
        }
        Ok(extent)
    }

    fn kind_of(&self, run: &Run) -> ExtentKind {
        let inside = self.geometry.in_cluster(run.range.start());
        match run.mapping {
            Mapping::Unallocated => ExtentKind::Unallocated,
            Mapping::Zero => ExtentKind::Zero { host_offset: None },
            Mapping::ZeroAllocated(host) => ExtentKind::Zero {
                host_offset: Some(host.plus(inside).0),
            },
            Mapping::Data(host) => ExtentKind::Data {
                host_offset: Some(host.plus(inside).0),
                compressed: false,
            },
            Mapping::Compressed(_) => ExtentKind::Data {
                host_offset: None,
                compressed: true,
            },
        }
    }
}

/// What must follow an extent to be a part of it.
fn continued(extent: Extent) -> ExtentKind {
    let further = |offset: Option<u64>| offset.map(|offset| offset + extent.length);
    match extent.kind {
        ExtentKind::Data {
            host_offset,
            compressed,
        } => ExtentKind::Data {
            host_offset: further(host_offset),
            compressed,
        },
        ExtentKind::Zero { host_offset } => ExtentKind::Zero {
            host_offset: further(host_offset),
        },
        ExtentKind::Unallocated => ExtentKind::Unallocated,
    }
}
