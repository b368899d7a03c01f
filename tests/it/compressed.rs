//! Makes some data clusters of an image compressed ones, as `qemu-img convert -c` would have them.

use flate2::{Compress, Compression, FlushCompress, Status};
use liveblk::testing::{Random, VolatileStore};

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// The image with about half of its data clusters compressed (deflate), several of them in one host
/// cluster where the refcounts are wide enough. The image is clean and has no leaks, before and after.
pub(crate) fn compress_some(store: &VolatileStore, random: &mut Random) -> VolatileStore {
    let mut image = Image {
        bytes: store.to_bytes(),
        shared: None,
    };
    for entry in image.l2_entries() {
        if random.percent(50) {
            image.compress(entry);
        }
    }
    VolatileStore::from_bytes(&image.bytes)
}

struct Image {
    bytes: Vec<u8>,
    /// A host cluster with compressed data, and how many bytes of it are used.
    shared: Option<(u64, u64)>,
}

impl Image {
    fn number(&self, at: u64) -> u64 {
        let field = &self.bytes[at as usize..at as usize + 8];
        u64::from_be_bytes(field.try_into().expect("eight bytes"))
    }

    fn cluster_bits(&self) -> u32 {
        u32::from(self.bytes[23])
    }

    fn refcount_order(&self) -> u32 {
        match self.bytes[7] {
            2 => 4,
            _ => u32::from(self.bytes[99]),
        }
    }

    /// Where the entries of all L2 tables lie.
    fn l2_entries(&self) -> Vec<u64> {
        let l1 = self.number(40);
        let entries = self.number(36) >> 32;
        let tables = (0..entries).map(|index| self.number(l1 + 8 * index) & OFFSET);
        tables
            .filter(|table| *table != 0)
            .flat_map(|table| (table..table + (1 << self.cluster_bits())).step_by(8))
            .collect()
    }

    fn compress(&mut self, entry: u64) {
        let mapping = self.number(entry);
        let host = mapping & OFFSET;
        if mapping & (COPIED | COMPRESSED | 1) != COPIED || host == 0 {
            return;
        }
        let size = 1 << self.cluster_bits();
        let mut cluster = vec![0; size as usize];
        let end = self.bytes.len().min((host + size) as usize);
        cluster[..end - host as usize].copy_from_slice(&self.bytes[host as usize..end]);
        let Some(data) = deflate(&cluster) else {
            return;
        };
        let place = self.place(host, data.len() as u64);
        let end = place as usize + data.len();
        self.bytes
            .resize(self.bytes.len().max(end.next_multiple_of(512)), 0);
        self.bytes[place as usize..end].copy_from_slice(&data);
        let sectors = (end as u64 - 1) / 512 - place / 512;
        let split = 62 - (self.cluster_bits() - 8);
        let mapping = COMPRESSED | sectors << split | place;
        self.bytes[entry as usize..entry as usize + 8].copy_from_slice(&mapping.to_be_bytes());
    }

    /// Room for compressed data: behind other such data, or in the data's own cluster.
    fn place(&mut self, own: u64, length: u64) -> u64 {
        let size = 1 << self.cluster_bits();
        let most = match self.refcount_order() {
            6 => u64::MAX,
            order => (1 << (1 << order)) - 1,
        };
        if let Some((host, used)) = self.shared
            && used + length <= size
            && self.refcount(host) < most
        {
            self.shared = Some((host, used + length));
            self.set_refcount(host, self.refcount(host) + 1);
            self.set_refcount(own, 0);
            return host + used;
        }
        self.shared = Some((own, length));
        own
    }

    /// Byte and first bit of a cluster's refcount, and how many bits it has.
    fn refcount_at(&self, host: u64) -> (usize, u32, u32) {
        let cluster = host >> self.cluster_bits();
        let order = self.refcount_order();
        let block_bits = self.cluster_bits() + 3 - order;
        let block = self.number(self.number(48) + 8 * (cluster >> block_bits));
        let bit = (cluster & ((1 << block_bits) - 1)) << order;
        ((block + bit / 8) as usize, (bit % 8) as u32, 1 << order)
    }

    fn refcount(&self, host: u64) -> u64 {
        let (byte, bit, width) = self.refcount_at(host);
        if width < 8 {
            return u64::from(self.bytes[byte]) >> bit & ((1 << width) - 1);
        }
        let bytes = &self.bytes[byte..byte + width as usize / 8];
        bytes
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    fn set_refcount(&mut self, host: u64, value: u64) {
        let (byte, bit, width) = self.refcount_at(host);
        if width < 8 {
            let mask = ((1u8 << width) - 1) << bit;
            self.bytes[byte] = self.bytes[byte] & !mask | (value as u8) << bit;
            return;
        }
        let length = width as usize / 8;
        self.bytes[byte..byte + length].copy_from_slice(&value.to_be_bytes()[8 - length..]);
    }
}

/// Raw deflate; `None` where that is not shorter.
fn deflate(cluster: &[u8]) -> Option<Vec<u8>> {
    let mut data = Vec::with_capacity(cluster.len() - 1);
    let mut stream = Compress::new(Compression::default(), false);
    let status = stream.compress_vec(cluster, &mut data, FlushCompress::Finish);
    (status.expect("deflate takes anything") == Status::StreamEnd && data.len() < cluster.len())
        .then_some(data)
}
