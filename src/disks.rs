//! An instance's writable overlay: a sparse ext4 file that costs milliseconds and few bytes.
//!
//! mkfs.ext4 runs once per size; its result stays in the data folder as a template. Each disk is a
//! sparse copy of it: a reflink where the file system can, else its few data extents.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The maker of overlay disks. Clones share the templates.
#[derive(Debug, Clone)]
pub struct Disks {}

/// A disk just made, open. Dropped, its file is removed, unless it was kept.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
}

#[expect(clippy::todo, reason = "signatures first, so that callers can be written meanwhile")]
impl Disks {
    /// Uses `dir` (made if missing) for templates; removes what a killed server left there.
    ///
    /// # Errors
    ///
    /// [`DiskError::Io`].
    pub fn open(dir: &Path) -> Result<Self, DiskError> {
        todo!()
    }

    /// Makes a disk of `size_bytes` (rounded up to 1 MiB) at `path`, which must not exist.
    ///
    /// # Errors
    ///
    /// [`DiskError`]; nothing is left at `path`.
    pub async fn create(&self, path: &Path, size_bytes: u64) -> Result<Disk, DiskError> {
        todo!()
    }
}

#[expect(clippy::todo, reason = "signatures first, so that callers can be written meanwhile")]
impl Disk {
    /// The file, open for reading and writing.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves the file in place for good.
    pub fn keep(self) -> File {
        todo!()
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
    /// A file or folder.
    #[error("Failed to make disk {path}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
