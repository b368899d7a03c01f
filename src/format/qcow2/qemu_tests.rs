//! Images made and judged by qemu-img and qemu-io.

use std::path::Path;
use std::process::Command;

use super::CacheSizes;
use super::create::CreateOptions;
use super::header::CompressionType;
use super::tests::{Image, change, geometry};
use crate::block::{Extent, ExtentKind, Graph, TruncateOptions, WriteFlags};
use crate::buffer::MemorySlice;
use crate::error::ErrorKind;
use crate::range::ByteRange;
use crate::testing::{Random, SimulatedDisk, disk_of, for_each_seed, simulate};

/// A temporary directory to work in; `None`, said aloud, where QEMU's tools are missing.
pub(super) fn workshop() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return None;
    }
    Some(tempfile::tempdir().expect("a temporary directory"))
}

/// Runs a tool to its success; its standard output.
pub(super) fn run(directory: &Path, line: &str) -> String {
    let mut words = Vec::new();
    for (index, part) in line.split('\'').enumerate() {
        match index % 2 {
            0 => words.extend(part.split_whitespace().map(str::to_owned)),
            _ => words.push(part.to_owned()),
        }
    }
    let output = Command::new(&words[0])
        .args(&words[1..])
        .current_dir(directory)
        .output()
        .expect("the tool starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {text}{errors}");
    text
}

pub(super) fn load(handle: &crate::runtime::Handle, path: &Path) -> SimulatedDisk {
    disk_of(handle, &std::fs::read(path).expect("the image"), 3)
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at / 7 % 251) as u8).collect()
}

#[test]
fn images_of_qemu_read_as_qemu_reads_them() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    std::fs::write(directory.join("raw"), pattern(3 << 20)).expect("space");
    let options = [
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "compression_type=zstd",
        "refcount_bits=1,cluster_size=4k",
        "refcount_bits=64",
        "lazy_refcounts=on",
    ];
    for option in options {
        for compress in ["", "-c"] {
            let line = format!("qemu-img convert -f raw -O qcow2 {compress} -o {option} raw image");
            run(directory, &line);
            run(
                directory,
                "qemu-io -c 'write -z 4096 5000' -c 'write -P 9 100000 70001' image",
            );
            run(directory, "qemu-img convert -f qcow2 -O raw image expected");
            let expected = std::fs::read(directory.join("expected")).expect("converted");
            simulate(1, async |handle| {
                let disk = load(&handle, &directory.join("image"));
                let image = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default())
                    .await
                    .expect("QEMU's image");
                let read = image.read(0, expected.len()).await;
                assert!(read == expected, "{option} {compress}");
                let part = image.read(65000, 3001).await;
                assert!(part == expected[65000..68001], "{option} {compress}");
            });
        }
    }
}

#[test]
fn images_written_here_are_sound_for_qemu() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    for_each_seed("images_written_here_are_sound", 12, |seed| {
        let (bytes, model) = simulate(seed, async |handle| {
            let mut random = Random::new(seed);
            let size = 512 * (1 + random.below(3000));
            let options = geometry(&mut random, size);
            let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
            let mut model = vec![0; size as usize];
            for _ in 0..60 {
                change(&image, &mut model, &mut random).await;
            }
            image.close().await;
            (image.disk.to_bytes(), model)
        });
        std::fs::write(directory.join("image"), bytes).expect("space");
        std::fs::write(directory.join("raw"), model).expect("space");
        run(directory, "qemu-img check -f qcow2 image");
        run(directory, "qemu-img compare -f raw -F qcow2 raw image");
    });
}

#[test]
fn compressed_images_are_overwritten_soundly() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    for_each_seed("compressed_images_are_overwritten", 8, |seed| {
        let mut random = Random::new(seed);
        let mut model = pattern(512 * (1 + random.below(2000) as usize));
        std::fs::write(directory.join("raw"), &model).expect("space");
        let cluster = random.choose(&["512", "4k", "64k"]);
        let line =
            format!("qemu-img convert -f raw -O qcow2 -c -o cluster_size={cluster} raw image");
        run(directory, &line);
        let bytes = simulate(seed, async |handle| {
            let disk = load(&handle, &directory.join("image"));
            let image = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default())
                .await
                .expect("QEMU's image");
            for _ in 0..40 {
                change(&image, &mut model, &mut random).await;
            }
            image.close().await;
            image.disk.to_bytes()
        });
        std::fs::write(directory.join("image"), bytes).expect("space");
        std::fs::write(directory.join("raw"), &model).expect("space");
        run(directory, "qemu-img check -f qcow2 image");
        run(directory, "qemu-img compare -f raw -F qcow2 raw image");
    });
}

/// Clusters of noise, of patterns and of zeroes, one after the other and over others, in every geometry.
#[test]
fn what_is_compressed_here_is_read_by_qemu() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    for_each_seed("what_is_compressed_here", 16, |seed| {
        let (bytes, model) = simulate(seed, async |handle| {
            let mut random = Random::new(seed);
            let size = 512 * (100 + random.below(3000));
            let mut options = geometry(&mut random, size);
            if options.version == 3 && random.percent(50) {
                options.compression = CompressionType::Zstd;
            }
            let cluster = options.cluster_size;
            let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
            let mut model = vec![0; size as usize];
            for round in 0..40 {
                let start = random.below(size) / cluster * cluster;
                let end = (start + cluster * (1 + random.below(8))).min(size);
                let part = &mut model[start as usize..end as usize];
                let kind = random.below(3);
                for byte in &mut *part {
                    *byte = match kind {
                        0 => random.next_u64() as u8,
                        1 => round,
                        _ => (random.next_u64() % 3) as u8,
                    };
                }
                let payload = MemorySlice::from_bytes(part).into();
                let written = image.guest.write(start, payload, WriteFlags::COMPRESSED);
                written.await.expect("no fault");
                if random.percent(20) {
                    change(&image, &mut model, &mut random).await;
                }
                let read = image.read(start, (end - start) as usize).await;
                assert!(read == model[start as usize..end as usize], "{start:#x}");
            }
            image.close().await;
            (image.disk.to_bytes(), model)
        });
        std::fs::write(directory.join("image"), bytes).expect("space");
        std::fs::write(directory.join("raw"), model).expect("space");
        run(directory, "qemu-img check -f qcow2 image");
        run(directory, "qemu-img compare -f raw -F qcow2 raw image");
    });
}

/// Refcount blocks of 64 clusters and a table for 2 MiB: both grow, in the file and by the L1 table,
/// which needs more clusters than a block counts.
#[test]
fn tables_grow_beyond_what_they_can_count() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let bytes = simulate(1, async |handle| {
        let options = CreateOptions {
            cluster_size: 512,
            refcount_bits: 64,
            ..CreateOptions::new(8 << 20)
        };
        let image = Image::new(&handle, "i", options, None, CacheSizes::default()).await;
        for piece in 0..128 {
            let bytes = vec![piece as u8 + 1; 65536];
            image.write(piece << 16, &bytes).await;
        }
        let exact = TruncateOptions {
            exact: true,
            zero_new: false,
        };
        image
            .guest
            .truncate(1 << 30, exact)
            .await
            .expect("no fault");
        image.write((1 << 30) - 65536, &[200; 65536]).await;
        for piece in 0..128 {
            let read = image.read(piece << 16, 65536).await;
            assert!(read == vec![piece as u8 + 1; 65536], "piece {piece}");
        }
        image.close().await;
        image.assert_clean().await;
        image.disk.to_bytes()
    });
    std::fs::write(directory.join("image"), bytes).expect("space");
    run(directory, "qemu-img check -f qcow2 image");
}

/// While it is open the bitmap is marked in use, and our own autoclear bit says that it is true all the same;
/// closed, it is as QEMU would have left it.
#[test]
fn a_bitmap_of_qemu_is_kept_up_to_date() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    run(directory, "qemu-img create -f qcow2 image 1M");
    run(directory, "qemu-img bitmap --add image b");
    simulate(1, async |handle| {
        let disk = load(&handle, &directory.join("image"));
        let image = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default())
            .await
            .expect("QEMU's image");
        image.read(0, 512).await;
        image.guest.flush().await.expect("no fault");
        let autoclear = || (disk.to_bytes()[88], disk.to_bytes()[95]);
        assert_eq!(autoclear(), (0x80, 1), "the bitmap is kept");
        image.write(0, &[1; 512]).await;
        assert_eq!(autoclear(), (0x80, 1), "the bitmap is kept");
        image.close().await;
        assert_eq!(autoclear(), (0, 1), "the bitmap is consistent");
        std::fs::write(directory.join("image"), disk.to_bytes()).expect("space");
    });
    let info = run(directory, "qemu-img info image");
    assert!(info.contains("[0]: auto"), "{info}");
    run(directory, "qemu-img check -f qcow2 image");
    run(directory, "qemu-img bitmap --clear image b");
}

/// QEMU was killed with lazy refcounts: mappings without refcounts, under the dirty mark.
#[test]
fn a_dirty_image_is_counted_anew() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    run(
        directory,
        "qemu-img create -f qcow2 -o lazy_refcounts=on image 64M",
    );
    let writes = "-c 'write -P 5 0 1M' -c 'write -P 6 40M 1M' -c 'sigraise 9'";
    let killed = Command::new("sh")
        .arg("-c")
        .arg(format!("qemu-io {writes} image"))
        .current_dir(directory)
        .output()
        .expect("the tool starts");
    assert!(!killed.status.success(), "it was to be killed");
    simulate(1, async |handle| {
        let disk = load(&handle, &directory.join("image"));
        let image = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default())
            .await
            .expect("a dirty image");
        image.write(20 << 20, &[7; 70000]).await;
        image.close().await;
        image.assert_clean().await;
        assert_eq!(image.read(40 << 20, 3).await, [6, 6, 6]);
        assert_eq!(image.read(0, 3).await, [5, 5, 5]);
        std::fs::write(directory.join("image"), disk.to_bytes()).expect("space");
    });
    run(directory, "qemu-img check -f qcow2 image");
}

#[test]
fn images_with_unknown_features_are_not_written() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    run(
        directory,
        "qemu-img create -f qcow2 -o extended_l2=on,cluster_size=16k extended 1M",
    );
    run(
        directory,
        "qemu-img create -f qcow2 -o data_file=data external 1M",
    );
    let cases = [
        (
            "extended",
            "Unsupported qcow2 feature(s): extended L2 entries",
        ),
        (
            "external",
            "Unsupported qcow2 feature(s): external data file",
        ),
    ];
    simulate(1, async |handle| {
        for (name, text) in cases {
            let disk = load(&handle, &directory.join(name));
            let opened = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default()).await;
            let error = opened.err().expect("not supported");
            assert_eq!(error.message(), text);
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    });
}

#[test]
fn block_status_says_what_qemu_img_map_says() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    run(directory, "qemu-img create -f qcow2 image 4M");
    let writes = "-c 'write 0 128k' -c 'write -z 192k 64k' -c 'write 1M 1' -c 'write -c 2M 64k'";
    run(directory, &format!("qemu-io {writes} image"));
    simulate(1, async |handle| {
        let disk = load(&handle, &directory.join("image"));
        let image = Image::open(&Graph::new(), "i", &disk, None, CacheSizes::default())
            .await
            .expect("QEMU's image");
        let mut found = Vec::new();
        let mut start = 0;
        while start < 4 << 20 {
            let range = ByteRange::between(start, 4 << 20);
            let extent: Extent = image.guest.block_status(range).await.expect("no fault");
            let kind = match extent.kind {
                ExtentKind::Data {
                    compressed: true, ..
                } => "compressed",
                ExtentKind::Data { .. } => "data",
                ExtentKind::Zero { .. } => "zero",
                ExtentKind::Unallocated => "unallocated",
            };
            found.push((start >> 16, kind));
            start += extent.length;
        }
        let expected = [
            (0, "data"),
            (2, "unallocated"),
            (3, "zero"),
            (4, "unallocated"),
            (16, "data"),
            (17, "unallocated"),
            (32, "compressed"),
            (33, "unallocated"),
        ];
        assert_eq!(found, expected);
    });
}
