//! `liveblk image create`: a new image, durable when the command returns.

use std::fs::{File, Metadata, OpenOptions, metadata, remove_file};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::block::TruncateOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::create::{CreateOptions, create};
use crate::format::qcow2::header::BackingReference;
use crate::runtime::Handle;

use super::super::Outcome;
use super::super::format::Format;
use super::super::image_args::CreateArguments;
use super::opened::{Access, Opened, text_of};
use super::options::apply;

pub(super) async fn run(handle: &Handle, arguments: &CreateArguments) -> Result<Outcome> {
    let format = Format::of(&arguments.file, arguments.format)?;
    let plan = match format {
        Format::Raw => raw_plan(arguments)?,
        Format::Qcow2 => qcow2_plan(handle, arguments).await?,
    };
    let target = Target::new(&arguments.file, arguments.force)?;
    let image = Opened::open(handle, &arguments.file, Access::Write).await?;
    match plan {
        Plan::Raw(size) => {
            image.edge().truncate(0, TruncateOptions::default()).await?;
            image
                .edge()
                .truncate(size, TruncateOptions::default())
                .await?;
        }
        Plan::Qcow2(options) => create(image.edge(), &options).await?,
    }
    image.close().await?;
    target.keep()?;
    Ok(Outcome::text(String::new()))
}

/// What is to be written.
enum Plan {
    /// A disk of so many bytes.
    Raw(u64),
    Qcow2(CreateOptions),
}

fn raw_plan(arguments: &CreateArguments) -> Result<Plan> {
    if arguments.backing.is_some() {
        return Err(wrong("a raw image cannot have a backing file"));
    }
    if let Some(option) = arguments.options.first() {
        return Err(wrong(format!("a raw image has no option '{option}'")));
    }
    match arguments.size {
        Some(size) => Ok(Plan::Raw(size)),
        None => Err(wrong("a raw image needs a SIZE")),
    }
}

async fn qcow2_plan(handle: &Handle, arguments: &CreateArguments) -> Result<Plan> {
    let backing = match (&arguments.backing, arguments.backing_format) {
        (Some(file), Some(format)) => Some((file, format)),
        _ => None, // clap lets neither stand alone
    };
    let backing_size = match backing {
        Some((file, format)) => {
            let file = beside(&arguments.file, file);
            refuse_itself(&arguments.file, &file)?;
            Some(size_of(handle, &file, format).await?)
        }
        None => None,
    };
    let Some(size) = arguments.size.or(backing_size) else {
        return Err(wrong("an image without a backing file needs a SIZE"));
    };
    let mut options = CreateOptions::new(size);
    if let Some((file, format)) = backing {
        options.backing = Some(BackingReference {
            file: text_of(file)?.to_string(),
            format: Some(format.name().to_string()),
        });
    }
    for option in &arguments.options {
        apply(&mut options, option)?;
    }
    options.check()?;
    Ok(Plan::Qcow2(options))
}

/// A backing file's name is relative to the directory of its overlay.
fn beside(image: &Path, backing: &Path) -> PathBuf {
    match image.parent() {
        Some(directory) => directory.join(backing),
        None => backing.to_path_buf(),
    }
}

/// An image that is its own backing file can never be opened.
fn refuse_itself(image: &Path, backing: &Path) -> Result<()> {
    let identity = |path| {
        metadata(path)
            .ok()
            .map(|data: Metadata| (data.dev(), data.ino()))
    };
    match identity(image).is_some_and(|image| Some(image) == identity(backing)) {
        true => Err(wrong("an image cannot be its own backing file")),
        false => Ok(()),
    }
}

/// Bytes of the disk in `file`, which others may have open.
async fn size_of(handle: &Handle, file: &Path, format: Format) -> Result<u64> {
    let image = Opened::open(handle, file, Access::ReadShared).await?;
    let size = match format {
        Format::Raw => image.size(),
        Format::Qcow2 => image.header().await?.size,
    };
    image.close().await?;
    Ok(size)
}

/// The file that becomes an image; one that was not there before is removed again on failure.
struct Target<'a> {
    path: &'a Path,
    file: File,
    is_new: bool,
    kept: bool,
}

impl Target<'_> {
    fn new(path: &Path, force: bool) -> Result<Target<'_>> {
        let mut options = OpenOptions::new();
        options.write(true);
        let opened = match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && force => {
                options.open(path).map(|file| (file, false))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let text = format!("'{}' exists; --force overwrites it", path.display());
                return Err(wrong(text));
            }
            result => result.map(|file| (file, true)),
        };
        let (file, is_new) = opened.map_err(|error| failed(path, &error))?;
        Ok(Target {
            path,
            file,
            is_new,
            kept: false,
        })
    }

    /// The image is whole: makes the file and its name durable.
    fn keep(mut self) -> Result<()> {
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let synced = self.file.sync_all();
        let synced = synced.and_then(|()| File::open(directory)?.sync_all());
        synced.map_err(|error| self.failed(&error))?;
        self.kept = true;
        Ok(())
    }

    fn failed(&self, error: &io::Error) -> Error {
        failed(self.path, error)
    }
}

impl Drop for Target<'_> {
    fn drop(&mut self) {
        if self.is_new && !self.kept {
            // Nothing more can be done about a file that cannot be removed either.
            let _ = remove_file(self.path);
        }
    }
}

fn failed(path: &Path, error: &io::Error) -> Error {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32));
    Error::sys(errno, format!("Could not create '{}'", path.display()))
}

fn wrong(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, text)
}
