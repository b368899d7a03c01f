//! Graphs opened from options, against what QEMU's tools say of the same images.

use liveblk::blockdev::{FormatSpecific, Value, image_info};
use liveblk::buffer::MemorySlice;

use crate::images::{Images, with, with_images};

async fn first_byte(images: &Images, name: &str, offset: u64) -> u8 {
    let node = images.open(name).await;
    let edge = images.attach(&node);
    let data = MemorySlice::zeroed(512);
    edge.read(offset, data.clone().into()).await.expect("read");
    images.blockdev.graph().detach(&edge).await.expect("detach");
    images.blockdev.delete(name).await.expect("delete");
    data.to_vec()[0]
}

#[test]
fn chains_of_other_sizes_formats_and_directories_read_as_in_qemu() {
    with_images(1, |images| async move {
        std::fs::create_dir(images.path("sub")).expect("mkdir");
        std::fs::write(images.path("sub/base.raw"), vec![0x11; 1 << 20]).expect("write");
        let create = |backing: &str, format: &str, name: &str| {
            let arguments = [
                "create", "-q", "-f", "qcow2", "-b", backing, "-F", format, name, "4M",
            ];
            images.must("qemu-img", &arguments);
        };
        create("base.raw", "raw", "sub/middle.qcow2");
        create("sub/middle.qcow2", "qcow2", "top.qcow2");
        images.must(
            "qemu-io",
            &["-c", "write -P 0x22 64k 64k", "sub/middle.qcow2"],
        );
        images.must("qemu-io", &["-c", "write -P 0x33 3M 64k", "top.qcow2"]);
        let expected = [(0, 0x11), (64 << 10, 0x22), (3 << 20, 0x33), (2 << 20, 0)];
        for (offset, byte) in expected {
            assert_eq!(
                first_byte(&images, "top", offset).await,
                byte,
                "at {offset:#x}"
            );
        }
    });
}

#[test]
fn image_info_has_what_qemu_img_info_has() {
    with_images(1, |images| async move {
        images.create("base.qcow2", "1M");
        let options = "cluster_size=4096,refcount_bits=8,lazy_refcounts=on,compression_type=zstd";
        let arguments = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            "-b",
            "base.qcow2",
        ];
        images.must(
            "qemu-img",
            &[&arguments[..], &["-F", "qcow2", "top.qcow2", "2M"]].concat(),
        );
        let output = images.tool("qemu-img", &["info", "--output=json", "top.qcow2"]);
        let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let ours = image_info(&images.open("top").await);
        assert_eq!(theirs["virtual-size"], ours.virtual_size);
        assert_eq!(theirs["cluster-size"], ours.cluster_size.expect("clusters"));
        assert_eq!(theirs["dirty-flag"], ours.dirty_flag);
        assert_eq!(
            theirs["backing-filename"],
            *ours.backing_filename.as_ref().expect("named")
        );
        let full = images.path("base.qcow2");
        assert_eq!(ours.full_backing_filename, Some(full));
        let Some(FormatSpecific::Qcow2(special)) = &ours.format_specific else {
            panic!("{ours:?}")
        };
        let data = &theirs["format-specific"]["data"];
        assert_eq!(data["compat"], special.compat);
        assert_eq!(data["refcount-bits"], special.refcount_bits);
        assert_eq!(data["lazy-refcounts"], special.lazy_refcounts);
        assert_eq!(data["compression-type"], special.compression_type.name());
        assert_eq!(ours.backing_image.expect("attached").virtual_size, 1 << 20);
    });
}

#[test]
fn json_names_are_spelled_so_that_qemu_opens_them() {
    with_images(1, |images| async move {
        images.create("a \"quoted\".qcow2", "1M");
        images.must(
            "qemu-io",
            &["-c", "write -P 0x5a 0 64k", "a \"quoted\".qcow2"],
        );
        let backing = images.qcow2("base", images.file("a \"quoted\".qcow2"));
        images.create("top.qcow2", "1M");
        let description = with(
            images.qcow2("top", images.file("top.qcow2")),
            "backing",
            with(backing, "read-only", Value::Bool(true)),
        );
        let node = images.blockdev.add(description).await.expect("add");
        let name = node.file_name();
        assert!(name.starts_with("json:"), "{name}");
        images.blockdev.delete("top").await.expect("delete");
        let read = ["-r", "-c", "read -P 0x5a 0 64k", &name];
        let output = images.tool("qemu-io", &read);
        let text = String::from_utf8_lossy(&output.stdout);
        let good = output.status.success() && !text.contains("Pattern verification failed");
        assert!(good, "{output:?}");
    });
}
