use super::super::create::{CreateOptions, Preallocation, create};
use super::super::header::{BackingReference, CompressionType};
use super::*;
use crate::block::Graph;
use crate::testing::{SimulatedDisk, attach_file, disk_of, insert, simulate};

const MIB: u64 = 1 << 20;

/// The bytes of a new image.
fn image(options: &CreateOptions) -> Vec<u8> {
    simulate(1, |handle| async move {
        let disk = SimulatedDisk::empty(&handle, 1);
        let graph = Graph::new();
        let file = attach_file(&graph, &insert(&graph, "file", disk.driver()));
        create(&file, options).await.expect("valid options");
        disk.to_bytes()
    })
}

fn check_bytes(bytes: &[u8]) -> CheckResult {
    simulate(2, |handle| async move {
        let disk = disk_of(&handle, bytes, 2);
        let graph = Graph::new();
        let file = attach_file(&graph, &insert(&graph, "file", disk.driver()));
        check(&file).await.expect("a readable header")
    })
}

fn put(bytes: &mut [u8], offset: usize, word: u64) {
    bytes[offset..offset + 8].copy_from_slice(&word.to_be_bytes());
}

/// 1 MiB in clusters of 4 KiB, all allocated: header, refcount table, refcount block, L1 table, L2
/// table, 256 data clusters.
fn allocated() -> Vec<u8> {
    image(&CreateOptions {
        cluster_size: 4096,
        preallocation: Preallocation::Metadata,
        ..CreateOptions::new(MIB)
    })
}

const REFCOUNTS: usize = 2 * 4096;
const L1: usize = 3 * 4096;
const L2: usize = 4 * 4096;

#[test]
fn new_images_of_every_geometry_are_clean() {
    for cluster_bits in [9, 12, 16, 21] {
        for refcount_bits in [1, 2, 4, 8, 16, 32, 64] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                let options = CreateOptions {
                    cluster_size: 1 << cluster_bits,
                    refcount_bits,
                    preallocation,
                    ..CreateOptions::new(5 * MIB + 512)
                };
                let result = check_bytes(&image(&options));
                assert!(result.is_clean(), "{options:?}: {result:?}");
                let all = preallocation == Preallocation::Metadata;
                let expected = if all { result.total_clusters } else { 0 };
                assert_eq!(result.allocated_clusters, expected, "{options:?}");
            }
        }
    }
}

#[test]
fn headers_come_back() {
    let options = CreateOptions {
        backing: Some(BackingReference {
            file: "below.raw".to_owned(),
            format: Some("raw".to_owned()),
        }),
        lazy_refcounts: true,
        compression: CompressionType::Zstd,
        ..CreateOptions::new(3 * MIB)
    };
    let header = Header::parse(&image(&options)[..65536]).expect("a valid header");
    assert_eq!(header.backing, options.backing);
    assert_eq!((header.version, header.size), (3, 3 * MIB));
    assert!(header.has_lazy_refcounts());
    assert_eq!(header.compression, CompressionType::Zstd);
}

#[test]
fn a_refcount_too_high_is_a_leak() {
    let mut bytes = allocated();
    bytes[REFCOUNTS + 2 * 100 + 1] = 3;
    let result = check_bytes(&bytes);
    assert_eq!((result.leaks, result.corruptions), (1, 1));
    assert!(!result.is_safe(), "its COPIED flag is wrong too");
    bytes[REFCOUNTS + 2 * 100 + 1] = 1;
    put(&mut bytes, L2 + 8 * 7, 0);
    let result = check_bytes(&bytes);
    assert_eq!((result.leaks, result.corruptions), (1, 0));
    assert!(result.is_safe() && !result.is_clean());
}

#[test]
fn a_refcount_too_low_is_a_corruption() {
    let mut bytes = allocated();
    bytes[REFCOUNTS + 2 * 100 + 1] = 0;
    assert_eq!(check_bytes(&bytes).corruptions, 2);
}

#[test]
fn shared_misplaced_and_unaligned_clusters_are_corruptions() {
    for (offset, entry) in [
        (L2, (1 << 63) | (6 * 4096)),
        (L2, (1 << 63) | (3 * 4096)),
        (L2, 1 << 63 | 1 << 40),
        (L2, 1 << 63 | (5 * 4096 + 512)),
        (L2, 5 * 4096),
        (L2, 1 << 63 | 1 << 60 | (5 * 4096)),
        (L1, 4 * 4096),
        (L1, 1 << 63 | (4 * 4096 + 512)),
        (L1, 1 << 63 | 1 << 40),
        (L1, (1 << 63) | (4 * 4096) | 2),
        (4096, 2 * 4096 + 1),
        (4096, 2 * 4096 + 512),
        (4096, 1 << 40),
        (4096, 3 * 4096),
    ] {
        let mut bytes = allocated();
        put(&mut bytes, offset, entry);
        let result = check_bytes(&bytes);
        assert!(
            result.corruptions > 0,
            "{entry:#x} at {offset:#x}: {result:?}"
        );
    }
}

#[test]
fn a_file_cut_short_is_corrupt() {
    let bytes = allocated();
    let result = check_bytes(&bytes[..bytes.len() - 2 * 4096]);
    assert_eq!(result.corruptions, 2, "{result:?}");
    assert!(check_bytes(&bytes[..bytes.len() - 4095]).is_clean());
}

#[test]
fn create_refuses_what_cannot_be() {
    let good = CreateOptions::new(MIB);
    let text = |options: CreateOptions| {
        let error = options.check().expect_err("invalid options");
        error.message().to_owned()
    };
    let unaligned = text(CreateOptions::new(1000));
    assert_eq!(unaligned, "Image size must be a multiple of 512 bytes");
    for cluster_size in [0, 256, 700, 4 << 20] {
        let bad = CreateOptions {
            cluster_size,
            ..good.clone()
        };
        assert_eq!(
            text(bad),
            "Cluster size must be a power of two between 512 and 2048k"
        );
    }
    for refcount_bits in [0, 3, 128] {
        let bad = CreateOptions {
            refcount_bits,
            ..good.clone()
        };
        let expected = "Refcount width must be a power of two and may not exceed 64 bits";
        assert_eq!(text(bad), expected);
    }
    let old = CreateOptions {
        version: 2,
        ..good.clone()
    };
    old.check().expect("version 2 is fine");
    for bad in [
        CreateOptions {
            lazy_refcounts: true,
            ..old.clone()
        },
        CreateOptions {
            refcount_bits: 8,
            ..old.clone()
        },
        CreateOptions {
            compression: CompressionType::Zstd,
            ..old.clone()
        },
    ] {
        assert!(text(bad).contains("version=v3"));
    }
    let huge = CreateOptions {
        cluster_size: 512,
        ..CreateOptions::new(1 << 40)
    };
    assert!(text(huge).contains("L1 table"));
    assert!(text(CreateOptions::new(1 << 63)).contains("exceeds maximum"));
}
