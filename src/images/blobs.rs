//! Content on this host, named by its digest: manifests, configurations, layers.
//!
//! A blob appears in `blobs/sha256/<hex>` by rename, after its bytes were digested, counted and
//! synced; what has a name there is whole and right. Temporary files live in `tmp` and belong to
//! nobody after a restart.
//!
//! A sweep removes blobs that no image refers to. Who stores blobs before there is an image that
//! could refer to them holds a [`Lease`] on them meanwhile.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::images::digest::Digest;
use crate::images::manifest::Descriptor;
use crate::images::room::{Room, RoomError};

/// The blob store of one data folder. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Blobs {
    dir: PathBuf,
    tmp: PathBuf,
    room: Room,
    leases: Arc<Mutex<Leases>>,
}

/// Who holds what. Locked while blobs get their name under a lease, and during a sweep.
#[derive(Debug, Default)]
struct Leases {
    seen: u64,
    held: HashMap<u64, HashSet<Digest>>,
}

impl Blobs {
    /// Opens the store in `data_dir`, making its folders. Temporary files of the past are removed.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(data_dir: &Path, room: Room) -> io::Result<Self> {
        let blobs = Self {
            dir: data_dir.join("blobs/sha256"),
            tmp: data_dir.join("tmp"),
            room,
            leases: Arc::default(),
        };
        fs::create_dir_all(&blobs.dir)?;
        match fs::remove_dir_all(&blobs.tmp) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => fs::create_dir(&blobs.tmp)?,
        }
        Ok(blobs)
    }

    /// The folder for files in the making, on the same file system as all else.
    pub fn tmp(&self) -> &Path {
        &self.tmp
    }

    /// The free space of that file system.
    pub fn room(&self) -> &Room {
        &self.room
    }

    /// A lease on no blobs yet.
    pub fn lease(&self) -> Lease {
        let mut leases = lock(&self.leases);
        leases.seen += 1;
        let id = leases.seen;
        leases.held.insert(id, HashSet::new());
        Lease { leases: Arc::clone(&self.leases), id }
    }

    /// Whether the blob is here.
    pub fn has(&self, blob: &Descriptor) -> bool {
        fs::metadata(self.path(&blob.digest)).is_ok_and(|stat| stat.len() == blob.size_bytes)
    }

    /// Opens a blob.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] and others.
    pub fn read(&self, digest: &Digest) -> io::Result<File> {
        File::open(self.path(digest))
    }

    /// Begins a blob whose digest and size are promised.
    ///
    /// # Errors
    ///
    /// [`BlobError::Room`] if it does not fit, [`BlobError::Io`].
    pub fn write(&self, blob: &Descriptor) -> Result<BlobWriter, BlobError> {
        self.room.claim(blob.size_bytes)?;
        let file = tempfile::Builder::new().prefix("blob-").tempfile_in(&self.tmp)?;
        Ok(BlobWriter {
            file,
            path: self.path(&blob.digest),
            hasher: Sha256::new(),
            written_bytes: 0,
            promised: blob.clone(),
        })
    }

    /// Begins a blob whose digest is whatever its bytes have.
    ///
    /// # Errors
    ///
    /// [`BlobError::Io`].
    pub fn write_unknown(&self) -> Result<UnknownBlobWriter, BlobError> {
        let file = tempfile::Builder::new().prefix("blob-").tempfile_in(&self.tmp)?;
        Ok(UnknownBlobWriter {
            file,
            blobs: self.clone(),
            hasher: Sha256::new(),
            written_bytes: 0,
            claimed_bytes: 0,
        })
    }

    /// Stores a small blob, under `lease`.
    ///
    /// # Errors
    ///
    /// As [`Blobs::write`].
    pub fn put(&self, content: &[u8], lease: &Lease) -> Result<Digest, BlobError> {
        let mut writer = self.write_unknown()?;
        writer.push(content)?;
        Ok(writer.finish(lease)?.0)
    }

    /// Removes all blobs but those to keep and those under a lease. Returns how many were removed.
    ///
    /// # Errors
    ///
    /// Those of the file system; some blobs may be removed already.
    pub fn sweep(&self, keep: &HashSet<Digest>) -> io::Result<usize> {
        let leases = lock(&self.leases);
        let is_kept = |digest: &Digest| {
            keep.contains(digest) || leases.held.values().any(|held| held.contains(digest))
        };
        let mut removed = 0;
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|name| Digest::from_hex(name).ok());
            if digest.as_ref().is_some_and(is_kept) {
                continue;
            }
            fs::remove_file(entry.path())?;
            removed += 1;
        }
        Ok(removed)
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }
}

/// A blob in the making. Dropped unfinished, nothing is left of it.
#[derive(Debug)]
pub struct BlobWriter {
    file: tempfile::NamedTempFile,
    path: PathBuf,
    hasher: Sha256,
    written_bytes: u64,
    promised: Descriptor,
}

impl BlobWriter {
    /// Appends.
    ///
    /// # Errors
    ///
    /// [`BlobError::TooLong`] beyond the promised size, [`BlobError::Io`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.written_bytes += bytes.len() as u64;
        if self.written_bytes > self.promised.size_bytes {
            let Descriptor { digest, size_bytes, .. } = self.promised;
            return Err(BlobError::TooLong { digest, size_bytes });
        }
        self.hasher.update(bytes);
        Ok(self.file.write_all(bytes)?)
    }

    /// Checks the promise and gives the blob its name.
    ///
    /// # Errors
    ///
    /// [`BlobError::Truncated`], [`BlobError::Mismatch`] or [`BlobError::Io`].
    pub fn finish(self) -> Result<(), BlobError> {
        let Descriptor { digest, size_bytes, .. } = self.promised;
        if self.written_bytes < size_bytes {
            let written_bytes = self.written_bytes;
            return Err(BlobError::Truncated { digest, size_bytes, written_bytes });
        }
        let found = Digest::from(self.hasher);
        if found != digest {
            return Err(BlobError::Mismatch { expected: digest, found });
        }
        settle(self.file, &self.path)?;
        Ok(())
    }
}

/// A blob in the making whose digest nobody promised. Dropped unfinished, nothing is left of it.
#[derive(Debug)]
pub struct UnknownBlobWriter {
    file: tempfile::NamedTempFile,
    blobs: Blobs,
    hasher: Sha256,
    written_bytes: u64,
    /// Bytes there was room for when somebody last looked.
    claimed_bytes: u64,
}

impl UnknownBlobWriter {
    /// Appends.
    ///
    /// # Errors
    ///
    /// [`BlobError::Room`], [`BlobError::Io`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        const CLAIM_BYTES: u64 = 16 << 20;
        self.written_bytes += bytes.len() as u64;
        if self.written_bytes > self.claimed_bytes {
            self.blobs.room.claim(CLAIM_BYTES)?;
            self.claimed_bytes = self.written_bytes + CLAIM_BYTES;
        }
        self.hasher.update(bytes);
        Ok(self.file.write_all(bytes)?)
    }

    /// Gives the blob its name, under `lease`. Returns it, and the blob's length.
    ///
    /// # Errors
    ///
    /// [`BlobError::Io`].
    pub fn finish(self, lease: &Lease) -> Result<(Digest, u64), BlobError> {
        let digest = Digest::from(self.hasher);
        let path = self.blobs.path(&digest);
        // First the lease: from here on no sweep takes it away.
        lock(&lease.leases).held.entry(lease.id).or_default().insert(digest);
        // What is there already is whole, and may be being read.
        if !fs::metadata(&path).is_ok_and(|stat| stat.len() == self.written_bytes) {
            settle(self.file, &path)?;
        }
        Ok((digest, self.written_bytes))
    }
}

/// Keeps blobs from being swept until it is dropped.
#[derive(Debug)]
pub struct Lease {
    leases: Arc<Mutex<Leases>>,
    id: u64,
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.leases).held.remove(&self.id);
    }
}

fn lock(leases: &Mutex<Leases>) -> MutexGuard<'_, Leases> {
    // Whoever panicked has at worst left blobs leased.
    leases.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Brings a finished file to the disk and to its name.
fn settle(file: tempfile::NamedTempFile, path: &Path) -> io::Result<()> {
    let handle = file.as_file();
    let mut permissions = handle.metadata()?.permissions();
    permissions.set_readonly(true);
    handle.set_permissions(permissions)?;
    handle.sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    sync_parent(path)
}

/// Makes a rename into the folder of `path` last.
///
/// # Errors
///
/// Those of the file system.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

/// Why a blob was not stored.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// It is not what was promised.
    #[error("Content has digest {found}, {expected} expected")]
    Mismatch {
        /// Promised.
        expected: Digest,
        /// Of the bytes.
        found: Digest,
    },
    /// It ended early.
    #[error("Content of {digest} ended after {written_bytes} of {size_bytes} bytes")]
    Truncated {
        /// Which.
        digest: Digest,
        /// Promised.
        size_bytes: u64,
        /// Came.
        written_bytes: u64,
    },
    /// It did not end.
    #[error("Content of {digest} is longer than its {size_bytes} bytes")]
    TooLong {
        /// Which.
        digest: Digest,
        /// Promised.
        size_bytes: u64,
    },
    /// The disk is too full.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The file.
    #[error("Failed to write blob")]
    Io(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::mem;

    use super::*;

    fn store() -> (tempfile::TempDir, Blobs) {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path(), Room::new(dir.path(), 0).unwrap()).unwrap();
        (dir, blobs)
    }

    fn promise(content: &[u8], size_bytes: u64) -> Descriptor {
        let digest = Digest::of(content);
        let annotations = BTreeMap::new();
        Descriptor { media_type: String::new(), digest, size_bytes, platform: None, annotations }
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir.join("tmp")).unwrap().count()
            + fs::read_dir(dir.join("blobs/sha256")).unwrap().count()
    }

    #[test]
    fn a_blob_is_there_once_it_is_whole_and_right() {
        let (_dir, blobs) = store();
        let blob = promise(b"content", 7);
        let mut writer = blobs.write(&blob).unwrap();
        writer.push(b"con").unwrap();
        writer.push(b"tent").unwrap();

        assert!(!blobs.has(&blob));
        writer.finish().unwrap();

        assert!(blobs.has(&blob));
        let content = io::read_to_string(blobs.read(&blob.digest).unwrap()).unwrap();
        assert_eq!(content, "content");
        assert_eq!(blobs.put(b"content", &blobs.lease()).unwrap(), blob.digest);
    }

    #[test]
    fn broken_promises_leave_nothing() {
        let (dir, blobs) = store();
        let write = |blob: &Descriptor, content: &[u8]| {
            let mut writer = blobs.write(blob)?;
            writer.push(content)?;
            writer.finish()
        };

        let short = write(&promise(b"content", 7), b"cont").unwrap_err();
        let long = write(&promise(b"content", 7), b"content!").unwrap_err();
        let wrong = write(&promise(b"content", 7), b"CONTENT").unwrap_err();
        drop(blobs.write(&promise(b"content", 7)).unwrap());

        assert!(matches!(short, BlobError::Truncated { written_bytes: 4, size_bytes: 7, .. }));
        assert!(matches!(long, BlobError::TooLong { size_bytes: 7, .. }));
        assert!(matches!(wrong, BlobError::Mismatch { .. }));
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn a_blob_that_does_not_fit_is_refused_first() {
        let (dir, blobs) = store();

        let error = blobs.write(&promise(b"", u64::MAX / 2)).unwrap_err();

        assert!(matches!(error, BlobError::Room(RoomError::Full { .. })));
        assert_eq!(files(dir.path()), 0);
    }

    #[test]
    fn a_sweep_keeps_what_it_is_told_and_nothing_else() {
        let (dir, blobs) = store();
        let kept = blobs.put(b"kept", &blobs.lease()).unwrap();
        blobs.put(b"gone", &blobs.lease()).unwrap();
        fs::write(dir.path().join("blobs/sha256/rubbish"), "").unwrap();

        assert_eq!(blobs.sweep(&HashSet::from([kept])).unwrap(), 2);

        assert_eq!(files(dir.path()), 1);
        assert!(blobs.read(&kept).is_ok());
    }

    #[test]
    fn a_leased_blob_outlives_sweeps_as_long_as_the_lease() {
        let (_dir, blobs) = store();
        let (lease, other) = (blobs.lease(), blobs.lease());
        let digest = blobs.put(b"content", &lease).unwrap();
        blobs.put(b"content", &other).unwrap();

        assert_eq!(blobs.sweep(&HashSet::new()).unwrap(), 0);
        drop(lease);
        assert_eq!(blobs.sweep(&HashSet::new()).unwrap(), 0);
        drop(other);

        assert_eq!(blobs.sweep(&HashSet::new()).unwrap(), 1);
        assert!(blobs.read(&digest).is_err());
    }

    #[test]
    fn what_a_killed_server_left_is_removed() {
        let (dir, blobs) = store();
        let mut writer = blobs.write(&promise(b"content", 7)).unwrap();
        writer.push(b"cont").unwrap();
        mem::forget(writer);
        assert_eq!(files(dir.path()), 1);

        Blobs::open(dir.path(), Room::new(dir.path(), 0).unwrap()).unwrap();

        assert_eq!(files(dir.path()), 0);
    }
}
