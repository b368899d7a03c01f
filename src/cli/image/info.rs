//! `liveblk image info`: what an image says of itself.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::header::{Header, Incompatible};
use crate::format::qcow2::snapshot_table::{InternalSnapshot, read_snapshots};
use crate::runtime::Handle;

use super::super::Outcome;
use super::super::args::Output;
use super::super::format::Format;
use super::super::image_args::InfoArguments;
use super::super::size::human;
use super::opened::{Access, Opened, text_of};
use super::snapshot_list;

/// Everything that is shown.
struct Info {
    filename: String,
    format: Format,
    virtual_size: u64,
    /// Driver and size in bytes of the file that holds the image.
    file_driver: &'static str,
    file_size: u64,
    /// What the file takes up.
    actual_size: u64,
    /// Internal snapshots.
    snapshots: Vec<InternalSnapshot>,
    /// Only of qcow2.
    header: Option<Header>,
}

pub(super) async fn run(handle: &Handle, arguments: &InfoArguments) -> Result<Outcome> {
    let format = arguments.image.format()?;
    let mut infos = vec![describe(handle, arguments, &arguments.image.file, format).await?];
    while let Some((file, format)) = match arguments.backing_chain {
        true => next_below(&infos)?,
        false => None,
    } {
        infos.push(describe(handle, arguments, Path::new(&file), format).await?);
    }
    Ok(Outcome::text(match (arguments.output, &infos[..]) {
        (Output::Human, _) => infos.iter().map(Info::text).collect::<Vec<_>>().join("\n"),
        (Output::Json, [info]) if !arguments.backing_chain => format!("{:#}\n", info.json()),
        (Output::Json, _) => {
            let all: Value = infos.iter().map(Info::json).collect();
            format!("{all:#}\n")
        }
    }))
}

async fn describe(
    handle: &Handle,
    arguments: &InfoArguments,
    file: &Path,
    format: Format,
) -> Result<Info> {
    let access = Access::to_read(arguments.force_share);
    let image = Opened::open(handle, file, access).await?;
    let header = match format {
        Format::Raw => None,
        Format::Qcow2 => Some(image.header().await?),
    };
    let snapshots = match &header {
        None => Vec::new(),
        Some(header) => read_snapshots(image.edge(), header).await?,
    };
    let info = Info {
        filename: text_of(file)?.to_string(),
        format,
        virtual_size: header.as_ref().map_or(image.size(), |header| header.size),
        file_driver: image.driver_name(),
        file_size: image.size(),
        actual_size: image.allocated()?,
        snapshots,
        header,
    };
    image.close().await?;
    Ok(info)
}

/// The backing file of the last image, and its format.
///
/// # Errors
/// Its name is not one of a file, its format is not declared, or it is above in the chain.
fn next_below(infos: &[Info]) -> Result<Option<(String, Format)>> {
    let last = &infos[infos.len() - 1];
    let Some(backing) = last
        .header
        .as_ref()
        .and_then(|header| header.backing.as_ref())
    else {
        return Ok(None);
    };
    let refuse = |reason: String| {
        let text = format!(
            "backing file '{}' of '{}': {reason}",
            backing.file, last.filename
        );
        Err(Error::new(ErrorKind::InvalidImage, text))
    };
    if has_protocol(&backing.file) {
        return refuse("only names of local files are followed".to_owned());
    }
    let format = match backing.format.as_deref() {
        Some("qcow2") => Format::Qcow2,
        Some("raw" | "file" | "host_device") => Format::Raw,
        Some(other) => return refuse(format!("format '{other}' is not supported")),
        None => return refuse("the image does not declare its format".to_owned()),
    };
    let file = full_name(&last.filename, &backing.file);
    let is_same = |info: &Info| same_file(&info.filename, &file);
    match infos.iter().any(is_same) {
        true => refuse("the chain leads back to an image above".to_owned()),
        false => Ok(Some((file, format))),
    }
}

fn same_file(one: &str, two: &str) -> bool {
    let identity = |name: &str| fs::metadata(name).ok().map(|data| (data.dev(), data.ino()));
    identity(one).is_some_and(|known| identity(two) == Some(known))
}

impl Info {
    fn json(&self) -> Value {
        let file = json!({
            "children": [],
            "virtual-size": self.file_size,
            "filename": self.filename,
            "format": self.file_driver,
            "actual-size": self.actual_size,
            "format-specific": {"type": "file", "data": {}},
            "dirty-flag": false,
        });
        let mut info = json!({
            "children": [{"name": "file", "info": file}],
            "virtual-size": self.virtual_size,
            "filename": self.filename,
            "format": self.format.name(),
            "actual-size": self.actual_size,
            "dirty-flag": false,
        });
        if let Some(header) = &self.header {
            info["cluster-size"] = header.geometry.cluster_size().into();
            info["dirty-flag"] = is(header, Incompatible::DIRTY).into();
            info["format-specific"] = json!({"type": "qcow2", "data": specific(header)});
            self.backing_json(header, &mut info);
            if !self.snapshots.is_empty() {
                info["snapshots"] = snapshot_list::json_of(&self.snapshots);
            }
        }
        info
    }

    fn backing_json(&self, header: &Header, info: &mut Value) {
        let Some(backing) = &header.backing else {
            return;
        };
        info["backing-filename"] = backing.file.as_str().into();
        info["full-backing-filename"] = full_name(&self.filename, &backing.file).into();
        if let Some(format) = &backing.format {
            info["backing-filename-format"] = format.as_str().into();
        }
    }

    fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let (size, occupied) = (self.virtual_size, human(self.actual_size));
        writeln!(out, "image: {}", self.filename)?;
        writeln!(out, "file format: {}", self.format.name())?;
        writeln!(out, "virtual size: {} ({size} bytes)", human(size))?;
        writeln!(out, "disk size: {occupied}")?;
        if let Some(header) = &self.header {
            self.write_header(header, out)?;
        }
        let length = self.file_size;
        writeln!(out, "Child node '/file':")?;
        writeln!(out, "    filename: {}", self.filename)?;
        writeln!(out, "    protocol type: {}", self.file_driver)?;
        writeln!(out, "    file length: {} ({length} bytes)", human(length))?;
        writeln!(out, "    disk size: {occupied}")
    }

    fn write_header(&self, header: &Header, out: &mut String) -> std::fmt::Result {
        writeln!(out, "cluster_size: {}", header.geometry.cluster_size())?;
        if is(header, Incompatible::DIRTY) {
            writeln!(out, "cleanly shut down: no")?;
        }
        if let Some(backing) = &header.backing {
            let full = full_name(&self.filename, &backing.file);
            let actual = match full == backing.file {
                true => String::new(),
                false => format!(" (actual path: {full})"),
            };
            writeln!(out, "backing file: {}{actual}", backing.file)?;
            if let Some(format) = &backing.format {
                writeln!(out, "backing file format: {format}")?;
            }
        }
        if !self.snapshots.is_empty() {
            snapshot_list::write(&self.snapshots, out)?;
        }
        writeln!(out, "Format specific information:")?;
        for (name, value) in specific(header).as_object().into_iter().flatten() {
            let value = value.as_str().map_or(value.to_string(), str::to_string);
            writeln!(out, "    {}: {value}", name.replace('-', " "))?;
        }
        Ok(())
    }
}

fn is(header: &Header, mark: Incompatible) -> bool {
    header.incompatible.contains(mark)
}

/// `ImageInfoSpecificQCow2`; version 2 has less to say.
fn specific(header: &Header) -> Value {
    let refcount_bits = 1_u32 << header.geometry.refcount_order;
    let compression = header.compression.name();
    if header.version < 3 {
        return json!({
            "compat": "0.10",
            "compression-type": compression,
            "refcount-bits": refcount_bits,
        });
    }
    json!({
        "compat": "1.1",
        "compression-type": compression,
        "lazy-refcounts": header.has_lazy_refcounts(),
        "refcount-bits": refcount_bits,
        "corrupt": is(header, Incompatible::CORRUPT),
        "extended-l2": is(header, Incompatible::EXTENDED_L2),
    })
}

/// A relative backing file name is relative to the directory in the image's name.
fn full_name(image: &str, backing: &str) -> String {
    match image.rsplit_once('/') {
        Some((directory, _)) if !backing.starts_with('/') && !has_protocol(backing) => {
            format!("{directory}/{backing}")
        }
        _ => backing.to_string(),
    }
}

/// `PROTOCOL:…`
fn has_protocol(name: &str) -> bool {
    name.find([':', '/'])
        .is_some_and(|at| name[at..].starts_with(':'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backing_names_are_relative_to_the_image() {
        for (image, backing, full) in [
            ("b", "a", "a"),
            ("d/b", "a", "d/a"),
            ("/d/b", "../a", "/d/../a"),
            ("d/b", "/a", "/a"),
            ("d/b", "nbd://host", "nbd://host"),
            ("d/b", "json:{}", "json:{}"),
            ("d/b", "./a:b", "d/./a:b"),
        ] {
            assert_eq!(full_name(image, backing), full);
        }
    }
}
