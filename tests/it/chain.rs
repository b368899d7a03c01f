//! Chains of qcow2 images on simulated disks: created, opened, overlaid, crashed and opened again.

use std::rc::Rc;

use liveblk::block::{Child, Graph, Node, Permissions, Role};
use liveblk::error::Result;
use liveblk::filter::{CopyOnRead, GuestReads};
use liveblk::format::qcow2::check::{CheckResult, check};
use liveblk::format::qcow2::create::{CreateOptions, create};
use liveblk::format::qcow2::{BitmapKeeping, CacheSizes, OpenOptions, Qcow2};
use liveblk::runtime::Handle;
use liveblk::testing::{
    DiskOptions, Power, Random, SimulatedDisk, VolatileStore, attach, full_access, insert,
    insert_with, writable,
};

/// What the images of a chain are like.
#[derive(Clone, Debug)]
pub(crate) struct Geometry {
    pub(crate) version: u32,
    pub(crate) cluster_bits: u32,
    pub(crate) refcount_bits: u64,
    pub(crate) lazy_refcounts: bool,
    /// Caches of the smallest size, so that they overflow.
    pub(crate) tiny_caches: bool,
    pub(crate) pass_discard: bool,
}

impl Geometry {
    /// Any that there is, small clusters more often.
    pub(crate) fn draw(random: &mut Random) -> Geometry {
        let version = random.choose(&[2, 3, 3, 3]);
        Geometry {
            version,
            cluster_bits: random.choose(&[9, 9, 10, 12, 12, 14, 16]),
            refcount_bits: match version {
                2 => 16,
                _ => random.choose(&[1, 2, 4, 8, 16, 16, 32, 64]),
            },
            lazy_refcounts: version == 3 && random.percent(25),
            tiny_caches: random.percent(50),
            pass_discard: random.percent(70),
        }
    }

    pub(crate) fn create_options(&self, size: u64) -> CreateOptions {
        CreateOptions {
            version: self.version,
            cluster_size: 1 << self.cluster_bits,
            refcount_bits: self.refcount_bits,
            lazy_refcounts: self.lazy_refcounts,
            ..CreateOptions::new(size)
        }
    }

    fn caches(&self) -> CacheSizes {
        match self.tiny_caches {
            false => CacheSizes::default(),
            true => CacheSizes {
                cache_size: None,
                l2_cache_size: Some(2048),
                refcount_cache_size: Some(2048),
            },
        }
    }
}

/// An open chain; the last layer is the active one.
pub(crate) struct Chain {
    pub(crate) handle: Handle,
    pub(crate) power: Power,
    pub(crate) graph: Graph,
    pub(crate) geometry: Geometry,
    pub(crate) disk_options: DiskOptions,
    pub(crate) disks: Vec<SimulatedDisk>,
    pub(crate) guest: Rc<Child>,
    seed: u64,
}

/// An edge to the file of a format, over a new disk node.
pub(crate) fn file_edge(graph: &Graph, name: &str, disk: &SimulatedDisk) -> Rc<Child> {
    let node = insert(graph, &format!("{name}-file"), disk.driver());
    let edge = graph.attach_for(name, Role::File, &node, full_access());
    edge.expect("a new disk has no other user")
}

/// Creates an image on the disk and leaves no node behind.
pub(crate) async fn create_on(disk: &SimulatedDisk, options: &CreateOptions) -> Result<()> {
    let graph = Graph::new();
    create(&file_edge(&graph, "create", disk), options).await
}

/// Opens the image on a disk; a backing file is attached.
pub(crate) async fn open_image(
    graph: &Graph,
    name: &str,
    disk: &SimulatedDisk,
    geometry: &Geometry,
    backing: Option<&Rc<Node>>,
    read_only: bool,
) -> Result<Rc<Node>> {
    let file = file_edge(graph, name, disk);
    let edge = match backing {
        Some(below) => {
            let permissions = Permissions::NONE.for_backing();
            Some(graph.attach_for(name, Role::Backing, below, permissions)?)
        }
        None => None,
    };
    let options = OpenOptions {
        node_name: name.to_owned(),
        graph: Some(graph.clone()),
        read_only,
        backing: edge.clone(),
        pass_discard: geometry.pass_discard,
        caches: geometry.caches(),
        // Small enough that they matter to a small disk.
        keeping: BitmapKeeping {
            region: Some(16 << 10),
            most_marked: 4,
        },
        ..OpenOptions::default()
    };
    let driver = match Qcow2::open(file.clone(), options).await {
        Ok(driver) => driver,
        Err(error) => {
            graph.detach(&file).await?;
            return Err(error);
        }
    };
    let children = std::iter::once(file).chain(edge).collect();
    let mut node_options = writable();
    node_options.read_only = read_only;
    Ok(insert_with(
        graph,
        name,
        Box::new(driver),
        children,
        node_options,
    ))
}

/// Checks the image on a disk, as it is there now.
pub(crate) async fn check_disk(disk: &SimulatedDisk) -> Result<CheckResult> {
    let graph = Graph::new();
    check(&file_edge(&graph, "check", disk)).await
}

impl Chain {
    /// A new image of `size` bytes on a disk of this kind.
    pub(crate) async fn create(
        handle: &Handle,
        power: &Power,
        geometry: &Geometry,
        disk_options: DiskOptions,
        size: u64,
        seed: u64,
    ) -> Chain {
        let disk = SimulatedDisk::empty(handle, seed);
        let created = create_on(&disk, &geometry.create_options(size)).await;
        created.expect("valid options");
        let left = vec![disk.store()];
        let opened = Chain::open(handle, power, geometry, disk_options, left, seed).await;
        opened.expect("a new image can be opened")
    }

    /// The chain on what disks hold, from the base to the active layer.
    pub(crate) async fn open(
        handle: &Handle,
        power: &Power,
        geometry: &Geometry,
        disk_options: DiskOptions,
        stores: Vec<VolatileStore>,
        seed: u64,
    ) -> Result<Chain> {
        let disk = |(depth, store)| {
            SimulatedDisk::new(handle, power, disk_options, store, seed ^ depth as u64)
        };
        let disks = stores.into_iter().enumerate().map(disk).collect();
        Chain::open_disks(handle, power, geometry, disks, seed).await
    }

    /// The chain on disks of a kind, from the base to the active layer.
    pub(crate) async fn open_disks(
        handle: &Handle,
        power: &Power,
        geometry: &Geometry,
        disks: Vec<SimulatedDisk>,
        seed: u64,
    ) -> Result<Chain> {
        let graph = Graph::new();
        let mut below: Option<Rc<Node>> = None;
        let top = disks.len() - 1;
        let disk_options = disks[top].options();
        for (depth, disk) in disks.iter().enumerate() {
            let name = format!("layer{depth}");
            let lower = below.as_ref();
            let node = open_image(&graph, &name, disk, geometry, lower, depth < top).await?;
            below = Some(node);
        }
        let node = below.expect("a chain has a layer");
        Ok(Chain {
            handle: handle.clone(),
            power: power.clone(),
            guest: attach(&graph, &node, full_access()),
            graph,
            geometry: geometry.clone(),
            disk_options,
            disks,
            seed,
        })
    }

    /// Puts a new overlay on top, as a live snapshot does: requests wait meanwhile.
    pub(crate) async fn snapshot(&mut self) -> Result<()> {
        let depth = self.disks.len();
        let size = self.guest.node().size();
        let store = VolatileStore::default();
        let seed = self.seed ^ (depth as u64) << 8;
        let disk = SimulatedDisk::new(&self.handle, &self.power, self.disk_options, store, seed);
        create_on(&disk, &self.geometry.create_options(size)).await?;
        let name = format!("layer{depth}");
        let overlay = open_image(&self.graph, &name, &disk, &self.geometry, None, false).await?;
        let old = self.guest.node();
        let drained = self.graph.drain(&[old.clone(), overlay.clone()]).await?;
        self.graph
            .redirect(&drained, std::slice::from_ref(&self.guest), &overlay)?;
        self.graph.set_backing(&drained, &overlay, Some(&old))?;
        old.driver().set_read_only(true).await?;
        drop(drained);
        self.disks.push(disk);
        Ok(())
    }

    /// Puts a copy-on-read filter on top, as a stream job does: requests wait meanwhile.
    pub(crate) async fn copy_on_read(
        &mut self,
        bottom: Option<Rc<Node>>,
        reads: GuestReads,
    ) -> Result<Rc<Node>> {
        let node = self.copy_on_read_beside(bottom, reads)?;
        let drained = self.graph.drain(&[self.guest.node(), node.clone()]).await?;
        self.graph
            .redirect(&drained, std::slice::from_ref(&self.guest), &node)?;
        Ok(node)
    }

    /// A copy-on-read filter over the node of the guest, which does not use it.
    pub(crate) fn copy_on_read_beside(
        &self,
        bottom: Option<Rc<Node>>,
        reads: GuestReads,
    ) -> Result<Rc<Node>> {
        let (graph, top) = (&self.graph, self.guest.node());
        let name = format!("copy{}", graph.nodes().len());
        let file = graph.attach_for(&name, Role::File, &top, Permissions::NONE)?;
        let driver = Box::new(CopyOnRead::new(file.clone(), bottom, reads));
        Ok(insert_with(graph, &name, driver, vec![file], writable()))
    }

    /// What is left of every disk after power failed.
    pub(crate) fn crash(&self, random: &mut Random) -> Vec<VolatileStore> {
        self.disks.iter().map(|disk| disk.crash(random)).collect()
    }

    /// Closes every layer, top first.
    pub(crate) async fn close(&self) -> Result<()> {
        self.graph.detach(&self.guest).await
    }

    /// Every image is in order; `leaks`: space may be held in vain.
    pub(crate) async fn assert_sound(&self, leaks: bool, when: &str) {
        for (depth, disk) in self.disks.iter().enumerate() {
            let result = check_disk(disk).await.expect("a readable header");
            let sound = if leaks {
                result.is_safe()
            } else {
                result.is_clean()
            };
            assert!(sound, "layer {depth} {when}: {result:#?}");
        }
    }
}
