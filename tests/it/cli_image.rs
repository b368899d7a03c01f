//! `liveblk image` against qemu-img: what one makes the other reads, and both describe alike.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::cli::{failure, liveblk, result};

/// Exit status and stdout of qemu-img.
fn qemu_img(directory: &Path, arguments: &[&str]) -> (i32, String) {
    let output = Command::new("qemu-img")
        .args(arguments)
        .current_dir(directory)
        .output()
        .expect("qemu-img is installed");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    (output.status.code().expect("exit status"), text)
}

fn parsed(text: &str) -> Value {
    let mut value: Value = text.parse().expect("JSON");
    value.sort_all_objects();
    value
}

/// Both tools describe `file` with the same words and the same JSON.
fn described_alike(directory: &Path, format: &str, file: &str) {
    let ours = result(directory, &["image", "info", "-f", format, file]);
    let (_, theirs) = qemu_img(directory, &["info", "-f", format, file]);
    assert_eq!(ours, theirs);
    let arguments = ["info", "-f", format, "--output", "json", file];
    let ours = result(directory, &[&["image"], &arguments[..]].concat());
    let (_, theirs) = qemu_img(directory, &["info", "-f", format, "--output=json", file]);
    assert_eq!(parsed(&ours), parsed(&theirs));
}

/// Both tools find the same in `file`; gives the exit status.
fn checked_alike(directory: &Path, file: &str) -> i32 {
    let ours = liveblk(directory, &["image", "check", file]);
    let (status, theirs) = qemu_img(directory, &["check", file]);
    assert_eq!(String::from_utf8_lossy(&ours.stdout), theirs);
    assert_eq!(ours.status.code(), Some(status));
    let ours = liveblk(directory, &["image", "check", "--output", "json", file]);
    let (_, theirs) = qemu_img(directory, &["check", "--output=json", file]);
    let ours = String::from_utf8(ours.stdout).expect("UTF-8");
    assert_eq!(parsed(&ours), parsed(&theirs));
    status
}

#[test]
fn new_images_are_what_qemu_img_would_have_made() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    result(place, &["image", "create", "base.raw", "3M"]);
    described_alike(place, "raw", "base.raw");
    for (number, options) in [
        "size=8M",
        "size=1G,cluster_size=4k,compat=0.10",
        "size=512,cluster_size=512",
        "size=100M,refcount_bits=1,cluster_size=2M",
        "size=5T,refcount_bits=64,lazy_refcounts=on",
        "size=1M,compression_type=zstd",
        "size=64M,preallocation=metadata",
    ]
    .iter()
    .enumerate()
    {
        let (size, options) = options.split_once(',').unwrap_or((options, ""));
        let size = size.trim_start_matches("size=");
        let (ours, theirs) = (format!("o{number}.qcow2"), format!("t{number}.qcow2"));
        let mut more = vec![];
        if !options.is_empty() {
            more = vec!["-o", options];
        }
        result(
            place,
            &[&["image", "create"], &more[..], &[&ours, size]].concat(),
        );
        let create = ["create", "-q", "-f", "qcow2"];
        qemu_img(place, &[&create, &more[..], &[&theirs, size]].concat());
        described_alike(place, "qcow2", &ours);
        assert_eq!(checked_alike(place, &ours), 0, "{options}");
        let same = [
            "compare", "-s", "-f", "qcow2", "-F", "qcow2", &ours, &theirs,
        ];
        let (status, text) = qemu_img(place, &same);
        assert_eq!(status, 0, "{options}: {text}");
    }
}

#[test]
fn an_overlay_has_the_size_of_its_backing_file_and_names_it_from_its_own_directory() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    fs::create_dir(place.join("d")).expect("made");
    result(place, &["image", "create", "d/base.qcow2", "5M"]);
    let create = [
        "image",
        "create",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "d/top.qcow2",
    ];
    assert_eq!(result(place, &create), "");
    described_alike(place, "qcow2", "d/top.qcow2");
    let info = result(place, &["image", "info", "--output", "json", "d/top.qcow2"]);
    assert_eq!(parsed(&info)["virtual-size"], 5 << 20);
    let (status, _) = qemu_img(place, &["info", "--backing-chain", "d/top.qcow2"]);
    assert_eq!(status, 0);
}

#[test]
fn images_of_qemu_img_are_described_and_checked_alike() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    let noise: Vec<u8> = (0..3_u32 << 20)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    fs::write(place.join("data"), noise).expect("written");
    for (file, options) in [
        ("plain.qcow2", &[][..]),
        ("small.qcow2", &["-o", "cluster_size=1k,refcount_bits=8"]),
        ("packed.qcow2", &["-c"]),
        ("old.qcow2", &["-o", "compat=0.10"]),
    ] {
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        qemu_img(place, &[&convert, options, &["data", file]].concat());
        described_alike(place, "qcow2", file);
        assert_eq!(checked_alike(place, file), 0, "{file}");
    }
}

#[test]
fn leaks_and_corruptions_are_told_and_have_their_exit_status() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    result(place, &["image", "create", "i.qcow2", "8M"]);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(place.join("i.qcow2"));
    let file = file.expect("opened");
    let word = |offset: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).expect("read");
        u64::from_be_bytes(bytes)
    };
    let refcounts = word(word(48));
    let clusters = file.metadata().expect("length").len().div_ceil(65536);
    file.write_all_at(&[0, 1], refcounts + 2 * clusters)
        .expect("written");
    file.write_all_at(&[0; 65536], clusters * 65536)
        .expect("written");
    assert_eq!(checked_alike(place, "i.qcow2"), 3);
    file.write_all_at(&[0, 0], refcounts).expect("written");
    assert_eq!(checked_alike(place, "i.qcow2"), 2);
    let output = liveblk(place, &["image", "check", "i.qcow2"]);
    let findings = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(findings.lines().count(), 2, "{findings}");
    assert!(
        findings.lines().all(|line| line.starts_with("liveblk: ")),
        "{findings}"
    );
}

#[test]
fn what_cannot_be_made_leaves_nothing_behind() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    fs::write(place.join("there.qcow2"), "precious").expect("written");
    for (arguments, wanted) in [
        (&["there.qcow2", "1M"][..], "'there.qcow2' exists; --force"),
        (
            &["x.img", "1M"],
            "'x.img': the name does not say which format",
        ),
        (&["x.qcow2"], "needs a SIZE"),
        (&["x.raw"], "needs a SIZE"),
        (&["x.qcow2", "511"], "multiple of 512"),
        (
            &["-o", "cluster_size=3k", "x.qcow2", "1M"],
            "Cluster size must be",
        ),
        (&["-o", "nosuch=1", "x.qcow2", "1M"], "no option 'nosuch'"),
        (
            &["-o", "cluster_size=4k", "x.raw", "1M"],
            "a raw image has no option",
        ),
        (
            &["-b", "gone.qcow2", "-F", "qcow2", "x.qcow2"],
            "Could not open 'gone.qcow2': No such",
        ),
        (
            &["-b", "there.qcow2", "-F", "qcow2", "x.qcow2"],
            "not in qcow2 format",
        ),
        (
            &["-b", "there.qcow2", "-F", "raw", "x.raw"],
            "cannot have a backing file",
        ),
        (
            &["--force", "-b", "there.qcow2", "-F", "raw", "there.qcow2"],
            "cannot be its own backing file",
        ),
        (
            &["nodir/x.qcow2", "1M"],
            "Could not create 'nodir/x.qcow2': No such",
        ),
    ] {
        let error = failure(place, 1, &[&["image", "create"], arguments].concat());
        assert!(error.contains(wanted), "{arguments:?}: {error}");
    }
    let error = failure(
        place,
        2,
        &["image", "create", "-b", "there.qcow2", "x.qcow2"],
    );
    assert!(error.contains("--backing-format"), "{error}");
    let error = failure(place, 2, &["image", "create", "x.qcow2", "1X"]);
    assert!(error.contains("'1X' is not a size"), "{error}");
    let left: Vec<_> = fs::read_dir(place).expect("read").collect();
    assert_eq!(left.len(), 1);
    assert_eq!(
        fs::read(place.join("there.qcow2")).expect("read"),
        b"precious"
    );
}

#[test]
fn a_file_is_overwritten_only_by_force_and_never_in_use() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    fs::write(place.join("i.raw"), vec![7; 4096]).expect("written");
    result(place, &["image", "create", "--force", "i.raw", "1M"]);
    assert_eq!(
        fs::read(place.join("i.raw")).expect("read"),
        vec![0; 1 << 20]
    );

    result(place, &["image", "create", "busy.qcow2", "1M"]);
    let before = fs::read(place.join("busy.qcow2")).expect("read");
    let mut user = Command::new("qemu-storage-daemon")
        .args([
            "--blockdev",
            "qcow2,node-name=n,file.driver=file,file.filename=busy.qcow2",
        ])
        .args(["--pidfile", "pid"])
        .current_dir(place)
        .spawn()
        .expect("qemu-storage-daemon is installed");
    while !place.join("pid").exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let create = failure(
        place,
        1,
        &["image", "create", "--force", "busy.qcow2", "9M"],
    );
    let info = failure(place, 1, &["image", "info", "busy.qcow2"]);
    let shared = liveblk(place, &["image", "info", "-U", "busy.qcow2"]);
    let _ = user.kill();
    let _ = user.wait();
    assert!(create.starts_with("Failed to get "), "{create}");
    assert!(
        info.starts_with("Failed to get shared \"write\" lock"),
        "{info}"
    );
    assert_eq!(shared.status.code(), Some(0));
    assert_eq!(fs::read(place.join("busy.qcow2")).expect("read"), before);
}

#[test]
fn chains_and_internal_snapshots_are_described_alike() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    fs::create_dir(place.join("d")).expect("made");
    qemu_img(place, &["create", "-q", "-f", "raw", "disk", "3M"]);
    let create = ["create", "-q", "-f", "qcow2"];
    qemu_img(
        place,
        &[&create[..], &["-b", "disk", "-F", "raw", "base"]].concat(),
    );
    for name in ["one", "a longer name than the column"] {
        let (status, _) = qemu_img(place, &["snapshot", "-c", name, "base"]);
        assert_eq!(status, 0);
    }
    for (below, name) in [("../base", "d/mid"), ("mid", "d/top")] {
        let more = ["-b", below, "-F", "qcow2", name];
        assert_eq!(qemu_img(place, &[&create[..], &more].concat()).0, 0);
    }
    let chain = ["info", "--backing-chain", "-f", "qcow2", "d/top"];
    let theirs = Command::new("qemu-img")
        .args(chain)
        .current_dir(place)
        .env("TZ", "UTC")
        .output()
        .expect("qemu-img is installed");
    let ours = result(place, &[&["image"], &chain[..]].concat());
    assert_eq!(ours, String::from_utf8_lossy(&theirs.stdout));
    assert!(ours.contains("Snapshot list:"));
    let chain = [&chain[..], &["--output=json"]].concat();
    let ours = result(place, &[&["image"], &chain[..]].concat());
    assert_eq!(parsed(&ours), parsed(&qemu_img(place, &chain).1));

    // Neither a lost layer nor a circle is passed over.
    fs::rename(place.join("d/mid"), place.join("d/away")).expect("moved");
    let told = failure(place, 1, &[&["image"], &chain[..]].concat());
    assert!(told.contains("d/mid"), "{told}");
    fs::copy(place.join("d/top"), place.join("d/mid")).expect("copied");
    let told = failure(place, 1, &[&["image"], &chain[..]].concat());
    assert!(told.contains("leads back"), "{told}");
}

/// What qemu-io reads at the start of an image is this byte.
fn starts_with(directory: &Path, file: &str, byte: u8) {
    let raw = "start.raw";
    qemu_img(directory, &["convert", "-O", "raw", file, raw]);
    let content = fs::read(directory.join(raw)).expect("converted");
    assert!(
        content[..65536].iter().all(|found| *found == byte),
        "{file}"
    );
}

fn write_start(directory: &Path, file: &str, byte: u8) {
    let write = format!("write -P {byte} 0 64k");
    let output = Command::new("qemu-io")
        .args(["-c", &write, file])
        .current_dir(directory)
        .output();
    assert!(output.expect("qemu-io is installed").status.success());
}

#[test]
fn internal_snapshots_are_made_gone_back_to_and_deleted_as_by_qemu_img() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    let ours = |arguments: &[&str]| result(place, &[&["image", "snapshot"], arguments].concat());
    result(place, &["image", "create", "disk.qcow2", "1M"]);
    write_start(place, "disk.qcow2", 1);
    ours(&["-c", "ours", "disk.qcow2"]);
    write_start(place, "disk.qcow2", 2);
    assert_eq!(
        qemu_img(place, &["snapshot", "-c", "theirs", "disk.qcow2"]).0,
        0
    );
    write_start(place, "disk.qcow2", 3);
    assert_eq!(checked_alike(place, "disk.qcow2"), 0);
    assert_eq!(
        qemu_img(place, &["snapshot", "-a", "ours", "disk.qcow2"]).0,
        0
    );
    starts_with(place, "disk.qcow2", 1);
    ours(&["--apply", "theirs", "disk.qcow2"]);
    starts_with(place, "disk.qcow2", 2);
    assert_eq!(checked_alike(place, "disk.qcow2"), 0);
    let listed = parsed(&ours(&["--output", "json", "disk.qcow2"]));
    let names: Vec<_> = listed
        .as_array()
        .expect("a list")
        .iter()
        .map(|one| one["name"].as_str())
        .collect();
    assert_eq!(names, [Some("ours"), Some("theirs")]);
    assert!(ours(&["-l", "disk.qcow2"]).contains("theirs"));
    // By id; qemu-img deletes the other.
    ours(&["-d", "1", "disk.qcow2"]);
    assert_eq!(
        qemu_img(place, &["snapshot", "-d", "theirs", "disk.qcow2"]).0,
        0
    );
    assert_eq!(ours(&["disk.qcow2"]), "");
    assert_eq!(checked_alike(place, "disk.qcow2"), 0);
    starts_with(place, "disk.qcow2", 2);
}

#[test]
fn internal_snapshots_that_cannot_be_are_refused() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    let refused =
        |arguments: &[&str]| failure(place, 1, &[&["image", "snapshot"], arguments].concat());
    result(place, &["image", "create", "disk.qcow2", "1M"]);
    result(place, &["image", "create", "disk.raw", "1M"]);
    result(place, &["image", "snapshot", "-c", "one", "disk.qcow2"]);
    let before = fs::read(place.join("disk.qcow2")).expect("the image");
    assert!(refused(&["-c", "one", "disk.qcow2"]).contains("already exists"));
    assert!(refused(&["-c", "", "disk.qcow2"]).contains("Name is empty"));
    assert!(
        refused(&["-d", "two", "disk.qcow2"])
            .contains("Could not delete snapshot 'two': snapshot not found")
    );
    assert!(
        refused(&["-a", "two", "disk.qcow2"])
            .contains("Could not apply snapshot 'two': snapshot not found")
    );
    assert!(refused(&["-c", "one", "disk.raw"]).contains("does not support internal snapshots"));
    let both = ["image", "snapshot", "-c", "x", "-d", "one", "disk.qcow2"];
    assert!(failure(place, 2, &both).contains("cannot be used with"));
    assert!(
        fs::read(place.join("disk.qcow2")).expect("the image") == before,
        "a refusal changed the image"
    );
    assert_eq!(
        qemu_img(place, &["bitmap", "--add", "disk.qcow2", "b"]).0,
        0
    );
    assert!(refused(&["-a", "one", "disk.qcow2"]).contains("Device has active dirty bitmaps"));
}
