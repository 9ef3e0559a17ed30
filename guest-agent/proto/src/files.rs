//! Files on their way into a guest and out of it.

use crate::body::{Reader, Writer};

/// One file, directory or link to make in the guest. The bytes of a file follow as data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PutSpec {
    /// Where. A relative path counts from the root.
    pub path: String,
    /// What.
    pub kind: PutKind,
    /// Permission bits, at most 0o7777. A link has none.
    pub mode: u32,
    /// Owner and group; root's if there are none.
    pub owner: Option<(u32, u32)>,
    /// When it was last changed, in seconds since 1970; now if it is not said.
    pub mtime: Option<i64>,
}

/// What to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PutKind {
    /// A regular file.
    File,
    /// A directory, which may be there already.
    Directory,
    /// A symbolic link to this.
    Link(String),
}

/// A tree to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GetSpec {
    /// Its root: a file, a directory or a link.
    pub path: String,
    /// Whether links are read as what they lead to.
    pub follow_links: bool,
}

/// One entry of a tree. The bytes of a file follow as data, exactly as many as `size` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Relative; begins with the name of the tree's root.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes of data that follow.
    pub size: u64,
    /// When it was last changed, in seconds since 1970.
    pub mtime: i64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Link(String),
}

/// A question about a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatSpec {
    /// The path. A relative path counts from the root.
    pub path: String,
    /// Whether a link is what it leads to.
    pub follow_links: bool,
}

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// What it is.
    pub kind: PathKind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
}

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathKind {
    /// Nothing.
    Missing,
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link to this.
    Link(String),
    /// A device, a socket or a pipe.
    Special,
}

const FILE: u8 = 0;
const DIRECTORY: u8 = 1;
const LINK: u8 = 2;
const MISSING: u8 = 3;
const SPECIAL: u8 = 4;

/// All permission bits there are.
const MODE_MAX: u32 = 0o7777;

impl PutSpec {
    pub(crate) fn write(&self) -> Vec<u8> {
        let Self { path, kind, mode, owner, mtime } = self;
        let (kind, target) = match kind {
            PutKind::File => (FILE, ""),
            PutKind::Directory => (DIRECTORY, ""),
            PutKind::Link(target) => (LINK, target.as_str()),
        };
        let (uid, gid) = owner.unwrap_or_default();
        Writer::default()
            .text(path)
            .u8(kind)
            .text(target)
            .u32(*mode)
            .flag(owner.is_some())
            .u32(uid)
            .u32(gid)
            .flag(mtime.is_some())
            .i64(mtime.unwrap_or_default())
            .finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let path = reader.text()?;
        let kind = match (reader.u8()?, reader.text()?) {
            (FILE, _) => PutKind::File,
            (DIRECTORY, _) => PutKind::Directory,
            (LINK, target) => PutKind::Link(target),
            _ => return None,
        };
        let mode = reader.u32().filter(|&mode| mode <= MODE_MAX)?;
        let (has_owner, uid, gid) = (reader.flag()?, reader.u32()?, reader.u32()?);
        let (has_mtime, mtime) = (reader.flag()?, reader.i64()?);
        reader.end()?;
        let (owner, mtime) = (has_owner.then_some((uid, gid)), has_mtime.then_some(mtime));
        Some(Self { path, kind, mode, owner, mtime })
    }
}

impl GetSpec {
    pub(crate) fn write(&self) -> Vec<u8> {
        Writer::default().text(&self.path).flag(self.follow_links).finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let (path, follow_links) = (reader.text()?, reader.flag()?);
        reader.end()?;
        Some(Self { path, follow_links })
    }
}

impl StatSpec {
    pub(crate) fn write(&self) -> Vec<u8> {
        Writer::default().text(&self.path).flag(self.follow_links).finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let GetSpec { path, follow_links } = GetSpec::read(body)?;
        Some(Self { path, follow_links })
    }
}

impl Entry {
    pub(crate) fn write(&self) -> Vec<u8> {
        let Self { path, kind, mode, size, mtime, uid, gid } = self;
        let (kind, target) = match kind {
            EntryKind::File => (FILE, ""),
            EntryKind::Directory => (DIRECTORY, ""),
            EntryKind::Link(target) => (LINK, target.as_str()),
        };
        Writer::default()
            .text(path)
            .u8(kind)
            .text(target)
            .u32(*mode)
            .u64(*size)
            .i64(*mtime)
            .u32(*uid)
            .u32(*gid)
            .finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let path = reader.lossy()?;
        let kind = match (reader.u8()?, reader.lossy()?) {
            (FILE, _) => EntryKind::File,
            (DIRECTORY, _) => EntryKind::Directory,
            (LINK, target) => EntryKind::Link(target),
            _ => return None,
        };
        let mode = reader.u32().filter(|&mode| mode <= MODE_MAX)?;
        let (size, mtime) = (reader.u64()?, reader.i64()?);
        let (uid, gid) = (reader.u32()?, reader.u32()?);
        reader.end()?;
        Some(Self { path, kind, mode, size, mtime, uid, gid })
    }
}

impl PathInfo {
    pub(crate) fn write(&self) -> Vec<u8> {
        let Self { kind, mode, size } = self;
        let (kind, target) = match kind {
            PathKind::Missing => (MISSING, ""),
            PathKind::File => (FILE, ""),
            PathKind::Directory => (DIRECTORY, ""),
            PathKind::Link(target) => (LINK, target.as_str()),
            PathKind::Special => (SPECIAL, ""),
        };
        Writer::default().u8(kind).text(target).u32(*mode).u64(*size).finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let kind = match (reader.u8()?, reader.lossy()?) {
            (MISSING, _) => PathKind::Missing,
            (FILE, _) => PathKind::File,
            (DIRECTORY, _) => PathKind::Directory,
            (LINK, target) => PathKind::Link(target),
            (SPECIAL, _) => PathKind::Special,
            _ => return None,
        };
        let mode = reader.u32().filter(|&mode| mode <= MODE_MAX)?;
        let size = reader.u64()?;
        reader.end()?;
        Some(Self { kind, mode, size })
    }
}
