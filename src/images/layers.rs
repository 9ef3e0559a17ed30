//! Merges the layers of an image: each is read once, front to back, in one pass that inflates,
//! digests, parses and writes.
//!
//! ```text
//! blob ─> gzip or zstd ─> Meter ─> digest ─> TarReader ─┬─ headers ─> Tree
//!                                                      └─ bodies ──> DataArea
//! ```
//!
//! Semantics are those of the OCI image specification 1.1, "Image Layer Filesystem Changeset";
//! where it is silent, of containerd: names are cleaned (a leading `/` and `.` are dropped, `..`
//! is refused), links above the last component are followed inside the image, missing parents are
//! made as 0755. Attributes that cannot mean anything in a guest are dropped: overlayfs's own
//! (`trusted.overlay.*`), which would act on the guest's overlay, and those of prefixes Linux does
//! not have on EROFS.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read};

use crate::images::digest::{Digest, DigestReader};
use crate::images::erofs::{
    DataArea, DataError, XattrError, admit_xattr, device_fits, xattr_bytes,
};
use crate::images::erofs::{SYMLINK_BYTES_MAX, XATTRS_BYTES_MAX};
use crate::images::tree::{Kind, Meta, Node, PathError, Place, Tree, Xattr};
use crate::tar::packed::unpack;
use crate::tar::{Entry, EntryKind, TarError, TarReader};

/// Most layers of an image: the bound container runtimes have.
pub const LAYERS_MAX: usize = 128;

/// Most entries of all layers together, those that upper layers hide included.
const ENTRIES_MAX: u64 = 4_000_000;

/// Bytes read at once, packed and unpacked.
const BUFFER_BYTES: usize = 256 << 10;

/// Prefix of an entry that hides another.
const WHITEOUT: &[u8] = b".wh.";

/// An entry that hides all that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Prefix of what AUFS kept for itself; means nothing elsewhere.
const WHITEOUT_META: &[u8] = b".wh..wh.";

/// One layer: its blob, open, and what it must unpack to.
#[derive(Debug)]
pub struct Layer {
    /// The tar archive: plain, gzip or zstd.
    pub blob: File,
    /// Digest of the plain archive (`rootfs.diff_ids` in the image's configuration).
    pub diff_id: Digest,
}

/// What stops a merge.
pub trait Watch {
    /// Whether the merge shall end with [`MergeError::Cancelled`].
    fn is_cancelled(&self) -> bool;
}

/// Merges `layers`, lowest first: bodies into `data`, all else into the tree that is returned.
///
/// # Errors
///
/// [`MergeError`]; `data` is not usable further.
pub fn merge(
    layers: Vec<Layer>,
    unpacked_bytes_max: u64,
    data: &mut DataArea,
    watch: &dyn Watch,
) -> Result<Tree, MergeError> {
    if layers.len() > LAYERS_MAX {
        return Err(MergeError::TooManyLayers { layers: layers.len() });
    }
    let mut tree = Tree::new();
    let budget = Budget { bytes: Cell::new(unpacked_bytes_max), entries: Cell::new(ENTRIES_MAX) };
    for (index, layer) in layers.into_iter().enumerate() {
        tree.begin_layer();
        apply(layer, &budget, watch, data, &mut tree).map_err(|cause| match cause {
            Cause::Cancelled => MergeError::Cancelled,
            Cause::TooLarge => MergeError::TooLarge { unpacked_bytes_max },
            cause => MergeError::Layer { index, source: cause },
        })?;
        data.discard(&tree.take_dead())
            .map_err(|error| MergeError::Layer { index, source: error.into() })?;
    }
    Ok(tree)
}

/// What the layers of an image may still cost.
struct Budget {
    bytes: Cell<u64>,
    entries: Cell<u64>,
}

fn apply(
    layer: Layer,
    budget: &Budget,
    watch: &dyn Watch,
    data: &mut DataArea,
    tree: &mut Tree,
) -> Result<(), Cause> {
    let plain = unpack(BufReader::with_capacity(BUFFER_BYTES, layer.blob))?;
    let metered = Meter { inner: plain, bytes: &budget.bytes, watch };
    let digested = DigestReader::new(metered);
    let mut tar = TarReader::new(BufReader::with_capacity(BUFFER_BYTES, digested));
    while let Some(entry) = tar.next_entry()? {
        let entries = budget.entries.get().checked_sub(1).ok_or(Cause::TooManyEntries)?;
        budget.entries.set(entries);
        apply_entry(&entry, &mut tar, data, tree).map_err(|cause| match cause {
            Cause::Path(source) => Cause::Entry { path: lossy(&entry.path), source },
            cause => cause,
        })?;
    }
    // What follows the archive's end belongs to the digest too.
    tar.drain()?;
    let (found, _) = tar.into_inner().into_inner().finish();
    if found != layer.diff_id {
        return Err(Cause::DiffId { expected: layer.diff_id, found });
    }
    Ok(())
}

fn apply_entry(
    entry: &Entry,
    body: &mut impl Read,
    data: &mut DataArea,
    tree: &mut Tree,
) -> Result<(), Cause> {
    let last = entry.path.rsplit(|&byte| byte == b'/').find(|name| !matches!(name, [] | [b'.']));
    if let Some(hidden) = last.and_then(|name| name.strip_prefix(WHITEOUT)) {
        return hide(&entry.path, hidden, tree);
    }
    if entry.path.split(|&byte| byte == b'/').any(|name| name.starts_with(WHITEOUT_META)) {
        return Ok(());
    }
    let meta = meta(entry)?;
    let Some(place) = tree.place(&entry.path)? else {
        // The root itself can only be a directory.
        if entry.kind != EntryKind::Directory {
            return Err(PathError::NotADirectory.into());
        }
        return Ok(tree.put_root(meta)?);
    };
    let kind = match entry.kind {
        EntryKind::Directory => Kind::Directory(BTreeMap::new()),
        EntryKind::File => {
            Kind::File(data.append(body, entry.size_bytes, xattr_bytes(&meta.xattrs))?)
        }
        EntryKind::Symlink => symlink(entry, &meta)?,
        EntryKind::Fifo => Kind::Fifo,
        EntryKind::CharDevice => device(entry, Kind::CharDevice)?,
        EntryKind::BlockDevice => device(entry, Kind::BlockDevice)?,
        EntryKind::HardLink => return hard_link(entry, place, tree),
    };
    Ok(tree.put(place, Node::new(kind, meta))?)
}

/// Applies a whiteout of `hidden` beside `path`.
fn hide(path: &[u8], hidden: &[u8], tree: &mut Tree) -> Result<(), Cause> {
    let is_opaque = hidden == &OPAQUE[WHITEOUT.len()..];
    if !is_opaque && hidden.starts_with(&WHITEOUT_META[WHITEOUT.len()..]) {
        return Ok(());
    }
    let Some(place) = tree.find(path)? else { return Ok(()) };
    match hidden {
        _ if is_opaque => tree.make_opaque(place.directory),
        b"" | b"." | b".." => return Err(Cause::Whiteout { path: lossy(path) }),
        name => tree.white_out(Place { directory: place.directory, name }),
    }
    Ok(())
}

fn hard_link(entry: &Entry, place: Place<'_>, tree: &mut Tree) -> Result<(), Cause> {
    let target = tree.find(&entry.link)?.and_then(|place| tree.at(place));
    let Some(target) = target else {
        return Err(Cause::LinkTarget { path: lossy(&entry.path), target: lossy(&entry.link) });
    };
    Ok(tree.link(place, target)?)
}

fn symlink(entry: &Entry, meta: &Meta) -> Result<Kind, Cause> {
    // The target stands behind inode and attributes, in one block.
    if entry.link.len() + xattr_bytes(&meta.xattrs) > SYMLINK_BYTES_MAX {
        return Err(PathError::PathTooLong.into());
    }
    if entry.link.is_empty() {
        return Err(Cause::LinkTarget { path: lossy(&entry.path), target: String::new() });
    }
    Ok(Kind::Symlink(entry.link.as_slice().into()))
}

fn device(entry: &Entry, kind: fn(u32, u32) -> Kind) -> Result<Kind, Cause> {
    let (major, minor) = entry.device;
    if !device_fits(major, minor) {
        return Err(Cause::Device { path: lossy(&entry.path), major, minor });
    }
    Ok(kind(major, minor))
}

fn meta(entry: &Entry) -> Result<Meta, Cause> {
    const ANY_MODE: u16 = 0o777;
    let mut xattrs = Vec::with_capacity(entry.xattrs.len());
    for (name, value) in &entry.xattrs {
        if name.starts_with(b"trusted.overlay.") {
            continue;
        }
        match admit_xattr(name, value) {
            Ok(()) => {
                xattrs.push(Xattr { name: name.as_slice().into(), value: value.as_slice().into() })
            }
            Err(XattrError::UnknownPrefix) => {
                tracing::debug!(path = lossy(&entry.path), name = lossy(name), "xattr dropped");
            }
            Err(XattrError::ValueTooLong) => {
                return Err(Cause::Xattrs { path: lossy(&entry.path) });
            }
        }
    }
    xattrs.sort();
    if xattr_bytes(&xattrs) > XATTRS_BYTES_MAX {
        return Err(Cause::Xattrs { path: lossy(&entry.path) });
    }
    Ok(Meta {
        // Linux has no permissions on symbolic links.
        mode: if entry.kind == EntryKind::Symlink { ANY_MODE } else { entry.mode },
        uid: entry.uid,
        gid: entry.gid,
        mtime_s: entry.mtime_s,
        mtime_ns: entry.mtime_ns,
        xattrs: xattrs.into(),
    })
}

/// A name for people, with what is not UTF-8 replaced.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Counts the unpacked bytes of all layers and stops when they are too many, or nobody waits.
struct Meter<'a, R> {
    inner: R,
    bytes: &'a Cell<u64>,
    watch: &'a dyn Watch,
}

impl<R: Read> Read for Meter<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.watch.is_cancelled() {
            return Err(io::Error::other(Stop::Cancelled));
        }
        let read = self.inner.read(buffer)?;
        let left = self.bytes.get().checked_sub(read as u64);
        self.bytes.set(left.ok_or_else(|| io::Error::other(Stop::TooLarge))?);
        Ok(read)
    }
}

/// How a [`Meter`] ends a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
enum Stop {
    #[error("Cancelled")]
    Cancelled,
    #[error("Too many bytes")]
    TooLarge,
}

/// Why an image's layers could not be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// Nobody waits for it any more.
    #[error("Conversion was cancelled")]
    Cancelled,
    /// It has too many layers.
    #[error("Image has {layers} layers, more than {LAYERS_MAX}")]
    TooManyLayers {
        /// How many.
        layers: usize,
    },
    /// It is too large.
    #[error("Image is larger than {unpacked_bytes_max} bytes unpacked")]
    TooLarge {
        /// The limit.
        unpacked_bytes_max: u64,
    },
    /// One of the layers.
    #[error("Failed to apply layer {index}")]
    Layer {
        /// Which, from 0.
        index: usize,
        /// Why.
        #[source]
        source: Cause,
    },
}

/// What is wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// See [`MergeError::Cancelled`].
    #[error("Cancelled")]
    Cancelled,
    /// See [`MergeError::TooLarge`].
    #[error("Too many bytes")]
    TooLarge,
    /// It has too many entries.
    #[error("Image has more than {ENTRIES_MAX} entries in its layers")]
    TooManyEntries,
    /// It does not unpack to what the configuration says.
    #[error("Layer unpacks to {found}, {expected} expected")]
    DiffId {
        /// By the configuration.
        expected: Digest,
        /// Of the bytes.
        found: Digest,
    },
    /// A hard link to nothing, or a symbolic link without a target.
    #[error("Link {path:?} has no target {target:?}")]
    LinkTarget {
        /// The link.
        path: String,
        /// Its target.
        target: String,
    },
    /// A whiteout of a name that no file has.
    #[error("Whiteout {path:?} hides no possible name")]
    Whiteout {
        /// The entry.
        path: String,
    },
    /// A device that Linux cannot have.
    #[error("Device {path:?} has impossible numbers {major}:{minor}")]
    Device {
        /// The entry.
        path: String,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// Too much to say about a file.
    #[error("Extended attributes of {path:?} are longer than {XATTRS_BYTES_MAX} bytes")]
    Xattrs {
        /// The entry.
        path: String,
    },
    /// Its name, or where it leads.
    #[error("Refused entry {path:?}")]
    Entry {
        /// The entry.
        path: String,
        /// Why.
        #[source]
        source: PathError,
    },
    /// As above, before it is known which entry.
    #[error(transparent)]
    Path(#[from] PathError),
    /// The archive.
    #[error(transparent)]
    Tar(TarError),
    /// Reading or writing bodies.
    #[error(transparent)]
    Data(DataError),
    /// The blob.
    #[error("Failed to read layer")]
    Io(#[source] io::Error),
}

/// Finds the [`Stop`] of a [`Meter`] in what readers made of it.
fn stop(error: &io::Error) -> Option<Cause> {
    match error.get_ref()?.downcast_ref::<Stop>()? {
        Stop::Cancelled => Some(Cause::Cancelled),
        Stop::TooLarge => Some(Cause::TooLarge),
    }
}

impl From<io::Error> for Cause {
    fn from(error: io::Error) -> Self {
        stop(&error).unwrap_or(Self::Io(error))
    }
}

impl From<TarError> for Cause {
    fn from(error: TarError) -> Self {
        match error {
            TarError::Io(error) => error.into(),
            error => Self::Tar(error),
        }
    }
}

impl From<DataError> for Cause {
    fn from(error: DataError) -> Self {
        match error {
            DataError::Read(error) => stop(&error).unwrap_or(Self::Data(DataError::Read(error))),
            error => Self::Data(error),
        }
    }
}

#[cfg(test)]
mod tests;
