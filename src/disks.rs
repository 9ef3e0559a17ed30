//! An instance's writable overlay: a sparse ext4 file that costs a millisecond and few blocks.
//!
//! mkfs.ext4 runs once per size; its result stays in the data folder as a template. Each disk is a
//! sparse copy of it: a reflink where the file system can, else its few data extents. All disks of
//! one size therefore share their file system's UUID, which no two guests see together.

use std::ffi::OsStr;
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

use crate::os::tool::{MKFS_EXT4, ToolError};

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
        if !(SIZE_BYTES_MIN..=SIZE_BYTES_MAX).contains(&size_bytes) {
            let (min_bytes, max_bytes) = (SIZE_BYTES_MIN, SIZE_BYTES_MAX);
            return Err(DiskError::Size { size_bytes, min_bytes, max_bytes });
        }
        let size_bytes = size_bytes.next_multiple_of(SIZE_STEP_BYTES);
        let template = self.template(size_bytes)?;
        let file = create_new(&path).map_err(|source| DiskError::of(&path, source))?;
        let disk = Disk { file, path, kept: false };
        copy_sparsely(&template, &disk.file).map_err(|source| DiskError::of(&disk.path, source))?;
        Ok(disk)
    }

    /// Opens the disk at `path` again, for one more machine.
    ///
    /// A program that is just being started has a copy of every file for a moment, until it becomes
    /// that program, and with it the lock of the last machine. So it is asked for a few times.
    ///
    /// # Errors
    ///
    /// [`DiskError::InUse`] if a machine still has it: two would destroy it.
    pub async fn reopen(&self, path: &Path) -> Result<File, DiskError> {
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            let open = || {
                let file = File::options().read(true).write(true).open(path)?;
                flock(&file, FlockOperation::NonBlockingLockExclusive)?;
                Ok(file)
            };
            match open().map_err(|source| DiskError::of(path, source)) {
                Err(DiskError::InUse { .. }) if Instant::now() < deadline => {
                    time::sleep(LOCK_INTERVAL).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// The template of that size, made if it is the first of its kind.
    fn template(&self, size_bytes: u64) -> Result<File, DiskError> {
        let options = options(size_bytes);
        let key = Sha256::digest(format!("{size_bytes} {}", options.join(" ")));
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
        let mut arguments: Vec<&OsStr> = options.iter().map(OsStr::new).collect();
        arguments.push(file.path().as_os_str());
        // The host's configuration shall not change what guests get.
        MKFS_EXT4.run(&arguments, &[("MKE2FS_CONFIG", "/dev/null")], FORMAT_TIMEOUT)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))
    }
}

/// The command line of mkfs.ext4, without the file.
fn options(size_bytes: u64) -> Vec<String> {
    let journal_mib = if size_bytes < LARGE_BYTES { 4 } else { 16 };
    let journal = format!("size={journal_mib}");
    let words = [
        "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-J", &journal, "-O", FEATURES, "-E",
        LAYOUT,
    ];
    words.map(str::to_owned).to_vec()
}

/// The lock belongs to the open file: it lasts as long as a worker that was handed it.
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
        &self.path
    }

    /// Brings it to the host's disk, with its name and that of its folder: what is done with it
    /// meanwhile may or may not be part of it. To be done before anybody is told that it is there.
    ///
    /// # Errors
    ///
    /// [`DiskError`].
    pub async fn settle(&self) -> Result<(), DiskError> {
        let path = self.path.clone();
        let failed = |source| DiskError::of(&self.path, source);
        let file = self.file.try_clone().map_err(failed)?;
        let settling = spawn_blocking(move || {
            file.sync_all()?;
            path.ancestors().skip(1).take(2).try_for_each(|folder| File::open(folder)?.sync_all())
        });
        settling.await.expect("syncing a disk does not panic").map_err(failed)
    }

    /// Leaves the file in place for good.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Disk {
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
