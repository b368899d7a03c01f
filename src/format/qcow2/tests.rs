//! Images written at random against a plain model, checked by the in-process check.

use std::rc::Rc;

use super::check::check;
use super::create::{CreateOptions, create};
use super::header::BackingReference;
use super::{CacheSizes, OpenOptions, Qcow2};
use crate::block::{
    Child, Graph, NodeOptions, NodeSpec, Permission, Permissions, Role, WriteFlags, ZeroFlags,
};
use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::range::ByteRange;
use crate::runtime::{Handle, Runtime};
use crate::testing::{Random, SimulatedDisk, for_each_seed};

const ALL: Permissions = Permissions {
    required: Permission::all(),
    shared: Permission::all(),
};

fn spec(name: &str) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        options: NodeOptions {
            discard: crate::block::DiscardMode::Unmap,
            ..NodeOptions::default()
        },
        file_name: String::new(),
        implicit: false,
    }
}

/// An edge to a new node over this disk.
fn file_edge(graph: &Graph, name: &str, disk: &SimulatedDisk) -> Rc<Child> {
    let node = graph
        .insert(spec(&format!("{name}-file")), disk.driver(), Vec::new())
        .expect("a new name");
    graph
        .attach_for(name, Role::File, &node, ALL)
        .expect("no other user")
}

/// An open image over a simulated disk, and an edge to it.
pub(super) struct Image {
    pub(super) graph: Graph,
    pub(super) disk: SimulatedDisk,
    pub(super) guest: Rc<Child>,
}

impl Image {
    pub(super) async fn open(
        graph: &Graph,
        name: &str,
        disk: &SimulatedDisk,
        backing: Option<&Image>,
        caches: CacheSizes,
    ) -> Result<Image> {
        let file = file_edge(graph, name, disk);
        let edge = backing.map(|below| {
            let users = Permissions::NONE.for_backing();
            graph
                .attach_for(name, Role::Backing, &below.guest.node(), users)
                .expect("reading is shared")
        });
        let options = OpenOptions {
            node_name: name.to_owned(),
            graph: Some(graph.clone()),
            backing: edge.clone(),
            pass_discard: true,
            caches,
            ..OpenOptions::default()
        };
        let driver = Qcow2::open(file.clone(), options).await?;
        let children = std::iter::once(file).chain(edge).collect();
        let node = graph.insert(spec(name), Box::new(driver), children)?;
        let guest = graph.attach_root("a test", &node, ALL)?;
        Ok(Image {
            graph: graph.clone(),
            disk: disk.clone(),
            guest,
        })
    }

    pub(super) async fn read(&self, offset: u64, length: usize) -> Vec<u8> {
        let buffer = MemorySlice::zeroed(length);
        buffer.fill(0, length, 0x77);
        self.guest
            .read(offset, buffer.clone().into())
            .await
            .expect("no fault");
        buffer.to_vec()
    }

    pub(super) async fn write(&self, offset: u64, bytes: &[u8]) {
        let payload = MemorySlice::from_bytes(bytes).into();
        self.guest
            .write(offset, payload, WriteFlags::empty())
            .await
            .expect("no fault");
    }

    pub(super) async fn close(&self) {
        self.guest.node().driver().close().await.expect("no fault");
    }

    pub(super) async fn assert_clean(&self) {
        let file = self.guest.node().child(Role::File).expect("a file");
        let result = check(&file).await.expect("a valid header");
        assert!(result.is_clean(), "{result:?}");
    }

    pub(super) async fn new(
        handle: &Handle,
        name: &str,
        options: CreateOptions,
        backing: Option<&Image>,
        caches: CacheSizes,
    ) -> Image {
        let graph = backing.map_or_else(Graph::new, |below| below.graph.clone());
        let disk = SimulatedDisk::empty(handle, 5);
        let file = file_edge(&graph, &format!("create-{name}"), &disk);
        create(&file, &options).await.expect("valid options");
        Image::open(&graph, name, &disk, backing, caches)
            .await
            .expect("a valid image")
    }
}

fn small_caches() -> CacheSizes {
    CacheSizes {
        l2_cache_size: Some(2048),
        refcount_cache_size: Some(2048),
        cache_size: None,
    }
}

pub(super) fn geometry(random: &mut Random, size: u64) -> CreateOptions {
    CreateOptions {
        version: if random.percent(25) { 2 } else { 3 },
        cluster_size: 1 << random.choose(&[9, 9, 10, 12, 14, 16]),
        ..CreateOptions::new(size)
    }
    .with_refcounts(random)
}

impl CreateOptions {
    fn with_refcounts(mut self, random: &mut Random) -> CreateOptions {
        if self.version == 3 {
            self.refcount_bits = random.choose(&[1, 2, 4, 8, 16, 32, 64]);
        }
        self
    }
}

/// One random change of image and model.
pub(super) async fn change(image: &Image, model: &mut [u8], random: &mut Random) {
    let size = model.len() as u64;
    let start = random.below(size);
    let most = random.choose(&[100, 5000, 60000]);
    let length = 1 + random.below((size - start).min(most));
    let range = ByteRange::between(start, start + length);
    let part = &mut model[start as usize..(start + length) as usize];
    match random.below(10) {
        0..=5 => {
            let value = random.next_u64() as u8;
            part.fill(value);
            image.write(start, part).await;
        }
        6 => {
            part.fill(0);
            let flags = random.choose(&[ZeroFlags::empty(), ZeroFlags::MAY_UNMAP]);
            image
                .guest
                .write_zeroes(range, flags)
                .await
                .expect("no fault");
        }
        7 => {
            image.guest.discard(range).await.expect("no fault");
            let now = image.read(start, length as usize).await;
            let zero_or_kept = now
                .iter()
                .zip(part.iter())
                .all(|(now, was)| *now == 0 || now == was);
            assert!(zero_or_kept, "a discard made something up in {range}");
            part.copy_from_slice(&now);
        }
        8 => image.guest.flush().await.expect("no fault"),
        _ => {
            let now = image.read(start, length as usize).await;
            assert!(now == part, "{range} reads wrong");
        }
    }
}

async fn run_against_model(handle: &Handle, seed: u64) {
    let mut random = Random::new(seed);
    let size = 512 * (1 + random.below(1000));
    let below_size = 512 * (1 + random.below(1000));
    let base = Image::new(
        handle,
        "base",
        geometry(&mut random, below_size),
        None,
        CacheSizes::default(),
    )
    .await;
    let mut below = vec![0; below_size as usize];
    for _ in 0..20 {
        change(&base, &mut below, &mut random).await;
    }
    let mut options = geometry(&mut random, size);
    let backing = random.percent(60).then_some(&base);
    options.backing = backing.map(|_| BackingReference {
        file: "base".to_owned(),
        format: Some("qcow2".to_owned()),
    });
    let image = Image::new(handle, "top", options, backing, small_caches()).await;
    let mut model = match backing {
        Some(_) => below,
        None => Vec::new(),
    };
    model.resize(size as usize, 0);
    for _ in 0..120 {
        change(&image, &mut model, &mut random).await;
    }
    assert!(
        image.read(0, model.len()).await == model,
        "before the close"
    );
    image.close().await;
    image.assert_clean().await;
    base.close().await;
    base.assert_clean().await;
    let again = Image::open(
        &image.graph,
        "again",
        &image.disk,
        backing,
        CacheSizes::default(),
    )
    .await
    .expect("a valid image");
    assert!(
        again.read(0, model.len()).await == model,
        "after opening again"
    );
}

#[test]
fn random_requests_one_by_one_behave_like_a_plain_disk() {
    for_each_seed("random_requests_one_by_one", 60, |seed| {
        let runtime = Runtime::simulated(seed).expect("a simulated runtime");
        runtime.block_on(run_against_model(&runtime.handle(), seed));
    });
}
