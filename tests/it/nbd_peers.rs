//! The NBD server against other people's clients: qemu-io, qemu-img, qemu-nbd, nbdinfo, nbdcopy, fio.

use std::fs;

use liveblk::block::NodeOptions;
use liveblk::export::RemoveMode;
use liveblk::export::nbd::NbdExportSpec;
use liveblk::range::ByteRange;

use crate::nbd_server::{Site, export_spec, has_program, memory, serve, serve_with};

const SIZE: u64 = 64 << 20;

/// A writable node of 64 MiB, exported as `n`, that gives space back.
fn exported(site: &Site) {
    let options = NodeOptions {
        discard: liveblk::block::DiscardMode::Unmap,
        ..NodeOptions::default()
    };
    let node = site.node("n", SIZE, options);
    site.export(&node, true);
}

/// Run qemu-io commands; its output if all of them succeed.
async fn qemu_io(site: &Site, commands: &[&str]) -> Result<String, String> {
    let uri = site.uri("n");
    let mut arguments = vec!["-f", "raw", &uri];
    for command in commands {
        arguments.extend(["-c", command]);
    }
    site.run("qemu-io", &arguments).await
}

/// Bytes without a pattern that a copy error could survive.
fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = || {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

#[test]
fn qemu_io_reads_what_it_wrote() {
    if !has_program("qemu-io") {
        return;
    }
    serve(|site| async move {
        exported(&site);
        let output = qemu_io(
            &site,
            &[
                "write -P 0x11 0 64k",
                "write -P 0x22 -f 4095 513",
                "write -z 8k 4k",
                "write -z -u 32k 16k",
                "discard 48k 4k",
                "flush",
                "read -P 0x11 0 4095",
                "read -P 0x22 4095 513",
                "read -P 0x11 4608 3584",
                "read -P 0 8k 4k",
                "read -P 0 32k 20k",
                "read -P 0x11 52k 12k",
                "write -P 0x33 32M 32M",
                "read -P 0x33 32M 32M",
                "aio_write -P 0x44 1M 128k",
                "aio_write -P 0x55 2M 128k",
                "aio_flush",
                "read -P 0x44 1M 128k",
                "read -P 0x55 2M 128k",
            ],
        );
        let output = output.await.unwrap();
        assert!(!output.contains("verification failed"), "{output}");
    });
}

#[test]
fn errors_reach_qemu_as_their_errno() {
    if !has_program("qemu-io") {
        return;
    }
    serve(|site| async move {
        exported(&site);
        let node = site.graph.find("n").unwrap();
        memory(&node).bad.set(ByteRange::new(1 << 20, 4096));
        let output = qemu_io(&site, &["read 1M 512", "write 512k 1M", "read 0 1M"]).await;
        let output = output.unwrap_err();
        assert_eq!(
            output.matches("failed: Input/output error").count(),
            2,
            "{output}"
        );
        assert!(output.contains("read 1048576/1048576"), "{output}");
        memory(&node).full.set(true);
        let output = qemu_io(&site, &["write 0 512"]).await.unwrap_err();
        assert!(output.contains("No space left on device"), "{output}");
    });
}

#[test]
fn a_read_only_export_is_opened_for_reading_only() {
    if !has_program("qemu-io") {
        return;
    }
    serve(|site| async move {
        let node = site.node("n", SIZE, NodeOptions::default());
        site.export(&node, false);
        let uri = site.uri("n");
        let error = qemu_io(&site, &["write 0 512"]).await.unwrap_err();
        assert!(
            error.contains("read-only") || error.contains("Permission"),
            "{error}"
        );
        site.run(
            "qemu-io",
            &["-r", "-f", "raw", "-c", "read -P 0 0 512", &uri],
        )
        .await
        .unwrap();
    });
}

#[test]
fn clients_are_told_what_qemu_would_tell_them() {
    if !has_program("qemu-nbd") {
        return;
    }
    serve(|site| async move {
        let node = site.node("n", 8 << 20, NodeOptions::default());
        let writable = NbdExportSpec {
            description: Some("writable one".into()),
            ..export_spec("w", "n", true)
        };
        site.service.add(writable).unwrap();
        let with_depth = NbdExportSpec {
            allocation_depth: true,
            ..export_spec("r", "n", false)
        };
        site.service.add(with_depth).unwrap();
        let socket = site.socket();
        let list = site
            .run("qemu-nbd", &["-L", "-k", socket.to_str().unwrap()])
            .await
            .unwrap();
        let sizes = "  min block: 1\n  opt block: 4096\n  max block: 33554432\n";
        let expected = format!(
            "exports available: 2\n export: 'w'\n  description: writable one\n  size:  8388608\n  flags: \
             0x1ded ( flush fua trim zeroes df multi cache fast-zero block-status-payload )\n{sizes}  \
             transaction size: 64-bit\n  available meta contexts: 1\n   base:allocation\n export: 'r'\n  \
             size:  8388608\n  flags: 0x158f ( readonly flush fua df multi cache block-status-payload )\n\
             {sizes}  transaction size: 64-bit\n  available meta contexts: 2\n   base:allocation\n   \
             qemu:allocation-depth\n"
        );
        assert_eq!(list, expected);
        assert_eq!(node.size(), 8 << 20);
    });
}

#[test]
fn one_connection_means_no_multi_conn() {
    if !has_program("nbdinfo") {
        return;
    }
    serve_with(
        |options| options.max_connections = 1,
        |site| async move {
            exported(&site);
            let info = site
                .run("nbdinfo", &["--json", &site.uri("n")])
                .await
                .unwrap();
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            let export = &info["exports"][0];
            assert_eq!(export["can_multi_conn"], false);
            assert_eq!(export["export-size"], SIZE);
            assert_eq!(export["can_fast_zero"], true);
        },
    );
}

#[test]
fn the_map_shows_data_and_holes() {
    if !has_program("nbdinfo") || !has_program("qemu-img") {
        return;
    }
    serve(|site| async move {
        exported(&site);
        qemu_io(&site, &["write 1M 64k", "write 8M 4k", "write -z -u 1M 8k"])
            .await
            .unwrap();
        let map = site
            .run("nbdinfo", &["--map", &site.uri("n")])
            .await
            .unwrap();
        let words: Vec<&str> = map.split_whitespace().collect();
        let expected = "0 1056768 3 hole,zero 1056768 57344 0 data 1114112 7274496 3 hole,zero \
                        8388608 4096 0 data 8392704 58716160 3 hole,zero";
        assert_eq!(words.join(" "), expected);
        let uri = site.uri("n");
        let map = site
            .run("qemu-img", &["map", "--output=json", "-f", "raw", &uri])
            .await;
        let map: serde_json::Value = serde_json::from_str(&map.unwrap()).unwrap();
        let data: Vec<_> = map
            .as_array()
            .unwrap()
            .iter()
            .filter(|e| e["data"] == true)
            .collect();
        assert_eq!(data.len(), 2);
        assert_eq!(
            (&data[0]["start"], &data[0]["length"]),
            (&1056768.into(), &57344.into())
        );
    });
}

#[test]
fn qemu_img_copies_in_and_out() {
    if !has_program("qemu-img") {
        return;
    }
    serve(|site| async move {
        exported(&site);
        let uri = site.uri("n");
        let mut content = noise(SIZE as usize, 1);
        content[3 << 20..20 << 20].fill(0);
        fs::write(site.directory().join("in.raw"), &content).unwrap();
        let convert = ["convert", "-n", "-f", "raw", "-O", "raw"];
        site.run("qemu-img", &[&convert[..], &["in.raw", &uri]].concat())
            .await
            .unwrap();
        let compare = ["compare", "-f", "raw", "-F", "raw", "in.raw", &uri];
        site.run("qemu-img", &compare).await.unwrap();
        let convert = ["convert", "-f", "raw", "-O", "qcow2", &uri, "out.qcow2"];
        site.run("qemu-img", &convert).await.unwrap();
        let compare = ["compare", "-f", "raw", "-F", "qcow2", "in.raw", "out.qcow2"];
        site.run("qemu-img", &compare).await.unwrap();
        qemu_io(&site, &["write -P 0x77 40M 1"]).await.unwrap();
        let compare = ["compare", "-f", "raw", "-F", "qcow2", &uri, "out.qcow2"];
        assert!(site.run("qemu-img", &compare).await.is_err());
    });
}

#[test]
fn nbdcopy_copies_over_several_connections() {
    if !has_program("nbdcopy") {
        return;
    }
    serve(|site| async move {
        exported(&site);
        let uri = site.uri("n");
        let mut content = noise(SIZE as usize, 2);
        content[5 << 20..9 << 20].fill(0);
        fs::write(site.directory().join("in.raw"), &content).unwrap();
        for flags in [
            &["--flush"][..],
            &["--synchronous"],
            &["--connections=4", "--requests=64"],
        ] {
            site.run("nbdcopy", &[flags, &["in.raw", &uri]].concat())
                .await
                .unwrap();
            site.run("nbdcopy", &[flags, &[&uri, "out.raw"]].concat())
                .await
                .unwrap();
            assert!(
                fs::read(site.directory().join("out.raw")).unwrap() == content,
                "{flags:?}"
            );
            qemu_io(&site, &["write -z -u 0 64M"]).await.unwrap();
        }
    });
}

#[test]
fn fio_verifies_what_it_writes() {
    let engines = std::process::Command::new("fio").arg("--enghelp").output();
    if !engines.is_ok_and(|list| String::from_utf8_lossy(&list.stdout).contains("nbd")) {
        eprintln!("SKIPPED: fio with the nbd engine is not installed");
        return;
    }
    serve(|site| async move {
        exported(&site);
        let uri = format!("--uri={}", site.uri("n"));
        let arguments = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-256k",
            "--size=32M",
            "--iodepth=32",
            "--verify=crc32c",
            "--output-format=terse",
        ];
        site.run("fio", &arguments).await.unwrap();
    });
}

#[test]
fn writethrough_flushes_after_each_write() {
    if !has_program("qemu-io") {
        return;
    }
    serve(|site| async move {
        let node = site.node("n", SIZE, NodeOptions::default());
        let spec = NbdExportSpec {
            writethrough: true,
            ..export_spec("n", "n", true)
        };
        site.service.add(spec).unwrap();
        let uri = site.uri("n");
        let unsafe_cache = [
            "-t",
            "unsafe",
            "-f",
            "raw",
            "-c",
            "write 0 4k",
            "-c",
            "write 4k 4k",
        ];
        site.run("qemu-io", &[&unsafe_cache[..], &[&uri]].concat())
            .await
            .unwrap();
        // The peer flushes once when it leaves, whatever its cache mode.
        assert_eq!(memory(&node).flushes.get(), 3);
        site.exports.remove("n", RemoveMode::Safe).await.unwrap();
        site.export(&node, true);
        site.run("qemu-io", &[&unsafe_cache[..], &[&uri]].concat())
            .await
            .unwrap();
        assert_eq!(memory(&node).flushes.get(), 4);
    });
}
