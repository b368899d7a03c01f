//! A node as somebody describes it: `blockdev-add`, `--blockdev`, `blockdev-reopen`.

use std::time::Duration;

use crate::block::{DetectZeroes, DiscardMode, Role};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::CacheSizes;
use crate::format::raw::RawOptions;
use crate::protocol::file::FileKind;

use super::filter_description::FilterDescription;
use super::nbd_description::NbdDescription;
use super::value::{Reader, Value, invalid};

/// A node and the children that come with it.
#[derive(Clone, Debug)]
pub struct Description {
    /// Its name, if it was given one.
    pub node_name: Option<String>,
    /// Options that every node has.
    pub shared: SharedOptions,
    /// The driver and its own options.
    pub driver: DriverOptions,
}

/// Options that every node has; those not given are inherited or have defaults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedOptions {
    /// `read-only`.
    pub read_only: Option<bool>,
    /// `auto-read-only`.
    pub auto_read_only: Option<bool>,
    /// `force-share`.
    pub force_share: Option<bool>,
    /// `cache.direct`.
    pub cache_direct: Option<bool>,
    /// `cache.no-flush`.
    pub cache_no_flush: Option<bool>,
    /// `discard`.
    pub discard: Option<DiscardMode>,
    /// `detect-zeroes`.
    pub detect_zeroes: Option<DetectZeroes>,
}

/// The driver and what only it understands.
#[derive(Clone, Debug)]
pub enum DriverOptions {
    /// `file`, `host_device`.
    File(FileDescription),
    /// `null-co`, `null-aio`.
    Null(NullDescription),
    /// `nbd`.
    Nbd(NbdDescription),
    /// `raw`.
    Raw {
        /// The file below.
        file: ChildDescription,
        /// Which part of it.
        part: RawOptions,
    },
    /// `qcow2`.
    Qcow2 {
        /// The file below.
        file: ChildDescription,
        /// The backing file.
        backing: BackingDescription,
        /// Everything else.
        options: Qcow2Description,
    },
    /// A filter.
    Filter(FilterDescription),
}

/// Options of `file` and `host_device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDescription {
    /// Which of them.
    pub kind: FileKind,
    /// Path, literally.
    pub filename: String,
    /// `aio=native` was asked for; the ring serves every engine, but QEMU's condition holds.
    pub aio_native: bool,
    /// Lock bytes are taken.
    pub locking: bool,
}

/// Options of `null-co` and `null-aio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NullDescription {
    /// Which of them.
    pub driver_name: &'static str,
    /// Bytes.
    pub size: Option<u64>,
    /// Time that a request takes.
    pub latency: Duration,
    /// Reads give zeroes.
    pub read_zeroes: Option<bool>,
}

/// Options of `qcow2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Qcow2Description {
    /// `lazy-refcounts`; asked of images that have the feature.
    pub lazy_refcounts: Option<bool>,
    /// `pass-discard-request`.
    pub pass_discard_request: Option<bool>,
    /// `discard-no-unref`.
    pub discard_no_unref: bool,
    /// Metadata caches.
    pub caches: CacheSizes,
    /// `l2-cache-entry-size`: checked, but slices have the driver's own size.
    pub l2_cache_entry_size: Option<u64>,
}

/// A child: a node that is there, or one to open with its parent.
#[derive(Clone, Debug)]
pub enum ChildDescription {
    /// By node-name.
    Reference(String),
    /// With its own description.
    Inline(Box<Description>),
}

/// The backing child.
#[derive(Clone, Debug)]
pub enum BackingDescription {
    /// As the image's header names it.
    FromHeader,
    /// None, whatever the header says.
    Nothing,
    /// This one.
    Child(ChildDescription),
}

impl DriverOptions {
    /// The driver's name.
    pub fn name(&self) -> &'static str {
        match self {
            DriverOptions::File(file) => file.kind.name(),
            DriverOptions::Null(null) => null.driver_name,
            DriverOptions::Nbd(_) => "nbd",
            DriverOptions::Raw { .. } => "raw",
            DriverOptions::Qcow2 { .. } => "qcow2",
            DriverOptions::Filter(filter) => filter.name(),
        }
    }

    /// The `file` child, where the driver has one; `image` of `blkdebug`.
    pub fn file(&self) -> Option<&ChildDescription> {
        match self {
            DriverOptions::Raw { file, .. } | DriverOptions::Qcow2 { file, .. } => Some(file),
            DriverOptions::Filter(filter) => Some(&filter.child),
            DriverOptions::File(_) | DriverOptions::Null(_) | DriverOptions::Nbd(_) => None,
        }
    }

    /// The `target` child, where the driver has one.
    pub fn target(&self) -> Option<&ChildDescription> {
        match self {
            DriverOptions::Filter(filter) => filter.target(),
            _ => None,
        }
    }

    /// The role of that child.
    pub fn file_role(&self) -> Role {
        match self {
            DriverOptions::Filter(filter) => filter.role(),
            _ => Role::File,
        }
    }

    /// The `backing` child, where the driver has one.
    pub fn backing(&self) -> Option<&BackingDescription> {
        match self {
            DriverOptions::Qcow2 { backing, .. } => Some(backing),
            _ => None,
        }
    }
}

impl Description {
    /// Gives a tree of options its meaning.
    ///
    /// # Errors
    /// An option is missing, of the wrong type, contradicts another, or is not supported; the
    /// message names it.
    pub fn parse(value: Value) -> Result<Description> {
        Description::parse_at(value, "")
    }

    /// As [`Description::parse`]; messages name options below `path`.
    pub(super) fn parse_at(value: Value, path: &str) -> Result<Description> {
        let mut reader = Reader::new(value, path)?;
        let driver = reader.required_string("driver")?;
        let node_name = reader.string("node-name")?;
        let shared = SharedOptions::parse(&mut reader)?;
        let driver_options = match driver.as_str() {
            "file" => DriverOptions::File(FileDescription::parse(&mut reader, FileKind::Regular)?),
            "host_device" => {
                DriverOptions::File(FileDescription::parse(&mut reader, FileKind::Device)?)
            }
            "null-co" => DriverOptions::Null(NullDescription::parse(&mut reader, "null-co")?),
            "null-aio" => DriverOptions::Null(NullDescription::parse(&mut reader, "null-aio")?),
            "nbd" => DriverOptions::Nbd(NbdDescription::parse(&mut reader)?),
            "raw" => DriverOptions::Raw {
                file: ChildDescription::parse_file(&mut reader)?,
                part: parse_raw(&mut reader)?,
            },
            "qcow2" => DriverOptions::Qcow2 {
                file: ChildDescription::parse_file(&mut reader)?,
                backing: BackingDescription::parse(&mut reader)?,
                options: Qcow2Description::parse(&mut reader)?,
            },
            "blkdebug" => DriverOptions::Filter(FilterDescription::parse_blkdebug(&mut reader)?),
            "copy-before-write" => {
                DriverOptions::Filter(FilterDescription::parse_copy_before_write(&mut reader)?)
            }
            "copy-on-read" => {
                DriverOptions::Filter(FilterDescription::parse_copy_on_read(&mut reader)?)
            }
            "preallocate" => {
                DriverOptions::Filter(FilterDescription::parse_preallocate(&mut reader)?)
            }
            "snapshot-access" => {
                DriverOptions::Filter(FilterDescription::parse_snapshot_access(&mut reader)?)
            }
            "throttle" => DriverOptions::Filter(FilterDescription::parse_throttle(&mut reader)?),
            other => {
                let message = format!("Parameter 'driver' does not accept value '{other}'");
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
        };
        reader.finish(&driver)?;
        Ok(Description {
            node_name,
            shared,
            driver: driver_options,
        })
    }
}

impl SharedOptions {
    fn parse(reader: &mut Reader) -> Result<SharedOptions> {
        let mut cache_direct = None;
        let mut cache_no_flush = None;
        if let Some(mut cache) = reader.map("cache")? {
            cache_direct = cache.bool("direct")?;
            cache_no_flush = cache.bool("no-flush")?;
            cache.finish("cache")?;
        }
        if reader.bool("active")? == Some(false) {
            let message = "Inactive nodes ('active': false) are not supported";
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(SharedOptions {
            read_only: reader.bool("read-only")?,
            auto_read_only: reader.bool("auto-read-only")?,
            force_share: reader.bool("force-share")?,
            cache_direct,
            cache_no_flush,
            discard: reader.word(
                "discard",
                &[
                    ("ignore", DiscardMode::Ignore),
                    ("unmap", DiscardMode::Unmap),
                ],
            )?,
            detect_zeroes: reader.word(
                "detect-zeroes",
                &[
                    ("off", DetectZeroes::Off),
                    ("on", DetectZeroes::On),
                    ("unmap", DetectZeroes::Unmap),
                ],
            )?,
        })
    }
}

impl FileDescription {
    /// A regular file or device of this name, with default options.
    pub(super) fn named(filename: &str, kind: FileKind) -> FileDescription {
        FileDescription {
            kind,
            filename: filename.to_owned(),
            aio_native: false,
            locking: true,
        }
    }

    fn parse(reader: &mut Reader, kind: FileKind) -> Result<FileDescription> {
        let filename = reader.required_string("filename")?;
        let aio = [("threads", false), ("native", true), ("io_uring", false)];
        let aio_native = reader.word("aio", &aio)?.unwrap_or(false);
        let locking = [("auto", true), ("on", true), ("off", false)];
        let locking = reader.word("locking", &locking)?.unwrap_or(true);
        // It says what happens when another host takes the image over, which never happens here.
        reader.bool("drop-cache")?;
        if filename.contains('\0') {
            return Err(invalid("File name contains a NUL character"));
        }
        Ok(FileDescription {
            kind,
            filename,
            aio_native,
            locking,
        })
    }
}

impl NullDescription {
    fn parse(reader: &mut Reader, driver_name: &'static str) -> Result<NullDescription> {
        let latency = reader.unsigned("latency-ns")?.unwrap_or(0);
        Ok(NullDescription {
            driver_name,
            size: reader.unsigned("size")?,
            latency: Duration::from_nanos(latency),
            read_zeroes: reader.bool("read-zeroes")?,
        })
    }
}

fn parse_raw(reader: &mut Reader) -> Result<RawOptions> {
    Ok(RawOptions {
        offset: reader.unsigned("offset")?.unwrap_or(0),
        size: reader.unsigned("size")?,
    })
}

impl Qcow2Description {
    fn parse(reader: &mut Reader) -> Result<Qcow2Description> {
        Ok(Qcow2Description {
            lazy_refcounts: reader.bool("lazy-refcounts")?,
            pass_discard_request: reader.bool("pass-discard-request")?,
            discard_no_unref: reader.bool("discard-no-unref")?.unwrap_or(false),
            caches: CacheSizes {
                cache_size: reader.unsigned("cache-size")?,
                l2_cache_size: reader.unsigned("l2-cache-size")?,
                refcount_cache_size: reader.unsigned("refcount-cache-size")?,
            },
            l2_cache_entry_size: reader.unsigned("l2-cache-entry-size")?,
        })
    }
}

impl ChildDescription {
    /// The `file` child, which must be there.
    pub(super) fn parse_file(reader: &mut Reader) -> Result<ChildDescription> {
        ChildDescription::parse_child(reader, "file")
    }

    /// The child of this name, which must be there.
    pub(super) fn parse_child(reader: &mut Reader, name: &str) -> Result<ChildDescription> {
        match reader.take(name) {
            Some(value) => ChildDescription::parse(value, &reader.path_of(name)),
            None => Err(reader.missing(name)),
        }
    }

    /// A reference or an inline description; messages name it by `path`.
    pub(super) fn parse(value: Value, path: &str) -> Result<ChildDescription> {
        match value {
            Value::Str(name) => Ok(ChildDescription::Reference(name)),
            value => {
                let inline = Description::parse_at(value, &format!("{path}."))?;
                Ok(ChildDescription::Inline(Box::new(inline)))
            }
        }
    }
}

impl BackingDescription {
    fn parse(reader: &mut Reader) -> Result<BackingDescription> {
        Ok(match reader.take("backing") {
            None => BackingDescription::FromHeader,
            Some(Value::Null) => BackingDescription::Nothing,
            Some(Value::Str(name)) if name.is_empty() => {
                tracing::warn!(
                    "Use of \"backing\": \"\" is deprecated; use \"backing\": null instead"
                );
                BackingDescription::Nothing
            }
            Some(value) => {
                let path = reader.path_of("backing");
                BackingDescription::Child(ChildDescription::parse(value, &path)?)
            }
        })
    }
}
