use std::future::Future;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use tempfile::TempDir;

use super::*;
use crate::block::{ExtentKind, Permission};
use crate::buffer::MemorySlice;
use crate::error::ErrorKind;
use crate::runtime::{Config, Runtime};

const WRITER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ
        .union(Permission::WRITE)
        .union(Permission::RESIZE),
    shared: Permission::CONSISTENT_READ.union(Permission::WRITE_UNCHANGED),
};
const READER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ,
    shared: Permission::CONSISTENT_READ.union(Permission::WRITE_UNCHANGED),
};

fn run<T, F: Future<Output = T>>(test: impl FnOnce(Handle) -> F) -> T {
    let runtime = Runtime::new(&Config::default()).expect("io_uring is there");
    runtime.block_on(test(runtime.handle()))
}

fn scratch(content: &[u8]) -> (TempDir, FileOptions) {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("f");
    std::fs::File::create(&path)
        .and_then(|mut file| file.write_all(content))
        .expect("a file");
    let options = FileOptions {
        filename: path.to_str().expect("UTF-8").to_owned(),
        kind: FileKind::Regular,
        writable: true,
        auto_read_only: false,
        direct: false,
        no_flush: false,
        locking: true,
    };
    (directory, options)
}

fn hold(file: &File, users: Permissions, writable: bool) -> Result<()> {
    file.prepare_permissions(users, writable)?;
    file.commit_permissions();
    Ok(())
}

async fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let memory = MemorySlice::zeroed(length);
    memory.fill(0, length, 0xee);
    file.read(offset, memory.clone().into())
        .await
        .expect("read");
    memory.to_vec()
}

#[test]
fn past_the_end_there_are_zeroes() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[7; 1000]);
        let file = File::open(&handle, options).await.expect("open");
        assert_eq!(file.size(), 1024);
        let bytes = read(&file, 990, 100).await;
        assert_eq!(&bytes[..10], &[7; 10]);
        assert_eq!(&bytes[10..], &[0; 90]);
        assert_eq!(read(&file, 1 << 40, 16).await, vec![0; 16]);
    });
}

#[test]
fn direct_reads_of_an_odd_file_end_in_zeroes() {
    run(|handle| async move {
        let (_directory, mut options) = scratch(&[7; 5000]);
        options.direct = true;
        let file = match File::open(&handle, options).await {
            Ok(file) => file,
            Err(error) if error.message().contains("O_DIRECT") => return,
            Err(error) => panic!("{error}"),
        };
        let limits = file.limits();
        assert!(limits.request_alignment >= 512 && limits.memory_alignment >= 4);
        let bytes = read(&file, 0, 16384).await;
        assert_eq!(&bytes[..5000], &[7; 5000]);
        assert!(bytes[5000..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn writes_grow_the_file_and_reach_it() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[]);
        let path = options.filename.clone();
        let file = File::open(&handle, options).await.expect("open");
        let data = MemorySlice::from_bytes(&[9; 700]);
        file.write(100, data.into(), WriteFlags::FUA)
            .await
            .expect("write");
        file.flush().await.expect("flush");
        assert_eq!(file.size(), 1024);
        let on_disk = std::fs::read(path).expect("file");
        assert_eq!(on_disk.len(), 800);
        assert_eq!(&on_disk[100..], &[9; 700]);
    });
}

#[test]
fn zeroes_punch_keep_or_grow() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[5; 1 << 20]);
        let path = options.filename.clone();
        let file = File::open(&handle, options).await.expect("open");
        let range = |start: u64, end: u64| ByteRange::between(start, end);
        file.write_zeroes(range(0x10000, 0x20000), ZeroFlags::MAY_UNMAP)
            .await
            .expect("punch");
        file.write_zeroes(range(0x24001, 0x30000), ZeroFlags::empty())
            .await
            .expect("zero");
        file.write_zeroes(range(0xf0000, 0x120000), ZeroFlags::empty())
            .await
            .expect("grow");
        assert_eq!(file.size(), 0x120000);
        let on_disk = std::fs::read(path).expect("file");
        assert_eq!(on_disk.len(), 0x120000);
        let expected = |offset: usize| match offset {
            0x10000..0x20000 | 0x24001..0x30000 | 0xf0000.. => 0,
            _ => 5,
        };
        assert!(
            on_disk
                .iter()
                .enumerate()
                .all(|(offset, byte)| *byte == expected(offset))
        );
    });
}

#[test]
fn discard_leaves_a_hole_and_is_counted() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[5; 1 << 20]);
        let file = File::open(&handle, options).await.expect("open");
        let before = file.allocated_bytes().expect("stat");
        file.discard(ByteRange::between(0, 1 << 19))
            .await
            .expect("discard");
        assert!(file.allocated_bytes().expect("stat") < before);
        let counted = file.discards();
        assert_eq!((counted.succeeded, counted.bytes), (1, 1 << 19));
        let hole = file
            .block_status(ByteRange::between(0, 1 << 20))
            .await
            .expect("status");
        assert_eq!(hole, Extent::zero(1 << 19));
        let data = file
            .block_status(ByteRange::between(1 << 19, 1 << 20))
            .await
            .expect("status");
        assert_eq!(data, Extent::data(1 << 19, 1 << 19));
        let past = file
            .block_status(ByteRange::between(1 << 20, 1 << 21))
            .await
            .expect("status");
        assert!(matches!(past.kind, ExtentKind::Zero { .. }));
    });
}

#[test]
fn truncate_sets_the_length() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[5; 4096]);
        let path = options.filename.clone();
        let file = File::open(&handle, options).await.expect("open");
        for size in [512, 1 << 20] {
            file.truncate(size, TruncateOptions::default())
                .await
                .expect("truncate");
            assert_eq!(std::fs::metadata(&path).expect("stat").len(), size);
            assert_eq!(file.size(), size);
        }
        let error = file
            .truncate(1 << 63, TruncateOptions::default())
            .await
            .expect_err("too large");
        assert_eq!(error.errno(), Errno::EFBIG);
    });
}

#[test]
fn errors_of_opening_are_worded_as_qemu_does() {
    run(|handle| async move {
        let (directory, options) = scratch(&[]);
        let open = async |name: &str, kind| {
            let filename = directory
                .path()
                .join(name)
                .to_str()
                .expect("UTF-8")
                .to_owned();
            let options = FileOptions {
                filename,
                kind,
                ..options.clone()
            };
            let text = match File::open(&handle, options).await {
                Ok(_) => String::new(),
                Err(error) => error.message().to_owned(),
            };
            text.replace(&format!("{}/", directory.path().display()), "")
        };
        let missing = open("missing", FileKind::Regular).await;
        assert_eq!(
            missing,
            "Could not open 'missing': No such file or directory"
        );
        assert_eq!(
            open(".", FileKind::Regular).await,
            "Could not open '.': Is a directory"
        );
        let device = open("f", FileKind::Device).await;
        let expected = "'host_device' driver requires 'f' to be either a character or block device";
        assert_eq!(device, expected);
        nix::unistd::mkfifo(
            &directory.path().join("fifo"),
            nix::sys::stat::Mode::S_IRWXU,
        )
        .expect("a FIFO");
        let fifo = open("fifo", FileKind::Regular).await;
        assert_eq!(fifo, "'file' driver requires 'fifo' to be a regular file");
    });
}

#[test]
fn two_writers_are_in_each_others_way() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[0; 512]);
        let first = File::open(&handle, options.clone()).await.expect("open");
        let second = File::open(&handle, options).await.expect("open");
        hold(&first, WRITER, true).expect("nobody else");
        let error = hold(&second, WRITER, true).expect_err("locked");
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert_eq!(error.message(), "Failed to get \"write\" lock");
        let error = hold(&second, READER, true).expect_err("locked");
        assert_eq!(error.message(), "Failed to get shared \"write\" lock");
        hold(&second, Permissions::NONE, true).expect("wants nothing");
        hold(&first, READER, true).expect("gives up writing");
        hold(&second, READER, true).expect("two readers");
        first.close().await.expect("close");
        hold(&second, WRITER, true).expect("the other is closed");
    });
}

#[test]
fn an_aborted_change_leaves_the_locks_as_they_were() {
    run(|handle| async move {
        let (_directory, options) = scratch(&[0; 512]);
        let first = File::open(&handle, options.clone()).await.expect("open");
        let second = File::open(&handle, options).await.expect("open");
        hold(&first, READER, true).expect("nobody else");
        first
            .prepare_permissions(WRITER, true)
            .expect("nobody else");
        assert!(hold(&second, READER, true).is_err(), "prepared counts");
        first.abort_permissions();
        hold(&second, READER, true).expect("as before");
        let refused = first.prepare_permissions(WRITER, true);
        assert!(
            refused.is_err(),
            "the second reads and does not share write"
        );
        hold(&second, Permissions::NONE, true).expect("gives up");
        hold(&second, READER, true).expect("the refused one left no byte behind");
    });
}

#[test]
fn auto_read_only_opens_for_writing_only_while_somebody_writes() {
    run(|handle| async move {
        let (_directory, mut options) = scratch(&[0; 512]);
        options.auto_read_only = true;
        let file = File::open(&handle, options).await.expect("open");
        let write = async || {
            let data = MemorySlice::from_bytes(&[1; 512]);
            file.write(0, data.into(), WriteFlags::empty()).await
        };
        assert_eq!(write().await.expect_err("read-only").errno(), Errno::EBADF);
        hold(&file, WRITER, true).expect("reopened");
        write().await.expect("writable");
        hold(&file, READER, true).expect("reopened");
        assert_eq!(write().await.expect_err("read-only").errno(), Errno::EBADF);
        file.flush().await.expect("flushes what was written before");
    });
}

#[test]
fn a_file_that_was_renamed_is_reopened_all_the_same() {
    run(|handle| async move {
        let (directory, options) = scratch(&[3; 512]);
        let path = options.filename.clone();
        let file = File::open(&handle, options).await.expect("open");
        let moved = directory.path().join("moved");
        std::fs::rename(&path, &moved).expect("rename");
        std::fs::write(&path, [0xff; 512]).expect("another file of that name");
        hold(&file, READER, false).expect("reopened read-only");
        assert_eq!(read(&file, 0, 512).await, vec![3; 512]);
        hold(&file, WRITER, true).expect("reopened for writing");
        let data = MemorySlice::from_bytes(&[4; 512]);
        file.write(0, data.into(), WriteFlags::empty())
            .await
            .expect("write");
        let byte = &mut [0];
        std::fs::File::open(moved)
            .and_then(|file| file.read_exact_at(byte, 0))
            .expect("read");
        assert_eq!(*byte, [4]);
    });
}
