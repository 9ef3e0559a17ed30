//! Writable disks: sparse ext4 files.
//!
//! An overlay costs a millisecond and few blocks: mkfs.ext4 runs once per size, its result stays in
//! the data folder as a template, and each overlay is a sparse copy of it: a reflink where the file
//! system can, else its few data extents. All overlays of one size therefore share their file
//! system's UUID, by which nobody mounts them. A volume outlives instances and may be told by its
//! UUID: it is formatted by itself, with content if there is some.
//!
//! A disk that is open is locked: for one machine, or for any number that only read. The lock
//! belongs to the open file and so lasts as long as a worker that was handed it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, SeekFrom, flock, ioctl_ficlone, seek};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use tokio::task::spawn_blocking;
use tokio::time;

use crate::os::tool::{E2FSCK, MKFS_EXT4, ToolError};

/// Smallest disk: below, the journal would be most of it.
pub const SIZE_BYTES_MIN: u64 = 32 << 20;

/// Largest disk: below what any file system we may be on gives a file.
pub const SIZE_BYTES_MAX: u64 = 8 << 40;

/// Sizes are multiples of this, so that there are few templates.
const SIZE_STEP_BYTES: u64 = 1 << 20;

/// From this size on the journal has its full length.
const LARGE_BYTES: u64 = 1 << 30;

/// How long formatting may take; it takes milliseconds.
const FORMAT_TIMEOUT: Duration = Duration::from_secs(60);

/// How long it may take to format a disk with content, which is written on the way.
const FILL_TIMEOUT: Duration = Duration::from_secs(3600);

/// How long it may take to finish what a journal holds.
const REPLAY_TIMEOUT: Duration = Duration::from_secs(60);

/// Bytes of disk for which mkfs.ext4 makes one inode by itself.
const INODE_BYTES: u64 = 16 << 10;

/// Where ext4's magic number and incompatible features are (Documentation/filesystems/ext4 of the
/// kernel, "Super Block"), and the feature that says that the journal is not empty.
const MAGIC_AT: u64 = 1024 + 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];
const FEATURES_AT: u64 = 1024 + 0x60;
const NEEDS_RECOVERY: u8 = 0x4;

/// Features: what a current kernel makes best use of, and nothing that costs blocks up front (no
/// room to resize, no backup superblocks).
const FEATURES: &str = "has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super2,\
                        large_file,huge_file,dir_nlink,extra_isize,metadata_csum,^resize_inode";

/// Metadata in one place, so that there are few extents to copy; nothing zeroed, for a sparse file
/// is zeros, which mkfs.ext4 notes so that the guest's kernel does not zero it either.
const LAYOUT: &str =
    "lazy_itable_init=1,lazy_journal_init=1,packed_meta_blocks=1,num_backup_sb=0,root_owner=0:0";

/// How long a lock may be held by who is about to let go of it, and how often that is looked at.
const LOCK_TIMEOUT: Duration = Duration::from_millis(200);
const LOCK_INTERVAL: Duration = Duration::from_millis(2);

/// Bytes copied at once: a template's data fits.
const COPY_BYTES: usize = 64 << 10;

/// Readable and writable by the server only.
const MODE: u32 = 0o600;

/// The maker of overlay disks. Clones share the templates.
#[derive(Debug, Clone)]
pub struct Disks {
    templates: PathBuf,
}

impl Disks {
    /// Uses the folder `dir` (made if missing) for templates; removes what a killed server left.
    ///
    /// # Errors
    ///
    /// [`DiskError::Io`].
    pub fn open(dir: &Path) -> Result<Self, DiskError> {
        let failed = |source| DiskError::Io { path: dir.to_owned(), source };
        fs::create_dir_all(dir).map_err(failed)?;
        for entry in fs::read_dir(dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension() != Some(OsStr::new("ext4")) {
                fs::remove_file(&path).map_err(failed)?;
            }
        }
        Ok(Self { templates: dir.to_owned() })
    }

    /// Makes a disk of `size_bytes` (rounded up to 1 MiB) at `path`, which must not exist.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; nothing is left at `path`.
    pub async fn create(&self, path: &Path, size_bytes: u64) -> Result<Disk, DiskError> {
        let (disks, path) = (self.clone(), path.to_owned());
        let making = spawn_blocking(move || disks.create_now(path, size_bytes));
        making.await.expect("making a disk does not panic")
    }

    fn create_now(&self, path: PathBuf, size_bytes: u64) -> Result<Disk, DiskError> {
        let size_bytes = checked_size(size_bytes)?;
        let template = self.template(size_bytes)?;
        let file = create_new(&path).map_err(|source| DiskError::of(&path, source))?;
        let disk = Disk { file, place: Place { path, kept: false } };
        copy_sparsely(&template, &disk.file)
            .map_err(|source| DiskError::of(disk.path(), source))?;
        Ok(disk)
    }

    /// Makes a disk of `size_bytes` (rounded up to 1 MiB) at `path`, which must not exist, with a
    /// file system that no other disk has. Blocks while the content is written.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; nothing is left at `path`.
    pub fn format(
        path: PathBuf,
        size_bytes: u64,
        content: Option<&Content>,
    ) -> Result<Disk, DiskError> {
        let size_bytes = checked_size(size_bytes)?;
        let file = create_new(&path).map_err(|source| DiskError::of(&path, source))?;
        let disk = Disk { file, place: Place { path, kept: false } };
        let failed = |source| DiskError::of(disk.path(), source);
        disk.file.set_len(size_bytes).map_err(failed)?;
        let mut words = options(size_bytes);
        let mut timeout = FORMAT_TIMEOUT;
        if let Some(Content { folder, files }) = content {
            // A quarter more than there are, for what a guest adds.
            let inodes = (size_bytes / INODE_BYTES).max(files.saturating_add(files / 4));
            words.extend(["-N".into(), inodes.to_string().into(), "-d".into()]);
            words.push(folder.clone().into());
            timeout = FILL_TIMEOUT;
        }
        mkfs(words, disk.path(), timeout)?;
        disk.file.sync_all().map_err(failed)?;
        Ok(disk)
    }

    /// Opens the disk at `path` for reading, beside others who do. What its last writer had begun
    /// is finished first: who mounts it cannot.
    ///
    /// # Errors
    ///
    /// [`DiskError::InUse`] if a machine may write to it.
    pub async fn open_to_read(path: &Path) -> Result<File, DiskError> {
        patiently(path, open_whole).await
    }

    /// Opens the disk at `path` again, for one more machine.
    ///
    /// # Errors
    ///
    /// [`DiskError::InUse`] if a machine still has it: two would destroy it.
    pub async fn reopen(path: &Path) -> Result<File, DiskError> {
        let open = |path: &Path| {
            let file = File::options().read(true).write(true).open(path)?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok(file)
        };
        patiently(path, move |path| open(path).map_err(|source| DiskError::of(path, source))).await
    }

    /// The template of that size, made if it is the first of its kind.
    fn template(&self, size_bytes: u64) -> Result<File, DiskError> {
        let options = options(size_bytes);
        let key =
            Sha256::digest(format!("{size_bytes} {}", options.join(OsStr::new(" ")).display()));
        let path = self.templates.join(format!("{}.ext4", hex::encode(&key[..8])));
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => return result.map_err(|source| DiskError::of(&path, source)),
        }
        let failed = |source| DiskError::of(&path, source);
        // Two who make the same template rename the same bytes over each other.
        let file = tempfile::Builder::new().suffix(".new").tempfile_in(&self.templates);
        let file = file.map_err(failed)?;
        file.as_file().set_len(size_bytes).map_err(failed)?;
        mkfs(options, file.path(), FORMAT_TIMEOUT)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))
    }
}

/// Files for a new disk.
#[derive(Debug)]
pub struct Content {
    /// The folder whose content it is.
    pub folder: PathBuf,
    /// Files, directories and links in it.
    pub files: u64,
}

/// Opens a disk by `open`, a few times if another has it: a program that is just being started has
/// a copy of every file for a moment, until it becomes that program, and with it the lock of the
/// last machine.
async fn patiently(
    path: &Path,
    open: impl Fn(&Path) -> Result<File, DiskError> + Copy + Send + 'static,
) -> Result<File, DiskError> {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        let path = path.to_owned();
        let opening = spawn_blocking(move || open(&path));
        match opening.await.expect("opening a disk does not panic") {
            Err(DiskError::InUse { .. }) if Instant::now() < deadline => {
                time::sleep(LOCK_INTERVAL).await;
            }
            outcome => return outcome,
        }
    }
}

/// Opens a disk for reading, with nothing left in its journal.
fn open_whole(path: &Path) -> Result<File, DiskError> {
    let failed = |source| DiskError::of(path, source);
    let file = File::open(path).map_err(failed)?;
    let is_alone = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
    if is_alone && needs_recovery(&file).map_err(failed)? {
        let words: [&OsStr; 4] =
            ["-p".as_ref(), "-E".as_ref(), "journal_only".as_ref(), path.as_os_str()];
        E2FSCK.run(&words, &[], REPLAY_TIMEOUT)?;
    }
    flock(&file, FlockOperation::NonBlockingLockShared).map_err(|errno| failed(errno.into()))?;
    if needs_recovery(&file).map_err(failed)? {
        // Its last writer let go of it only just now.
        return Err(failed(Errno::WOULDBLOCK.into()));
    }
    Ok(file)
}

fn checked_size(size_bytes: u64) -> Result<u64, DiskError> {
    if !(SIZE_BYTES_MIN..=SIZE_BYTES_MAX).contains(&size_bytes) {
        let (min_bytes, max_bytes) = (SIZE_BYTES_MIN, SIZE_BYTES_MAX);
        return Err(DiskError::Size { size_bytes, min_bytes, max_bytes });
    }
    Ok(size_bytes.next_multiple_of(SIZE_STEP_BYTES))
}

/// Formats the file at `path`. The host's configuration shall not change what guests get.
fn mkfs(options: Vec<OsString>, path: &Path, timeout: Duration) -> Result<(), ToolError> {
    let mut arguments = options;
    arguments.push(path.as_os_str().to_owned());
    let arguments: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
    MKFS_EXT4.run(&arguments, &[("MKE2FS_CONFIG", "/dev/null")], timeout).map(drop)
}

/// Whether the journal holds what has not arrived at its place.
fn needs_recovery(disk: &File) -> io::Result<bool> {
    let (mut magic, mut features) = ([0; 2], [0; 1]);
    disk.read_exact_at(&mut magic, MAGIC_AT)?;
    disk.read_exact_at(&mut features, FEATURES_AT)?;
    Ok(magic == MAGIC && features[0] & NEEDS_RECOVERY != 0)
}

/// The command line of mkfs.ext4, without the file.
fn options(size_bytes: u64) -> Vec<OsString> {
    let journal_mib = if size_bytes < LARGE_BYTES { 4 } else { 16 };
    let journal = format!("size={journal_mib}");
    let words = [
        "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-J", &journal, "-O", FEATURES, "-E",
        LAYOUT,
    ];
    words.map(OsString::from).to_vec()
}

fn create_new(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).mode(MODE).open(path)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// Makes `to`, which is empty, equal to `from`, taking only the blocks that `from` takes.
fn copy_sparsely(from: &File, to: &File) -> io::Result<()> {
    match ioctl_ficlone(to, from) {
        Ok(()) => return Ok(()),
        // No reflinks here.
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY) => {}
        Err(errno) => return Err(errno.into()),
    }
    to.set_len(from.metadata()?.len())?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut offset = 0;
    loop {
        let start = match seek(from, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // No data behind the last hole.
            Err(Errno::NXIO) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        let end = seek(from, SeekFrom::Hole(start))?;
        let mut at = start;
        while at < end {
            let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
            let chunk = &mut buffer[..wanted];
            from.read_exact_at(chunk, at)?;
            to.write_all_at(chunk, at)?;
            at += wanted as u64;
        }
        offset = end;
    }
}

/// A disk just made, open. Dropped, its file is removed, unless it was kept.
#[derive(Debug)]
pub struct Disk {
    file: File,
    place: Place,
}

#[derive(Debug)]
struct Place {
    path: PathBuf,
    kept: bool,
}

impl Disk {
    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.place.path
    }

    /// Leaves the file in place for good.
    pub fn keep(mut self) -> File {
        self.place.kept = true;
        self.file
    }
}

/// Waits until the disk at `path` and its place in two folders above it are on the host's disk.
///
/// # Errors
///
/// [`DiskError`].
pub async fn settle(file: &File, path: &Path) -> Result<(), DiskError> {
    let path = path.to_owned();
    let failed = |source| DiskError::of(&path, source);
    let file = file.try_clone().map_err(failed)?;
    let folders: Vec<PathBuf> = path.ancestors().skip(1).take(2).map(Path::to_owned).collect();
    let settling = spawn_blocking(move || {
        file.sync_all()?;
        folders.iter().try_for_each(|folder| File::open(folder)?.sync_all())
    });
    settling.await.expect("syncing a disk does not panic").map_err(failed)
}

impl Drop for Place {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "disk could not be removed");
        }
    }
}

/// Why a disk could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The size is outside of what ext4 and this host serve.
    #[error("Disk of {size_bytes} bytes: {min_bytes} to {max_bytes} expected")]
    Size {
        /// As asked for.
        size_bytes: u64,
        /// Least.
        min_bytes: u64,
        /// Most.
        max_bytes: u64,
    },
    /// The file system has no room.
    #[error("No space left for disk {path}", path = path.display())]
    NoSpace {
        /// Which disk.
        path: PathBuf,
    },
    /// Another machine has it.
    #[error("Disk {path} is in use by another machine", path = path.display())]
    InUse {
        /// Which disk.
        path: PathBuf,
    },
    /// A file or folder.
    #[error("Failed to use disk {path}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Formatting.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

impl DiskError {
    fn of(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace { path },
            io::ErrorKind::WouldBlock => Self::InUse { path },
            _ => Self::Io { path, source },
        }
    }
}

#[cfg(test)]
mod tests;
