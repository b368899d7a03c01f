//! Opening a tree of nodes.

use std::rc::Rc;

use crate::block::{Child, DiscardMode, Driver, Node, NodeOptions, NodeSpec, Permissions, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::{BitmapKeeping, OpenOptions, Qcow2};
use crate::format::raw::{BesideOptions, Raw, RawOptions};
use crate::protocol::file::{File, FileOptions};
use crate::protocol::nbd::Nbd;
use crate::protocol::null::{Null, NullOptions};

use super::description::{
    ChildDescription, Description, DriverOptions, FileDescription, NullDescription,
    Qcow2Description,
};
use super::effective::{Source, resolve};
use super::origin::Origin;
use super::state_file::StateFile;
use super::value::invalid;
use super::{Blockdev, LocalFuture, file_name, names};

/// Bytes of a null node where none are given.
const NULL_SIZE: u64 = 1 << 30;
/// Bytes of the slices in which the driver caches L2 tables, where clusters are not smaller.
const L2_SLICE: u64 = 4096;

/// A node that another one is opened over.
struct Below {
    role: Role,
    node: Rc<Node>,
    /// It was opened for that.
    is_inline: bool,
}

impl Blockdev {
    /// Opens a node with its children and its backing chain.
    ///
    /// # Errors
    /// In QEMU's words; nothing stays open.
    pub(super) fn open<'a>(
        &'a self,
        description: Description,
        source: Source,
    ) -> LocalFuture<'a, Result<Rc<Node>>> {
        Box::pin(async move {
            let node = self.open_alone(description, source).await?;
            match self.open_chain(&node).await {
                Ok(()) => Ok(node),
                Err(error) => {
                    self.discard_failed(&node).await;
                    Err(error)
                }
            }
        })
    }

    /// Opens a node with its `file` child, without a backing file.
    pub(super) fn open_alone<'a>(
        &'a self,
        description: Description,
        source: Source,
    ) -> LocalFuture<'a, Result<Rc<Node>>> {
        Box::pin(async move {
            let options = resolve(&description.shared, source)?;
            let mut below = Vec::new();
            let opened = self.open_below(&description, options, &mut below).await;
            let node = match opened {
                Ok(()) => self.open_over(&below, description, options).await,
                Err(error) => Err(error),
            };
            for one in below {
                match &node {
                    Ok(node) if one.is_inline => Origin::adopt(node, &one.node),
                    Ok(_) => {}
                    Err(_) => self.discard_failed(&one.node).await,
                }
            }
            node
        })
    }

    /// Opens the children that a node is opened with.
    async fn open_below(
        &self,
        description: &Description,
        options: NodeOptions,
        below: &mut Vec<Below>,
    ) -> Result<()> {
        let driver = &description.driver;
        let file = driver.file().map(|file| (driver.file_role(), file));
        let target = driver.target().map(|target| (Role::Target, target));
        for (role, child) in file.into_iter().chain(target) {
            let is_inline = matches!(child, ChildDescription::Inline(_));
            let source = Source::FileOf(options);
            let node = self.open_child(child.clone(), source).await?;
            below.push(Below {
                role,
                node,
                is_inline,
            });
        }
        Ok(())
    }

    /// A node that is there, or one that is opened.
    pub(super) async fn open_child(
        &self,
        child: ChildDescription,
        source: Source,
    ) -> Result<Rc<Node>> {
        match child {
            ChildDescription::Reference(name) => {
                let node = names::find_either(&self.graph, &name)?;
                match source {
                    // What is written past a job's filter the job would not see.
                    Source::FileOf(_) => node.check_unoccupied()?,
                    _ => node.check_content_stays()?,
                }
                Ok(node)
            }
            ChildDescription::Inline(description) => self.open(*description, source).await,
        }
    }

    /// Closes a node that did not get a user; one that has users or an owner stays.
    pub(super) async fn discard_failed(&self, node: &Rc<Node>) {
        if let Err(error) = self.graph.release(node).await {
            tracing::warn!(node = node.name(), %error, "closing after a failure");
        }
    }

    async fn open_over(
        &self,
        below: &[Below],
        description: Description,
        options: NodeOptions,
    ) -> Result<Rc<Node>> {
        let name = match &description.node_name {
            Some(name) => {
                names::check_new(&self.graph, name)?;
                name.clone()
            }
            None => self.graph.generate_name(self.handle.random_u64()),
        };
        let mut edges = Vec::new();
        let inserted = match self.join(&name, below, &description, &options, &mut edges) {
            Ok(()) => {
                let opened = self.driver(&name, &description.driver, &edges, &options);
                match opened.await {
                    Ok(driver) => self.insert(name, driver, edges.clone(), options),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        };
        match inserted {
            Ok(node) => {
                Origin::remember(&node, description);
                file_name::refresh(&node);
                Ok(node)
            }
            Err(error) => {
                for edge in edges {
                    if let Err(error) = self.graph.detach(&edge).await {
                        tracing::warn!(%error, "closing after a failure");
                    }
                }
                Err(error)
            }
        }
    }

    /// Gives a node that is being opened its edges.
    fn join(
        &self,
        name: &str,
        below: &[Below],
        description: &Description,
        options: &NodeOptions,
        edges: &mut Vec<Rc<Child>>,
    ) -> Result<()> {
        let permissions = first_permissions(&description.driver, options);
        for one in below {
            let edge = self
                .graph
                .attach_for(name, one.role, &one.node, permissions)?;
            edges.push(edge);
        }
        Ok(())
    }

    fn insert(
        &self,
        name: String,
        driver: Box<dyn Driver>,
        edges: Vec<Rc<Child>>,
        options: NodeOptions,
    ) -> Result<Rc<Node>> {
        let spec = NodeSpec {
            name,
            options,
            file_name: String::new(),
            implicit: false,
        };
        self.graph.insert(spec, driver, edges)
    }

    async fn driver(
        &self,
        name: &str,
        driver: &DriverOptions,
        edges: &[Rc<Child>],
        options: &NodeOptions,
    ) -> Result<Box<dyn Driver>> {
        match (driver, edges) {
            (DriverOptions::File(file), []) => self.file(file, options).await,
            (DriverOptions::Null(null), []) => self.null(null),
            (DriverOptions::Nbd(nbd), []) => {
                let opening = Nbd::open(&self.handle, nbd.options(options));
                Ok(Box::new(Box::pin(opening).await?))
            }
            (DriverOptions::Raw { part, .. }, [edge]) => {
                Ok(Box::new(self.raw(name, *part, edge, options).await?))
            }
            (
                DriverOptions::Qcow2 {
                    options: special, ..
                },
                [edge],
            ) => self.qcow2(name, special, edge, options).await,
            (DriverOptions::Filter(filter), [edge, others @ ..]) => {
                self.filter(&filter.options, edge, others.first()).await
            }
            _ => unreachable!("{} was opened with the wrong children", driver.name()),
        }
    }

    pub(super) async fn file(
        &self,
        file: &FileDescription,
        options: &NodeOptions,
    ) -> Result<Box<dyn Driver>> {
        check_aio(file, options)?;
        let options = FileOptions {
            filename: file.filename.clone(),
            kind: file.kind,
            writable: !options.read_only,
            auto_read_only: options.auto_read_only,
            direct: options.cache_direct,
            no_flush: options.cache_no_flush,
            locking: file.locking && !options.force_share,
        };
        Ok(Box::new(File::open(&self.handle, options).await?))
    }

    fn null(&self, null: &NullDescription) -> Result<Box<dyn Driver>> {
        let options = NullOptions {
            driver_name: null.driver_name,
            size: null.size.unwrap_or(NULL_SIZE),
            latency: null.latency,
            read_zeroes: null.read_zeroes.unwrap_or(false),
        };
        Ok(Box::new(Null::open(&self.handle, options)?))
    }

    /// A raw node over a file or device keeps bitmaps in the state directory.
    async fn raw(
        &self,
        name: &str,
        part: RawOptions,
        edge: &Rc<Child>,
        options: &NodeOptions,
    ) -> Result<Raw> {
        let raw = Raw::open(edge.clone(), part)?;
        let directory = self.state_directory.borrow().clone();
        let protocol = lowest(&edge.node());
        let (Some(directory), Some(file)) = (directory, protocol.driver_as::<File>()) else {
            return Ok(raw);
        };
        let state = match StateFile::of(&self.handle, &directory, file, part).await {
            Ok(state) => state,
            // It can be opened without a name, by its descriptor.
            Err(error) => {
                tracing::warn!(node = name, %error, "no persistent bitmaps");
                return Ok(raw);
            }
        };
        raw.with_bitmaps(BesideOptions {
            node_name: name.to_owned(),
            shelf: Rc::new(state),
            keeping: BitmapKeeping::default(),
            read_only: options.read_only,
        })
        .await
    }

    async fn qcow2(
        &self,
        name: &str,
        special: &Qcow2Description,
        edge: &Rc<Child>,
        options: &NodeOptions,
    ) -> Result<Box<dyn Driver>> {
        let unmap = options.discard == DiscardMode::Unmap;
        let image = Qcow2::open(
            edge.clone(),
            OpenOptions {
                node_name: name.to_owned(),
                graph: Some(self.graph.clone()),
                read_only: options.read_only,
                backing: None,
                pass_discard: special.pass_discard_request.unwrap_or(unmap),
                discard_no_unref: special.discard_no_unref,
                caches: special.caches,
                keeping: BitmapKeeping::default(),
                helpers: Some(self.handle.clone()),
            },
        )
        .await?;
        check_qcow2(special, &image)?;
        Ok(Box::new(image))
    }
}

/// The node in which everything is stored at last.
fn lowest(node: &Rc<Node>) -> Rc<Node> {
    let mut lowest = node.clone();
    while let Some(edge) = lowest.storage() {
        lowest = edge.node();
    }
    lowest
}

/// What a format needs of its file while it is being opened.
fn first_permissions(driver: &DriverOptions, options: &NodeOptions) -> Permissions {
    match driver {
        DriverOptions::Raw { part, .. } => Raw::file_permissions(part),
        // Opening a filter reads and writes nothing.
        DriverOptions::Filter(_) => Permissions::NONE,
        _ => Permissions::NONE.for_format_file(!options.read_only),
    }
}

/// # Errors
/// `aio=native` without direct I/O, in QEMU's words.
pub(super) fn check_aio(file: &FileDescription, options: &NodeOptions) -> Result<()> {
    if file.aio_native && !options.cache_direct {
        return Err(invalid(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    Ok(())
}

/// # Errors
/// Options that do not fit the image, in QEMU's words.
pub(super) fn check_qcow2(special: &Qcow2Description, image: &Qcow2) -> Result<()> {
    let info = image.info();
    if special.lazy_refcounts == Some(true) && info.compat == "0.10" {
        return Err(invalid(
            "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
        ));
    }
    let Some(entry) = special.l2_cache_entry_size else {
        return Ok(());
    };
    let cluster_size = info.cluster_size;
    if !entry.is_power_of_two() || !(512..=cluster_size).contains(&entry) {
        return Err(invalid(format!(
            "L2 cache entry size must be a power of two between 512 and the cluster size \
             ({cluster_size})"
        )));
    }
    if entry != L2_SLICE.min(cluster_size) {
        let message = format!("l2-cache-entry-size {entry} is not supported, only {L2_SLICE}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    Ok(())
}
