//! What the tests of images share: tar archives made entry by entry, whole or broken.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::mem;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use rustix::fs::{lgetxattr, llistxattr};

use crate::images::digest::Digest;
use crate::images::layers::Layer;

pub(crate) mod layout;
pub(crate) mod server;

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

    pub(crate) fn layer(self) -> Layer {
        layer(&self.build())
    }
}

/// A layer of these plain bytes.
pub(crate) fn layer(tar: &[u8]) -> Layer {
    Layer { blob: file_of(tar), diff_id: Digest::of(tar) }
}

/// A nameless file with `content`, at its start.
pub(crate) fn file_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
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

/// Runs a tool that the tests need, and says which package has it if it is missing.
#[expect(clippy::disallowed_methods, reason = "an oracle of a test, not a tool of the product")]
pub(crate) fn run(package: &str, tool: &str, args: &[&str]) -> Output {
    match Command::new(tool).args(args).output() {
        Ok(output) => output,
        Err(error) => panic!("this test needs {tool} (Debian package {package}): {error}"),
    }
}

/// An EROFS image mounted by the kernel. Unmounted on drop.
#[derive(Debug)]
pub(crate) struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    pub(crate) fn new(image: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (image.to_str().unwrap(), dir.path().to_str().unwrap());
        let output = run("mount", "mount", &["-t", "erofs", "-o", "ro,loop", from, to]);
        assert!(
            output.status.success(),
            "this test needs root, a loop device and a kernel with EROFS: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run("mount", "umount", &[self.dir.path().to_str().unwrap()]);
    }
}

/// Every file below `dir`, one line each, with all that stat(2), readlink(2), listxattr(2) and its
/// bytes say.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let mut todo = vec![dir.to_owned()];
    let mut lines = Vec::new();
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let content = if kind.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii())
        } else if kind.is_file() {
            let content = fs::read(&path).unwrap();
            assert_eq!(content.len() as u64, stat.len());
            format!("{} {}", content.len(), &Digest::of(&content).hex()[..8])
        } else if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            "/".to_owned()
        } else {
            format!("dev {:x}", stat.rdev())
        };
        let name = path.strip_prefix(dir).unwrap().as_os_str().as_bytes().escape_ascii();
        lines.push(format!(
            "/{name} {:o} {}:{} {}.{} x{} {content}{}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.mtime(),
            stat.mtime_nsec(),
            stat.nlink(),
            xattrs(&path),
        ));
    }
    lines.sort();
    lines
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0_u8; 64 << 10];
    let length = llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut all: Vec<String> = names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0_u8; 65_536];
            let length = lgetxattr(path, name, &mut value[..]).unwrap();
            let shown = match &value[..length] {
                long if long.len() > 100 => format!("{} {}", long.len(), Digest::of(long).hex()),
                short => short.escape_ascii().to_string(),
            };
            format!(" {}={shown}", name.escape_ascii())
        })
        .collect();
    all.sort();
    all.concat()
}
