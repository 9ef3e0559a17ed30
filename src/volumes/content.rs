//! The files of an archive, put in a folder of ours to become those of a new volume.
//!
//! An archive is a stream that an enemy may have made, and we may be root. So nothing is ever
//! reached by a path: each directory is opened inside of the one above it, no link is followed, and
//! every name is made anew. What leads out of the volume, or is no business of one, is refused:
//! absolute names, `..`, links that climb, names below links, devices.
//!
//! Files, names and what they cost as file system are counted against the size of the volume as
//! they come, so that an archive which unpacks to more than that ends there.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::mem;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags, chmodat,
    chownat, fchmod, fchown, fsetxattr, fstat, linkat, mkdirat, mkfifoat, open, openat, openat2,
    symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::os::room::{Room, RoomError};
use crate::tar::packed::unpack;
use crate::tar::{Entry, EntryKind, TarError, TarReader};

/// What an entry costs beside its content: an inode, its place in a directory.
const ENTRY_BYTES: u64 = 4 << 10;

/// Bytes of content are counted in blocks of the file system.
const BLOCK_BYTES: u64 = 4 << 10;

/// Most directories above each other: what mkfs.ext4 walks through by recursion.
const DEPTH_MAX: usize = 128;

/// Longest name of a file (Linux NAME_MAX).
const NAME_BYTES_MAX: usize = 255;

/// Most entries of an archive.
const FILES_MAX: u64 = 1_000_000;

/// Most bytes of names in one directory, as ext4 keeps them: some 16,000 of usual length.
/// mkfs.ext4 looks through the whole directory for each: 4,000 took it 3 to 6 s, and 16,000 a
/// minute and a half.
const FOLDER_BYTES_MAX: u64 = 512 << 10;

/// What the name of an entry takes beside itself (Documentation/filesystems/ext4 of the kernel,
/// "Linear (Classic) Directories"), and what all of it is a multiple of.
const NAME_OVERHEAD_BYTES: usize = 8;
const NAME_STEP_BYTES: usize = 4;

/// Most bytes of names of directories that are held until the end.
const DIRECTORY_BYTES_MAX: usize = 64 << 20;

/// Longest path (Linux PATH_MAX, less its NUL).
const PATH_BYTES_MAX: usize = 4095;

/// Bytes copied at once.
const COPY_BYTES: usize = 256 << 10;

/// Between two looks at how much space is left.
const ROOM_STEP_BYTES: u64 = 64 << 20;

/// Mode of directories that no entry describes.
const DIRECTORY_MODE: Mode = Mode::from_raw_mode(0o755);

/// Attributes that are kept; others mean nothing on a volume or act on the host.
const XATTRS_KEPT: [&[u8]; 2] = [b"user.", b"security.capability"];

/// What was unpacked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Measure {
    /// Files, directories and links.
    pub(super) files: u64,
    /// What they take, as a file system.
    pub(super) bytes: u64,
}

/// Bounds of an unpacking.
pub(super) struct Bounds<'a> {
    /// Most [`Measure::bytes`].
    pub(super) bytes_max: u64,
    /// Where the files go.
    pub(super) room: &'a Room,
    /// Whether nobody waits for it any more.
    pub(super) is_abandoned: &'a dyn Fn() -> bool,
}

/// Why an archive is no volume.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Its bytes are no archive.
    #[error("The body is no tar archive")]
    NotAnArchive,
    /// It is malformed, or ended early.
    #[error(transparent)]
    Tar(TarError),
    /// It ended early, or its compression is broken.
    #[error("Failed to read the archive")]
    Read(#[source] io::Error),
    /// It has what no volume may have.
    #[error("Refused entry {path:?}: {why}")]
    Refused {
        /// Which.
        path: String,
        /// Why.
        why: &'static str,
    },
    /// More than the volume may have.
    #[error("What is in the archive takes over {bytes_max} bytes")]
    TooLarge {
        /// The limit.
        bytes_max: u64,
    },
    /// Nobody waits for it.
    #[error("The client went away")]
    Abandoned,
    /// The host's disk is full.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The host cannot keep such a file.
    #[error("Failed to unpack {path:?}")]
    Write {
        /// Which.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Unpacks `packed` (tar: plain, gzip or zstd) into the folder `into`, which is empty.
///
/// # Errors
///
/// [`ContentError`]; what was unpacked is left for the caller to remove.
pub(super) fn unpack_into(
    packed: impl BufRead,
    into: &Path,
    bounds: &Bounds<'_>,
) -> Result<Measure, ContentError> {
    let plain = unpack(packed).map_err(ContentError::Read)?;
    // What is read has to end too: headers that describe nothing, zeros behind the end.
    let stream_bytes_max = bounds.bytes_max.saturating_mul(2);
    let mut tar =
        TarReader::new(BufReader::with_capacity(COPY_BYTES, plain.take(stream_bytes_max)));
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(into, flags, Mode::empty()).map_err(|errno| write_error(&[], errno))?;
    let mut unpacking = Unpacking {
        bounds,
        root,
        measure: Measure::default(),
        unchecked_bytes: ROOM_STEP_BYTES,
        directories: BTreeMap::new(),
        directory_bytes: 0,
        folder_bytes: HashMap::new(),
        buffer: vec![0; COPY_BYTES],
    };
    let outcome = unpacking.entries(&mut tar).and_then(|()| tar.drain().map_err(read_error));
    if tar.into_inner().into_inner().limit() == 0 {
        return Err(ContentError::TooLarge { bytes_max: bounds.bytes_max });
    }
    outcome?;
    if unpacking.measure.files == 0 {
        return Err(ContentError::NotAnArchive);
    }
    unpacking.finish_directories()?;
    Ok(unpacking.measure)
}

struct Unpacking<'a> {
    bounds: &'a Bounds<'a>,
    root: OwnedFd,
    measure: Measure,
    /// Written since the last look at the space left.
    unchecked_bytes: u64,
    /// Directories that the archive describes: done last, for they must be written to before.
    directories: BTreeMap<Vec<u8>, Entry>,
    directory_bytes: usize,
    /// What the names in each directory take, by its inode.
    folder_bytes: HashMap<u64, u64>,
    buffer: Vec<u8>,
}

impl Unpacking<'_> {
    fn entries(&mut self, tar: &mut TarReader<impl Read>) -> Result<(), ContentError> {
        while let Some(entry) = tar.next_entry().map_err(tar_error)? {
            self.count(ENTRY_BYTES)?;
            self.measure.files += 1;
            if self.measure.files > FILES_MAX {
                return Err(refused(&entry.path, "the archive has over a million entries"));
            }
            self.entry(entry, tar)?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry, body: &mut impl Read) -> Result<(), ContentError> {
        let names = names(&entry.path, &entry.path)?;
        let Some((name, above)) = names.split_last() else {
            if entry.kind != EntryKind::Directory {
                return Err(refused(&entry.path, "only a directory can be the volume's root"));
            }
            return self.describe(Vec::new(), entry);
        };
        let (path, parent) = (entry.path.clone(), self.directory(above, &entry.path)?);
        let failed = |errno| write_error(&path, errno);
        if entry.kind == EntryKind::Directory {
            match mkdirat(&parent, *name, DIRECTORY_MODE) {
                Ok(()) => self.name(&parent, name, &path)?,
                // Whatever is there, if it is a directory it stays.
                Err(Errno::EXIST) => drop(self.directory(&names, &path)?),
                Err(errno) => return Err(failed(errno)),
            }
            return self.describe(names.join(&b'/'), entry);
        }
        match unlinkat(&parent, *name, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::NOENT) => self.name(&parent, name, &path)?,
            Err(Errno::ISDIR) => return Err(refused(&path, "a directory is there already")),
            Err(errno) => return Err(failed(errno)),
        }
        match entry.kind {
            EntryKind::File => return self.file(&entry, (&parent, name), body),
            EntryKind::Symlink => {
                check_target(&entry, above.len())?;
                symlinkat(entry.link.as_slice(), &parent, *name).map_err(failed)?;
            }
            EntryKind::HardLink => {
                return self.hard_link(&entry, (&parent, name));
            }
            EntryKind::Fifo => {
                let mode = Mode::from_raw_mode(entry.mode.into());
                mkfifoat(&parent, *name, mode).map_err(failed)?;
                chmodat(&parent, *name, mode, AtFlags::empty()).map_err(failed)?;
            }
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                return Err(refused(&path, "a volume has no devices"));
            }
            EntryKind::Directory => {}
        }
        own(&parent, name, &entry).and_then(|()| date(&parent, name, &entry)).map_err(failed)
    }

    fn file(
        &mut self,
        entry: &Entry,
        (parent, name): (&OwnedFd, &[u8]),
        body: &mut impl Read,
    ) -> Result<(), ContentError> {
        let failed = |errno| write_error(&entry.path, errno);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o600);
        let file = openat(parent, name, flags | OFlags::CLOEXEC, mode).map_err(failed)?;
        let mut file = File::from(file);
        self.count(entry.size_bytes.checked_next_multiple_of(BLOCK_BYTES).unwrap_or(u64::MAX))?;
        loop {
            if (self.bounds.is_abandoned)() {
                return Err(ContentError::Abandoned);
            }
            let read = body.read(&mut self.buffer).map_err(read_error)?;
            if read == 0 {
                break;
            }
            let written = file.write_all(&self.buffer[..read]);
            written.map_err(|source| ContentError::Write { path: lossy(&entry.path), source })?;
        }
        for (name, value) in entry.xattrs.iter().filter(|(name, _)| is_kept(name)) {
            fsetxattr(&file, name.as_slice(), value, XattrFlags::empty()).map_err(failed)?;
        }
        // The owner first: changing it takes setuid and setgid away.
        let (uid, gid) = owner(entry);
        fchown(&file, uid, gid).map_err(failed)?;
        fchmod(&file, Mode::from_raw_mode(entry.mode.into())).map_err(failed)?;
        date(parent, name, entry).map_err(failed)
    }

    fn hard_link(
        &mut self,
        entry: &Entry,
        (parent, name): (&OwnedFd, &[u8]),
    ) -> Result<(), ContentError> {
        let target = names(&entry.link, &entry.path)?;
        let missing =
            || refused(&entry.path, "a hard link to what is not in the archive before it");
        let (target_name, above) = target.split_last().ok_or_else(missing)?;
        let folder = self.existing(above).map_err(|_| missing())?;
        match linkat(&folder, *target_name, parent, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            Err(Errno::NOENT) => Err(missing()),
            Err(Errno::PERM) => Err(refused(&entry.path, "a hard link to a directory")),
            Err(errno) => Err(write_error(&entry.path, errno)),
        }
    }

    /// The directory that `names` lead to, made as far as it is missing.
    fn directory(&mut self, names: &[&[u8]], path: &[u8]) -> Result<OwnedFd, ContentError> {
        match self.existing(names) {
            Err(Errno::NOENT) => {}
            Ok(found) => return Ok(found),
            Err(errno) => return Err(no_directory(path, errno)),
        }
        let mut at = self.existing(&[]).map_err(|errno| write_error(path, errno))?;
        for name in names {
            match mkdirat(&at, *name, DIRECTORY_MODE) {
                Ok(()) => {
                    self.count(ENTRY_BYTES)?;
                    self.name(&at, name, path)?;
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(write_error(path, errno)),
            }
            let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            at = openat(&at, *name, flags, Mode::empty())
                .map_err(|errno| no_directory(path, errno))?;
        }
        Ok(at)
    }

    /// The directory that `names` lead to, none of them a link.
    fn existing(&self, names: &[&[u8]]) -> Result<OwnedFd, Errno> {
        let path = if names.is_empty() { b".".to_vec() } else { names.join(&b'/') };
        let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        openat2(&self.root, path.as_slice(), flags, Mode::empty(), inside)
    }

    /// Gives directories what the archive says of them, the deepest first.
    fn finish_directories(&mut self) -> Result<(), ContentError> {
        for (path, entry) in mem::take(&mut self.directories).iter().rev() {
            let path: &[u8] = if path.is_empty() { b"." } else { path };
            let failed = |errno| write_error(path, errno);
            own(&self.root, path, entry).map_err(failed)?;
            let mode = Mode::from_raw_mode(entry.mode.into());
            chmodat(&self.root, path, mode, AtFlags::empty()).map_err(failed)?;
            date(&self.root, path, entry).map_err(failed)?;
        }
        Ok(())
    }

    /// Keeps what is said of a directory; of several times the last counts.
    fn describe(&mut self, path: Vec<u8>, entry: Entry) -> Result<(), ContentError> {
        self.directory_bytes += path.len() + entry.path.len();
        if self.directory_bytes > DIRECTORY_BYTES_MAX {
            return Err(refused(
                &entry.path,
                "the names of directories are too long, all together",
            ));
        }
        self.directories.insert(path, Entry { xattrs: Vec::new(), ..entry });
        Ok(())
    }

    /// Counts the name of a new entry at `path` against what the directory it is in may have.
    fn name(&mut self, folder: &OwnedFd, name: &[u8], path: &[u8]) -> Result<(), ContentError> {
        let inode = fstat(folder).map_err(|errno| write_error(path, errno))?.st_ino;
        let bytes = (NAME_OVERHEAD_BYTES + name.len()).next_multiple_of(NAME_STEP_BYTES);
        let names_bytes = self.folder_bytes.entry(inode).or_default();
        *names_bytes += bytes as u64;
        if *names_bytes > FOLDER_BYTES_MAX {
            let why = "its directory has over 512 KiB of names: divide that into several";
            return Err(refused(path, why));
        }
        Ok(())
    }

    /// Counts what becomes of `bytes` on the volume, and looks whether the host has room for them.
    fn count(&mut self, bytes: u64) -> Result<(), ContentError> {
        self.measure.bytes = self.measure.bytes.saturating_add(bytes);
        let bytes_max = self.bounds.bytes_max;
        if self.measure.bytes > bytes_max {
            return Err(ContentError::TooLarge { bytes_max });
        }
        self.unchecked_bytes = self.unchecked_bytes.saturating_add(bytes);
        if self.unchecked_bytes >= ROOM_STEP_BYTES {
            self.bounds.room.claim(bytes.max(ROOM_STEP_BYTES))?;
            self.unchecked_bytes = 0;
        }
        Ok(())
    }
}

/// The names in a path of the archive, cleaned of `.` and of slashes that say nothing.
fn names<'a>(text: &'a [u8], path: &[u8]) -> Result<Vec<&'a [u8]>, ContentError> {
    if text.first() == Some(&b'/') {
        return Err(refused(path, "its path is absolute"));
    }
    if text.len() > PATH_BYTES_MAX {
        return Err(refused(path, "its path is too long"));
    }
    let names: Vec<&[u8]> =
        text.split(|&byte| byte == b'/').filter(|name| !matches!(*name, [] | [b'.'])).collect();
    if names.contains(&b"..".as_slice()) {
        return Err(refused(path, "its path has a `..` in it"));
    }
    if names.iter().any(|name| name.len() > NAME_BYTES_MAX) {
        return Err(refused(path, "a name is too long"));
    }
    if names.len() > DEPTH_MAX {
        return Err(refused(path, "it lies below too many directories"));
    }
    Ok(names)
}

/// A symbolic link climbs at most to the volume's root, and does so first: behind a name `..` would
/// mean whatever that leads to.
fn check_target(entry: &Entry, depth: usize) -> Result<(), ContentError> {
    let target = entry.link.as_slice();
    if target.first() == Some(&b'/') || target.is_empty() || target.len() > PATH_BYTES_MAX {
        return Err(refused(&entry.path, "its target is absolute, empty or too long"));
    }
    let mut names =
        target.split(|&byte| byte == b'/').filter(|name| !matches!(*name, [] | [b'.'])).peekable();
    let mut climbs = 0;
    while names.next_if(|name| *name == b"..").is_some() {
        climbs += 1;
    }
    if climbs > depth || names.any(|name| name == b"..") {
        return Err(refused(&entry.path, "its target leads out of the volume"));
    }
    Ok(())
}

fn is_kept(xattr: &[u8]) -> bool {
    XATTRS_KEPT.iter().any(|kept| xattr.starts_with(kept))
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    // The largest number means `as it is` to the kernel.
    let is_id = |id: &u32| *id != u32::MAX;
    (
        Some(entry.uid).filter(is_id).map(Uid::from_raw),
        Some(entry.gid).filter(is_id).map(Gid::from_raw),
    )
}

fn own(parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), Errno> {
    let (uid, gid) = owner(entry);
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
}

fn date(parent: &OwnedFd, name: &[u8], entry: &Entry) -> Result<(), Errno> {
    let time = Timespec { tv_sec: entry.mtime_s, tv_nsec: entry.mtime_ns.into() };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(parent, name, &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn refused(path: &[u8], why: &'static str) -> ContentError {
    ContentError::Refused { path: lossy(path), why }
}

fn no_directory(path: &[u8], errno: Errno) -> ContentError {
    match errno {
        Errno::NOTDIR | Errno::LOOP | Errno::XDEV => {
            refused(path, "a directory above it is a file or a link")
        }
        errno => write_error(path, errno),
    }
}

fn write_error(path: &[u8], errno: Errno) -> ContentError {
    ContentError::Write { path: lossy(path), source: errno.into() }
}

fn read_error(error: io::Error) -> ContentError {
    ContentError::Read(error)
}

fn tar_error(error: TarError) -> ContentError {
    match error {
        TarError::Io(error) => ContentError::Read(error),
        error => ContentError::Tar(error),
    }
}

/// The beginning of a name, for people, with what is not UTF-8 replaced.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(NAME_BYTES_MAX)]).into_owned()
}

#[cfg(test)]
mod tests;
