//! Archives as they travel: plain, gzip or zstd.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Inflates by what the bytes are: media types are known to lie.
///
/// # Errors
///
/// Those of reading the first bytes.
pub fn unpack<'a>(mut packed: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let start = packed.fill_buf()?;
    if start.starts_with(GZIP) {
        Ok(Box::new(MultiGzDecoder::new(packed)))
    } else if start.starts_with(ZSTD) {
        Ok(Box::new(zstd::Decoder::with_buffer(packed)?))
    } else {
        Ok(Box::new(packed))
    }
}
