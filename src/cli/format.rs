//! Which format an image has. It is declared, never looked for in the image's bytes: what a guest
//! writes into a raw disk must not decide how the disk is opened next time.

use std::path::Path;

use clap::ValueEnum;

use crate::error::{Error, ErrorKind, Result};

/// The formats there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    /// The bytes of the disk.
    Raw,
    /// qcow2, versions 2 and 3.
    Qcow2,
}

impl Format {
    /// As drivers and qemu-img call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        }
    }

    /// The declared format, or the one that the file's extension says: `.qcow2` or `.raw`.
    ///
    /// # Errors
    /// Neither says.
    pub(super) fn of(file: &Path, declared: Option<Format>) -> Result<Format> {
        if let Some(format) = declared {
            return Ok(format);
        }
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("qcow2") => Ok(Format::Qcow2),
            Some("raw") => Ok(Format::Raw),
            _ => {
                let text = format!(
                    "'{}': the name does not say which format it is (.qcow2 or .raw would); \
                     give --format",
                    file.display()
                );
                Err(Error::new(ErrorKind::InvalidArgument, text))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_decides_only_where_it_is_clear() {
        let of = |file: &str| Format::of(Path::new(file), None).ok();
        assert_eq!(of("a/b.qcow2"), Some(Format::Qcow2));
        assert_eq!(of("a.raw"), Some(Format::Raw));
        for file in ["a.img", "a", "/dev/sda", "a.QCOW2", ".qcow2", "qcow2/a"] {
            assert_eq!(of(file), None, "{file}");
        }
        let declared = Format::of(Path::new("a.qcow2"), Some(Format::Raw));
        assert_eq!(declared.unwrap(), Format::Raw);
    }
}
