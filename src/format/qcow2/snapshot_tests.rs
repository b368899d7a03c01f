//! Images with internal snapshots, which QEMU made, written here: no snapshot changes.

use std::path::Path;

use super::qemu_tests::{load, run, workshop};
use super::tests::{Image, change};
use super::{CacheSizes, Qcow2};
use crate::block::{Graph, TruncateOptions, WriteFlags, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::ErrorKind;
use crate::range::ByteRange;
use crate::runtime::Handle;
use crate::testing::{
    DiskOperation, DiskOptions, Fault, Power, Random, SimulatedDisk, VolatileStore, disk_of,
    for_each_seed, simulate,
};
use nix::errno::Errno;

async fn open(disk: &SimulatedDisk) -> crate::error::Result<Image> {
    Image::open(&Graph::new(), "i", disk, None, CacheSizes::default()).await
}

/// An image with data, compressed data and a snapshot of both; what the snapshot holds.
fn with_snapshot(directory: &Path) -> (Vec<u8>, Vec<u8>) {
    let create = "qemu-img create -f qcow2 -o cluster_size=4k image 1M";
    run(directory, create);
    let writes = "qemu-io -c 'write -P 5 0 512k' -c 'write -c -P 6 512k 4k' image";
    run(directory, writes);
    run(directory, "qemu-img snapshot -c one image");
    let bytes = std::fs::read(directory.join("image")).expect("the image");
    (bytes, content_of(directory, "one"))
}

/// QEMU finds leaks at most in what is left, and the snapshot as it was.
fn judge(directory: &Path, left: Vec<u8>, snapshot: &[u8], what: &str) {
    std::fs::write(directory.join("image"), left).expect("space");
    let repair = "qemu-img check -r leaks -f qcow2 image";
    run(directory, repair);
    assert!(
        content_of(directory, "one") == snapshot,
        "{what}: the snapshot changed"
    );
}

/// The disk as QEMU reads it in a snapshot.
fn content_of(directory: &Path, snapshot: &str) -> Vec<u8> {
    let line = format!("qemu-img convert -f qcow2 -O raw -l {snapshot} image content");
    run(directory, &line);
    std::fs::read(directory.join("content")).expect("converted")
}

/// Random changes between snapshots, one of them thrown away again: whoever looks into a snapshot finds
/// what the disk held when it was made.
#[test]
fn snapshots_keep_their_content_while_the_image_is_written() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    for_each_seed("snapshots_keep_their_content", 10, |seed| {
        let mut random = Random::new(seed);
        let size = 512 * (1 + random.below(1500));
        let cluster = random.choose(&["512", "4k", "64k"]);
        let version = random.choose(&["compat=1.1", "compat=1.1,refcount_bits=8", "compat=0.10"]);
        let mut model = vec![7; size as usize];
        std::fs::write(directory.join("raw"), &model).expect("space");
        let compress = random.choose(&["", "-c"]);
        let options = format!("{compress} -o cluster_size={cluster},{version}");
        let line = format!("qemu-img convert -f raw -O qcow2 {options} raw image");
        run(directory, &line);
        let mut kept = Vec::new();
        for round in 0..4 {
            run(directory, &format!("qemu-img snapshot -c s{round} image"));
            kept.push((format!("s{round}"), model.clone()));
            if round == 2 {
                run(directory, "qemu-img snapshot -d s1 image");
                kept.remove(1);
            }
            let bytes = simulate(seed, async |handle| {
                let disk = load(&handle, &directory.join("image"));
                let image = open(&disk).await.expect("QEMU's image");
                for _ in 0..15 {
                    change(&image, &mut model, &mut random).await;
                }
                image.close().await;
                image.assert_clean().await;
                image.disk.to_bytes()
            });
            std::fs::write(directory.join("image"), bytes).expect("space");
            run(directory, "qemu-img check -f qcow2 image");
            std::fs::write(directory.join("raw"), &model).expect("space");
            run(directory, "qemu-img compare -f raw -F qcow2 raw image");
            for (name, expected) in &kept {
                let found = content_of(directory, name);
                assert!(found == *expected, "{name} changed in round {round}");
            }
        }
    });
}

/// Values that a byte may have after power failed: the one that was flushed, and later ones.
struct Promise {
    flushed: Vec<u8>,
    later: Vec<(ByteRange, u8)>,
}

impl Promise {
    fn flush(&mut self) {
        for (range, value) in self.later.drain(..) {
            self.flushed[range.start() as usize..range.end() as usize].fill(value);
        }
    }

    fn allows(&self, at: usize, found: u8) -> bool {
        let mut later = self.later.iter();
        found == self.flushed[at]
            || later.any(|(range, value)| {
                (range.start()..range.end()).contains(&(at as u64)) && found == *value
            })
    }
}

/// Writes, zeroes and discards over what the snapshot uses. Faults are the caller's matter.
async fn overwrite(image: &Image, random: &mut Random, promise: &mut Promise) {
    for _ in 0..25 {
        let start = random.below(600 << 10);
        let range = ByteRange::between(start, start + 1 + random.below(20000));
        let value = match random.below(5) {
            0 => 0,
            _ => 10 + random.below(200) as u8,
        };
        promise.later.push((range, value));
        if value == 0 {
            let _ = image.guest.write_zeroes(range, ZeroFlags::MAY_UNMAP).await;
        } else {
            let payload = MemorySlice::zeroed(range.length() as usize);
            payload.fill(0, range.length() as usize, value);
            let written = image
                .guest
                .write(start, payload.into(), WriteFlags::empty());
            let _ = written.await;
        }
        if random.percent(20) && image.guest.flush().await.is_ok() {
            promise.flush();
        }
    }
}

/// Power fails at some disk operation of a run; what is left, and what was promised of it.
fn crashed(start: &[u8], content: &[u8], seed: u64) -> (Vec<u8>, Promise) {
    simulate(seed, async |handle| {
        let mut random = Random::new(seed);
        let power = Power::new();
        let store = VolatileStore::from_bytes(start);
        let disk = SimulatedDisk::new(&handle, &power, DiskOptions::default(), store, seed);
        let mut promise = Promise {
            flushed: content.to_vec(),
            later: Vec::new(),
        };
        let image = open(&disk).await.expect("QEMU's image");
        power.fail_after(1 + random.below(150));
        power
            .run(overwrite(&image, &mut random, &mut promise))
            .await;
        (disk.crash(&mut random).to_bytes(), promise)
    })
}

#[test]
fn snapshots_survive_a_crash_anywhere() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let (start, snapshot) = with_snapshot(directory);
    for_each_seed("snapshots_survive_a_crash", 60, |seed| {
        let (left, promise) = crashed(&start, &snapshot, seed);
        judge(directory, left, &snapshot, "after a crash");
        run(directory, "qemu-img convert -f qcow2 -O raw image now");
        let now = std::fs::read(directory.join("now")).expect("converted");
        let wrong = (0..now.len()).find(|at| !promise.allows(*at, now[*at]));
        assert_eq!(
            wrong, None,
            "a byte that nobody wrote or a flushed one lost"
        );
    });
}

#[test]
fn snapshots_survive_a_fault_anywhere() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let (start, snapshot) = with_snapshot(directory);
    let all = [
        DiskOperation::Read,
        DiskOperation::Write,
        DiskOperation::Flush,
    ];
    let mut struck = 0;
    for_each_seed("snapshots_survive_a_fault", 60, |seed| {
        let left = simulate(seed, async |handle| {
            let disk = disk_of(&handle, &start, seed);
            let image = open(&disk).await.expect("QEMU's image");
            let mut random = Random::new(seed);
            let kind = random.choose(&all);
            disk.fail(Fault::once(&[kind], 1 + random.below(40), Errno::EIO));
            let mut promise = Promise {
                flushed: snapshot.clone(),
                later: Vec::new(),
            };
            overwrite(&image, &mut random, &mut promise).await;
            struck += disk.faults_struck();
            disk.heal();
            image.close().await;
            disk.to_bytes()
        });
        judge(directory, left, &snapshot, "after a fault");
    });
    assert!(struck > 20, "faults struck {struck} times only");
}

#[test]
fn a_disk_with_snapshots_changes_its_size_where_they_know_theirs() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let exact = TruncateOptions {
        exact: true,
        zero_new: false,
    };
    let (bytes, snapshot) = with_snapshot(directory);
    for size in [5 << 20, 256 << 10] {
        let left = simulate(1, async |handle| {
            let image = open(&disk_of(&handle, &bytes, 1))
                .await
                .expect("QEMU's image");
            let resized = image.guest.truncate(size, exact).await;
            resized.expect("snapshots of version 3 know their size");
            image.close().await;
            image.assert_clean().await;
            image.disk.to_bytes()
        });
        std::fs::write(directory.join("image"), left).expect("space");
        run(directory, "qemu-img check -f qcow2 image");
        run(directory, "qemu-img snapshot -a one image");
        run(directory, "qemu-img convert -f qcow2 -O raw image now");
        let now = std::fs::read(directory.join("now")).expect("converted");
        assert!(now == snapshot, "{size}: the snapshot changed");
        run(directory, "qemu-img check -f qcow2 image");
    }
    run(directory, "qemu-img create -f qcow2 -o compat=0.10 old 1M");
    run(directory, "qemu-img snapshot -c one old");
    simulate(1, async |handle| {
        let image = open(&load(&handle, &directory.join("old")))
            .await
            .expect("QEMU's image");
        let error = image
            .guest
            .truncate(5 << 20, exact)
            .await
            .expect_err("version 2");
        assert_eq!(
            error.message(),
            "Can't resize a v2 image which has snapshots"
        );
    });
}

/// The message that refuses to open these bytes for writing.
async fn refusal(handle: &Handle, bytes: &[u8]) -> String {
    let error = open(&disk_of(handle, bytes, 1))
        .await
        .err()
        .expect("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidImage);
    error.message().to_owned()
}

#[test]
fn damaged_snapshot_tables_are_not_written() {
    let Some(directory) = workshop() else { return };
    let (bytes, _) = with_snapshot(directory.path());
    let field = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let table = field(64) as usize;
    let with = |changes: &[(usize, &[u8])]| {
        let mut bytes = bytes.clone();
        for (at, new) in changes {
            bytes[*at..*at + new.len()].copy_from_slice(new);
        }
        bytes
    };
    let active = field(40).to_be_bytes();
    let far = (1_u64 << 55).to_be_bytes();
    let cases: [(Vec<u8>, &str); 6] = [
        (with(&[(table, &active)]), "overlaps other metadata"),
        (with(&[(table, &far)]), "has an invalid L1 table at"),
        (with(&[(table + 7, &[8])]), "has an invalid L1 table at"),
        (
            with(&[(table + 8, &[0xff; 4])]),
            "has an invalid L1 table at",
        ),
        (with(&[(table + 36, &[0xff; 4])]), "Too much extra metadata"),
        (with(&[(64, &active)]), "overlaps other metadata"),
    ];
    simulate(1, async |handle| {
        for (bytes, expected) in &cases {
            let message = refusal(&handle, bytes).await;
            assert!(message.contains(expected), "{message}, not {expected}");
        }
        let dirty = refusal(&handle, &with(&[(79, &[1])])).await;
        assert!(dirty.contains("it has internal snapshots"), "{dirty}");
    });
}

#[test]
fn random_damage_to_a_snapshot_table_gives_errors_and_nothing_worse() {
    let Some(directory) = workshop() else { return };
    let (start, content) = with_snapshot(directory.path());
    let table = u64::from_be_bytes(start[64..72].try_into().expect("8 bytes")) as usize;
    let (mut opened, mut changes) = (0, 0);
    for_each_seed("random_damage_to_a_snapshot_table", 100, |seed| {
        simulate(seed, async |handle| {
            let mut random = Random::new(seed);
            let mut bytes = start.clone();
            let at = table + random.below(64) as usize;
            bytes[at] = random.choose(&[0, 1, 0x7f, 0xff, bytes[at] ^ 2]);
            let Ok(image) = open(&disk_of(&handle, &bytes, seed)).await else {
                return;
            };
            opened += 1;
            let mut promise = Promise {
                flushed: content.clone(),
                later: Vec::new(),
            };
            overwrite(&image, &mut random, &mut promise).await;
            let node = image.guest.node();
            let qcow2 = node.driver_as::<Qcow2>().expect("a qcow2 image");
            for _ in 0..4 {
                let changed = match random.below(3) {
                    0 => qcow2.create_snapshot("new", (0, 0)).await,
                    _ if qcow2.snapshots().is_empty() => break,
                    1 => qcow2.delete_snapshot(0).await,
                    _ => qcow2.apply_snapshot(0).await,
                };
                changes += u64::from(changed.is_ok());
            }
        });
    });
    assert!(changes > 10, "{changes} changes of snapshots went well");
    assert!(opened > 10 && opened < 100, "{opened} of 100 were opened");
}
