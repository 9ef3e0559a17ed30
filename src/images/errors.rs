//! What can go wrong with images, seen from outside: one type per thing a caller asks for.

use std::io;
use std::path::PathBuf;

use crate::images::blobs::BlobError;
use crate::images::image::ImageStatus;
use crate::images::registry::RegistryError;

/// Why the images of this host cannot be opened or recorded.
#[derive(Debug, thiserror::Error)]
pub enum ImagesError {
    /// A folder or file of theirs.
    #[error("Failed to use {path}", path = path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The records.
    #[error("Failed to keep image records")]
    Records(#[source] rusqlite::Error),
}

/// Why an image could not be asked for.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not `linux/amd64`, or not a platform at all.
    #[error("Platform {platform:?} is not supported: linux/amd64 expected")]
    Platform {
        /// As asked for.
        platform: String,
    },
    /// Its layers are more than the configuration allows.
    #[error("Image has {packed_bytes} bytes of layers, more than {packed_bytes_max}")]
    TooLarge {
        /// As its manifest says.
        packed_bytes: u64,
        /// The limit.
        packed_bytes_max: u64,
    },
    /// Its documents could not be stored.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The registry has no such image, refuses, or cannot be reached.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Records or files.
    #[error(transparent)]
    Host(#[from] ImagesError),
}

/// Why there is no root disk of an image.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// No such name or digest.
    #[error("Image {name} is not on this host")]
    Missing {
        /// Which.
        name: String,
    },
    /// It is not ready yet, or failed.
    #[error("Image {name} is not ready: {status:?}")]
    NotReady {
        /// Which.
        name: String,
        /// How far it is.
        status: ImageStatus,
    },
    /// The file cannot be opened.
    #[error(transparent)]
    Host(#[from] ImagesError),
}

/// Why an image was not deleted.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// No such name.
    #[error("Image {name} is not on this host")]
    Missing {
        /// Which.
        name: String,
    },
    /// An instance or snapshot needs its root disk.
    #[error("Image {name} is in use")]
    InUse {
        /// Which.
        name: String,
    },
    /// Records or files.
    #[error(transparent)]
    Host(#[from] ImagesError),
}

/// Why a name was not given.
#[derive(Debug, thiserror::Error)]
pub enum TagError {
    /// No such source.
    #[error("Image {name} is not on this host")]
    Missing {
        /// Which.
        name: String,
    },
    /// The source is not ready.
    #[error("Image {name} is not ready: {status:?}")]
    NotReady {
        /// Which.
        name: String,
        /// How far it is.
        status: ImageStatus,
    },
    /// The target is a digest, which is nobody's to give.
    #[error("Target {name} is a digest: a tag expected")]
    TargetIsDigest {
        /// Which.
        name: String,
    },
    /// Records.
    #[error(transparent)]
    Host(#[from] ImagesError),
}
