//! The copy engine on files: what it copies is compared and checked by QEMU's tools.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Instant;

use liveblk::block::{Child, Node};
use liveblk::blockdev::Value;
use liveblk::job::copy::{Copier, CopyOptions, run};
use liveblk::range::ByteRange;

use crate::images::{Images, with, with_images};

/// Images of a test have this size unless it says otherwise: not a multiple of any cluster.
const SIZE: u64 = (12 << 20) + 512 * 5;

/// Numbers that look random (xorshift), for `--no-default-features` too.
struct Draw(u64);

impl Draw {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Writes of any alignment, zeroes, discards and compressed clusters, by QEMU.
fn scribble(images: &Images, draw: &mut Draw, name: &str, format: &str, cluster: u64) {
    let mut arguments = vec!["-f".to_owned(), format.to_owned()];
    for number in 0..14 {
        let sector = draw.below(SIZE / 512);
        let most = [8, 300, 3000][draw.below(3) as usize];
        let length = (1 + draw.below(most)) * 512;
        let start = sector * 512;
        let length = length.min(SIZE - start);
        let value = 1 + draw.below(255);
        let command = match draw.below(8) {
            // QEMU compresses into clusters without data only.
            _ if number == 0 && format == "qcow2" => {
                let start = start / cluster * cluster;
                let length = cluster.min(SIZE - start);
                format!("write -c -P {value} {start} {length}")
            }
            1 => format!("write -z {start} {length}"),
            2 => format!("write -z -u {start} {length}"),
            3 => format!("discard {start} {length}"),
            _ => format!("write -P {value} {start} {length}"),
        };
        arguments.extend(["-c".to_owned(), command]);
    }
    arguments.extend(["-d".to_owned(), "unmap".to_owned(), name.to_owned()]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    images.must("qemu-io", &arguments);
}

fn create(images: &Images, name: &str, cluster: u64, backing: Option<(&str, &str)>) {
    let options = format!("cluster_size={cluster}");
    let size = SIZE.to_string();
    let mut arguments = vec!["create", "-q", "-f", "qcow2", "-o", &options];
    if let Some((backing, format)) = backing {
        arguments.extend(["-b", backing, "-F", format]);
    }
    arguments.extend([name, &size]);
    images.must("qemu-img", &arguments);
}

/// A file node's description, past the page cache or not.
fn file(images: &Images, name: &str, direct: bool) -> Value {
    let cache = Value::map([("direct", Value::Bool(direct))]);
    with(images.file(name), "cache", cache)
}

/// Opens an image of a format; a backing file keeps to the page cache.
async fn open(images: &Images, node: &str, format: &str, file: Value) -> Rc<Node> {
    let description = Value::map([
        ("driver", Value::str(format)),
        ("node-name", Value::str(node)),
        ("file", file),
    ]);
    images
        .blockdev
        .add(description)
        .await
        .expect("blockdev-add")
}

async fn close(images: &Images, edge: &Rc<Child>, name: &str) {
    images.blockdev.graph().detach(edge).await.expect("detach");
    images.blockdev.delete(name).await.expect("delete");
}

/// Copies everything in pieces of `piece` bytes, several in flight.
async fn copy_all(
    images: &Images,
    from: &Rc<Child>,
    to: &Rc<Child>,
    options: CopyOptions,
    piece: u64,
) {
    let size = from.node().size();
    let copier = Rc::new(Copier::new(options));
    let at = Cell::new(0);
    let next = async || {
        let start = at.get();
        let end = size.min(start + piece);
        at.set(end);
        let (copier, from, to) = (copier.clone(), from.clone(), to.clone());
        (start < end).then_some(async move {
            let range = ByteRange::between(start, end);
            copier.copy(&from, &to, range).await
        })
    };
    let copied = run(&images.handle, next, || 4).await;
    copied.expect("nothing fails");
}

/// Chains of any cluster sizes and contents into targets of other ones that are full of junk.
#[test]
fn copies_compare_equal_and_check_clean() {
    for seed in 1..=12 {
        with_images(seed, |images| async move {
            let mut draw = Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut cluster = || 512 << draw.below(9);
            let (below, above, other) = (cluster(), cluster(), cluster());
            images.must("qemu-img", &["create", "-q", "-f", "raw", "base.raw", "9M"]);
            let raw_base = seed % 3 == 0;
            let base = match raw_base {
                true => ("base.raw", "raw"),
                false => ("base.qcow2", "qcow2"),
            };
            create(&images, "base.qcow2", below, None);
            if !raw_base {
                scribble(&images, &mut draw, base.0, base.1, below);
            } else {
                images.must("qemu-io", &["-f", "raw", "-c", "write -P 9 1M 3M", base.0]);
            }
            create(&images, "top.qcow2", above, Some(base));
            scribble(&images, &mut draw, "top.qcow2", "qcow2", above);
            let format = ["qcow2", "qcow2", "raw"][draw.below(3) as usize];
            let over = (draw.below(2) == 0).then_some(("junk.qcow2", "qcow2"));
            create(&images, "junk.qcow2", other, None);
            scribble(&images, &mut draw, "junk.qcow2", "qcow2", other);
            if format == "raw" {
                let size = SIZE.to_string();
                images.must("qemu-img", &["create", "-q", "-f", "raw", "target", &size]);
            } else {
                create(&images, "target", other, over);
            }
            scribble(&images, &mut draw, "target", format, other);

            // Without direct I/O a file system (tmpfs before Linux 6.6) is tried cached.
            let direct = draw.below(2) == 0 && has_direct(&images);
            let source = open(&images, "top", "qcow2", file(&images, "top.qcow2", direct)).await;
            let direct = draw.below(2) == 0 && has_direct(&images);
            let target = open(&images, "target", format, file(&images, "target", direct)).await;
            let (from, to) = (images.attach(&source), images.attach(&target));
            let options = CopyOptions {
                buffer_length: 4096 << draw.below(9),
                unmap: draw.below(2) == 0,
                file_slices: seed % 4 != 0,
                ..CopyOptions::default()
            };
            let piece = 512 * (1 + draw.below(9000));
            copy_all(&images, &from, &to, options, piece).await;
            to.flush().await.expect("flush");
            close(&images, &from, "top").await;
            close(&images, &to, "target").await;

            let mut equal = vec!["compare", "-q", "-f", "qcow2", "-F", format];
            equal.extend(["top.qcow2", "target"]);
            images.must("qemu-img", &equal);
            if format == "qcow2" {
                images.must("qemu-img", &["check", "-q", "-f", "qcow2", "target"]);
            }
        });
    }
}

/// The directory's file system knows direct I/O.
fn has_direct(images: &Images) -> bool {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    let direct = options.read(true).custom_flags(libc::O_DIRECT);
    direct.open(images.path("top.qcow2")).is_ok()
}

/// How fast a chain of two layers is copied to a new image, beside `qemu-img convert`. The directory
/// is that of `TMPDIR`, the size in MiB that of `LIVEBLK_COPY_MIB`.
#[test]
#[ignore = "takes gigabytes; for figures"]
fn speed() {
    with_images(1, |images| async move {
        let mib: u64 = std::env::var("LIVEBLK_COPY_MIB")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(1024);
        let size = format!("{mib}M");
        let half = format!("{}M", mib / 2);
        images.create("base.qcow2", &size);
        let fill = format!("write -q -P 7 0 {half}");
        images.must("qemu-io", &["-c", &fill, "base.qcow2"]);
        let overlay = [
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
        ];
        images.must("qemu-img", &[&overlay[..], &["top.qcow2"]].concat());
        let fill = format!("write -q -P 9 {half} {half}");
        images.must("qemu-io", &["-c", &fill, "top.qcow2"]);
        let rate = |begun: Instant| mib as f64 / 1024.0 * 1.073 / begun.elapsed().as_secs_f64();

        for direct in [false, true] {
            if direct && !has_direct(&images) {
                eprintln!("no direct I/O here");
                continue;
            }
            let cache = if direct { "none" } else { "writeback" };
            let begun = Instant::now();
            let mut convert = vec![
                "convert", "-f", "qcow2", "-O", "qcow2", "-T", cache, "-t", cache,
            ];
            convert.extend(["-W", "-m", "8", "top.qcow2", "converted.qcow2"]);
            images.must("qemu-img", &convert);
            eprintln!(
                "direct={direct}: qemu-img convert -W {:.2} GB/s",
                rate(begun)
            );
            std::fs::remove_file(images.path("converted.qcow2")).expect("unlink");
            for file_slices in [true, false] {
                images.create("target.qcow2", &size);
                let source = open(&images, "top", "qcow2", file(&images, "top.qcow2", direct));
                let source = source.await;
                let target = file(&images, "target.qcow2", direct);
                let target = open(&images, "target", "qcow2", target).await;
                let (from, to) = (images.attach(&source), images.attach(&target));
                let options = CopyOptions {
                    file_slices,
                    ..CopyOptions::default()
                };
                let begun = Instant::now();
                copy_all(&images, &from, &to, options, 8 << 20).await;
                let rate = rate(begun);
                eprintln!("direct={direct}: file slices {file_slices}: {rate:.2} GB/s");
                close(&images, &from, "top").await;
                close(&images, &to, "target").await;
                images.must("qemu-img", &["compare", "-q", "top.qcow2", "target.qcow2"]);
                std::fs::remove_file(images.path("target.qcow2")).expect("unlink");
            }
        }
    });
}
