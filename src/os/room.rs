//! Room on a file system: asked for before it is used, so that an image never fills a disk that
//! instances write to.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::fstatvfs;

/// The free space of one file system, less what must stay free. Clones are the same.
#[derive(Debug, Clone)]
pub struct Room {
    folder: Arc<File>,
    free_bytes_min: u64,
}

impl Room {
    /// Of the file system that `folder` is on; `free_bytes_min` stay free.
    ///
    /// # Errors
    ///
    /// Those of opening the folder.
    pub fn new(folder: &Path, free_bytes_min: u64) -> io::Result<Self> {
        Ok(Self { folder: Arc::new(File::open(folder)?), free_bytes_min })
    }

    /// Checks that `bytes` more may be written. Reserves nothing.
    ///
    /// # Errors
    ///
    /// [`RoomError`] if they do not fit, or nobody can say.
    pub fn claim(&self, bytes: u64) -> Result<(), RoomError> {
        let stat = fstatvfs(&self.folder).map_err(|errno| RoomError::Unknown(errno.into()))?;
        let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free_bytes < bytes.saturating_add(self.free_bytes_min) {
            let reserved_bytes = self.free_bytes_min;
            return Err(RoomError::Full { wanted_bytes: bytes, free_bytes, reserved_bytes });
        }
        Ok(())
    }
}

/// Why nothing may be written.
#[derive(Debug, thiserror::Error)]
pub enum RoomError {
    /// It would leave too little.
    #[error(
        "No space left: {wanted_bytes} bytes wanted, {free_bytes} free of which \
         {reserved_bytes} stay free"
    )]
    Full {
        /// Asked for.
        wanted_bytes: u64,
        /// Free now.
        free_bytes: u64,
        /// Of these, not to be used.
        reserved_bytes: u64,
    },
    /// The file system does not answer.
    #[error("Failed to see how much space is left")]
    Unknown(#[source] io::Error),
}
