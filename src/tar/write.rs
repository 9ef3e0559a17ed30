//! Archives as POSIX has them: ustar headers, with a PAX header before one that says too little.

use std::io::{self, Write};

use crate::tar::{BLOCK_BYTES, Entry, EntryKind};

/// Where the fields of a header are, and how long (POSIX.1-2017, pax, "ustar Interchange Format").
const NAME: (usize, usize) = (0, 100);
const MODE: (usize, usize) = (100, 8);
const UID: (usize, usize) = (108, 8);
const GID: (usize, usize) = (116, 8);
const SIZE: (usize, usize) = (124, 12);
const MTIME: (usize, usize) = (136, 12);
const CHECKSUM: (usize, usize) = (148, 8);
const TYPE_FLAG: usize = 156;
const LINK: (usize, usize) = (157, 100);
const MAGIC: (usize, usize) = (257, 8);

/// Name of a PAX header, for readers that take it for a file.
const PAX_NAME: &[u8] = b"PaxHeaders/entry";

/// Writes entries one after the other, each with its body behind it.
#[derive(Debug)]
pub struct TarWriter<W> {
    inner: W,
    /// Bytes that are missing of the current body.
    body_bytes: u64,
    /// Zeros after it, up to the next block.
    padding_bytes: usize,
}

impl<W: Write> TarWriter<W> {
    /// An archive that starts with the next byte of `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, body_bytes: 0, padding_bytes: 0 }
    }

    /// Begins an entry: a file, a directory or a symbolic link. Of a file the body has to follow.
    ///
    /// # Errors
    ///
    /// What the stream says, or that the body before this one is too short.
    pub fn begin(&mut self, entry: &Entry) -> io::Result<()> {
        self.end_body()?;
        let mut records = Vec::new();
        let mut block = [0; BLOCK_BYTES];
        text(&mut block, NAME, "path", &entry.path, &mut records);
        text(&mut block, LINK, "linkpath", &entry.link, &mut records);
        octal(&mut block, MODE, u64::from(entry.mode));
        number(&mut block, UID, "uid", entry.uid.into(), &mut records);
        number(&mut block, GID, "gid", entry.gid.into(), &mut records);
        number(&mut block, SIZE, "size", entry.size_bytes.cast_signed(), &mut records);
        number(&mut block, MTIME, "mtime", entry.mtime_s, &mut records);
        block[TYPE_FLAG] = type_flag(entry.kind);
        if !records.is_empty() {
            let mut head = [0; BLOCK_BYTES];
            put(&mut head, NAME, PAX_NAME);
            octal(&mut head, MODE, 0o644);
            octal(&mut head, SIZE, records.len() as u64);
            head[TYPE_FLAG] = b'x';
            self.write_header(head)?;
            self.inner.write_all(&records)?;
            let padding = records.len().next_multiple_of(BLOCK_BYTES) - records.len();
            self.inner.write_all(&[0; BLOCK_BYTES][..padding])?;
        }
        self.write_header(block)?;
        let end = entry.size_bytes.next_multiple_of(BLOCK_BYTES as u64);
        self.body_bytes = entry.size_bytes;
        self.padding_bytes = usize::try_from(end - entry.size_bytes).unwrap_or(0);
        Ok(())
    }

    /// Ends the archive; returns what it was written to.
    ///
    /// # Errors
    ///
    /// As [`Self::begin`].
    pub fn finish(mut self) -> io::Result<W> {
        self.end_body()?;
        self.inner.write_all(&[0; 2 * BLOCK_BYTES])?;
        self.inner.flush()?;
        Ok(self.inner)
    }

    fn end_body(&mut self) -> io::Result<()> {
        if self.body_bytes > 0 {
            return Err(io::Error::other("an entry's body is shorter than its header says"));
        }
        self.inner.write_all(&[0; BLOCK_BYTES][..self.padding_bytes])?;
        self.padding_bytes = 0;
        Ok(())
    }

    fn write_header(&mut self, mut block: [u8; BLOCK_BYTES]) -> io::Result<()> {
        put(&mut block, MAGIC, b"ustar\x0000");
        // The checksum itself counts as eight spaces.
        put(&mut block, CHECKSUM, b"        ");
        let sum = block.iter().map(|&byte| u64::from(byte)).sum();
        octal(&mut block, CHECKSUM, sum);
        self.inner.write_all(&block)
    }
}

impl<W: Write> Write for TarWriter<W> {
    /// Writes the body of the current entry, never more than it has.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = usize::try_from(self.body_bytes).unwrap_or(usize::MAX).min(bytes.len());
        let written = self.inner.write(&bytes[..room])?;
        self.body_bytes -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn type_flag(kind: EntryKind) -> u8 {
    match kind {
        EntryKind::File => b'0',
        EntryKind::HardLink => b'1',
        EntryKind::Symlink => b'2',
        EntryKind::CharDevice => b'3',
        EntryKind::BlockDevice => b'4',
        EntryKind::Directory => b'5',
        EntryKind::Fifo => b'6',
    }
}

fn put(block: &mut [u8; BLOCK_BYTES], (at, length): (usize, usize), bytes: &[u8]) {
    let fitting = &bytes[..bytes.len().min(length)];
    block[at..at + fitting.len()].copy_from_slice(fitting);
}

/// A text as far as it fits; whole in a record if it does not.
fn text(
    block: &mut [u8; BLOCK_BYTES],
    field: (usize, usize),
    key: &str,
    value: &[u8],
    records: &mut Vec<u8>,
) {
    put(block, field, value);
    if value.len() > field.1 {
        record(key, value, records);
    }
}

/// Octal digits and a NUL, if they fit; a record if they do not.
fn number(
    block: &mut [u8; BLOCK_BYTES],
    field: (usize, usize),
    key: &str,
    value: i64,
    records: &mut Vec<u8>,
) {
    let bits = 3 * (field.1 - 1);
    match u64::try_from(value) {
        Ok(fitting) if fitting >> bits == 0 => octal(block, field, fitting),
        _ => record(key, value.to_string().as_bytes(), records),
    }
}

fn octal(block: &mut [u8; BLOCK_BYTES], field: (usize, usize), value: u64) {
    let digits = field.1 - 1;
    put(block, field, format!("{value:0digits$o}\0").as_bytes());
}

/// A PAX record, whose length counts its own digits.
fn record(key: &str, value: &[u8], records: &mut Vec<u8>) {
    // A space, an equals sign and a newline.
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(format!("{length} {key}=").as_bytes());
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::tar::TarReader;

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry {
            path: path.into(),
            kind,
            link: Vec::new(),
            mode: 0o640,
            uid: 1000,
            gid: 1000,
            mtime_s: 1_700_000_000,
            mtime_ns: 0,
            size_bytes: 0,
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }

    fn written(entries: &[(Entry, &[u8])]) -> Vec<u8> {
        let mut writer = TarWriter::new(Vec::new());
        for (entry, body) in entries {
            writer.begin(entry).unwrap();
            writer.write_all(body).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let long = "d/".repeat(120) + "name";
        let entries = [
            (entry("d/", EntryKind::Directory), &b""[..]),
            (Entry { size_bytes: 5, ..entry("d/file", EntryKind::File) }, b"hello"),
            (Entry { link: long.clone().into(), ..entry("l", EntryKind::Symlink) }, b""),
            (Entry { size_bytes: 512, ..entry(&long, EntryKind::File) }, &[7; 512]),
            (Entry { uid: u32::MAX, mtime_s: -5, ..entry("old", EntryKind::File) }, b""),
        ];

        let archive = written(&entries);

        assert!(archive.len().is_multiple_of(BLOCK_BYTES));
        let mut reader = TarReader::new(archive.as_slice());
        for (entry, body) in &entries {
            assert_eq!(reader.next_entry().unwrap().as_ref(), Some(entry));
            let mut read = Vec::new();
            reader.read_to_end(&mut read).unwrap();
            assert_eq!(read, *body);
        }
        assert_eq!(reader.next_entry().unwrap(), None);
    }

    #[test]
    fn another_reader_reads_the_same() {
        let long = "d/".repeat(120) + "name";
        let archive =
            written(&[(Entry { size_bytes: 5, ..entry(&long, EntryKind::File) }, b"hello")]);

        let mut archive = tar::Archive::new(archive.as_slice());
        let mut found = archive.entries().unwrap().next().unwrap().unwrap();

        assert_eq!(*found.path_bytes(), *long.as_bytes());
        let header = found.header();
        assert_eq!((header.mode().unwrap(), header.uid().unwrap()), (0o640, 1000));
        let mut body = String::new();
        found.read_to_string(&mut body).unwrap();
        assert_eq!(body, "hello");
    }

    #[test]
    fn more_than_eight_gibibytes_are_said_in_a_record() {
        let large = Entry { size_bytes: 9 << 30, ..entry("large", EntryKind::File) };
        let mut archive = Vec::new();
        TarWriter::new(&mut archive).begin(&large).unwrap();

        let found = TarReader::new(archive.as_slice()).next_entry().unwrap();

        assert_eq!(found, Some(large));
    }

    #[test]
    fn a_body_is_neither_shorter_nor_longer_than_was_said() {
        let mut writer = TarWriter::new(Vec::new());
        writer.begin(&Entry { size_bytes: 2, ..entry("f", EntryKind::File) }).unwrap();

        assert!(writer.write_all(b"abc").is_err());
        writer.begin(&Entry { size_bytes: 2, ..entry("g", EntryKind::File) }).unwrap();
        assert!(writer.finish().is_err());
    }
}
