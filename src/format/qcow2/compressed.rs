//! Compressed clusters: from the bytes in the image to a whole cluster.
//!
//! The data comes from the image, so it may be anything: it never makes more than one cluster, and
//! memory stays bounded.

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, Operation};
use zstd::zstd_safe::{InBuffer, OutBuffer};

use crate::error::{Error, ErrorKind, Result};

use super::header::CompressionType;

/// Largest window of a Zstandard frame, as a power of two: what frames of 2 MiB clusters need, with
/// room; bounds the memory that a hostile frame can ask for.
const MAX_ZSTD_WINDOW_LOG: u32 = 24;

/// Decompresses `data`, which may go on after the end of the compressed data, to exactly the length
/// of `cluster`.
///
/// # Errors
/// [`ErrorKind::InvalidImage`] (`EIO`): broken data, or data that ends before the cluster is full.
pub fn decompress(compression: CompressionType, data: &[u8], cluster: &mut [u8]) -> Result<()> {
    let written = match compression {
        CompressionType::Deflate => inflate(data, cluster)?,
        CompressionType::Zstd => decode_zstd(data, cluster)?,
    };
    if written < cluster.len() {
        let message = format!(
            "compressed cluster ends after {written:#x} of {:#x} bytes",
            cluster.len()
        );
        return Err(Error::new(ErrorKind::InvalidImage, message));
    }
    Ok(())
}

fn broken(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let message = format!("compressed cluster is broken: {error}");
    Error::new(ErrorKind::InvalidImage, message).with_source(error)
}

/// Raw deflate. Writers use a window of 4 KiB; any window is read.
fn inflate(data: &[u8], cluster: &mut [u8]) -> Result<usize> {
    let mut stream = Decompress::new(false);
    loop {
        let (read, written) = (stream.total_in() as usize, stream.total_out() as usize);
        let status = stream
            .decompress(
                &data[read..],
                &mut cluster[written..],
                FlushDecompress::None,
            )
            .map_err(broken)?;
        let moved = stream.total_in() as usize > read || stream.total_out() as usize > written;
        let full = stream.total_out() as usize == cluster.len();
        if status == Status::StreamEnd || full || !moved {
            return Ok(stream.total_out() as usize);
        }
    }
}

/// Zstandard frames, one after the other, until the cluster is full.
fn decode_zstd(data: &[u8], cluster: &mut [u8]) -> Result<usize> {
    let mut decoder = Decoder::new()?;
    decoder.set_parameter(DParameter::WindowLogMax(MAX_ZSTD_WINDOW_LOG))?;
    let length = cluster.len();
    let mut input = InBuffer::around(data);
    let mut output = OutBuffer::around(cluster);
    loop {
        let before = (input.pos(), output.pos());
        decoder.run(&mut input, &mut output).map_err(broken)?;
        let moved = (input.pos(), output.pos()) != before;
        if output.pos() == length || !moved {
            return Ok(output.pos());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::{Compress, Compression, FlushCompress};

    fn sample(length: usize) -> Vec<u8> {
        (0..length)
            .map(|at| ((at / 7) ^ (at * at / 1000)) as u8)
            .collect()
    }

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut stream = Compress::new(Compression::default(), false);
        let mut data = Vec::with_capacity(bytes.len() + 1000);
        stream
            .compress_vec(bytes, &mut data, FlushCompress::Finish)
            .expect("it fits");
        data
    }

    fn zstandard(bytes: &[u8]) -> Vec<u8> {
        zstd::stream::encode_all(bytes, 3).expect("memory compresses")
    }

    type Compressor = fn(&[u8]) -> Vec<u8>;

    const BOTH: [(CompressionType, Compressor); 2] = [
        (CompressionType::Deflate, deflated),
        (CompressionType::Zstd, zstandard),
    ];

    #[test]
    fn clusters_come_back_with_garbage_behind_them() {
        for (compression, compress) in BOTH {
            for length in [512, 65536, 2 << 20] {
                let bytes = sample(length);
                let mut data = compress(&bytes);
                data.extend_from_slice(&[0xee; 511]);
                let mut cluster = vec![0; length];
                decompress(compression, &data, &mut cluster).expect("valid data");
                assert_eq!(cluster, bytes, "{compression:?} {length}");
            }
        }
    }

    #[test]
    fn a_short_cluster_is_an_error() {
        for (compression, compress) in BOTH {
            let data = compress(&sample(1000));
            let error = decompress(compression, &data, &mut [0; 1024]).expect_err("too short");
            assert_eq!(error.errno(), nix::errno::Errno::EIO);
        }
    }

    #[test]
    fn more_than_a_cluster_is_cut_off() {
        for (compression, compress) in BOTH {
            let bytes = sample(1 << 20);
            let mut cluster = vec![0; 65536];
            decompress(compression, &compress(&bytes), &mut cluster).expect("enough data");
            assert_eq!(cluster, bytes[..65536]);
        }
    }

    #[test]
    fn broken_data_is_an_error_or_other_bytes_but_never_more() {
        let mut random = crate::testing::Random::new(5);
        for (compression, compress) in BOTH {
            let data = compress(&sample(4096));
            for _ in 0..2000 {
                let mut broken = data.clone();
                for _ in 0..1 + random.below(4) {
                    let at = random.below(broken.len() as u64) as usize;
                    broken[at] = random.next_u64() as u8;
                }
                broken.truncate(random.below(broken.len() as u64 + 1) as usize);
                let _ = decompress(compression, &broken, &mut [0; 4096]);
            }
            decompress(compression, &[], &mut [0; 4096]).expect_err("no data at all");
        }
    }

    #[test]
    fn a_frame_that_wants_a_huge_window_is_refused() {
        let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).expect("an encoder");
        encoder.window_log(27).expect("a window");
        std::io::Write::write_all(&mut encoder, &sample(1 << 16)).expect("memory");
        let data = encoder.finish().expect("memory");
        let mut cluster = vec![0; 1 << 16];
        decompress(CompressionType::Zstd, &data, &mut cluster).expect_err("128 MiB of window");
    }
}
