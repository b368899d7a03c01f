//! Headers parsed, written, and out of bounds in each field.

use super::*;
use crate::format::qcow2::extension::known_feature_names;

fn header(cluster_bits: u32) -> Header {
    let geometry = Geometry {
        cluster_bits,
        refcount_order: 4,
    };
    Header {
        version: 3,
        geometry,
        size: 1 << 20,
        encryption: 0,
        l1_entries: geometry.l1_entries_for(1 << 20) as u32,
        l1_offset: HostOffset(3 << cluster_bits),
        refcount_table_offset: HostOffset(1 << cluster_bits),
        refcount_table_clusters: 1,
        snapshots: 0,
        snapshots_offset: HostOffset(0),
        incompatible: Incompatible::empty(),
        compatible: Compatible::empty(),
        autoclear: Autoclear::empty(),
        compression: CompressionType::Deflate,
        backing: None,
        backing_offset: 0,
        unknown_fields: Vec::new(),
        feature_names: known_feature_names(),
        extensions: Vec::new(),
    }
}

fn backing(file: &str) -> Option<BackingReference> {
    Some(BackingReference {
        file: file.to_owned(),
        format: Some("qcow2".to_owned()),
    })
}

fn bytes(header: &Header) -> Vec<u8> {
    header.serialise().expect("fits").to_bytes()
}

#[test]
fn what_is_written_is_what_is_parsed() {
    for cluster_bits in MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS {
        for name in [None, backing("base.qcow2"), backing(&"n".repeat(300))] {
            if cluster_bits == 9 && name.as_ref().is_some_and(|name| name.file.len() > 100) {
                continue;
            }
            let mut written = header(cluster_bits);
            written.backing = name;
            written.extensions.push(Extension {
                magic: 0x1234,
                data: vec![1, 2, 3],
            });
            let mut parsed = Header::parse(&bytes(&written)).expect("valid");
            assert!(known_feature_names().starts_with(&parsed.feature_names));
            parsed.feature_names.clone_from(&written.feature_names);
            parsed.backing_offset = 0;
            assert_eq!(parsed, written);
        }
    }
}

#[test]
fn a_new_backing_name_never_overwrites_the_one_on_disk() {
    let mut old = header(16);
    old.backing = backing(&"o".repeat(MAX_BACKING_NAME));
    for _ in 0..4 {
        let mut new = Header::parse(&bytes(&old)).expect("valid");
        let old_place = new.backing_offset as usize;
        new.backing = backing(&"n".repeat(MAX_BACKING_NAME));
        let image = new.serialise().expect("fits");
        assert_eq!(image.head.len(), 512);
        let (place, name) = image.name.clone().expect("a name of its own");
        let place = place as usize;
        assert!(place + name.len() <= old_place || old_place + MAX_BACKING_NAME <= place);
        old = Header::parse(&image.to_bytes()).expect("valid");
    }
}

#[test]
fn a_small_cluster_without_room_says_so() {
    let mut small = header(9);
    small.backing = backing(&"n".repeat(500));
    let error = small.serialise().expect_err("no room");
    assert_eq!(error.kind(), ErrorKind::NoSpace);
}

fn broken(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = bytes(&header(16));
    bytes.resize(1 << 16, 0);
    change(&mut bytes);
    match Header::parse(&bytes) {
        Ok(header) => panic!("{header:?} is not valid"),
        Err(error) => error.message().to_owned(),
    }
}

fn put(offset: usize, value: &[u8]) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes: &mut Vec<u8>| bytes[offset..offset + value.len()].copy_from_slice(value)
}

#[test]
fn each_field_out_of_bounds_is_refused_in_qemus_words() {
    let cases: [(usize, &[u8], &str); 24] = [
        (0, b"QFJ", "Image is not in qcow2 format"),
        (7, &[4], "Unsupported qcow2 version 4"),
        (23, &[8], "Unsupported cluster size: 2^8"),
        (23, &[22], "Unsupported cluster size: 2^22"),
        (103, &[103], "qcow2 header too short"),
        (101, &[2], "qcow2 header exceeds cluster size"),
        (8, &[1], "Invalid backing file offset"),
        (35, &[7], "Unsupported encryption method 7"),
        (36, &[1], "Active L1 table too large"),
        (39, &[0], "L1 table is too small"),
        (40, &[0x80], "Active L1 table offset invalid"),
        (47, &[1], "Active L1 table offset invalid"),
        (45, &[0], "Active L1 table offset invalid"),
        (24, &[1], "L1 table is too small"),
        (24, &[0x10], "Image is too big"),
        (24, &[0xf0], "Image is too big"),
        (48, &[0xff], "Reference count table offset invalid"),
        (55, &[1], "Reference count table offset invalid"),
        (56, &[1], "Reference count table too large"),
        (59, &[0], "Image does not contain a reference count table"),
        (60, &[1], "Snapshot table too large"),
        (71, &[1], "Snapshot table offset invalid"),
        (
            99,
            &[7],
            "Reference count entry width too large; may not exceed 64 bits",
        ),
        (104, &[2], "qcow2: unknown compression type: 2"),
    ];
    for (offset, value, text) in cases {
        assert_eq!(broken(put(offset, value)), text, "byte {offset}");
    }
}

#[test]
fn features_are_refused_by_name() {
    let known = broken(put(79, &[0x4]));
    assert_eq!(known, "Unsupported qcow2 feature(s): external data file");
    let both = broken(|bytes| {
        bytes[78..80].copy_from_slice(&[0x81, 0]);
        bytes[0x70 + 8..][..2].copy_from_slice(&[0, 8]);
    });
    let text = "Unsupported qcow2 feature(s): dirty bit, Unknown incompatible feature: 8000";
    assert_eq!(both, text);
}

#[test]
fn backing_names_are_bounded() {
    let long = broken(|bytes| {
        put(14, &[2, 0])(bytes);
        put(18, &[4, 0])(bytes);
    });
    assert_eq!(long, "Backing file name too long");
    let nul = broken(|bytes| {
        put(14, &[2, 0])(bytes);
        put(19, &[5])(bytes);
    });
    assert_eq!(nul, "Backing file name contains a NUL character");
}

#[test]
fn extensions_are_bounded() {
    assert_eq!(broken(put(0x74, &[1])), "Header extension too large");
    let format = broken(|bytes| put(0x70, &[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 16])(bytes));
    assert_eq!(format, "ERROR: ext_backing_format: len=16 too large (>=16)");
}
