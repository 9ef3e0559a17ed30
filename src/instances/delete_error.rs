//! Why an instance could not be deleted.

use std::io;
use std::path::PathBuf;

use crate::instances::FindError;

/// Why an instance was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// The worker outlived its kill.
    #[error("Worker process {pid} could not be killed")]
    Stuck {
        /// Its process id.
        pid: u32,
    },
    /// Whether there is a worker is not known.
    #[error("Failed to find out whether instance {id} still runs")]
    Worker {
        /// Which instance.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record.
    #[error("Failed to change the record of instance {id}")]
    Record {
        /// Which instance.
        id: String,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// The files.
    #[error("Failed to remove {path}", path = path.display())]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}
