//! Malformed and hostile images: opening, reading and writing them ends, in success or in an error
//! that says what is wrong; never in a panic, a hang or a huge allocation.

use std::rc::Rc;

use liveblk::block::{
    Bitmap, BitmapFlags, DirtyBitmap, Graph, Node, TruncateOptions, WriteFlags, ZeroFlags,
};
use liveblk::buffer::MemorySlice;
use liveblk::error::Result;
use liveblk::range::ByteRange;
use liveblk::runtime::Handle;
use liveblk::testing::{
    Model, Power, Random, VolatileStore, Workload, WorkloadOptions, attach, disk_of, for_each_seed,
    full_access, simulate,
};

use super::chain::{Chain, Geometry, check_disk, open_image};

const MIB: u64 = 1 << 20;

/// Images of a few kinds, with data in them.
fn valid_image(seed: u64) -> (Geometry, Vec<u8>) {
    let mut random = Random::new(seed);
    let geometry = Geometry {
        cluster_bits: random.choose(&[9, 12, 16]),
        ..Geometry::draw(&mut random)
    };
    let size = 40 << geometry.cluster_bits.min(14);
    let made = geometry.clone();
    let bytes = simulate(seed, |handle| async move {
        let power = Power::new();
        let options = Default::default();
        let chain = Chain::create(&handle, &power, &made, options, size, seed).await;
        let guest = chain.guest.clone();
        let options = WorkloadOptions::default();
        let workload = Workload::new(&handle, guest, Model::zeroed(size), options, seed);
        workload.run(30).await;
        if made.version == 3 && seed.is_multiple_of(2) {
            add_bitmaps(&chain).await;
            workload.run(30).await;
        }
        if seed.is_multiple_of(4) {
            // As a crash leaves it: bitmaps in use.
            chain.guest.flush().await.expect("no fault");
            return chain.disks[0].to_bytes();
        }
        chain.close().await.expect("no fault");
        chain.disks[0].to_bytes()
    });
    (geometry, bytes)
}

async fn add_bitmaps(chain: &Chain) {
    let node = chain.guest.node();
    for granularity in [512, 65536] {
        let bits = DirtyBitmap::new(node.size(), granularity);
        let flags = BitmapFlags::ENABLED | BitmapFlags::PERSISTENT;
        let bitmap = Bitmap::new(format!("b{granularity}"), flags, bits);
        node.bitmaps().add(Rc::new(bitmap));
    }
    let store = node.driver().bitmap_store().expect("qcow2 stores bitmaps");
    store.update().await.expect("no fault");
}

/// An image of any bytes, as a fuzzer makes it.
#[allow(dead_code, reason = "for the fuzz target")]
pub(crate) fn abuse_any(bytes: &[u8]) {
    if bytes.len() <= MIB as usize {
        let geometry = Geometry::draw(&mut Random::new(bytes.len() as u64));
        abuse(&geometry, bytes.to_vec(), 1);
    }
}

/// Uses an image that may be anything. Returns why it could not be opened.
fn abuse(geometry: &Geometry, bytes: Vec<u8>, seed: u64) -> Option<String> {
    simulate(seed, |handle| async move {
        let refused = use_it(&handle, geometry, &bytes, seed, true).await;
        let writable = use_it(&handle, geometry, &bytes, seed, false).await;
        let disk = disk_of(&handle, &bytes, seed);
        if let Err(error) = check_disk(&disk).await {
            assert!(!error.message().is_empty());
        }
        refused.or(writable)
    })
}

async fn use_it(
    handle: &Handle,
    geometry: &Geometry,
    bytes: &[u8],
    seed: u64,
    read_only: bool,
) -> Option<String> {
    let disk = disk_of(handle, bytes, seed);
    let graph = Graph::new();
    let opened = open_image(&graph, "hostile", &disk, geometry, None, read_only).await;
    let node = match opened {
        Ok(node) => node,
        Err(error) => {
            assert!(error.message().len() > 5, "'{error}' says nothing");
            return Some(error.message().to_owned());
        }
    };
    let mut random = Random::new(seed);
    for _ in 0..40 {
        let outcome = request(&graph, &node, &mut random, read_only).await;
        if let Err(error) = outcome {
            assert!(error.message().len() > 5, "'{error}' says nothing");
        }
    }
    if let Err(error) = graph.release(&node).await {
        assert!(error.message().len() > 5, "'{error}' says nothing");
    }
    None
}

/// One request of any kind; the outcome is not looked at, as the image may be anything.
async fn request(
    graph: &Graph,
    node: &std::rc::Rc<Node>,
    random: &mut Random,
    read_only: bool,
) -> Result<()> {
    let mut permissions = full_access();
    if read_only {
        permissions.required = liveblk::block::Permission::CONSISTENT_READ;
    }
    let guest = attach(graph, node, permissions);
    let size = node.size();
    let length = (1 + random.below(128 << 10)).min(size);
    let offset = match random.below(3) {
        0 => size - length,
        _ => random.below(size - length + 1).min(random.below(4 * MIB)),
    };
    let range = ByteRange::between(offset, offset + length);
    let payload = || MemorySlice::zeroed(length as usize).into();
    node.set_monitor_owned(true);
    let kind = if read_only {
        random.below(2)
    } else {
        random.below(8)
    };
    let outcome = match kind {
        0 => guest.read(offset, payload()).await,
        1 if length > 0 => guest.block_status(range).await.map(|_| ()),
        2 | 3 => guest.write(offset, payload(), WriteFlags::FUA).await,
        4 => guest.write_zeroes(range, ZeroFlags::MAY_UNMAP).await,
        5 => guest.discard(range).await,
        6 if random.percent(30) => {
            let size = random.below(8 * MIB) / 512 * 512;
            guest.truncate(size, TruncateOptions::default()).await
        }
        _ => guest.flush().await,
    };
    graph.detach(&guest).await?;
    node.set_monitor_owned(false);
    outcome
}

/// Fields of the header: offset and bytes.
const FIELDS: [(usize, usize); 20] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 8),
    (112, 8),
];

fn put(bytes: &mut [u8], offset: usize, width: usize, value: u64) {
    bytes[offset..offset + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

fn take(bytes: &[u8], offset: usize, width: usize) -> u64 {
    let word = &bytes[offset..offset + width];
    word.iter()
        .fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

#[test]
fn every_header_field_at_and_beyond_its_bounds() {
    let before = peak_memory();
    for_each_seed("every_header_field", 3, |seed| {
        let (geometry, good) = valid_image(seed);
        assert_eq!(abuse(&geometry, good.clone(), seed), None);
        let mut refused = 0;
        for (offset, width) in FIELDS {
            let most = u64::MAX >> (64 - 8 * width);
            let now = take(&good, offset, width);
            let mut values = vec![
                0, 1, 2, 3, 7, 8, 9, 16, 21, 22, 63, 64, 511, 512, 1023, 1024,
            ];
            values.extend([
                most,
                most - 1,
                most >> 1,
                (most >> 1) + 1,
                most - 511,
                1 << 24,
            ]);
            values.extend([
                now + 1,
                now.wrapping_sub(1),
                now * 2,
                now + 512,
                now ^ (1 << 16),
            ]);
            values.extend([good.len() as u64, 1 << (4 * width), 1 << (7 * width)]);
            for value in values {
                let mut bad = good.clone();
                put(&mut bad, offset, width, value & most);
                refused += u64::from(abuse(&geometry, bad, seed).is_some());
            }
        }
        assert!(refused > 100, "only {refused} were refused");
    });
    assert_memory(before);
}

#[test]
fn mutated_images_of_all_kinds() {
    let before = peak_memory();
    for_each_seed("mutated_images", 60, |seed| {
        let (geometry, good) = valid_image(seed % 8);
        let mut random = Random::new(seed);
        for _ in 0..6 {
            let bad = mutate(&mut random, &good, geometry.cluster_bits);
            abuse(&geometry, bad, random.next_u64());
        }
    });
    assert_memory(before);
}

/// Flips bits, overwrites entries with plausible ones, copies clusters over others, cuts the file.
fn mutate(random: &mut Random, good: &[u8], cluster_bits: u32) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let clusters = (bytes.len() >> cluster_bits) as u64;
    for _ in 0..1 + random.below(8) {
        if bytes.len() < (2 << cluster_bits) {
            break;
        }
        let word = random.below(bytes.len() as u64 / 8) as usize * 8;
        // Metadata lies at the start.
        let word = if random.percent(70) {
            word % (8 << cluster_bits)
        } else {
            word
        };
        let word = word.min(bytes.len() - 8);
        let target = random.below(clusters + 3) << cluster_bits;
        match random.below(7) {
            0 => bytes[word + random.below(8) as usize] ^= 1 << random.below(8),
            1 => put(&mut bytes, word, 8, target | (1 << 63)),
            2 => put(&mut bytes, word, 8, target | random.below(512)),
            3 => put(&mut bytes, word, 8, (1 << 62) | random.next_u64() >> 2),
            4 => put(&mut bytes, word, 8, random.next_u64()),
            5 => {
                let whole = (bytes.len() >> cluster_bits) as u64;
                let from = (random.below(whole) << cluster_bits) as usize;
                let to = (random.below(whole) << cluster_bits) as usize;
                bytes.copy_within(from..from + (1 << cluster_bits), to);
            }
            _ if random.percent(20) => {
                let kept = 8 + random.below(bytes.len() as u64 - 8) as usize;
                bytes.truncate(kept);
            }
            _ => bytes[word..word + 8].fill(0),
        }
    }
    bytes
}

/// Files that are no images at all, or hardly.
#[test]
fn files_of_any_length_and_content() {
    let geometry = Geometry::draw(&mut Random::new(1));
    let (_, good) = valid_image(2);
    for length in (0..120).chain([511, 512, 513, 4096]) {
        let cut = good[..length.min(good.len())].to_vec();
        let refused = abuse(&geometry, cut, 1);
        assert!(
            length > 112 || refused.is_some(),
            "{length} bytes were opened"
        );
        let refused = abuse(&geometry, vec![0; length], 1);
        assert_eq!(refused.as_deref(), Some("Image is not in qcow2 format"));
    }
}

/// A disk of 2^60 bytes in a file that claims to be as large: nothing that large is allocated.
#[test]
fn a_huge_sparse_image() {
    let before = peak_memory();
    simulate(1, |handle| async move {
        let geometry = Geometry {
            version: 3,
            cluster_bits: 21,
            refcount_bits: 16,
            lazy_refcounts: false,
            tiny_caches: false,
            pass_discard: true,
        };
        let size = 1 << 50;
        let power = Power::new();
        let options = Default::default();
        let chain = Chain::create(&handle, &power, &geometry, options, size, 1).await;
        let payload = MemorySlice::from_bytes(&[7; 512]).into();
        let written = chain
            .guest
            .write(size - 512, payload, WriteFlags::FUA)
            .await;
        written.expect("there is space");
        let whole = ByteRange::between(0, size);
        let extent = chain.guest.block_status(whole).await;
        assert!(!extent.expect("no fault").is_allocated());
        chain.close().await.expect("no fault");
        let mut store: VolatileStore = chain.disks[0].store();
        store.truncate(1 << 60);
        let disk =
            liveblk::testing::SimulatedDisk::new(&handle, &power, Default::default(), store, 2);
        let result = check_disk(&disk).await.expect("a valid header");
        assert!(result.is_clean(), "{result:?}");
    });
    assert_memory(before);
}

/// The most memory that the process has had, in bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux has it");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("a number of KiB") * 1024
}

/// Other tests of this process need some memory too.
fn assert_memory(before: u64) {
    let grown = peak_memory() - before;
    assert!(grown < 1 << 30, "memory has grown by {grown:#x} bytes");
}
