//! What can go wrong with volumes, seen from outside: one type per thing a caller asks for.

use std::io;
use std::path::PathBuf;

use crate::disks::DiskError;
use crate::os::room::RoomError;
use crate::resources::Shortage;
use crate::volumes::content::ContentError;

/// Why volumes cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Their folder.
    #[error("Failed to use {path}", path = path.display())]
    Dir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Their records.
    #[error("Failed to read the records of volumes")]
    Records(#[source] rusqlite::Error),
}

/// Why no volume is meant.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// None has this id or name.
    #[error("No such volume: {key:?}")]
    Missing {
        /// The text.
        key: String,
    },
    /// Several have this name.
    #[error("Several volumes are called {key:?}: use the id")]
    Ambiguous {
        /// The text.
        key: String,
    },
    /// The records.
    #[error("Failed to read the records of volumes")]
    Records(#[from] rusqlite::Error),
}

/// Why a volume was not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Another has the id.
    #[error("Volume id {id:?} is taken")]
    IdTaken {
        /// Which.
        id: String,
    },
    /// All volumes together would be larger than they may be.
    #[error(
        "Volumes may take {total_gib_max}GB in all (max_volumes), of which {used_gib}GB are taken: \
         {size_gib}GB do not fit"
    )]
    TotalSize {
        /// As asked for.
        size_gib: u64,
        /// Of those that are there.
        used_gib: u64,
        /// The limit.
        total_gib_max: u64,
    },
    /// The host has no room.
    #[error(transparent)]
    Shortage(#[from] Shortage),
    /// The data folder has no room.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The archive.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// What is in the archive does not fit.
    #[error("What is in the archive does not fit {size_gib}GB: give a larger size_gb")]
    TooLarge {
        /// The limit.
        size_gib: u64,
    },
    /// Whoever asked for it is gone.
    #[error("The client went away")]
    Abandoned,
    /// The file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The volume's folder.
    #[error("Failed to use {path}", path = path.display())]
    Dir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record.
    #[error("Failed to keep the record of a volume")]
    Records(#[from] rusqlite::Error),
}

/// Why a volume was not removed.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// Somebody has it.
    #[error("Volume {volume} is attached to instance {instance}: detach it, or delete that, first")]
    InUse {
        /// The volume.
        volume: String,
        /// One of those who have it.
        instance: String,
    },
    /// The file.
    #[error("Failed to remove {path}", path = path.display())]
    Dir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record.
    #[error("Failed to change the record of a volume")]
    Records(#[from] rusqlite::Error),
}

/// Why an instance does not get a volume.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It is not there, or not any more.
    #[error("No such volume: {volume:?}")]
    Missing {
        /// Which.
        volume: String,
    },
    /// The instance has it already.
    #[error("Volume {volume} is attached to this instance already")]
    Twice {
        /// Which.
        volume: String,
    },
    /// Another has it, and one of both would write.
    #[error(
        "Volume {volume} is attached to instance {instance} {how}: only readonly attachments share \
         a volume"
    )]
    Taken {
        /// The volume.
        volume: String,
        /// Who has it.
        instance: String,
        /// What for.
        how: &'static str,
    },
    /// The records.
    #[error("Failed to keep who has a volume")]
    Records(#[from] rusqlite::Error),
}
