//! A chain of any images on simulated disks, with a guest above and jobs at work on it; opened from what the
//! headers on disk say.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use liveblk::block::{Child, Graph, Node, Permission, Permissions, Role};
use liveblk::error::{Error, ErrorKind, Result};
use liveblk::format::qcow2::Qcow2;
use liveblk::format::qcow2::create::CreateOptions;
use liveblk::format::qcow2::header::BackingReference;
use liveblk::format::raw::{Raw, RawOptions};
use liveblk::job::{Images, JobEvent, Jobs, LocalFuture, Workshop};
use liveblk::runtime::Handle;
use liveblk::runtime::sync::Mutex;
use liveblk::testing::{
    DiskOptions, Power, Random, SimulatedDisk, VolatileStore, attach, insert_with, writable,
};

use crate::chain::{Geometry, check_disk, create_on, file_edge, open_image};

/// The format of an image.
#[derive(Clone, Debug)]
pub(crate) enum Kind {
    Raw,
    Qcow2(Geometry),
}

impl Kind {
    fn name(&self) -> &'static str {
        match self {
            Kind::Raw => "raw",
            Kind::Qcow2(_) => "qcow2",
        }
    }
}

/// An image file: its name is that of the node, and what overlays' headers call it.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) disk: SimulatedDisk,
}

/// An image file that nobody has open.
#[derive(Clone)]
pub(crate) struct Stored {
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) store: VolatileStore,
}

fn backing_name(kind: &Kind, store: &VolatileStore) -> Option<String> {
    if matches!(kind, Kind::Raw) {
        return None;
    }
    let mut head = [0; 20];
    store.read(0, &mut head);
    let offset = u64::from_be_bytes(head[8..16].try_into().expect("eight bytes"));
    let length = u32::from_be_bytes(head[16..20].try_into().expect("four bytes"));
    let mut name = vec![0; length as usize];
    store.read(offset, &mut name);
    (offset != 0).then(|| String::from_utf8_lossy(&name).into_owned())
}

/// What the stage is made of besides images.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) handle: Handle,
    pub(crate) power: Power,
    pub(crate) disk: DiskOptions,
    pub(crate) seed: u64,
}

impl World {
    pub(crate) fn disk_with(&self, store: VolatileStore, salt: u64) -> SimulatedDisk {
        let seed = self.seed ^ salt << 8;
        SimulatedDisk::new(&self.handle, &self.power, self.disk, store, seed)
    }

    /// A new image, whole on its disk.
    pub(crate) async fn create(
        &self,
        name: &str,
        kind: &Kind,
        size: u64,
        backing: Option<(&str, &str)>,
        salt: u64,
    ) -> Image {
        let disk = self.disk_with(VolatileStore::default(), salt);
        match kind {
            Kind::Raw => {
                let zeroes = vec![0; size as usize];
                let disk = self.disk_with(VolatileStore::from_bytes(&zeroes), salt);
                return Image {
                    name: name.to_owned(),
                    kind: kind.clone(),
                    disk,
                };
            }
            Kind::Qcow2(geometry) => {
                let options = CreateOptions {
                    backing: backing.map(|(file, format)| BackingReference {
                        file: file.to_owned(),
                        format: Some(format.to_owned()),
                    }),
                    ..geometry.create_options(size)
                };
                create_on(&disk, &options).await.expect("valid options");
            }
        }
        Image {
            name: name.to_owned(),
            kind: kind.clone(),
            disk,
        }
    }
}

/// An open chain with a guest.
pub(crate) struct Stage {
    pub(crate) world: World,
    pub(crate) graph: Graph,
    pub(crate) workshop: Workshop,
    /// Held by whoever changes the graph over an await, as the daemon's commands do.
    pub(crate) changes: Rc<Mutex<()>>,
    pub(crate) images: RefCell<Vec<Image>>,
    pub(crate) guest: Rc<Child>,
    pub(crate) events: Rc<RefCell<Vec<JobEvent>>>,
    pub(crate) access: Rc<Access>,
    snapshots: Cell<u64>,
    /// Format of the targets of mirrors.
    pub(crate) target_kind: RefCell<Kind>,
    /// A target that waits for its mirror.
    target: RefCell<Option<Image>>,
    targets: Cell<u64>,
}

impl Stage {
    /// Opens the chain that begins with the image of this name, as the headers on disk have it.
    pub(crate) async fn open(world: &World, stored: Vec<Stored>, active: &str) -> Result<Stage> {
        let disk = |(index, one): (usize, Stored)| Image {
            disk: world.disk_with(one.store, index as u64),
            name: one.name,
            kind: one.kind,
        };
        let images: Vec<Image> = stored.into_iter().enumerate().map(disk).collect();
        Stage::open_images(world, images, active).await
    }

    pub(crate) async fn open_images(
        world: &World,
        images: Vec<Image>,
        active: &str,
    ) -> Result<Stage> {
        let graph = Graph::new();
        let mut chain: Vec<&Image> = Vec::new();
        let mut next = Some(active.to_owned());
        while let Some(name) = next {
            let image = images.iter().find(|image| image.name == name);
            let Some(image) = image else {
                let text = format!("no image '{name}'");
                return Err(Error::new(ErrorKind::NotFound, text));
            };
            next = backing_name(&image.kind, &image.disk.store());
            chain.push(image);
        }
        let mut below = None;
        for (index, image) in chain.iter().enumerate().rev() {
            let node = open_one(&graph, image, below.as_ref(), index > 0).await?;
            below = Some(node);
        }
        let node = below.expect("a chain has a layer");
        let changes = Rc::new(Mutex::new(()));
        let access = Rc::new(Access {
            graph: graph.clone(),
            refused: RefCell::default(),
        });
        let jobs = Jobs::new(&world.handle, &changes);
        let events: Rc<RefCell<Vec<JobEvent>>> = Rc::default();
        let told = events.clone();
        jobs.on_event(move |event| told.borrow_mut().push(event.clone()));
        Ok(Stage {
            world: world.clone(),
            guest: attach(&graph, &node, export()),
            workshop: Workshop {
                graph: graph.clone(),
                jobs,
                images: access.clone(),
            },
            graph,
            changes,
            target_kind: RefCell::new(chain[0].kind.clone()),
            images: RefCell::new(images),
            events,
            access,
            snapshots: Cell::new(0),
            target: RefCell::default(),
            targets: Cell::new(0),
        })
    }

    /// The active layer.
    pub(crate) fn active(&self) -> Rc<Node> {
        self.guest.node().without_filters()
    }

    /// The layers, from the active one to the base.
    pub(crate) fn layers(&self) -> Vec<Rc<Node>> {
        let mut layers = vec![self.active()];
        while let Some(below) = layers[layers.len() - 1].backing() {
            layers.push(below);
        }
        layers
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let layers = self.layers();
        layers.iter().map(|node| node.name().to_owned()).collect()
    }

    pub(crate) fn disk(&self, name: &str) -> SimulatedDisk {
        let images = self.images.borrow();
        let image = images.iter().find(|image| image.name == name);
        image.expect("an image of that name").disk.clone()
    }

    /// A live snapshot: a new active layer.
    ///
    /// # Errors
    /// The active layer is busy.
    pub(crate) async fn snapshot(&self, geometry: &Geometry) -> Result<()> {
        let _turn = self.changes.lock().await;
        let old = self.guest.node();
        old.check_unoccupied()?;
        let number = self.snapshots.get();
        self.snapshots.set(number + 1);
        let name = format!("snap{number}");
        let kind = Kind::Qcow2(geometry.clone());
        let backing = Some((old.name(), old.driver().driver_name()));
        let size = old.size();
        let salt = 100 + number;
        let image = self.world.create(&name, &kind, size, backing, salt).await;
        self.images.borrow_mut().push(image.clone());
        let overlay = open_one(&self.graph, &image, None, false).await?;
        let drained = self.graph.drain(&[old.clone(), overlay.clone()]).await?;
        let mut users = old.parents();
        users.retain(|edge| edge.follows());
        old.driver().flush().await?;
        self.graph.set_backing(&drained, &overlay, Some(&old))?;
        self.graph.redirect(&drained, &users, &overlay)?;
        self.access.turn_read_only(&old).await?;
        drop(drained);
        Ok(())
    }

    /// Makes the image that the next mirror goes to.
    pub(crate) async fn prepare_target(&self, backing: Option<&Rc<Node>>) -> Image {
        let number = self.targets.get();
        self.targets.set(number + 1);
        let name = format!("copy{number}");
        let kind = self.target_kind.borrow().clone();
        let backing = backing.map(|node| (node.name(), node.driver().driver_name()));
        let size = self.active().size();
        let made = self.world.create(&name, &kind, size, backing, 200 + number);
        let image = made.await;
        self.images.borrow_mut().push(image.clone());
        *self.target.borrow_mut() = Some(image.clone());
        image
    }

    /// The prepared target, or a new one, open.
    pub(crate) async fn open_target(&self, backing: Option<&Rc<Node>>) -> Result<Rc<Node>> {
        let prepared = self.target.take();
        let image = match prepared {
            Some(image) => image,
            None => self.prepare_target(backing).await,
        };
        self.target.take();
        self.open_named(&image.name).await
    }

    /// An image of its own, without a backing file.
    pub(crate) async fn open_named(&self, name: &str) -> Result<Rc<Node>> {
        let found = |image: &&Image| image.name == name;
        let image = self.images.borrow().iter().find(found).cloned();
        let image = image.expect("an image of that name");
        open_one(&self.graph, &image, None, false).await
    }

    /// What is on every disk when nothing is in flight.
    pub(crate) fn stored(&self) -> Vec<Stored> {
        self.each_store(|disk| disk.store())
    }

    /// What is left of every disk after power failed.
    pub(crate) fn crash(&self, random: &mut Random) -> Vec<Stored> {
        self.each_store(|disk| disk.crash(random))
    }

    fn each_store(&self, mut store: impl FnMut(&SimulatedDisk) -> VolatileStore) -> Vec<Stored> {
        let images = self.images.borrow();
        let each = images.iter().map(|image| Stored {
            name: image.name.clone(),
            kind: image.kind.clone(),
            store: store(&image.disk),
        });
        each.collect()
    }

    /// Closes every layer, top first.
    pub(crate) async fn close(&self) -> Result<()> {
        self.graph.detach(&self.guest).await
    }

    /// Every qcow2 image on the disks is in order; `leaks`: space may be held in vain.
    pub(crate) async fn assert_sound(&self, leaks: bool, when: &str) {
        let images = self.images.borrow().clone();
        for image in images {
            if matches!(image.kind, Kind::Raw) {
                continue;
            }
            let result = check_disk(&image.disk).await.expect("a readable header");
            let sound = if leaks {
                result.is_safe()
            } else {
                result.is_clean()
            };
            assert!(sound, "{} {when}: {result:#?}", image.name);
        }
    }

    /// No job has left anything behind: nodes, filters, edges, marks, access; and headers name the chain.
    pub(crate) fn assert_at_rest(&self, when: &str) {
        let wrong = self.traces();
        assert!(wrong.is_empty(), "{when}: {wrong:#?}");
    }

    /// As [`Stage::assert_at_rest`], where a header may be ahead of the graph: it was written by a last step
    /// that failed after that, and shows the same.
    pub(crate) fn assert_in_order(&self, when: &str) {
        let mut wrong = self.traces();
        wrong.retain(|line| !line.contains("its header says"));
        assert!(wrong.is_empty(), "{when}: {wrong:#?}");
    }

    fn traces(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        let layers = self.layers();
        if !Rc::ptr_eq(&layers[0], &self.guest.node()) {
            wrong.push(format!("the guest is above {:?}", self.guest.node()));
        }
        for (index, layer) in layers.iter().enumerate() {
            let parents: Vec<String> = layer
                .parents()
                .iter()
                .map(|edge| format!("{} ({})", edge.parent_description(), edge.role().name()))
                .collect();
            if parents.len() != 1 {
                wrong.push(format!("{layer:?} has the users {parents:?}"));
            }
            if layer.options().read_only != (index > 0) {
                wrong.push(format!("{layer:?} has read-only {}", index == 0));
            }
            if let Err(error) = layer.check_unoccupied() {
                wrong.push(error.message().to_owned());
            }
            let images = self.images.borrow();
            let image = images.iter().find(|image| image.name == layer.name());
            let image = image.expect("every layer is an image");
            let below = layer.child(Role::Backing).map(|edge| edge.node());
            let below = below.map(|node| node.name().to_owned());
            let named = backing_name(&image.kind, &image.disk.store());
            if below != named {
                wrong.push(format!(
                    "{layer:?} is over {below:?}, its header says {named:?}"
                ));
            }
        }
        let nodes: Vec<String> = self
            .graph
            .nodes()
            .iter()
            .map(|node| format!("{node:?}"))
            .collect();
        if nodes.len() != 2 * layers.len() {
            wrong.push(format!("{} layers, but nodes {nodes:?}", layers.len()));
        }
        wrong
    }

    /// Everything that a set-up that failed must leave as it was.
    pub(crate) fn picture(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for node in self.graph.nodes() {
            let options = node.options();
            let busy = node.check_unoccupied().is_err();
            lines.push(format!("{node:?} {options:?} busy {busy}"));
            for edge in node.parents() {
                let (user, role) = (edge.parent_description(), edge.role());
                lines.push(format!("  {user} {role:?} {:?}", edge.permissions()));
            }
        }
        lines
    }
}

/// What a writable export needs and lets others do.
fn export() -> Permissions {
    Permissions {
        required: Permission::CONSISTENT_READ | Permission::WRITE,
        shared: Permission::all() - Permission::RESIZE,
    }
}

pub(crate) async fn open_one(
    graph: &Graph,
    image: &Image,
    backing: Option<&Rc<Node>>,
    read_only: bool,
) -> Result<Rc<Node>> {
    let (name, disk) = (&image.name, &image.disk);
    match &image.kind {
        Kind::Qcow2(geometry) => open_image(graph, name, disk, geometry, backing, read_only).await,
        Kind::Raw => {
            let file = file_edge(graph, name, disk);
            let driver = Raw::open(file.clone(), RawOptions::default())?;
            let mut options = writable();
            options.read_only = read_only;
            Ok(insert_with(
                graph,
                name,
                Box::new(driver),
                vec![file],
                options,
            ))
        }
    }
}

/// Access to the images for jobs.
pub(crate) struct Access {
    graph: Graph,
    /// A node whose access cannot be changed.
    pub(crate) refused: RefCell<Option<String>>,
}

impl Access {
    fn check(&self, node: &Node) -> Result<()> {
        if self.refused.borrow().as_deref() == Some(node.name()) {
            let text = format!("Could not reopen '{}'", node.name());
            return Err(Error::new(ErrorKind::Permission, text));
        }
        Ok(())
    }

    async fn turn_writable(&self, node: &Rc<Node>) -> Result<()> {
        self.check(node)?;
        set_read_only(node, false);
        let refreshed = self.graph.refresh_permissions(std::slice::from_ref(node));
        let opened = match refreshed {
            Ok(()) => node.driver().set_read_only(false).await,
            Err(error) => Err(error),
        };
        if opened.is_err() {
            set_read_only(node, true);
            self.graph.refresh_permissions(std::slice::from_ref(node))?;
        }
        opened
    }

    async fn turn_read_only(&self, node: &Rc<Node>) -> Result<()> {
        if node.options().read_only {
            return Ok(());
        }
        self.check(node)?;
        node.driver().set_read_only(true).await?;
        set_read_only(node, true);
        let refreshed = self.graph.refresh_permissions(std::slice::from_ref(node));
        if refreshed.is_err() {
            set_read_only(node, false);
            node.driver().set_read_only(false).await?;
        }
        refreshed
    }
}

fn set_read_only(node: &Node, read_only: bool) {
    let mut options = node.options();
    options.read_only = read_only;
    node.set_options(options);
}

impl Images for Access {
    fn check_node_name(&self, name: &str) -> Result<()> {
        match self.graph.find(name) {
            None => Ok(()),
            Some(_) => {
                let text = format!("Duplicate nodes with node-name='{name}'");
                Err(Error::new(ErrorKind::InvalidArgument, text))
            }
        }
    }

    fn make_writable<'a>(&'a self, node: &'a Rc<Node>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.turn_writable(node))
    }

    fn make_read_only<'a>(&'a self, node: &'a Rc<Node>) -> LocalFuture<'a, Result<()>> {
        Box::pin(self.turn_read_only(node))
    }

    fn name_for_header(&self, node: &Node) -> String {
        node.name().to_owned()
    }

    fn lacks_backing(&self, node: &Rc<Node>) -> bool {
        let image: Option<&Qcow2> = node.driver_as();
        let named = image.and_then(Qcow2::backing_reference);
        named.is_some() && node.child(Role::Backing).is_none()
    }

    fn backing_changed(&self, _node: &Node) {}
}

/// The format that an overlay's header gets for an image.
pub(crate) fn format_of(kind: &Kind) -> &'static str {
    kind.name()
}
