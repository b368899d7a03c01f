//! Our check against `qemu-img check`, over images that QEMU made and over damaged ones.

use std::path::Path;
use std::process::Command;

use liveblk::block::Graph;
use liveblk::error::Result;
use liveblk::format::qcow2::check::{CheckResult, check};
use liveblk::format::qcow2::create::{CreateOptions, Preallocation, create};
use liveblk::testing::{
    Random, SimulatedDisk, attach_file, disk_of, for_each_seed, insert, simulate,
};

fn have_qemu() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("skipped: qemu-img is not installed");
    }
    found
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.expect("the program starts");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {errors}");
}

fn ours(bytes: &[u8]) -> Result<CheckResult> {
    simulate(1, |handle| async move {
        let disk = disk_of(&handle, bytes, 1);
        let graph = Graph::new();
        let file = attach_file(&graph, &insert(&graph, "file", disk.driver()));
        check(&file).await
    })
}

/// What `qemu-img check` counts; `None` where it cannot open the image.
fn theirs(path: &Path) -> Option<serde_json::Value> {
    let mut command = Command::new("qemu-img");
    command.args(["check", "-U", "-f", "qcow2", "--output=json"]);
    let output = command.arg(path).output().expect("qemu-img starts");
    serde_json::from_slice(&output.stdout).ok()
}

fn count(report: &serde_json::Value, key: &str) -> u64 {
    report
        .get(key)
        .and_then(|value| value.as_u64())
        .unwrap_or(0)
}

fn assert_same(path: &Path, what: &str) {
    let bytes = std::fs::read(path).expect("the image");
    let ours = ours(&bytes).expect("a readable header");
    let theirs = theirs(path).expect("qemu-img can open it");
    for (key, value) in [
        ("image-end-offset", ours.image_end_offset),
        ("total-clusters", ours.total_clusters),
        ("check-errors", ours.check_errors),
        ("allocated-clusters", ours.allocated_clusters),
        ("fragmented-clusters", ours.fragmented_clusters),
        ("compressed-clusters", ours.compressed_clusters),
        ("leaks", ours.leaks),
        ("corruptions", ours.corruptions),
    ] {
        assert_eq!(
            value,
            count(&theirs, key),
            "{key} of {what}: {ours:?} {theirs}"
        );
    }
}

#[test]
fn what_we_create_is_clean_for_qemu() {
    if !have_qemu() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    for cluster_bits in [9, 10, 12, 16, 21] {
        for (version, refcount_bits) in [(2, 16), (3, 1), (3, 8), (3, 16), (3, 64)] {
            for preallocation in [Preallocation::Off, Preallocation::Metadata] {
                let options = CreateOptions {
                    version,
                    refcount_bits,
                    cluster_size: 1 << cluster_bits,
                    preallocation,
                    ..CreateOptions::new((3 << 20) + 512)
                };
                std::fs::write(&path, created(&options)).expect("a file");
                assert_same(&path, &format!("{options:?}"));
            }
        }
    }
}

fn created(options: &CreateOptions) -> Vec<u8> {
    simulate(1, |handle| async move {
        let disk = SimulatedDisk::empty(&handle, 1);
        let graph = Graph::new();
        let file = attach_file(&graph, &insert(&graph, "file", disk.driver()));
        create(&file, options).await.expect("valid options");
        disk.to_bytes()
    })
}

/// An image with data, zeroes, discards, compressed clusters and snapshots, as QEMU writes it.
fn generate(random: &mut Random, folder: &Path) -> std::path::PathBuf {
    let path = folder.join("image");
    let name = path.to_str().expect("a plain name");
    let cluster_bits: u32 = random.choose(&[9, 10, 12, 12, 16]);
    let size: u64 = 64 << cluster_bits << random.below(4);
    let version = random.choose(&["0.10", "1.1", "1.1"]);
    let mut options = format!("cluster_size={},compat={version}", 1 << cluster_bits);
    if version == "1.1" {
        let width = random.choose(&[8, 16, 16, 32, 64]);
        options += &format!(",refcount_bits={width}");
        options += random.choose(&["", ",compression_type=zstd"]);
    }
    let bytes = size.to_string();
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &options, name, &bytes],
    );
    for round in 0..1 + random.below(3) {
        let mut commands: Vec<String> = Vec::new();
        for _ in 0..random.below(20) {
            let offset = random.below(size / 512) * 512;
            let length = (512 << random.below(u64::from(cluster_bits) - 4)).min(size - offset);
            let kind = random.choose(&[
                "write -P 7",
                "write -P 9",
                "write -z",
                "write -zu",
                "discard",
            ]);
            commands.push(format!("{kind} {offset} {length}"));
            let cluster = random.below(size >> cluster_bits) << cluster_bits;
            if random.percent(30) {
                commands.push(format!("write -c -P 3 {cluster} {}", 1 << cluster_bits));
            }
        }
        let mut arguments = vec!["-d", "unmap", "-f", "qcow2"];
        for command in &commands {
            arguments.extend(["-c", command]);
        }
        arguments.push(name);
        // A compressed write over a used cluster fails; that is as good.
        let _ = Command::new("qemu-io").args(&arguments).output();
        if random.percent(40) {
            run("qemu-img", &["snapshot", "-c", &format!("s{round}"), name]);
        }
    }
    path
}

#[test]
fn images_that_qemu_wrote_are_judged_alike() {
    if !have_qemu() {
        return;
    }
    for_each_seed("images_that_qemu_wrote_are_judged_alike", 40, |seed| {
        let folder = tempfile::tempdir().expect("a folder");
        let path = generate(&mut Random::new(seed), folder.path());
        assert_same(&path, &format!("seed {seed}"));
    });
}

/// Where both can open a damaged image, both find it corrupt, or neither does; and so for leaks.
#[test]
fn damaged_images_are_judged_alike() {
    if !have_qemu() {
        return;
    }
    for_each_seed("damaged_images_are_judged_alike", 30, |seed| {
        let mut random = Random::new(seed);
        let folder = tempfile::tempdir().expect("a folder");
        let path = generate(&mut random, folder.path());
        let good = std::fs::read(&path).expect("the image");
        for _ in 0..6 {
            let bytes = damaged(&mut random, &good);
            std::fs::write(&path, &bytes).expect("a file");
            let (Some(theirs), Ok(ours)) = (theirs(&path), ours(&bytes)) else {
                continue;
            };
            let verdict = (ours.corruptions + ours.check_errors > 0, ours.leaks > 0);
            let corrupt = count(&theirs, "corruptions") + count(&theirs, "check-errors") > 0;
            let expected = (corrupt, count(&theirs, "leaks") > 0);
            assert_eq!(verdict, expected, "{ours:?} {theirs}");
        }
    });
}

/// Changes a few bytes of words that look like entries of tables, or of refcounts.
fn damaged(random: &mut Random, good: &[u8]) -> Vec<u8> {
    let mut bytes = good.to_vec();
    let cluster_size = 1u64 << bytes[23];
    let clusters = bytes.len() as u64 / cluster_size;
    for _ in 0..1 + random.below(3) {
        let cluster = 1 + random.below(clusters.clamp(2, 12) - 1);
        let word = (cluster * cluster_size + random.below(cluster_size / 8) * 8) as usize;
        let Some(entry) = bytes.get_mut(word..word + 8) else {
            continue;
        };
        match random.below(4) {
            0 => entry[0] ^= 0x80,
            1 => entry[random.below(8) as usize] ^= 1 << random.below(8),
            2 => entry.fill(0),
            _ => {
                let target = (random.below(clusters + 2) * cluster_size) | (1 << 63);
                entry.copy_from_slice(&target.to_be_bytes());
            }
        }
    }
    bytes
}
