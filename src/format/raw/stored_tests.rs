//! The file beside a raw image, with good bytes and bad ones.

use proptest::prelude::*;

use super::*;

fn entry(name: &str, size: u64, granularity: u64, runs: &[(u64, u64)]) -> Entry {
    let mut bits = DirtyBitmap::new(size, granularity);
    for (start, length) in runs {
        bits.set(ByteRange::between(*start, start.saturating_add(*length)));
    }
    Entry {
        name: name.to_owned(),
        enabled: true,
        inconsistent: false,
        bits,
    }
}

fn sample(in_use: bool) -> Stored {
    let size = 10 << 20;
    Stored {
        identity: "file /x inode 7".to_owned(),
        stamp: "1 2.3".to_owned(),
        in_use,
        size,
        least_size: size,
        entries: vec![
            entry("few", size, 512, &[(0, 1), (99_999, 5000)]),
            entry(
                "many",
                size,
                65536,
                &[(0, 1 << 20), (3 << 20, 1), (5 << 20, 9)],
            ),
            Entry {
                enabled: false,
                inconsistent: true,
                ..entry("none", size, 1 << 31, &[])
            },
        ],
    }
}

fn mark(bytes: &mut [u8], slots: &mut Slots, range: ByteRange) {
    let (offset, mark) = slots.next(range).expect("there is room");
    bytes[offset as usize..][..mark.len()].copy_from_slice(&mark);
    slots.advance();
}

#[test]
fn what_is_stored_is_read_again_with_its_marks() {
    let stored = sample(true);
    let (mut bytes, mut slots) = stored.encode().expect("it is small");
    let ranges: Vec<ByteRange> = (0..SLOTS as u64)
        .map(|index| ByteRange::between(index << 16, (index + 1) << 16))
        .collect();
    for range in &ranges {
        let (read, _, _) = Stored::decode(&bytes).expect("it is whole");
        assert_eq!(read, stored);
        mark(&mut bytes, &mut slots, *range);
    }
    assert_eq!(slots.next(ranges[0]), None, "it is full");
    let (_, again, marks) = Stored::decode(&bytes).expect("it is whole");
    assert_eq!((again, marks), (slots, Marks::Ranges(ranges)));
}

/// Any other byte, and any other length, is noticed; in marks, too, where it is not taken for the last one's end.
#[test]
fn every_changed_byte_is_noticed() {
    let (mut bytes, mut slots) = sample(true).encode().expect("it is small");
    let first = ByteRange::between(0, 1 << 20);
    mark(&mut bytes, &mut slots, first);
    mark(&mut bytes, &mut slots, ByteRange::between(3 << 20, 4 << 20));
    let (good, _, _) = Stored::decode(&bytes).expect("it is whole");
    let padding = HEADER + good.encode_body().expect("small").len()..slots.start as usize;
    for at in (0..bytes.len()).filter(|at| !padding.contains(at)) {
        let mut bad = bytes.clone();
        bad[at] ^= 0x41;
        match Stored::decode(&bad) {
            Err(_) | Ok((_, _, Marks::Damaged)) => {}
            Ok((_, _, marks)) => panic!("byte {at:#x} is taken as {marks:?}"),
        }
    }
    for length in (0..bytes.len()).step_by(7) {
        assert!(Stored::decode(&bytes[..length]).is_err(), "{length} bytes");
    }
    bytes.push(0);
    assert!(Stored::decode(&bytes).is_err(), "one more byte");
}

/// A mark belongs to the file that it was written for.
#[test]
fn marks_of_another_file_are_not_taken() {
    let (one, mut slots) = sample(true).encode().expect("it is small");
    let (mut other, _) = Stored {
        stamp: "later".to_owned(),
        ..sample(true)
    }
    .encode()
    .expect("it is small");
    assert_eq!(one.len(), other.len());
    mark(&mut other, &mut slots, ByteRange::between(0, 512));
    let (_, _, marks) = Stored::decode(&other).expect("it is whole");
    assert_eq!(marks, Marks::Damaged);
}

#[test]
fn what_a_hostile_file_asks_for_is_refused() {
    let refused = |change: fn(&mut Stored)| {
        let mut stored = sample(false);
        change(&mut stored);
        match stored.encode() {
            Err(_) => {}
            Ok((bytes, _)) => assert!(Stored::decode(&bytes).is_err()),
        }
    };
    refused(|stored| stored.entries[0].name.clear());
    refused(|stored| stored.entries[0].name = "x".repeat(1024));
    refused(|stored| stored.entries[0].name = "few".replace("few", "many"));
    refused(|stored| stored.identity = "x".repeat(1 << 17));
    refused(|stored| stored.size = u64::MAX);
    let (mut bytes, _) = sample(false).encode().expect("it is small");
    bytes[8] = 2;
    let error = Stored::decode(&bytes).expect_err("version 2");
    assert!(error.message().contains("version 2"), "{error}");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

/// A body whose digest is right, whatever it says.
fn with_body(body: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend((body.len() as u64).to_le_bytes());
    bytes.resize(HEADER - size_of::<Sum>(), 0);
    let sum = sum_of(&[&bytes, body]);
    bytes.extend(sum);
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(SECTOR) + SLOTS * SLOT, 0);
    bytes
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = Stored::decode(&bytes);
        let _ = Stored::decode(&with_body(&bytes));
    }

    /// Bodies that are nearly right reach further.
    #[test]
    fn changed_bodies_are_read_or_refused(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut body = sample(true).encode_body().expect("it is small");
        for (at, byte) in changes {
            let at = at.index(body.len());
            body[at] = byte;
        }
        if let Ok((stored, _, _)) = Stored::decode(&with_body(&body)) {
            let (bytes, _) = stored.encode().expect("it was read");
            prop_assert_eq!(Stored::decode(&bytes).expect("it is whole").0, stored);
        }
        body.truncate(cut.index(body.len()));
        let _ = Stored::decode(&with_body(&body));
    }

    #[test]
    fn any_bits_come_back(
        runs in proptest::collection::vec((0..1_u64 << 24, 1..1_u64 << 20), 0..20),
        bits in 9..24_u32,
        size in 1..1_u64 << 24,
    ) {
        let stored = Stored {
            size,
            entries: vec![entry("b", size, 1 << bits, &runs)],
            ..sample(false)
        };
        let (bytes, _) = stored.encode().expect("it is small");
        prop_assert_eq!(Stored::decode(&bytes).expect("it is whole").0, stored);
    }
}
