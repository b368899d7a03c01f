//! Opening and deleting, on real files.

use std::path::Path;

use super::fixture_tests::*;
use super::*;

#[test]
fn a_chain_is_opened_from_its_headers() {
    run(|blockdev, dir| async move {
        std::fs::write(Path::new(&dir).join("base.raw"), [7; 4096]).expect("write");
        create(&dir, "b.qcow2", Some(("base.raw", "raw")));
        create(&dir, "c.qcow2", Some(("b.qcow2", "qcow2")));
        let top = blockdev
            .add(qcow2(&dir, "c", "c.qcow2"))
            .await
            .expect("add");
        let middle = top.backing().expect("b");
        let bottom = middle.backing().expect("base");
        assert_eq!(bottom.driver().driver_name(), "raw");
        assert_eq!(top.file_name(), format!("{dir}/c.qcow2"));
        assert_eq!(bottom.file_name(), format!("{dir}/base.raw"));
        assert!(!top.options().read_only && middle.options().read_only);
        assert_eq!(names(&blockdev).len(), 6);
        // Newest first: base, its file, b, its file, c, its file.
        assert_eq!(names(&blockdev)[4], "c");
        blockdev.delete("c").await.expect("delete");
        assert!(names(&blockdev).is_empty());
    });
}

#[test]
fn overridden_backing_files_show_in_the_name() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        create(&dir, "b.qcow2", Some(("a.qcow2", "qcow2")));
        let description = with(qcow2(&dir, "b", "b.qcow2"), "backing", Value::Null);
        let node = blockdev.add(description).await.expect("add");
        let expected = format!(
            "json:{{\"backing\": null, \"driver\": \"qcow2\", \"file\": {{\"driver\": \"file\", \
             \"filename\": \"{dir}/b.qcow2\"}}}}"
        );
        assert_eq!(node.file_name(), expected);
    });
}

#[test]
fn hostile_backing_names_are_refused() {
    run(|blockdev, dir| async move {
        let cases = [
            (
                "none.qcow2",
                "Could not open 'none.qcow2': No such file or directory",
            ),
            ("xyz:a", "Unknown protocol 'xyz'"),
            ("nbd://host/export", "Unknown protocol 'nbd'"),
        ];
        for (index, (backing, inner)) in cases.iter().enumerate() {
            let name = format!("{index}.qcow2");
            create(&dir, &name, Some((backing, "qcow2")));
            let text = refusal(&blockdev, &dir, qcow2(&dir, "n", &name)).await;
            assert_eq!(text, format!("Could not open backing file: {inner}"));
        }
        create(
            &dir,
            "json.qcow2",
            Some(("json:{\"driver\": \"null-co\"}", "raw")),
        );
        let text = refusal(&blockdev, &dir, qcow2(&dir, "n", "json.qcow2")).await;
        assert!(text.contains("json:"), "{text}");
    });
}

#[test]
fn loops_in_the_chain_are_found() {
    run(|blockdev, dir| async move {
        create(&dir, "self.qcow2", None);
        qemu_img(
            &dir,
            &[
                "rebase",
                "-u",
                "-F",
                "qcow2",
                "-b",
                "self.qcow2",
                "self.qcow2",
            ],
        );
        let loops = |file: &str| format!("Backing file '{file}' creates an infinite loop.");
        let text = refusal(&blockdev, &dir, qcow2(&dir, "n", "self.qcow2")).await;
        assert_eq!(
            text,
            format!("Could not open backing file: {}", loops("self.qcow2"))
        );
        create(&dir, "x.qcow2", Some(("y.qcow2", "qcow2")));
        create(&dir, "y.qcow2", Some(("x.qcow2", "qcow2")));
        let read_only = with(qcow2(&dir, "n", "x.qcow2"), "read-only", Value::Bool(true));
        let text = refusal(&blockdev, &dir, read_only).await;
        assert!(text.ends_with(&loops("x.qcow2")), "{text}");
    });
}

#[test]
fn an_undeclared_backing_format_is_raw_or_nothing() {
    run(|blockdev, dir| async move {
        std::fs::write(Path::new(&dir).join("base"), [7; 4096]).expect("write");
        create(&dir, "inner.qcow2", None);
        for (image, backing) in [("raw.qcow2", "base"), ("bad.qcow2", "inner.qcow2")] {
            create(&dir, image, Some((backing, "raw")));
            forget_backing_format(&Path::new(&dir).join(image));
        }
        let node = blockdev
            .add(qcow2(&dir, "n", "raw.qcow2"))
            .await
            .expect("add");
        assert_eq!(node.backing().expect("base").driver().driver_name(), "raw");
        let text = refusal(&blockdev, &dir, qcow2(&dir, "m", "bad.qcow2")).await;
        assert!(
            text.contains("'inner.qcow2' looks like a qcow2 image"),
            "{text}"
        );
    });
}

/// Turns the extension that names the format into one that readers ignore.
fn forget_backing_format(image: &Path) {
    let mut bytes = std::fs::read(image).expect("read");
    let magic = [0xe2, 0x79, 0x2a, 0xca];
    let at = bytes
        .windows(4)
        .position(|window| window == magic)
        .expect("the extension");
    bytes[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    std::fs::write(image, bytes).expect("write");
}

#[test]
fn a_thousand_layers_open_and_more_are_refused() {
    run(|blockdev, dir| async move {
        create(&dir, "0", None);
        let template = std::fs::read(Path::new(&dir).join("0")).expect("read");
        for layer in 1..=1002 {
            let mut image = template.clone();
            let name = format!("{}", layer - 1);
            // The name behind the header's extensions, and no format: the magic number check is
            // what a chain of undeclared images would fail, so each declares its format.
            image[8..16].copy_from_slice(&0x400_u64.to_be_bytes());
            image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            image[0x400..0x400 + name.len()].copy_from_slice(name.as_bytes());
            let header_length = u32::from_be_bytes(image[100..104].try_into().expect("4")) as usize;
            let old = image[header_length..0x3f0].to_vec();
            let mut extension = 0xe279_2aca_u32.to_be_bytes().to_vec();
            extension.extend(5_u32.to_be_bytes());
            extension.extend(b"qcow2\0\0\0");
            image[header_length..header_length + 16].copy_from_slice(&extension);
            image[header_length + 16..0x400].copy_from_slice(&old[..0x400 - header_length - 16]);
            std::fs::write(Path::new(&dir).join(layer.to_string()), image).expect("write");
        }
        let open = |name: &str| with(qcow2(&dir, "n", name), "read-only", Value::Bool(true));
        let node = blockdev.add(open("1000")).await.expect("a thousand below");
        assert_eq!(depth_of(&node), 1000);
        blockdev.delete("n").await.expect("delete");
        let text = refusal(&blockdev, &dir, open("1002")).await;
        assert!(text.contains("more than 1000 layers"), "{text}");
    });
}

#[test]
fn unsupported_options_are_refused_by_name() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        let data_file = with(qcow2(&dir, "n", "a.qcow2"), "data-file", file(&dir, "d"));
        let text = refusal(&blockdev, &dir, data_file).await;
        assert_eq!(
            text,
            "Option 'data-file' of driver 'qcow2' is not supported"
        );
        let inactive = with(qcow2(&dir, "n", "a.qcow2"), "active", Value::Bool(false));
        let text = refusal(&blockdev, &dir, inactive).await;
        assert!(text.contains("not supported"), "{text}");
        let other = Value::map([
            ("driver", Value::str("vmdk")),
            ("node-name", Value::str("n")),
        ]);
        let text = refusal(&blockdev, &dir, other).await;
        assert_eq!(text, "Parameter 'driver' does not accept value 'vmdk'");
    });
}

/// Layers from `node` down, itself not counted.
fn depth_of(node: &Rc<Node>) -> usize {
    let mut depth = 0;
    let mut next = node.child(crate::block::Role::Backing);
    while let Some(edge) = next {
        depth += 1;
        next = edge.node().child(crate::block::Role::Backing);
    }
    depth
}
