//! What a disk of data does not show: what is copied, reused, kept back and undone.

use nix::errno::Errno;

use super::CacheSizes;
use super::create::CreateOptions;
use super::header::BackingReference;
use super::tests::Image;
use crate::block::{Child, Driver, Role, TruncateOptions, WriteFlags, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::range::ByteRange;
use crate::runtime::Handle;
use crate::testing::{DiskOperation, Fault, simulate};

const MIB: u64 = 1 << 20;

async fn chain(handle: &Handle, size: u64) -> (Image, Image) {
    let options = CreateOptions::new(size);
    let base = Image::new(handle, "base", options, None, CacheSizes::default()).await;
    base.write(0, &vec![7; size as usize]).await;
    let backing = BackingReference {
        file: "base".to_owned(),
        format: Some("qcow2".to_owned()),
    };
    let options = CreateOptions {
        backing: Some(backing),
        ..CreateOptions::new(size)
    };
    let top = Image::new(handle, "top", options, Some(&base), CacheSizes::default()).await;
    (base, top)
}

fn payload(value: u8, length: usize) -> crate::buffer::Payload {
    MemorySlice::from_bytes(&vec![value; length]).into()
}

fn file_of(image: &Image) -> std::rc::Rc<Child> {
    image.guest.node().child(Role::File).expect("a file")
}

#[test]
fn sequential_small_writes_copy_no_byte_of_the_backing_file_twice() {
    simulate(1, async |handle| {
        let (base, top) = chain(&handle, 4 * 65536).await;
        let before = base.guest.node().statistics().read_bytes;
        let writes = (0..4 * 16).map(|block| {
            let guest = top.guest.clone();
            handle.spawn(async move {
                let empty = WriteFlags::empty();
                guest.write(block * 4096, payload(1, 4096), empty).await
            })
        });
        for write in writes.collect::<Vec<_>>() {
            write.await.expect("no fault");
        }
        let read = base.guest.node().statistics().read_bytes - before;
        assert!(
            read <= 4 * 65536,
            "{read} bytes were read from the backing file"
        );
        assert_eq!(top.read(0, 4 * 65536).await, vec![1; 4 * 65536]);
        let before = base.guest.node().statistics().read_bytes;
        top.guest.flush().await.expect("no fault");
        assert_eq!(base.guest.node().statistics().read_bytes, before);
    });
}

#[test]
fn whole_clusters_are_written_without_a_read_and_as_one() {
    simulate(1, async |handle| {
        let (base, top) = chain(&handle, MIB).await;
        let reads = base.guest.node().statistics().reads;
        top.write(0, &[1]).await;
        let writes = file_of(&top).node().statistics().writes;
        top.write(128 << 10, &vec![2; 512 << 10]).await;
        assert_eq!(file_of(&top).node().statistics().writes, writes + 1);
        assert_eq!(base.guest.node().statistics().reads, reads + 1);
    });
}

#[test]
fn discarded_space_is_used_again_after_a_flush() {
    simulate(1, async |handle| {
        let options = CreateOptions::new(8 * MIB);
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        let mut sizes = Vec::new();
        for round in 0..5 {
            let start = round % 2 * 4 * MIB;
            image.write(start, &vec![3; 2 * MIB as usize]).await;
            let range = ByteRange::between(start, start + 2 * MIB);
            image.guest.discard(range).await.expect("no fault");
            image.guest.flush().await.expect("no fault");
            sizes.push(image.disk.size());
        }
        assert!(
            sizes[4] <= sizes[0] + 65536 * 2,
            "the file grows: {sizes:?}"
        );
        image.close().await;
        image.assert_clean().await;
    });
}

/// A cluster was discarded, flushed, given to another guest cluster and written, while a read of the
/// first one was in flight: the reader saw the other's data.
#[test]
fn a_cluster_is_not_used_again_while_a_read_of_it_is_in_flight() {
    simulate(1, async |handle| {
        let options = CreateOptions::new(8 * MIB);
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        image.write(0, &vec![3; 65536]).await;
        image.guest.flush().await.expect("no fault");
        let buffer = MemorySlice::zeroed(65536);
        let transfer = crate::block::Transfer {
            kind: crate::block::TransferKind::Read,
            offset: 0,
            length: 65536,
        };
        let node = image.guest.node();
        let forward = node.driver().forward(&transfer).expect("one run of data");
        let range = ByteRange::between(0, 65536);
        image.guest.discard(range).await.expect("no fault");
        image.guest.flush().await.expect("no fault");
        image.write(MIB, &vec![9; 65536]).await;
        forward
            .child
            .read(forward.offset, buffer.clone().into())
            .await
            .expect("no fault");
        assert!(!buffer.to_vec().contains(&9), "another's data");
        let size = image.disk.size();
        drop(forward);
        image.write(2 * MIB, &vec![4; 65536]).await;
        assert_eq!(image.disk.size(), size, "the cluster is free now");
    });
}

#[test]
fn a_failed_write_changes_no_mapping_and_leaks_nothing() {
    simulate(1, async |handle| {
        let (_base, top) = chain(&handle, 4 * MIB).await;
        top.write(3 * MIB, &[1; 512]).await;
        top.disk
            .fail(Fault::once(&[DiskOperation::Write], 0, Errno::EIO));
        let empty = WriteFlags::empty();
        let failed = top.guest.write(4096, payload(1, 4096), empty).await;
        assert_eq!(failed.expect_err("the rule").errno(), Errno::EIO);
        assert_eq!(top.read(4096, 4096).await, vec![7; 4096]);
        top.write(4096, &[2; 4096]).await;
        assert_eq!(top.read(0, 4096).await, vec![7; 4096]);
        top.close().await;
        top.assert_clean().await;
    });
}

/// Each flush and each write of metadata may fail once; the next flush makes up for it.
#[test]
fn a_flush_that_failed_can_be_repeated() {
    for operation in [DiskOperation::Flush, DiskOperation::Write] {
        for nth in 0..8 {
            simulate(1, async |handle| {
                let options = CreateOptions::new(MIB);
                let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
                image.write(0, &[1; 4096]).await;
                image.disk.fail(Fault::once(&[operation], nth, Errno::EIO));
                let first = errno(image.guest.flush().await);
                let struck = image.disk.faults_struck() == 1;
                assert_eq!(first, struck.then_some(Errno::EIO), "{operation:?} {nth}");
                assert_eq!(image.read(0, 512).await, vec![1; 512]);
                image.disk.heal();
                image.write(65536, &[2; 4096]).await;
                image.guest.flush().await.expect("the disk is well again");
                image.assert_clean().await;
            });
        }
    }
}

fn errno(result: Result<()>) -> Option<Errno> {
    result.err().map(|error| error.errno())
}

#[test]
fn a_discard_never_shows_the_backing_file() {
    simulate(1, async |handle| {
        let (_base, top) = chain(&handle, MIB).await;
        top.write(0, &vec![1; 65536]).await;
        let range = ByteRange::between(0, 256 << 10);
        top.guest.discard(range).await.expect("no fault");
        assert_eq!(top.read(0, 256 << 10).await, vec![0; 256 << 10]);
        assert_eq!(top.read(256 << 10, 512).await, vec![7; 512]);
    });
}

#[test]
fn a_longer_disk_shows_neither_backing_file_nor_former_bytes() {
    for version in [2, 3] {
        simulate(1, async |handle| {
            let options = CreateOptions::new(MIB);
            let base = Image::new(&handle, "base", options, None, CacheSizes::default()).await;
            base.write(0, &vec![7; MIB as usize]).await;
            let backing = BackingReference {
                file: "base".to_owned(),
                format: None,
            };
            let options = CreateOptions {
                version,
                backing: Some(backing),
                cluster_size: 4096,
                ..CreateOptions::new(300 << 10)
            };
            let top = Image::new(&handle, "top", options, Some(&base), CacheSizes::default()).await;
            top.write(100 << 10, &vec![1; 200 << 10]).await;
            let exact = TruncateOptions {
                exact: true,
                zero_new: false,
            };
            for size in [101 << 10 | 512, 64 * MIB, 200 << 10, 2 * MIB] {
                top.guest.truncate(size, exact).await.expect("no fault");
                assert_eq!(top.guest.node().size(), size);
            }
            let kept = [vec![7; 100 << 10], vec![1; 1536]].concat();
            let mut expected = kept;
            expected.resize(2 * MIB as usize, 0);
            let read = top.read(0, 2 * MIB as usize).await;
            assert_eq!(read.iter().zip(&expected).position(|(a, b)| a != b), None);
            top.close().await;
            top.assert_clean().await;
        });
    }
}

#[test]
fn a_backing_reference_is_replaced_and_removed() {
    simulate(1, async |handle| {
        let (_base, top) = chain(&handle, MIB).await;
        let node = top.guest.node();
        let driver = node.driver_as::<super::Qcow2>().expect("qcow2");
        for reference in [Some(("other.raw", "raw")), Some(("base", "qcow2")), None] {
            driver
                .change_backing_reference(reference)
                .await
                .expect("no fault");
            let now = driver.backing_reference();
            let now = now
                .as_ref()
                .map(|now| (&*now.file, now.format.as_deref().unwrap_or("")));
            assert_eq!(now, reference);
            top.assert_clean().await;
        }
        let long = "n".repeat(1024);
        assert!(
            driver
                .change_backing_reference(Some((&long, "raw")))
                .await
                .is_err()
        );
        assert_eq!(driver.backing_reference(), None);
    });
}

#[test]
fn zeroes_keep_or_give_back_space_as_they_are_asked() {
    simulate(1, async |handle| {
        let options = CreateOptions::new(MIB);
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        image.write(0, &vec![1; 128 << 10]).await;
        let status = async |start| {
            let range = ByteRange::between(start, start + 65536);
            image
                .guest
                .block_status(range)
                .await
                .expect("no fault")
                .kind
        };
        let (first, second) = (
            ByteRange::between(0, 65536),
            ByteRange::between(65536, 131072),
        );
        image
            .guest
            .write_zeroes(first, ZeroFlags::empty())
            .await
            .expect("no fault");
        image
            .guest
            .write_zeroes(second, ZeroFlags::MAY_UNMAP)
            .await
            .expect("no fault");
        let kept = matches!(
            status(0).await,
            crate::block::ExtentKind::Zero {
                host_offset: Some(_)
            }
        );
        let freed = matches!(
            status(65536).await,
            crate::block::ExtentKind::Zero { host_offset: None }
        );
        assert!(kept && freed);
        image.write(512, &[5; 512]).await;
        assert_eq!(image.read(0, 512).await, vec![0; 512]);
        assert_eq!(image.read(512, 512).await, vec![5; 512]);
        assert_eq!(image.read(1024, 512).await, vec![0; 512]);
    });
}
