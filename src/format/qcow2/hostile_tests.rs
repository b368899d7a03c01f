//! Images with broken metadata: errors, but no panic, no hang and no other damage.

use super::CacheSizes;
use super::tests::{Image, change, geometry};
use crate::block::{BlockEvent, Graph, WriteFlags, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::ErrorKind;
use crate::range::ByteRange;
use crate::testing::{Random, disk_of, for_each_seed, simulate};
use std::cell::RefCell;
use std::rc::Rc;

/// A small image with data, as bytes.
async fn written(handle: &crate::runtime::Handle, random: &mut Random) -> Vec<u8> {
    let size = 512 * (1 + random.below(500));
    let options = geometry(random, size);
    let image = Image::new(handle, "i", options, None, CacheSizes::default()).await;
    let mut model = vec![0; size as usize];
    for _ in 0..20 {
        change(&image, &mut model, random).await;
    }
    image.close().await;
    image.disk.to_bytes()
}

/// Changes a few bytes, mostly where metadata is.
fn damage(bytes: &mut [u8], random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let area = random.choose(&[112, 4096, 40000, bytes.len() as u64]);
        let at = random.below(area.min(bytes.len() as u64)) as usize;
        bytes[at] = random.choose(&[0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 2]);
    }
}

#[test]
fn damaged_images_give_errors_and_nothing_worse() {
    let mut opened = 0;
    for_each_seed("damaged_images_give_errors", 300, |seed| {
        opened += simulate(seed, async |handle| {
            let mut random = Random::new(seed);
            let mut bytes = written(&handle, &mut random).await;
            damage(&mut bytes, &mut random);
            let disk = disk_of(&handle, &bytes, seed);
            let graph = Graph::new();
            let Ok(image) = Image::open(&graph, "i", &disk, None, CacheSizes::default()).await
            else {
                return 0;
            };
            let size = image.guest.node().size().min(1 << 20);
            for _ in 0..30 {
                let start = random.below(size.max(1));
                let length = 1 + random.below(40000);
                let range = ByteRange::between(start, start + length);
                let payload = MemorySlice::zeroed(length as usize);
                payload.fill(0, length as usize, 1);
                // Whether a request fails depends on what was damaged; that it ends is the test.
                let _ = match random.below(5) {
                    0 => image.guest.read(start, payload.into()).await,
                    1 => image.guest.write_zeroes(range, ZeroFlags::MAY_UNMAP).await,
                    2 => image.guest.discard(range).await,
                    3 => image.guest.flush().await,
                    _ => {
                        image
                            .guest
                            .write(start, payload.into(), WriteFlags::empty())
                            .await
                    }
                };
            }
            let _ = image.guest.node().driver().close().await;
            1
        });
    });
    assert!(
        opened > 20,
        "only {opened} images could be opened: the damage is too great"
    );
}

/// An L2 entry names the refcount block: writing there would destroy the image.
#[test]
fn an_entry_over_metadata_is_reported_and_the_image_marked() {
    simulate(1, async |handle| {
        let options = super::create::CreateOptions::new(1 << 20);
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        image.write(0, &[1; 512]).await;
        image.close().await;
        let mut bytes = image.disk.to_bytes();
        let entry = |bytes: &[u8], at: usize| super::table::big_endian(&bytes[at..]) & !(1 << 63);
        let l1 = entry(&bytes, 40) as usize;
        let l2 = entry(&bytes, l1) as usize;
        let block = entry(&bytes, entry(&bytes, 48) as usize);
        bytes[l2..l2 + 8].copy_from_slice(&(block | 1 << 63).to_be_bytes());
        let disk = disk_of(&handle, &bytes, 1);
        let graph = Graph::new();
        let events = Rc::new(RefCell::new(Vec::new()));
        let seen = events.clone();
        graph.on_event(move |event| seen.borrow_mut().push(event));
        let image = Image::open(&graph, "i", &disk, None, CacheSizes::default()).await;
        let image = image.expect("the header is sound");
        let write = async || {
            let payload = MemorySlice::from_bytes(&[2; 512]).into();
            image.guest.write(0, payload, WriteFlags::empty()).await
        };
        assert_eq!(
            write().await.expect_err("not written").kind(),
            ErrorKind::Corrupt
        );
        assert_eq!(
            write().await.expect_err("not written").errno(),
            nix::errno::Errno::EIO
        );
        image.read(65536, 512).await;
        let events = events.take();
        let [BlockEvent::ImageCorrupted { fatal, message, .. }] = &events[..] else {
            panic!("one event: {events:?}");
        };
        assert!(*fatal && message.starts_with("Preventing invalid write on metadata"));
        assert_eq!(disk.to_bytes()[79] & 2, 2, "the corrupt mark");
        let again = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default()).await;
        let error = again.err().expect("corrupt");
        assert_eq!(
            error.message(),
            "qcow2: Image is corrupt; cannot be opened read/write"
        );
    });
}
