//! `liveblk serve` without ublk: over NBD, which goes through everything but the ublk export.

use std::fs;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::cli::{Served, failure, liveblk, qemu, result};

#[test]
fn a_chain_is_served_snapshotted_and_left_clean() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    result(place, &["image", "create", "base.qcow2", "8M"]);
    let create = [
        "image",
        "create",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ];
    result(place, &create);

    let served = Served::start(place, 1, &["--nbd", "n.nbd", "top.qcow2"]);
    let uri = served.places[0].clone();
    let socket = place.join("n.nbd");
    assert_eq!(uri, format!("nbd+unix:///top?socket={}", socket.display()));
    qemu(
        place,
        "qemu-io",
        &["-f", "raw", "-c", "write -P 0x11 0 2M", &uri],
    );
    assert_eq!(result(place, &["snapshot", "new.qcow2"]), "new\n");
    qemu(
        place,
        "qemu-io",
        &["-f", "raw", "-c", "write -P 0x22 1M 2M", &uri],
    );

    let picture = result(place, &["chain", "--name", "top"]);
    let files: Vec<&str> = picture
        .lines()
        .skip(1)
        .filter_map(|line| line.rsplit('/').next())
        .collect();
    assert_eq!(files, ["new.qcow2", "top.qcow2", "base.qcow2"], "{picture}");
    assert_eq!(served.stop(Signal::SIGTERM), Some(0));

    assert!(!place.join("top.sock").exists(), "the control socket goes");
    for image in ["base.qcow2", "top.qcow2", "new.qcow2"] {
        result(place, &["image", "check", image]);
        qemu(place, "qemu-img", &["check", "-q", image]);
    }
    let pattern = ["read -P 0x11 0 1M", "read -P 0x22 1M 2M", "read -P 0 3M 5M"];
    for read in pattern {
        qemu(
            place,
            "qemu-io",
            &["-r", "-f", "qcow2", "-c", read, "new.qcow2"],
        );
    }
    let old = "read -P 0x11 0 2M";
    qemu(
        place,
        "qemu-io",
        &["-r", "-f", "qcow2", "-c", old, "top.qcow2"],
    );
}

#[test]
fn several_images_are_several_exports_and_quit_ends_all() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    fs::create_dir(place.join("d")).expect("made");
    result(place, &["image", "create", "a.qcow2", "1M"]);
    result(place, &["image", "create", "d/a.raw", "2M"]);
    let arguments = ["--name", "both", "--nbd", "n.nbd", "a.qcow2", "d/a.raw"];
    let mut served = Served::start(place, 2, &arguments);
    for (uri, size) in served.places.iter().zip(["1048576", "2097152"]) {
        let info = qemu(
            place,
            "qemu-img",
            &["info", "-f", "raw", "--output=json", uri],
        );
        assert!(
            info.contains(&format!("\"virtual-size\": {size}")),
            "{uri}: {info}"
        );
    }
    assert!(served.places[1].contains(":///a-2?"), "{:?}", served.places);
    assert_eq!(result(place, &["qmp", "-n", "both", "quit"]), "{}\n");
    assert_eq!(served.process.ended(), Some(0));
}

#[test]
fn read_only_means_that_nothing_is_written() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    result(place, &["image", "create", "-f", "raw", "disk", "1M"]);
    let before = fs::metadata(place.join("disk"))
        .expect("there")
        .modified()
        .expect("a time");
    let arguments = ["--read-only", "--format", "raw", "--nbd", "n.nbd", "disk"];
    let served = Served::start(place, 1, &arguments);
    let write = ["-f", "raw", "-c", "write 0 4k", &served.places[0]];
    let output = Command::new("qemu-io")
        .args(write)
        .output()
        .expect("qemu-io is installed");
    assert!(!output.status.success());
    qemu(
        place,
        "qemu-io",
        &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &served.places[0]],
    );
    assert_eq!(served.stop(Signal::SIGINT), Some(0));
    let after = fs::metadata(place.join("disk"))
        .expect("there")
        .modified()
        .expect("a time");
    assert_eq!(before, after);
}

#[test]
fn what_cannot_be_served_is_refused_and_leaves_nothing_behind() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    fs::write(place.join("x.img"), vec![0; 4096]).expect("written");
    fs::write(place.join("bad.qcow2"), vec![0; 4096]).expect("written");
    for (arguments, wanted) in [
        (
            &["gone.qcow2"][..],
            "gone.qcow2': No such file or directory",
        ),
        (&["x.img"], "'x.img': the name does not say which format"),
        (&["bad.qcow2"], "not in qcow2 format"),
        (&["--name", "a/b", "bad.qcow2"], "'a/b' cannot be the name"),
        (&["--nbd", "nodir/n", "-f", "raw", "x.img"], "nodir/n"),
        (
            &["--device-id", "1", "x.raw", "y.raw"],
            "for each image or for none",
        ),
    ] {
        let error = failure(place, 1, &[&["serve"], arguments].concat());
        assert!(error.contains(wanted), "{arguments:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    let error = failure(place, 2, &["serve"]);
    assert!(error.contains("<IMAGE>"), "{error}");
    let error = failure(place, 2, &["serve", "--nbd", "n", "--queues", "2", "x.raw"]);
    assert!(error.contains("cannot be used with"), "{error}");
    let mut left: Vec<String> = fs::read_dir(place)
        .expect("read")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    left.sort();
    assert_eq!(left, ["bad.qcow2", "x.img"]);
}

#[test]
fn an_instance_is_not_replaced_by_another_of_its_name() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    result(place, &["image", "create", "a.qcow2", "1M"]);
    result(place, &["image", "create", "b.qcow2", "1M"]);
    let socket = ["--socket", "s.sock", "--nbd"];
    let served = Served::start(place, 1, &[&socket[..], &["n1", "a.qcow2"]].concat());
    let error = failure(
        place,
        1,
        &[&["serve"], &socket[..], &["n2", "b.qcow2"]].concat(),
    );
    assert!(error.contains("is running"), "{error}");
    let busy = liveblk(
        place,
        &["serve", "--socket", "t.sock", "--nbd", "n3", "a.qcow2"],
    );
    let error = String::from_utf8_lossy(&busy.stderr).into_owned();
    assert!(error.contains("Failed to get \"write\" lock"), "{error}");
    assert!(result(place, &["chain", "-s", "s.sock"]).contains("a.qcow2"));
    assert_eq!(served.stop(Signal::SIGTERM), Some(0));
}
