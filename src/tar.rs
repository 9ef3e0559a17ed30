//! Tar archives: read as a stream an enemy may have made, and written.
//!
//! Understands ustar, GNU long names, and PAX records with any byte in their values; refuses what
//! would need seeking or guessing (sparse files, multi-volume archives). Where formats leave room
//! for interpretation this follows what container runtimes do, because two readers that see
//! different trees in one archive are a security hole: GNU long names beat PAX paths, global PAX
//! headers say nothing about entries, links and devices have no body whatever their size says.
//!
//! Bounds: a header is 512 bytes, everything that describes one entry at most
//! [`EXTENSION_BYTES_MAX`], and bodies are never held.

use std::io::{self, Read};

use crate::tar::header::RawHeader;

mod header;
pub mod packed;
mod pax;
pub mod stream;
mod write;

pub use header::EntryKind;
pub use write::TarWriter;

/// Unit of a tar archive.
pub const BLOCK_BYTES: usize = 512;

/// Most bytes of one PAX header or GNU long name: room for the longest path and for all extended
/// attributes a Linux file system takes.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;

/// One entry of an archive, without its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name as it stands there: any bytes but NUL, nothing cleaned.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: EntryKind,
    /// Target of a hard or symbolic link.
    pub link: Vec<u8>,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime_s: i64,
    /// Its nanoseconds, below 10^9.
    pub mtime_ns: u32,
    /// Bytes of the body.
    pub size_bytes: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes, full names.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries one after the other; [`Read`] gives the body of the last one.
#[derive(Debug)]
pub struct TarReader<R> {
    inner: R,
    /// Bytes of the current body not yet read.
    body_bytes: u64,
    /// Zeros after it, up to the next block.
    padding_bytes: u64,
    /// Where in the archive we are, for errors.
    offset: u64,
}

impl<R: Read> TarReader<R> {
    /// An archive that starts at the next byte of `inner`, which should be buffered.
    pub fn new(inner: R) -> Self {
        Self { inner, body_bytes: 0, padding_bytes: 0, offset: 0 }
    }

    /// The next entry, skipping what is left of the last one's body. `None` at the end.
    ///
    /// # Errors
    ///
    /// [`TarError`]; the archive is not readable further.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut long_path = None;
        let mut long_link = None;
        let mut records = None;
        loop {
            self.skip_body()?;
            let offset = self.offset;
            let malformed = |what| TarError::Malformed { what, offset };
            let Some(block) = self.read_header()? else {
                return match (long_path, long_link, records) {
                    (None, None, None) => Ok(None),
                    _ => Err(malformed("it ends where an entry was announced")),
                };
            };
            let header = RawHeader::parse(&block).map_err(malformed)?;
            match header.type_flag() {
                b'L' => long_path = Some(self.read_extension(&header)?),
                b'K' => long_link = Some(self.read_extension(&header)?),
                b'x' | b'X' => {
                    let bytes = self.read_extension(&header)?;
                    records = Some(pax::parse(&bytes).map_err(malformed)?);
                }
                b'g' => drop(self.read_extension(&header)?),
                _ => {
                    let records = records.unwrap_or_default();
                    let mut entry = header.entry(records, malformed, offset)?;
                    if let Some(path) = long_path {
                        entry.path = until_nul(path);
                    }
                    if let Some(link) = long_link {
                        entry.link = until_nul(link);
                    }
                    if entry.path.contains(&0) || entry.link.contains(&0) {
                        return Err(malformed("a name has a NUL byte"));
                    }
                    entry.settle_kind();
                    self.expect_body(entry.size_bytes);
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// Reads on to the end of the stream, past the end of the archive.
    ///
    /// # Errors
    ///
    /// What the stream says.
    pub fn drain(&mut self) -> io::Result<()> {
        io::copy(&mut self.inner, &mut io::sink()).map(drop)
    }

    /// The stream behind the archive.
    pub fn into_inner(self) -> R {
        self.inner
    }

    fn expect_body(&mut self, size_bytes: u64) {
        self.body_bytes = size_bytes;
        self.padding_bytes = size_bytes.next_multiple_of(BLOCK_BYTES as u64) - size_bytes;
    }

    fn skip_body(&mut self) -> Result<(), TarError> {
        let bytes = self.body_bytes + self.padding_bytes;
        let skipped = io::copy(&mut (&mut self.inner).take(bytes), &mut io::sink())?;
        self.offset += skipped;
        if skipped < self.body_bytes {
            return Err(TarError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        (self.body_bytes, self.padding_bytes) = (0, 0);
        Ok(())
    }

    /// The next header block. `None` at the end of the archive: a block of zeros, or no block.
    fn read_header(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, TarError> {
        let mut block = [0; BLOCK_BYTES];
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match self.inner.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(TarError::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.offset += BLOCK_BYTES as u64;
        Ok(block.iter().any(|&byte| byte != 0).then_some(block))
    }

    /// The body of a header that describes the entry after it.
    fn read_extension(&mut self, header: &RawHeader<'_>) -> Result<Vec<u8>, TarError> {
        let malformed = |what| TarError::Malformed { what, offset: self.offset };
        let size_bytes = header.size_bytes().map_err(malformed)?;
        if size_bytes > EXTENSION_BYTES_MAX {
            return Err(malformed("an entry's extended header is over 1 MiB"));
        }
        self.expect_body(size_bytes);
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

impl<R: Read> Read for TarReader<R> {
    /// Reads the body of the current entry. An archive that ends in it is an error, not an end.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let room = usize::try_from(self.body_bytes).unwrap_or(usize::MAX).min(buffer.len());
        if room == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..room])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.body_bytes -= read as u64;
        self.offset += read as u64;
        Ok(read)
    }
}

/// GNU long names end with a NUL.
fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    bytes.truncate(end);
    bytes
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// It is not a tar archive, or a broken one.
    #[error("Malformed tar archive at byte {offset}: {what}")]
    Malformed {
        /// What is wrong.
        what: &'static str,
        /// Where.
        offset: u64,
    },
    /// It has an entry of a kind that is not supported.
    #[error("Tar entry {path:?} is {what}, which is not supported")]
    Unsupported {
        /// The entry.
        path: String,
        /// Its kind.
        what: &'static str,
    },
    /// The stream failed, or ended inside the archive.
    #[error("Failed to read tar archive")]
    Io(#[from] io::Error),
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
