//! Images on this host: from a reference to a read-only root disk.
//!
//! [`Images::request`] resolves a name at its registry and queues what is missing: the layers come
//! into the blob store, are merged into one tree, and the tree is written as one EROFS file, the
//! root disk of every instance of that image. [`Images::load`] does the same from a tar archive.
//! [`Images::ready`] hands the file out.
//!
//! ```text
//! reference ──registry/archive──> blobs ──layers──> tree ──erofs──> images/<digest>/root.erofs
//! ```
//!
//! Work is done once per manifest digest, however many names and requests there are for it. All
//! that is on disk is named by its digest and appears by rename: a server killed at any moment
//! leaves only temporary files, which the next [`Images::open`] removes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use tokio::io::AsyncRead;
use tokio::sync::watch;

use crate::images::config::ImageConfig;
use crate::images::digest::Digest;
use crate::images::records::Records;
use crate::images::reference::Reference;
use crate::images::registry::{Credentials, RegistryError};

pub mod archive;
pub mod blobs;
pub mod config;
pub mod digest;
mod erofs;
mod layers;
pub mod manifest;
pub mod records;
pub mod reference;
pub mod registry;
mod room;
mod tar;
#[cfg(test)]
mod testing;
mod tree;

/// What the images of a host are given, from the server's configuration.
#[derive(Debug, Clone)]
pub struct ImagesSpec {
    /// The data folder: `blobs`, `images` and `tmp` are made in it.
    pub dir: PathBuf,
    /// Registries (`host` or `host:port`) that are spoken to in plain HTTP, besides loopback ones.
    pub insecure_registries: Vec<String>,
    /// How many images are pulled or converted at the same time, at least 1.
    pub jobs_max: usize,
    /// What an image may cost.
    pub limits: Limits,
}

/// What one image may cost this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of its layers as they are stored in the registry.
    pub packed_bytes_max: u64,
    /// Most bytes of its layers unpacked.
    pub unpacked_bytes_max: u64,
    /// Free bytes that are left on the data folder's file system whatever an image needs.
    pub free_bytes_min: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { packed_bytes_max: 32 << 30, unpacked_bytes_max: 64 << 30, free_bytes_min: 1 << 30 }
    }
}

/// One image name on this host and how far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its normalised name.
    pub name: Reference,
    /// The manifest (of our platform) the name stands for since it was last asked for.
    pub digest: Digest,
    /// How far that digest is.
    pub status: ImageStatus,
    /// Why it failed, the whole chain of causes; `None` unless failed.
    pub error: Option<String>,
    /// Disk use of the root disk; `None` until ready.
    pub size_bytes: Option<u64>,
    /// `os/arch`.
    pub platform: String,
    /// What the image says about its processes; empty until known.
    pub config: ImageConfig,
    /// The caller's labels, kept as they came.
    pub tags: BTreeMap<String, String>,
    /// When the name first appeared on this host.
    pub created_at: DateTime<Utc>,
    /// Place in the queue, from 1; `None` unless pending.
    pub queue_position: Option<usize>,
    /// Bytes pulled so far; `None` unless pulling.
    pub progress: Option<Progress>,
}

/// How far an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageStatus {
    /// Waits for its turn.
    Pending,
    /// Layers are being downloaded.
    Pulling,
    /// Layers are being merged into a root disk.
    Converting,
    /// Instances can start from it.
    Ready,
    /// It did not work; [`Image::error`] says why. Ask again to try again.
    Failed,
}

/// Bytes of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes on this host.
    pub done_bytes: u64,
    /// Bytes of all layers and the configuration.
    pub total_bytes: u64,
}

/// What is asked for: one image from its registry.
#[derive(Debug, Clone)]
pub struct ImageSpec {
    /// Which.
    pub name: Reference,
    /// `os/arch`; `None` and `linux/amd64` are the same.
    pub platform: Option<String>,
    /// For this pull only, never stored; `None`: the docker configuration of the server's user.
    pub credentials: Option<Credentials>,
    /// Labels that replace those the name has; empty keeps them.
    pub tags: BTreeMap<String, String>,
}

/// A root disk, open.
///
/// While it is held the image cannot be deleted: keep it until the digest is in a record that
/// the `in_use` of [`Images::delete`] looks at.
#[derive(Debug, Clone)]
pub struct RootDisk {
    /// The manifest digest it is made of.
    pub digest: Digest,
    /// The EROFS file, opened read-only.
    pub file: Arc<File>,
    /// Where it is, to open it again later.
    pub path: PathBuf,
    /// What the image says about its processes.
    pub config: ImageConfig,
    pin: Arc<()>,
}

/// The images of this host. Clones are the same images.
#[derive(Debug, Clone)]
pub struct Images {}

#[expect(clippy::todo, reason = "signatures first, so that callers can be written meanwhile")]
impl Images {
    /// Opens the images in `spec.dir`: makes the folders, removes what a killed server left,
    /// loads the records and queues again what was under way.
    ///
    /// What was under way with credentials of its own becomes failed: those are not kept.
    ///
    /// # Errors
    ///
    /// [`ImagesError`] if the folder or the records cannot be used.
    pub async fn open(spec: ImagesSpec, records: Records) -> Result<Self, ImagesError> {
        todo!()
    }

    /// Asks for an image: resolves the name at its registry and queues what is missing.
    ///
    /// Returns as soon as the digest is known, usually with a pending image; a ready one comes
    /// back at once if the digest is here. Idempotent: requests for a digest that is under way
    /// join that work, a failed one is tried again.
    ///
    /// # Errors
    ///
    /// [`RequestError`]; the records are as before.
    pub async fn request(&self, spec: ImageSpec) -> Result<Image, RequestError> {
        todo!()
    }

    /// Takes the images out of a tar archive (OCI layout or `docker save`, plain or gzip) and
    /// queues their conversion.
    ///
    /// `name` names the image if the archive holds exactly one; otherwise the archive's own names
    /// are used. Returns the images, usually pending: [`Images::settled`] waits for one.
    ///
    /// # Errors
    ///
    /// [`archive::ArchiveError`]; nothing is left.
    pub async fn load<R: AsyncRead + Unpin + Send>(
        &self,
        archive: R,
        name: Option<Reference>,
        tags: BTreeMap<String, String>,
    ) -> Result<Vec<Image>, archive::ArchiveError> {
        todo!()
    }

    /// The image of that name. By digest, any image of that repository with that digest.
    pub fn get(&self, name: &Reference) -> Option<Image> {
        todo!()
    }

    /// All images, by name.
    pub fn list(&self) -> Vec<Image> {
        todo!()
    }

    /// The image of that name and everything that happens to it. The channel closes when the name
    /// is deleted.
    pub fn watch(&self, name: &Reference) -> Option<watch::Receiver<Image>> {
        todo!()
    }

    /// Waits until the image is ready or failed. `None` if there is no such name, or no more.
    pub async fn settled(&self, name: &Reference) -> Option<Image> {
        todo!()
    }

    /// The root disk of an image, for a new instance.
    ///
    /// A name that was ready before it was asked for again keeps serving its last ready digest
    /// until the new one is ready.
    ///
    /// # Errors
    ///
    /// [`ReadyError`].
    pub fn ready(&self, name: &Reference) -> Result<RootDisk, ReadyError> {
        todo!()
    }

    /// The root disk of a digest that an instance already has, whatever its names are now.
    ///
    /// # Errors
    ///
    /// [`ReadyError`].
    pub fn root_disk(&self, digest: &Digest) -> Result<RootDisk, ReadyError> {
        todo!()
    }

    /// Removes a name; its root disk and blobs too once no name needs them. Work under way for it
    /// alone is cancelled. By digest, removes all names of that repository with that digest.
    ///
    /// # Errors
    ///
    /// [`DeleteError::InUse`] if this is the last name of a digest for which `in_use` is true, or
    /// whose [`RootDisk`] is held.
    pub async fn delete(
        &self,
        name: &Reference,
        in_use: impl Fn(&Digest) -> bool,
    ) -> Result<(), DeleteError> {
        todo!()
    }

    /// Makes `target` a name of the image `source`, or moves it there. Nothing is pulled.
    ///
    /// # Errors
    ///
    /// [`TagError`].
    pub fn tag(&self, source: &Reference, target: &Reference) -> Result<Image, TagError> {
        todo!()
    }

    /// Cancels all work and waits until it has stopped. What was under way is queued again by the
    /// next [`Images::open`].
    pub async fn close(&self) {
        todo!()
    }
}

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
        source: std::io::Error,
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
    /// The same digest is being pulled with other credentials.
    #[error("Image {name} is being pulled with other credentials")]
    OtherCredentials {
        /// Which.
        name: String,
    },
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
