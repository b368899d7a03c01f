//! Every driver, in several geometries, held to the contract of the block layer.

use std::rc::Rc;
use std::time::Duration;

use liveblk::block::{Child, Driver, Graph, Node, Permission, Permissions, Role};
use liveblk::filter::{
    Blkdebug, BlkdebugOptions, CbwOptions, CopyBeforeWrite, CopyOnRead, GuestReads, Preallocate,
    PreallocateOptions, SnapshotAccess, Throttle, ThrottleGroup, ThrottleLimits,
};
use liveblk::format::raw::{Raw, RawOptions};
use liveblk::protocol::file::{File, FileKind, FileOptions};
use liveblk::protocol::null::{Null, NullOptions};
use liveblk::runtime::{Config, Handle, Runtime};
use liveblk::testing::{
    DiskOptions, Power, Random, SimulatedDisk, Subject, VolatileStore, attach, check_contract,
    check_reading, disk_of, for_each_seed, full_access, insert, insert_with, simulate, stamped,
    writable,
};

use super::chain::{Geometry, create_on, open_image};

fn content(random: &mut Random, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    for stamp in 0..random.below(12) {
        let start = random.below(size);
        let end = (start + random.below(size / 3 + 1)).min(size);
        let range = liveblk::range::ByteRange::between(start, end);
        bytes[start as usize..end as usize].copy_from_slice(&stamped(stamp as u32, &range));
    }
    bytes
}

fn subject(name: &str, guest: Rc<Child>, content: Vec<u8>) -> Subject {
    Subject {
        name: name.to_owned(),
        guest,
        content,
        stores: true,
        kernel_pages: true,
        resizable: None,
        unit: 4096,
    }
}

fn file_child(graph: &Graph, parent: &str, node: &Rc<Node>, permissions: Permissions) -> Rc<Child> {
    let edge = graph.attach_for(parent, Role::File, node, permissions);
    edge.expect("no other user")
}

/// A disk whose requests must be aligned to any power of two up to a page.
fn any_disk(handle: &Handle, random: &mut Random, bytes: &[u8]) -> SimulatedDisk {
    let options = DiskOptions {
        request_alignment: random.choose(&[1, 512, 4096]),
        native_fua: random.percent(50),
        write_zeroes: random.percent(50),
        garbles_discards: false,
        ..DiskOptions::default()
    };
    let store = VolatileStore::from_bytes(bytes);
    SimulatedDisk::new(handle, &Power::new(), options, store, random.next_u64())
}

#[test]
fn simulated_disk() {
    for_each_seed("contract::simulated_disk", 8, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let bytes = content(&mut random, 1 << 18);
            let disk = any_disk(&handle, &mut random, &bytes);
            let graph = Graph::new();
            let guest = attach(
                &graph,
                &insert(&graph, "disk", disk.driver()),
                full_access(),
            );
            let step = u64::from(disk.options().request_alignment);
            let disk = Subject {
                resizable: Some(step),
                ..subject("simulated disk", guest, bytes)
            };
            check_contract(disk, seed).await;
        });
    });
}

#[test]
fn null() {
    simulate(1, |handle| async move {
        let options = NullOptions {
            driver_name: "null-co",
            size: 1 << 18,
            latency: Duration::from_micros(3),
            read_zeroes: true,
        };
        let driver = Null::open(&handle, options).expect("a small size");
        let graph = Graph::new();
        let guest = attach(
            &graph,
            &insert(&graph, "null", Box::new(driver)),
            full_access(),
        );
        let null = Subject {
            stores: false,
            ..subject("null-co", guest, vec![0; 1 << 18])
        };
        check_contract(null, 1).await;
    });
}

#[test]
fn raw() {
    for_each_seed("contract::raw", 10, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let whole = content(&mut random, 1 << 18);
            let disk = any_disk(&handle, &mut random, &whole);
            let alignment = u64::from(disk.options().request_alignment);
            let options = match seed % 3 {
                0 => RawOptions::default(),
                1 => RawOptions {
                    offset: random.below(9) * alignment,
                    size: None,
                },
                _ => RawOptions {
                    offset: random.below(9) * alignment,
                    size: Some((1 + random.below(20)) * 4096),
                },
            };
            let graph = Graph::new();
            let below = insert(&graph, "disk", disk.driver());
            let file = file_child(&graph, "raw", &below, Raw::file_permissions(&options));
            let driver = Raw::open(file.clone(), options).expect("a part of the disk");
            let node = insert_with(&graph, "raw", Box::new(driver), vec![file], writable());
            let start = options.offset as usize;
            let end = options
                .size
                .map_or(whole.len(), |size| start + size as usize);
            let mut permissions = full_access();
            if options.size.is_some() {
                permissions.required -= liveblk::block::Permission::RESIZE;
            }
            let guest = attach(&graph, &node, permissions);
            let part = whole[start..end].to_vec();
            let name = format!("raw {options:?} over alignment {alignment}");
            check_contract(subject(&name, guest, part), seed).await;
            let around = disk.to_bytes();
            assert_eq!(around[..start], whole[..start], "before the part");
            assert_eq!(around[end..], whole[end..], "after the part");
        });
    });
}

/// A real file, through the ring.
#[test]
fn file() {
    let runtime = match Runtime::new(&Config::default()) {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("skipped: {error}");
            return;
        }
    };
    let folder = tempfile::tempdir().expect("a folder");
    for_each_seed("contract::file", 4, |seed| {
        let bytes = content(&mut Random::new(seed), 1 << 18);
        let path = folder.path().join(format!("file{seed}"));
        std::fs::write(&path, &bytes).expect("a file");
        runtime.block_on(async {
            let options = FileOptions {
                filename: path.to_str().expect("a plain name").to_owned(),
                kind: FileKind::Regular,
                writable: true,
                auto_read_only: false,
                direct: seed % 2 == 0,
                no_flush: false,
                locking: true,
            };
            let direct = options.direct;
            let driver = match File::open(&runtime.handle(), options).await {
                Ok(driver) => driver,
                Err(error) if direct => {
                    eprintln!("skipped: no direct I/O here: {error}");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            let graph = Graph::new();
            let guest = attach(
                &graph,
                &insert(&graph, "file", Box::new(driver)),
                full_access(),
            );
            let file = Subject {
                kernel_pages: false,
                resizable: Some(4096),
                ..subject(&format!("file, direct={direct}"), guest.clone(), bytes)
            };
            check_contract(file, seed).await;
            graph.detach(&guest).await.expect("it closes");
        });
    });
}

#[test]
fn qcow2() {
    for_each_seed("contract::qcow2", 25, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let geometry = Geometry::draw(&mut random);
            let size = random.below(200) * 512 + (3 << geometry.cluster_bits);
            let disk = any_disk(&handle, &mut random, &[]);
            let created = create_on(&disk, &geometry.create_options(size)).await;
            created.expect("valid options");
            let graph = Graph::new();
            let opened = open_image(&graph, "image", &disk, &geometry, None, false).await;
            let node = opened.expect("a valid image");
            let guest = attach(&graph, &node, full_access());
            let image = Subject {
                resizable: Some(512),
                unit: 1 << geometry.cluster_bits,
                ..subject(&format!("{geometry:?}"), guest, vec![0; size as usize])
            };
            check_contract(image, seed).await;
        });
    });
}

/// Overlays over raw and qcow2 images that are shorter, longer, or of the same size.
#[test]
fn qcow2_overlays() {
    for_each_seed("contract::qcow2_overlays", 25, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let graph = Graph::new();
            let mut geometry = Geometry::draw(&mut random);
            let size = 512 * (1 + random.below(300)) + (3 << geometry.cluster_bits);
            let base_size = match seed % 3 {
                0 => size,
                1 => 512 * (1 + random.below(size / 512)),
                _ => size + 512 * random.below(300),
            };
            let mut bytes = content(&mut random, base_size);
            let mut below = insert(&graph, "base", disk_of(&handle, &bytes, seed).driver());
            for depth in 0..1 + random.below(3) {
                let disk = any_disk(&handle, &mut random, &[]);
                let size = size + 512 * random.below(9);
                let created = create_on(&disk, &geometry.create_options(size)).await;
                created.expect("valid options");
                let name = format!("layer{depth}");
                let opened = open_image(&graph, &name, &disk, &geometry, Some(&below), false).await;
                below = opened.expect("a valid image");
                bytes.resize(size as usize, 0);
                geometry = Geometry::draw(&mut random);
            }
            let guest = attach(&graph, &below, full_access());
            let chain = Subject {
                resizable: Some(512),
                unit: 4096,
                ..subject("overlay", guest, bytes)
            };
            check_contract(chain, seed).await;
        });
    });
}

/// A chain of two layers under a filter that fills the upper one.
#[test]
fn copy_on_read() {
    for_each_seed("contract::copy_on_read", 20, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let graph = Graph::new();
            let geometry = Geometry::draw(&mut random);
            let size = 512 * random.below(300) + (3 << geometry.cluster_bits);
            let bytes = content(&mut random, size);
            let base = insert(&graph, "base", disk_of(&handle, &bytes, seed).driver());
            let disk = any_disk(&handle, &mut random, &[]);
            let created = create_on(&disk, &geometry.create_options(size)).await;
            created.expect("valid options");
            let opened = open_image(&graph, "top", &disk, &geometry, Some(&base), false).await;
            let top = opened.expect("a valid image");
            let file = file_child(&graph, "copy", &top, Permissions::NONE);
            let driver = CopyOnRead::new(file.clone(), None, GuestReads::Copy);
            let node = insert_with(&graph, "copy", Box::new(driver), vec![file], writable());
            let guest = attach(&graph, &node, full_access());
            let filter = Subject {
                resizable: Some(512),
                unit: 1 << geometry.cluster_bits,
                ..subject("copy-on-read", guest, bytes)
            };
            check_contract(filter, seed).await;
        });
    });
}

/// A disk under a filter that saves what it had, and what it had after all that.
#[test]
fn copy_before_write() {
    for_each_seed("contract::copy_before_write", 20, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let graph = Graph::new();
            let geometry = Geometry::draw(&mut random);
            let size = 4096 * (48 + random.below(120));
            let bytes = content(&mut random, size);
            let disk = any_disk(&handle, &mut random, &bytes);
            let below = insert(&graph, "disk", disk.driver());
            let image = any_disk(&handle, &mut random, &[]);
            let created = create_on(&image, &geometry.create_options(size)).await;
            created.expect("valid options");
            let target = open_image(&graph, "target", &image, &geometry, None, false).await;
            let target = target.expect("a valid image");
            let edge = |role, node| graph.attach_for("filter", role, node, Permissions::NONE);
            let file = edge(Role::File, &below).expect("no other user");
            let target = edge(Role::Target, &target).expect("no other user");
            let children = vec![file.clone(), target.clone()];
            let options = CbwOptions {
                min_cluster_size: random.choose(&[0, 1 << 17, 1 << 21]),
                ..CbwOptions::default()
            };
            let driver = CopyBeforeWrite::new(&handle, file, target, options);
            let driver = Box::new(driver);
            let filter = insert_with(&graph, "filter", driver, children, writable());
            let guest = attach(&graph, &filter, shared_access());
            let file = file_child(&graph, "access", &filter, Permissions::NONE);
            let access = Box::new(SnapshotAccess::new(file.clone()));
            let access = insert_with(&graph, "access", access, vec![file], writable());
            let reader = attach(&graph, &access, shared_access());
            let before = || subject("snapshot-access", reader.clone(), bytes.clone());
            check_reading(before(), seed).await;
            let filter = Subject {
                unit: 1 << 16,
                ..subject("copy-before-write", guest, bytes.clone())
            };
            check_contract(filter, seed).await;
            check_reading(before(), seed).await;
        });
    });
}

/// Reads and writes; others may do anything.
fn shared_access() -> Permissions {
    Permissions {
        required: full_access().required - Permission::RESIZE,
        ..Permissions::NONE
    }
}

/// Filters that hand requests on, over disks of any alignment.
#[test]
fn filters() {
    for_each_seed("contract::filters", 24, |seed| {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let bytes = content(&mut random, 1 << 18);
            let disk = any_disk(&handle, &mut random, &bytes);
            let graph = Graph::new();
            let below = insert(&graph, "disk", disk.driver());
            let role = match seed % 3 {
                0 => Role::Image,
                _ => Role::File,
            };
            let edge = graph.attach_for("filter", role, &below, Permissions::NONE);
            let edge = edge.expect("no other user");
            let alignment = u64::from(disk.options().request_alignment);
            let driver: Box<dyn Driver> = match seed % 3 {
                0 => Box::new(any_blkdebug(&handle, &mut random, &edge, alignment)),
                1 => {
                    let mut limits = ThrottleLimits::default();
                    limits.set("iops-total", 1000);
                    limits.set("bps-write", 1 << 30);
                    let group = ThrottleGroup::new(&handle, "g", limits);
                    Box::new(Throttle::new(edge.clone(), group))
                }
                _ => {
                    let options = PreallocateOptions {
                        size: random.below(1 << 16),
                        align: 512 * (1 + random.below(9)),
                    };
                    let driver = Preallocate::new(edge.clone(), options);
                    Box::new(driver.expect("valid options"))
                }
            };
            let name = driver.driver_name();
            let node = insert_with(&graph, "filter", driver, vec![edge], writable());
            let guest = attach(&graph, &node, full_access());
            let filter = Subject {
                resizable: Some(4096),
                ..subject(name, guest, bytes)
            };
            check_contract(filter, seed).await;
        });
    });
}

/// Alignments and lengths that go together, and no errors.
fn any_blkdebug(
    handle: &Handle,
    random: &mut Random,
    image: &Rc<Child>,
    alignment: u64,
) -> Blkdebug {
    let align = alignment.max(random.choose(&[1, 512, 4096]));
    let options = BlkdebugOptions {
        align,
        max_transfer: align * random.below(4),
        opt_write_zero: align * random.below(3),
        max_write_zero: align * 2 * random.below(4),
        opt_discard: align * random.below(3),
        max_discard: align * 2 * random.below(4),
        ..BlkdebugOptions::default()
    };
    Blkdebug::new(handle, image.clone(), options).expect("they go together")
}
