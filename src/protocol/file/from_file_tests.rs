//! Writes of another file's bytes, in all combinations of cached and direct.

use std::os::unix::fs::FileExt as _;

use tempfile::TempDir;

use super::*;
use crate::block::Permission;
use crate::buffer::MemorySlice;
use crate::range::ByteRange;
use crate::runtime::{Config, Runtime};

const WRITER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ
        .union(Permission::WRITE)
        .union(Permission::RESIZE),
    shared: Permission::CONSISTENT_READ.union(Permission::WRITE_UNCHANGED),
};

fn run(test: impl AsyncFnOnce(Handle, TempDir)) {
    let runtime = Runtime::new(&Config::default()).expect("io_uring is there");
    let directory = TempDir::new().expect("a directory");
    runtime.block_on(test(runtime.handle(), directory));
}

/// A file of these bytes as a node's driver; `None` where the file system knows no direct I/O.
async fn open(
    handle: &Handle,
    place: &TempDir,
    name: &str,
    bytes: &[u8],
    direct: bool,
) -> Option<File> {
    let path = place.path().join(name);
    std::fs::write(&path, bytes).expect("a file");
    let options = FileOptions {
        filename: path.to_str().expect("UTF-8").to_owned(),
        kind: FileKind::Regular,
        writable: true,
        auto_read_only: false,
        direct,
        no_flush: false,
        locking: true,
    };
    let file = match File::open(handle, options).await {
        Err(error) if direct && error.message().contains("O_DIRECT") => return None,
        other => other.expect("open"),
    };
    file.prepare_permissions(WRITER, true)
        .expect("no other user");
    file.commit_permissions();
    Some(file)
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 5 * 31 + seed) as u8).collect()
}

fn range(start: u64, length: u64) -> ByteRange {
    ByteRange::between(start, start + length)
}

#[test]
fn every_combination_of_cached_and_direct_copies_the_bytes() {
    run(async |handle, place| {
        const MIB: usize = 1 << 20;
        let (content, before) = (pattern(5 * MIB, 3), pattern(MIB, 8));
        for (source_direct, target_direct) in
            [(false, false), (false, true), (true, false), (true, true)]
        {
            let source = open(&handle, &place, "source", &content, source_direct).await;
            let target = open(&handle, &place, "target", &before, target_direct).await;
            let (Some(source), Some(target)) = (source, target) else {
                eprintln!("skipped: no direct I/O here");
                continue;
            };
            // Unshared, shared and odd at the source; over the target's end.
            for (from, to, length) in [
                (0, 8192, 3 * MIB + 4096),
                (512, 4 * MIB, MIB),
                (1000, 0, 4096),
                (777, 4096, 4096),
            ] {
                let slice = source.file_slice(range(from as u64, length as u64));
                let slice = slice.expect("inside the file");
                let write = target.write(to as u64, slice.into(), WriteFlags::FUA);
                write.await.expect("write");
                assert!(target.size() >= (to + length) as u64);
                let memory = MemorySlice::zeroed(length);
                let read = target.read(to as u64, memory.clone().into());
                read.await.expect("read");
                let expected = &content[from..from + length];
                let how = (source_direct, target_direct, from, to);
                assert!(memory.to_vec() == expected, "{how:?}");
                // Another descriptor, through the cache.
                let mut other = vec![0; length];
                let file = std::fs::File::open(place.path().join("target")).expect("open");
                file.read_exact_at(&mut other, to as u64).expect("read");
                assert!(other == expected, "{how:?} through another descriptor");
            }
        }
    });
}

#[test]
fn only_bytes_before_the_end_are_a_slice() {
    run(async |handle, place| {
        let file = open(&handle, &place, "f", &[1; 1000], false).await;
        let file = file.expect("cached");
        assert!(file.file_slice(range(0, 1000)).is_some());
        // The node is longer than the file, by a part of a sector.
        assert!(file.file_slice(range(0, 1001)).is_none());
    });
}

#[test]
fn a_source_that_became_shorter_is_zeroes() {
    run(async |handle, place| {
        let source = open(&handle, &place, "source", &[7; 300_000], false).await;
        let target = open(&handle, &place, "target", &[1; 300_000], false).await;
        let (source, target) = (source.expect("cached"), target.expect("cached"));
        let slice = source.file_slice(range(0, 300_000)).expect("inside");
        let options = TruncateOptions::default();
        source.truncate(1024, options).await.expect("truncate");
        let write = target.write(0, slice.into(), WriteFlags::empty());
        write.await.expect("write");
        let on_disk = std::fs::read(place.path().join("target")).expect("file");
        assert_eq!(on_disk.len(), 300_000);
        let end = on_disk.iter().position(|byte| *byte != 7);
        assert_eq!(end, Some(1024));
        assert!(on_disk[1024..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn errors_tell_which_side_they_come_from() {
    run(async |handle, place| {
        let target = open(&handle, &place, "target", &[1; 8192], false).await;
        let target = target.expect("cached");
        let slice = |file: std::fs::File| {
            let source = SourceFile {
                descriptor: std::sync::Arc::new(file.into()),
                alignment: 1,
                direct: false,
                device: 0,
                name: "source".into(),
            };
            FileSlice::new(source, range(0, 4096))
        };
        let unreadable = slice(std::fs::File::open(place.path()).expect("a directory"));
        let write = target.write(0, unreadable.clone().into(), WriteFlags::empty());
        let error = write.await.expect_err("a directory has no bytes");
        assert_eq!(error.errno(), Errno::EISDIR);
        let told = unreadable.read_error().expect("the source's fault");
        assert_eq!(told.errno(), Errno::EISDIR);

        let path = place.path().join("target");
        let readable = slice(std::fs::File::open(path).expect("open"));
        target
            .prepare_permissions(Permissions::NONE, false)
            .expect("gives up writing");
        target.commit_permissions();
        let write = target.write(0, readable.clone().into(), WriteFlags::empty());
        let error = write.await.expect_err("open for reading only");
        assert_eq!(error.errno(), Errno::EBADF);
        assert!(readable.read_error().is_none(), "the target's fault");
    });
}
