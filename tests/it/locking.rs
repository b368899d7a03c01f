//! Lock bytes between this program and QEMU's, in both directions.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};

use liveblk::blockdev::{SnapshotSync, Value};

use crate::images::{Images, with, with_images};

const WRITE: &str = "Failed to get \"write\" lock";
const SHARED_WRITE: &str = "Failed to get shared \"write\" lock";

/// A qemu-io that holds an image open until it is dropped.
struct Holder(Child);

impl Holder {
    fn open(images: &Images, arguments: &[&str]) -> Holder {
        let mut process = Command::new("qemu-io")
            .current_dir(images.directory.path())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        // It prompts once the image is open.
        let mut prompt = [0];
        let output = process.stdout.as_mut().expect("piped");
        output.read_exact(&mut prompt).expect("a prompt");
        Holder(process)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Killed: locks must go with the process, whatever its end.
        self.0.kill().expect("it runs");
        self.0.wait().expect("it ends");
    }
}

async fn refusal(images: &Images, description: Value) -> String {
    match images.blockdev.add(description).await {
        Ok(node) => panic!("{node:?} was opened"),
        Err(error) => error.message().to_owned(),
    }
}

fn read_only(images: &Images) -> Value {
    let description = images.qcow2("n", images.file("a.qcow2"));
    with(description, "read-only", Value::Bool(true))
}

#[test]
fn qemu_keeps_out_of_an_image_that_we_write() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        images.open("a").await;
        images.must_fail("qemu-img", &["info", "a.qcow2"], SHARED_WRITE);
        images.must("qemu-img", &["info", "-U", "a.qcow2"]);
        images.must_fail("qemu-io", &["-c", "write 0 64k", "a.qcow2"], WRITE);
        images.must_fail("qemu-img", &["snapshot", "-c", "s", "a.qcow2"], WRITE);
        images.blockdev.delete("a").await.expect("delete");
        images.must("qemu-io", &["-c", "write 0 64k", "a.qcow2"]);
    });
}

#[test]
fn qemu_reads_beside_us_but_does_not_write_what_we_read() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        images.blockdev.add(read_only(&images)).await.expect("add");
        images.must("qemu-img", &["info", "a.qcow2"]);
        images.must_fail("qemu-io", &["-c", "write 0 64k", "a.qcow2"], WRITE);
    });
}

#[test]
fn we_keep_out_of_an_image_that_qemu_writes() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        let writable = || images.qcow2("n", images.file("a.qcow2"));
        let holder = Holder::open(&images, &["a.qcow2"]);
        assert_eq!(refusal(&images, writable()).await, WRITE);
        assert_eq!(refusal(&images, read_only(&images)).await, SHARED_WRITE);
        let forced = with(read_only(&images), "force-share", Value::Bool(true));
        images.blockdev.add(forced).await.expect("force-share");
        images.blockdev.delete("n").await.expect("delete");
        drop(holder);
        images.blockdev.add(writable()).await.expect("free again");
    });
}

#[test]
fn we_read_beside_qemu_but_do_not_write_what_it_reads() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        let _holder = Holder::open(&images, &["-r", "a.qcow2"]);
        images.blockdev.add(read_only(&images)).await.expect("add");
        images.blockdev.delete("n").await.expect("delete");
        let writable = images.qcow2("n", images.file("a.qcow2"));
        assert_eq!(refusal(&images, writable).await, WRITE);
    });
}

#[test]
fn a_snapshot_gives_the_old_image_up_for_reading_and_locks_the_new_one() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        let node = images.open("a").await;
        let _edge = images.attach(&node);
        let request = SnapshotSync {
            node_name: Some("a".into()),
            snapshot_file: images.path("b.qcow2"),
            snapshot_node_name: Some("b".into()),
            ..SnapshotSync::default()
        };
        images
            .blockdev
            .snapshot_sync(request)
            .await
            .expect("snapshot");
        images.must("qemu-img", &["info", "a.qcow2"]);
        images.must_fail("qemu-io", &["-c", "write 0 64k", "a.qcow2"], WRITE);
        images.must_fail("qemu-img", &["info", "b.qcow2"], SHARED_WRITE);
    });
}

#[test]
fn a_snapshot_does_not_touch_an_image_that_qemu_uses() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        images.create("used.qcow2", "2M");
        let before = std::fs::read(images.path("used.qcow2")).expect("read");
        let _holder = Holder::open(&images, &["-r", "used.qcow2"]);
        let node = images.open("a").await;
        let edge = images.attach(&node);
        let request = SnapshotSync {
            node_name: Some("a".into()),
            snapshot_file: images.path("used.qcow2"),
            snapshot_node_name: Some("b".into()),
            ..SnapshotSync::default()
        };
        let refused = images.blockdev.snapshot_sync(request).await;
        let error = refused.expect_err("it is in use");
        assert_eq!(error.message(), WRITE);
        assert_eq!(edge.node().name(), "a");
        assert_eq!(
            std::fs::read(images.path("used.qcow2")).expect("read"),
            before
        );
    });
}

#[test]
fn without_locking_nobody_is_kept_out() {
    with_images(1, |images| async move {
        images.create("a.qcow2", "1M");
        let file = with(images.file("a.qcow2"), "locking", Value::str("off"));
        let description = images.qcow2("a", file);
        images.blockdev.add(description).await.expect("add");
        images.must("qemu-img", &["info", "a.qcow2"]);
    });
}
