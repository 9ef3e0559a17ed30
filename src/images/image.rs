//! One image as callers see it: a name on this host, what it stands for, and how far that is.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use chrono::{DateTime, Utc};

use crate::images::config::ImageConfig;
use crate::images::digest::Digest;
use crate::images::records::{ImageRecord, Origin, RecordState};
use crate::images::reference::Reference;
use crate::images::registry::Credentials;

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
/// the `in_use` of `Images::delete` looks at.
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
    /// Counts who holds it.
    pub(super) _pin: Arc<()>,
}

impl Image {
    /// The row that keeps this over a restart.
    pub(super) fn record(&self, serves: Option<Digest>, origin: Origin) -> ImageRecord {
        let state = match self.status {
            ImageStatus::Pending | ImageStatus::Pulling | ImageStatus::Converting => {
                RecordState::Unfinished
            }
            ImageStatus::Ready => RecordState::Ready(self.size_bytes.unwrap_or_default()),
            ImageStatus::Failed => RecordState::Failed(self.error.clone().unwrap_or_default()),
        };
        ImageRecord {
            name: self.name.to_string(),
            digest: self.digest,
            state,
            serves,
            origin,
            config: self.config.clone(),
            tags: self.tags.clone(),
            created_at: self.created_at,
        }
    }
}

impl ImageStatus {
    /// Whether nothing more happens by itself.
    pub fn is_settled(self) -> bool {
        matches!(self, Self::Ready | Self::Failed)
    }
}
