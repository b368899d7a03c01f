//! Opening a tree of nodes.

use std::rc::Rc;

use crate::block::{Child, DiscardMode, Driver, Node, NodeOptions, NodeSpec, Permissions};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::{BitmapKeeping, OpenOptions, Qcow2};
use crate::format::raw::Raw;
use crate::protocol::file::{File, FileOptions};
use crate::protocol::null::{Null, NullOptions};

use super::description::{
    ChildDescription, Description, DriverOptions, FileDescription, NullDescription,
    Qcow2Description,
};
use super::effective::{Source, resolve};
use super::origin::Origin;
use super::value::invalid;
use super::{Blockdev, LocalFuture, file_name, names};

/// Bytes of a null node where none are given.
const NULL_SIZE: u64 = 1 << 30;
/// Bytes of the slices in which the driver caches L2 tables, where clusters are not smaller.
const L2_SLICE: u64 = 4096;

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
            let Some(child) = description.driver.file().cloned() else {
                return self.open_over(None, description, options).await;
            };
            let is_inline = matches!(child, ChildDescription::Inline(_));
            let file = self.open_child(child, Source::FileOf(options)).await?;
            let node = self.open_over(Some(&file), description, options).await;
            match &node {
                Ok(node) if is_inline => Origin::adopt(node, &file),
                Ok(_) => {}
                Err(_) => self.discard_failed(&file).await,
            }
            node
        })
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
        file: Option<&Rc<Node>>,
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
        let edge = match file {
            Some(file) => {
                let permissions = first_permissions(&description.driver, &options);
                let role = description.driver.file_role();
                Some(self.graph.attach_for(&name, role, file, permissions)?)
            }
            None => None,
        };
        let opened = self.driver(&name, &description.driver, edge.as_ref(), &options);
        let inserted = match opened.await {
            Ok(driver) => self.insert(name, driver, edge.clone(), options),
            Err(error) => Err(error),
        };
        match (inserted, edge) {
            (Ok(node), _) => {
                Origin::remember(&node, description);
                file_name::refresh(&node);
                Ok(node)
            }
            (Err(error), Some(edge)) => {
                if let Err(error) = self.graph.detach(&edge).await {
                    tracing::warn!(%error, "closing after a failure");
                }
                Err(error)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn insert(
        &self,
        name: String,
        driver: Box<dyn Driver>,
        edge: Option<Rc<Child>>,
        options: NodeOptions,
    ) -> Result<Rc<Node>> {
        let spec = NodeSpec {
            name,
            options,
            file_name: String::new(),
            implicit: false,
        };
        self.graph.insert(spec, driver, edge.into_iter().collect())
    }

    async fn driver(
        &self,
        name: &str,
        driver: &DriverOptions,
        edge: Option<&Rc<Child>>,
        options: &NodeOptions,
    ) -> Result<Box<dyn Driver>> {
        match (driver, edge) {
            (DriverOptions::File(file), None) => self.file(file, options).await,
            (DriverOptions::Null(null), None) => self.null(null),
            (DriverOptions::Raw { part, .. }, Some(edge)) => {
                Ok(Box::new(Raw::open(edge.clone(), *part)?))
            }
            (
                DriverOptions::Qcow2 {
                    options: special, ..
                },
                Some(edge),
            ) => self.qcow2(name, special, edge, options).await,
            (DriverOptions::Filter(filter), Some(edge)) => self.filter(&filter.options, edge).await,
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
