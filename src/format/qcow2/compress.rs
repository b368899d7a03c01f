//! From a whole cluster to fewer bytes, as QEMU reads them.

use flate2::{Compress, Compression, FlushCompress, Status};

use crate::error::{Error, ErrorKind, Result};

use super::header::CompressionType;

/// Log2 of the deflate window that readers of the format provide.
const WINDOW_BITS: u8 = 12;
/// Zstandard's own default.
const ZSTD_LEVEL: i32 = 3;

/// Compresses a cluster; `None` where that does not make it shorter.
///
/// # Errors
/// The library has run out of memory.
pub(super) fn compress(kind: CompressionType, cluster: &[u8]) -> Result<Option<Vec<u8>>> {
    let mut data = vec![0; cluster.len() - 1];
    let length = match kind {
        CompressionType::Deflate => deflate(cluster, &mut data)?,
        CompressionType::Zstd => {
            zstd::bulk::compress_to_buffer(cluster, &mut data, ZSTD_LEVEL).ok()
        }
    };
    Ok(length.map(|length| {
        data.truncate(length);
        data
    }))
}

/// Raw deflate.
fn deflate(cluster: &[u8], data: &mut [u8]) -> Result<Option<usize>> {
    let mut stream = Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
    let status = stream.compress(cluster, data, FlushCompress::Finish);
    match status.map_err(failed)? {
        Status::StreamEnd => Ok(Some(stream.total_out() as usize)),
        Status::Ok | Status::BufError => Ok(None),
    }
}

fn failed(error: flate2::CompressError) -> Error {
    let message = format!("a cluster cannot be compressed: {error}");
    Error::new(ErrorKind::Io(nix::errno::Errno::ENOMEM), message).with_source(error)
}

#[cfg(test)]
mod tests {
    use super::super::compressed::decompress;
    use super::*;

    const BOTH: [CompressionType; 2] = [CompressionType::Deflate, CompressionType::Zstd];

    #[test]
    fn what_is_compressed_comes_back() {
        for kind in BOTH {
            for length in [512, 65536, 2 << 20] {
                let bytes: Vec<u8> = (0..length)
                    .map(|at| ((at / 7) ^ (at / 1000)) as u8)
                    .collect();
                let data = compress(kind, &bytes).expect("memory").expect("shorter");
                assert!(data.len() < length / 2);
                let mut cluster = vec![0; length];
                decompress(kind, &data, &mut cluster).expect("valid data");
                assert_eq!(cluster, bytes, "{kind:?} {length}");
            }
        }
    }

    #[test]
    fn noise_is_not_made_longer() {
        let mut random = crate::testing::Random::new(9);
        let noise: Vec<u8> = (0..65536).map(|_| random.next_u64() as u8).collect();
        for kind in BOTH {
            assert_eq!(compress(kind, &noise).expect("memory"), None, "{kind:?}");
        }
    }

    /// Readers have a window of 4 KiB: a repetition from farther away is none.
    #[test]
    fn repetitions_from_afar_are_not_used() {
        let mut random = crate::testing::Random::new(10);
        let noise: Vec<u8> = (0..16384).map(|_| random.next_u64() as u8).collect();
        let twice = [noise.clone(), noise].concat();
        let data = compress(CompressionType::Deflate, &twice).expect("memory");
        assert_eq!(data, None);
    }
}
