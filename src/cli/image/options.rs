//! The `-o NAME=VALUE` options of a new qcow2 image, in qemu-img's names.

use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::create::{CreateOptions, Preallocation};
use crate::format::qcow2::header::CompressionType;

use super::super::size;

/// Sets what one option says.
///
/// # Errors
/// No such option, or a value that it does not have. Bounds are checked by [`CreateOptions::check`].
pub(super) fn apply(options: &mut CreateOptions, text: &str) -> Result<()> {
    let Some((name, value)) = text.split_once('=') else {
        return Err(wrong(format!(
            "the option '{text}' has no value: NAME=VALUE"
        )));
    };
    let refused = || wrong(format!("the option '{name}' does not accept '{value}'"));
    match name {
        "cluster_size" => options.cluster_size = size::parse(value).map_err(|_| refused())?,
        "compat" => {
            options.version = match value {
                "0.10" | "v2" => 2,
                "1.1" | "v3" => 3,
                _ => return Err(refused()),
            }
        }
        "refcount_bits" => options.refcount_bits = value.parse().map_err(|_| refused())?,
        "lazy_refcounts" => {
            options.lazy_refcounts = match value {
                "on" => true,
                "off" => false,
                _ => return Err(refused()),
            }
        }
        "compression_type" => {
            options.compression = match value {
                "zlib" => CompressionType::Deflate,
                "zstd" => CompressionType::Zstd,
                _ => return Err(refused()),
            }
        }
        "preallocation" => {
            options.preallocation = match value {
                "off" => Preallocation::Off,
                "metadata" => Preallocation::Metadata,
                _ => return Err(refused()),
            }
        }
        _ => return Err(wrong(format!("a qcow2 image has no option '{name}' here"))),
    }
    Ok(())
}

fn wrong(text: String) -> Error {
    Error::new(ErrorKind::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_qemu_img_s() {
        let mut options = CreateOptions::new(1 << 20);
        for text in [
            "cluster_size=4k",
            "compat=v3",
            "refcount_bits=1",
            "lazy_refcounts=on",
            "compression_type=zstd",
            "preallocation=metadata",
        ] {
            apply(&mut options, text).unwrap();
        }
        assert_eq!(options.cluster_size, 4096);
        assert_eq!((options.version, options.refcount_bits), (3, 1));
        assert!(options.lazy_refcounts);
        assert_eq!(options.compression, CompressionType::Zstd);
        assert_eq!(options.preallocation, Preallocation::Metadata);
    }

    #[test]
    fn what_is_not_an_option_is_refused() {
        let mut options = CreateOptions::new(1 << 20);
        for text in [
            "cluster_size",
            "cluster_size=x",
            "compat=2",
            "refcount_bits=-1",
            "lazy_refcounts=yes",
            "compression_type=lz4",
            "preallocation=full",
            "extended_l2=on",
            "data_file=x",
        ] {
            assert!(apply(&mut options, text).is_err(), "{text}");
        }
    }
}
