//! Tar archives made entry by entry, whole or broken, for tests.

use std::io::Write;
use std::mem;

use flate2::Compression;
use flate2::write::GzEncoder;

/// A tar archive in the making. Headers are built here byte by byte, so that a test can also make
/// what no tool would.
#[derive(Debug, Clone, Default)]
pub(crate) struct TarBuilder {
    bytes: Vec<u8>,
    mode: u32,
    owner: (u64, u64),
    mtime_s: u64,
    pax: Vec<u8>,
}

impl TarBuilder {
    pub(crate) fn new() -> Self {
        Self { mode: 0o644, ..Self::default() }
    }

    /// Mode of the next entry.
    pub(crate) fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Owner and group of the next entry.
    pub(crate) fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// Time of the next entry.
    pub(crate) fn mtime(mut self, mtime_s: u64) -> Self {
        self.mtime_s = mtime_s;
        self
    }

    /// A PAX record for the next entry.
    pub(crate) fn pax(mut self, key: &str, value: &[u8]) -> Self {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length += 1;
        }
        write!(self.pax, "{length} {key}=").unwrap();
        self.pax.extend(value);
        self.pax.push(b'\n');
        self
    }

    pub(crate) fn file(self, path: impl AsRef<[u8]>, content: impl AsRef<[u8]>) -> Self {
        self.entry(b'0', path.as_ref(), b"", content.as_ref(), (0, 0))
    }

    pub(crate) fn dir(self, path: impl AsRef<[u8]>) -> Self {
        let mode = if self.mode == 0o644 { 0o755 } else { self.mode };
        self.mode(mode).entry(b'5', path.as_ref(), b"", b"", (0, 0))
    }

    pub(crate) fn symlink(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.mode(0o777).entry(b'2', path.as_ref(), target.as_ref(), b"", (0, 0))
    }

    pub(crate) fn hard_link(self, path: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.entry(b'1', path.as_ref(), target.as_ref(), b"", (0, 0))
    }

    pub(crate) fn device(self, kind: u8, path: &str, major: u64, minor: u64) -> Self {
        self.entry(kind, path.as_bytes(), b"", b"", (major, minor))
    }

    pub(crate) fn fifo(self, path: &str) -> Self {
        self.entry(b'6', path.as_bytes(), b"", b"", (0, 0))
    }

    /// An entry of any type. Long names go into PAX records.
    pub(crate) fn entry(
        mut self,
        kind: u8,
        path: &[u8],
        link: &[u8],
        content: &[u8],
        device: (u64, u64),
    ) -> Self {
        if path.len() > 100 {
            self = self.pax("path", path);
        }
        if link.len() > 100 {
            self = self.pax("linkpath", link);
        }
        let pax = mem::take(&mut self.pax);
        if !pax.is_empty() {
            let header = header(b'x', b"pax", b"", pax.len() as u64, &Self::new(), (0, 0));
            self = self.raw(&header).raw_body(&pax);
        }
        let header = header(kind, path, link, content.len() as u64, &self, device);
        self = self.raw(&header).raw_body(content);
        (self.mode, self.owner, self.mtime_s) = (0o644, (0, 0), 0);
        self
    }

    /// Bytes as they are.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    /// Bytes, padded to a whole block.
    pub(crate) fn raw_body(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    /// The archive, ended.
    pub(crate) fn build(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }

    /// The archive, not ended.
    pub(crate) fn unfinished(self) -> Vec<u8> {
        self.bytes
    }
}

/// A ustar header with a right checksum.
pub(crate) fn header(
    kind: u8,
    path: &[u8],
    link: &[u8],
    size_bytes: u64,
    with: &TarBuilder,
    (major, minor): (u64, u64),
) -> [u8; 512] {
    let mut block = [0; 512];
    let mut put = |offset: usize, bytes: &[u8]| {
        block[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &path[..path.len().min(100)]);
    put(100, format!("{:07o}\0", with.mode).as_bytes());
    put(108, &number(with.owner.0, 8));
    put(116, &number(with.owner.1, 8));
    put(124, &number(size_bytes, 12));
    put(136, &number(with.mtime_s, 12));
    put(148, b"        ");
    put(156, &[kind]);
    put(157, &link[..link.len().min(100)]);
    put(257, b"ustar\x0000");
    put(329, &number(major, 8));
    put(337, &number(minor, 8));
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// Octal if it fits, else base-256.
fn number(value: u64, width: usize) -> Vec<u8> {
    let octal = format!("{value:0digits$o}\0", digits = width - 1);
    if octal.len() == width {
        return octal.into_bytes();
    }
    let mut bytes = vec![0; width.saturating_sub(8)];
    bytes.extend(&value.to_be_bytes()[8_usize.saturating_sub(width)..]);
    bytes[0] |= 0x80;
    bytes
}

/// What an archive is mostly packed with.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
