//! The whole stack against qemu-img and qemu-io, in both directions: images that QEMU wrote are read and written through
//! the daemon, and what the daemon wrote is checked and read by QEMU.
//!
//! Every case prints its seed when it fails; `LIVEBLK_TEST_SEED` shifts all of them. With `LIVEBLK_TEST_DAEMON=qemu-storage-daemon` the same tests run against
//! QEMU's own daemon, which shows that they ask for nothing that is not so.

mod daemon;
mod workload;

use std::fs;
use std::path::Path;

use daemon::{Daemon, run, try_run};
use workload::{Model, Workload};

use crate::nbd_server::has_program;

const MIB: u64 = 1 << 20;

/// A number added to every seed: other operations in each run, and the way to repeat one.
const SEED_SHIFT: &str = "LIVEBLK_TEST_SEED";

/// How many times as many seeds are tried, in long runs.
const SEED_SCALE: &str = "LIVEBLK_TEST_SCALE";

fn scaled(count: u64) -> u64 {
    count * std::env::var(SEED_SCALE).map_or(1, |scale| scale.parse().unwrap())
}

/// How an image is laid out.
#[derive(Clone, Copy, Debug)]
struct Layout {
    version: u32,
    cluster: u64,
    refcount_bits: u32,
    lazy_refcounts: bool,
}

impl Layout {
    const DEFAULT: Self = Self {
        version: 3,
        cluster: 64 << 10,
        refcount_bits: 16,
        lazy_refcounts: false,
    };

    fn options(&self) -> String {
        let compat = if self.version == 2 { "0.10" } else { "1.1" };
        let mut options = format!("compat={compat},cluster_size={}", self.cluster);
        if self.version == 3 {
            let lazy = if self.lazy_refcounts { "on" } else { "off" };
            options += &format!(
                ",refcount_bits={},lazy_refcounts={lazy}",
                self.refcount_bits
            );
        }
        options
    }

    /// A size that ends within a cluster.
    fn size(&self) -> u64 {
        (64 * self.cluster).clamp(MIB, 12 * MIB) + 3 * 512
    }
}

/// Skip, visibly, where there is no QEMU to compare with.
fn has_qemu() -> bool {
    has_program("qemu-img") && has_program("qemu-io")
}

/// An image in a directory of its own, and what must be in it.
struct Case {
    directory: tempfile::TempDir,
    name: String,
    workload: Workload,
    model: Model,
    /// The daemon goes past the host's page cache.
    direct: bool,
}

impl Case {
    fn new(name: String, seed: u64, cluster: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let shift: u64 = std::env::var(SEED_SHIFT).map_or(0, |shift| shift.parse().unwrap());
        let name = format!("{name}, {SEED_SHIFT}={shift}");
        let workload = Workload::new(seed.wrapping_add(shift), cluster);
        Self {
            directory,
            name,
            workload,
            model: Model::zeroes(0),
            direct: false,
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Create `top.qcow2`, with a backing file or without.
    fn create(&mut self, layout: &Layout, size: u64, backing: Option<(&str, &str)>) {
        let options = layout.options();
        let size_text = size.to_string();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        if let Some((name, format)) = backing {
            arguments.extend(["-b", name, "-F", format]);
        }
        arguments.extend(["top.qcow2", &size_text]);
        run(self.path(), "qemu-img", &arguments);
        self.model = self.model.resized(size);
    }

    /// Rename `top.qcow2`, to become a backing file.
    fn push_down(&self, name: &str) {
        fs::rename(self.path().join("top.qcow2"), self.path().join(name)).unwrap();
    }

    /// QEMU carries out operations.
    fn qemu_writes(&mut self, count: usize) {
        let mut arguments: Vec<String> = ["-d", "unmap", "-f", "qcow2"].map(str::to_owned).to_vec();
        arguments.extend(self.workload.run(count, &mut self.model));
        arguments.push("top.qcow2".into());
        run(self.path(), "qemu-io", &arguments);
    }

    /// The daemon carries out operations, reads all back and ends.
    fn daemon_writes(&mut self, count: usize) {
        let daemon = self.daemon(true);
        let mut arguments: Vec<String> = ["-f", "raw"].map(str::to_owned).to_vec();
        arguments.extend(self.workload.run(count, &mut self.model));
        arguments.push(daemon.uri());
        run(self.path(), "qemu-io", &arguments);
        self.compare(&daemon.uri(), "raw", "the daemon after writing");
        daemon.stop();
    }

    fn daemon(&self, writable: bool) -> Daemon {
        let access = if writable {
            "discard=unmap"
        } else {
            "read-only=on"
        };
        let direct = if self.direct { "on" } else { "off" };
        let blockdev = format!(
            "driver=qcow2,node-name=n,{access},file.driver=file,file.filename=top.qcow2,\
             file.discard=unmap,file.cache.direct={direct}"
        );
        Daemon::serve(self.path(), &blockdev, writable)
    }

    /// The daemon must read what is expected, through a read-only export.
    fn daemon_reads(&self) {
        let daemon = self.daemon(false);
        self.compare(&daemon.uri(), "raw", "the daemon");
        daemon.stop();
    }

    /// QEMU must read what is expected, and find nothing to complain of.
    fn qemu_reads(&self) {
        run(
            self.path(),
            "qemu-img",
            &["check", "-q", "-f", "qcow2", "top.qcow2"],
        );
        self.compare("top.qcow2", "qcow2", "QEMU");
    }

    fn compare(&self, image: &str, format: &str, reader: &str) {
        let convert = ["convert", "-f", format, "-O", "raw", image, "read.raw"];
        run(self.path(), "qemu-img", &convert);
        let read = fs::read(self.path().join("read.raw")).unwrap();
        self.model
            .assert_equal(&read, &format!("{}, read by {reader}", self.name));
    }

    /// Writes by turns, each side reading what the other wrote.
    fn take_turns(&mut self, rounds: usize, count: usize) {
        for _ in 0..rounds {
            self.qemu_writes(count);
            self.daemon_reads();
            self.daemon_writes(count);
            self.qemu_reads();
        }
    }
}

fn turns_on(layout: &Layout, rounds: usize, seed: u64) {
    for repeat in 0..scaled(1) {
        let seed = seed + 10_000 * repeat;
        let mut case = Case::new(format!("{layout:?}, seed {seed}"), seed, layout.cluster);
        case.create(layout, layout.size(), None);
        case.take_turns(rounds, 60);
    }
}

#[test]
fn every_cluster_size_in_both_versions() {
    if !has_qemu() {
        return;
    }
    for (number, bits) in (9..=21).enumerate() {
        for version in [2, 3] {
            let layout = Layout {
                version,
                cluster: 1 << bits,
                ..Layout::DEFAULT
            };
            turns_on(&layout, 1, 100 + number as u64);
        }
    }
}

#[test]
fn direct_io_with_requests_of_any_alignment() {
    if !has_qemu() {
        return;
    }
    for (number, cluster) in [512, 4096, 64 << 10].into_iter().enumerate() {
        let seed = 150 + number as u64;
        let layout = Layout {
            cluster,
            ..Layout::DEFAULT
        };
        let mut case = Case::new(format!("direct, {layout:?}, seed {seed}"), seed, cluster);
        case.direct = true;
        if opens_direct(case.path()) {
            case.create(&layout, layout.size(), None);
            case.take_turns(2, 60);
        }
    }
}

/// Whether the file system of a directory has direct I/O; says so if not.
fn opens_direct(directory: &Path) -> bool {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_CREAT | OFlag::O_RDWR | OFlag::O_DIRECT;
    let opened = open(
        &directory.join("direct"),
        flags,
        nix::sys::stat::Mode::S_IRWXU,
    );
    if let Err(errno) = opened {
        eprintln!("SKIPPED: no direct I/O in the directory for temporary files: {errno}");
    }
    opened.is_ok()
}

#[test]
fn raw_images_through_the_page_cache_and_past_it() {
    if !has_qemu() {
        return;
    }
    for (number, direct) in ["off", "on"].into_iter().enumerate() {
        let seed = 160 + number as u64;
        let mut case = Case::new(format!("raw, direct={direct}, seed {seed}"), seed, 4096);
        if direct == "on" && !opens_direct(case.path()) {
            continue;
        }
        // Direct I/O cannot write the end of a file that is not a multiple of its block size.
        let size = if direct == "on" {
            3 * MIB
        } else {
            3 * MIB + 512
        };
        let file = fs::File::create(case.path().join("top.raw")).unwrap();
        file.set_len(size).unwrap();
        case.model = Model::zeroes(size);
        let blockdev = format!(
            "driver=raw,node-name=n,file.driver=file,file.filename=top.raw,file.cache.direct={direct}"
        );
        let daemon = Daemon::serve(case.path(), &blockdev, true);
        let mut arguments: Vec<String> = ["-f", "raw"].map(str::to_owned).to_vec();
        arguments.extend(case.workload.run(120, &mut case.model));
        arguments.push(daemon.uri());
        run(case.path(), "qemu-io", &arguments);
        case.compare(&daemon.uri(), "raw", "the daemon");
        daemon.stop();
        case.compare("top.raw", "raw", "QEMU");
    }
}

#[test]
fn every_refcount_width() {
    if !has_qemu() {
        return;
    }
    for (number, refcount_bits) in [1, 2, 4, 8, 16, 32, 64].into_iter().enumerate() {
        let layout = Layout {
            refcount_bits,
            cluster: 4096,
            ..Layout::DEFAULT
        };
        turns_on(&layout, 2, 200 + number as u64);
        let layout = Layout {
            refcount_bits,
            ..Layout::DEFAULT
        };
        turns_on(&layout, 2, 220 + number as u64);
    }
}

#[test]
fn lazy_refcounts_are_in_order_after_a_clean_end() {
    if !has_qemu() {
        return;
    }
    for cluster in [512, 4096, 64 << 10] {
        let layout = Layout {
            lazy_refcounts: true,
            cluster,
            ..Layout::DEFAULT
        };
        turns_on(&layout, 2, 300);
    }
}

#[test]
fn backing_files_of_other_sizes_and_formats() {
    if !has_qemu() {
        return;
    }
    let top = Layout {
        cluster: 4096,
        ..Layout::DEFAULT
    };
    for (number, (base_size, format)) in [
        (2 * MIB, "qcow2"),
        (MIB + 512, "qcow2"),
        (4 * MIB, "qcow2"),
        (2 * MIB, "raw"),
        (MIB + 3 * 512, "raw"),
        (4 * MIB, "raw"),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 400 + number as u64;
        let name = format!("backing of {base_size:#x} bytes in {format}, seed {seed}");
        let mut case = Case::new(name, seed, top.cluster);
        case.create(&Layout::DEFAULT, base_size, None);
        case.qemu_writes(80);
        case.push_down("base.qcow2");
        if format == "raw" {
            let convert = [
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "base.qcow2",
                "base.raw",
            ];
            run(case.path(), "qemu-img", &convert);
        }
        case.create(
            &top,
            2 * MIB + 1536,
            Some((&format!("base.{format}"), format)),
        );
        case.daemon_reads();
        case.take_turns(2, 40);
    }
}

#[test]
fn chains_of_mixed_layouts() {
    if !has_qemu() {
        return;
    }
    let clusters = [64 << 10, 512, 2 << 20, 4096];
    for seed in 500..500 + scaled(3) {
        let mut case = Case::new(format!("chain, seed {seed}"), seed, 4096);
        let mut below: Option<String> = None;
        for (depth, cluster) in clusters.into_iter().enumerate() {
            let version = if depth % 2 == 0 { 3 } else { 2 };
            let layout = Layout {
                version,
                cluster,
                ..Layout::DEFAULT
            };
            let backing = below.as_deref().map(|name| (name, "qcow2"));
            case.create(&layout, 3 * MIB + 512 * depth as u64, backing);
            if depth % 2 == 0 {
                case.qemu_writes(30);
            } else {
                case.daemon_writes(30);
            }
            if depth + 1 < clusters.len() {
                let name = format!("layer{depth}.qcow2");
                case.push_down(&name);
                below = Some(name);
            }
        }
        case.take_turns(1, 40);
    }
}

#[test]
fn compressed_images_are_read_and_overwritten() {
    if !has_qemu() {
        return;
    }
    for (number, (compression, cluster)) in [
        ("zlib", 64 << 10),
        ("zlib", 4096),
        ("zlib", 2 << 20),
        ("zstd", 64 << 10),
        ("zstd", 4096),
    ]
    .into_iter()
    .enumerate()
    {
        let seed = 600 + number as u64;
        let name = format!("{compression} in clusters of {cluster:#x}, seed {seed}");
        let mut case = Case::new(name, seed, cluster);
        case.create(
            &Layout {
                cluster,
                ..Layout::DEFAULT
            },
            6 * MIB,
            None,
        );
        case.qemu_writes(200);
        case.push_down("plain.qcow2");
        let options = format!("compression_type={compression},cluster_size={cluster}");
        let convert = [
            "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", &options,
        ];
        run(
            case.path(),
            "qemu-img",
            &[&convert[..], &["plain.qcow2", "top.qcow2"]].concat(),
        );
        case.daemon_reads();
        case.take_turns(2, 60);
    }
}

#[test]
fn preallocated_images() {
    if !has_qemu() {
        return;
    }
    for (number, how) in ["metadata", "falloc", "full"].into_iter().enumerate() {
        let seed = 700 + number as u64;
        let mut case = Case::new(format!("preallocation={how}, seed {seed}"), seed, 64 << 10);
        let options = format!("preallocation={how}");
        let size = (4 * MIB).to_string();
        let create = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            "top.qcow2",
            &size,
        ];
        run(case.path(), "qemu-img", &create);
        case.model = Model::zeroes(4 * MIB);
        case.daemon_reads();
        case.take_turns(2, 40);
    }
}

#[test]
fn zero_clusters_over_data() {
    if !has_qemu() {
        return;
    }
    let mut case = Case::new("zeroes over a backing file".into(), 800, 64 << 10);
    case.create(&Layout::DEFAULT, 2 * MIB, None);
    run(
        case.path(),
        "qemu-io",
        &["-f", "qcow2", "-c", "write -q -P 9 0 2M", "top.qcow2"],
    );
    case.push_down("base.qcow2");
    case.create(&Layout::DEFAULT, 2 * MIB, Some(("base.qcow2", "qcow2")));
    let daemon = case.daemon(true);
    let commands = [
        "write -q -z -u 0 128k",
        "write -q -z 256k 128k",
        "discard -q 512k 128k",
    ];
    let mut arguments = vec!["-f", "raw"];
    commands
        .iter()
        .for_each(|command| arguments.extend(["-c", command]));
    let uri = daemon.uri();
    run(case.path(), "qemu-io", &[&arguments[..], &[&uri]].concat());
    daemon.stop();
    let reads = [
        "read -q -P 0 0 128k",
        "read -q -P 9 128k 128k",
        "read -q -P 0 256k 128k",
        "read -q -P 9 384k 128k",
        // Version 3: a discard over a backing file must not bring back what that has.
        "read -q -P 0 512k 128k",
        "read -q -P 9 640k 1408k",
    ];
    for command in reads {
        let read = ["-r", "-f", "qcow2", "-c", command, "top.qcow2"];
        run(case.path(), "qemu-io", &read);
    }
}

#[test]
fn block_status_agrees_with_qemus() {
    if !has_qemu() || !has_program("nbdinfo") {
        return;
    }
    for seed in 900..900 + scaled(4) {
        let layout = Layout {
            cluster: 4096,
            ..Layout::DEFAULT
        };
        let mut case = Case::new(format!("map, seed {seed}"), seed, layout.cluster);
        case.create(&layout, 2 * MIB, None);
        case.qemu_writes(40);
        case.push_down("base.qcow2");
        case.create(&layout, 2 * MIB + 512, Some(("base.qcow2", "qcow2")));
        case.qemu_writes(40);
        let daemon = case.daemon(false);
        let ours = run(
            case.path(),
            "qemu-img",
            &["map", "-f", "raw", "--output=json", &daemon.uri()],
        );
        daemon.stop();
        let qemu = run(
            case.path(),
            "qemu-img",
            &["map", "-f", "qcow2", "--output=json", "top.qcow2"],
        );
        assert_eq!(zeroes(&ours), zeroes(&qemu), "{}", case.name);
    }
}

/// Where a map says that zeroes are read; neighbours joined.
fn zeroes(map: &str) -> Vec<(u64, u64)> {
    let map: serde_json::Value = serde_json::from_str(map).unwrap();
    let mut found: Vec<(u64, u64)> = Vec::new();
    for extent in map
        .as_array()
        .unwrap()
        .iter()
        .filter(|extent| extent["zero"] == true)
    {
        let start = extent["start"].as_u64().unwrap();
        let end = start + extent["length"].as_u64().unwrap();
        match found.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => found.push((start, end)),
        }
    }
    found
}

/// The canary: what these tests look for is found.
#[test]
#[should_panic(expected = "at 0x2ff expected [1, 0, 0, 0], read [0, 0, 0, 0]")]
fn a_difference_of_one_byte_is_found() {
    let mut case = Case::new("canary".into(), 0, 512);
    case.model = Model::with_byte(0x303, 0x2ff, 1);
    fs::write(case.path().join("top.raw"), [0; 0x303]).unwrap();
    let read = fs::read(case.path().join("top.raw")).unwrap();
    case.model.assert_equal(&read, "canary");
}

#[test]
fn an_image_in_use_is_refused_both_ways() {
    if !has_qemu() {
        return;
    }
    let mut case = Case::new("locks".into(), 1000, 64 << 10);
    case.create(&Layout::DEFAULT, MIB, None);
    let daemon = case.daemon(true);
    let write = ["-f", "qcow2", "-c", "write 0 512", "top.qcow2"];
    let complaint = try_run(case.path(), "qemu-io", &write).unwrap_err();
    assert!(complaint.contains("Failed to get"), "{complaint}");
    daemon.stop();
    run(case.path(), "qemu-io", &write);
}
