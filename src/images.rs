//! Images on this host: from a reference to a read-only root disk.
//!
//! [`Images::request`] resolves a name at its registry and queues what is missing: the layers come
//! into the blob store, are merged into one tree, and the tree is written as one EROFS file, the
//! root disk of every instance of that image. [`Images::load`] does the same from a tar archive.
//! [`Images::ready`] hands the file out.
//!
//! ```text
//! reference ──registry/archive──> blobs ──layers──> tree ──erofs──> images/<hex>/root.erofs
//! ```
//!
//! Work is done once per manifest digest, however many names and requests there are for it. All
//! that is on disk is named by its digest and appears by rename: a server killed at any moment
//! leaves only temporary files, which the next [`Images::open`] removes.
//!
//! Root disks and blobs that no name needs any more are removed by [`Images::collect`] and never
//! otherwise: instances may still run from them, and only the caller knows.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use chrono::Utc;
use tokio::io::AsyncRead;
use tokio::sync::{RwLock, watch};
use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::images::archive::{ArchiveError, ArchivedImage};
use crate::images::blobs::{BlobError, Blobs};
use crate::images::digest::Digest;
use crate::images::jobs::{AuthSource, Pull};
use crate::images::manifest::{Manifest, PLATFORM};
use crate::images::records::{ImageRecord, Origin, Records};
use crate::images::reference::Reference;
use crate::images::registry::{Auth, Registry, RegistryError};
use crate::images::room::Room;
use crate::images::roots::Roots;
use crate::images::shelf::{Arrival, Found, Shelf};

pub mod archive;
pub mod blobs;
pub mod config;
pub mod digest;
mod erofs;
mod errors;
pub mod image;
mod jobs;
mod layers;
pub mod manifest;
pub mod records;
pub mod reference;
pub mod registry;
mod roots;
mod shelf;
#[cfg(test)]
mod testing;
mod tree;

pub use crate::os::room;
pub use errors::{DeleteError, ImagesError, ReadyError, RequestError, TagError};
pub use image::{Image, ImageSpec, ImageStatus, RootDisk};

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

/// The images of this host. Clones are the same images.
#[derive(Debug, Clone)]
pub struct Images {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    spec: ImagesSpec,
    blobs: Blobs,
    roots: Roots,
    records: Records,
    /// Names and work. Held for microseconds, never over an await.
    shelf: Mutex<Shelf>,
    /// Read while names are given to content; written while content without names is removed.
    /// Never held while a client or registry is waited for. Taken before `shelf`.
    content: RwLock<()>,
    tasks: TaskTracker,
    closing: CancellationToken,
}

impl Images {
    /// Opens the images in `spec.dir`: makes the folders, removes what a killed server left,
    /// loads the records and queues again what was under way.
    ///
    /// What was under way with credentials of its own becomes failed if it needs them again: they
    /// are not kept.
    ///
    /// # Errors
    ///
    /// [`ImagesError`] if the folder or the records cannot be used.
    pub async fn open(spec: ImagesSpec, records: Records) -> Result<Self, ImagesError> {
        let dir = spec.dir.clone();
        let free_bytes_min = spec.limits.free_bytes_min;
        let opening = spawn_blocking(move || -> io::Result<(Blobs, Roots)> {
            fs::create_dir_all(&dir)?;
            let blobs = Blobs::open(&dir, Room::new(&dir, free_bytes_min)?)?;
            Ok((blobs, Roots::open(&dir)?))
        });
        let opened = opening.await.expect("opening folders does not panic");
        let (blobs, roots) = opened.map_err(|source| failed(&spec.dir, source))?;
        let rows = records.with(ImageRecord::list).map_err(ImagesError::Records)?;
        let inner = Inner {
            shelf: Mutex::new(Shelf::default()),
            spec,
            blobs,
            roots,
            records,
            content: RwLock::new(()),
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
        };
        let images = Self { inner: Arc::new(inner) };
        for row in rows {
            images.restore(row)?;
        }
        images.start_jobs();
        Ok(images)
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
        if let Some(platform) = spec.platform.filter(|platform| platform != PLATFORM) {
            return Err(RequestError::Platform { platform });
        }
        let source = match &spec.credentials {
            Some(credentials) => AuthSource::Given(credentials.clone()),
            None => AuthSource::Host,
        };
        let auth = source.auth(&spec.name).await?;
        let registry = self.registry(&spec.name, auth)?;
        let resolved = registry.resolve().await?;
        let packed_bytes = resolved.manifest.packed_bytes();
        let packed_bytes_max = self.inner.spec.limits.packed_bytes_max;
        if packed_bytes > packed_bytes_max {
            return Err(RequestError::TooLarge { packed_bytes, packed_bytes_max });
        }
        let blobs = self.inner.blobs.clone();
        let storing = spawn_blocking(move || {
            let lease = blobs.lease();
            blobs.put(&resolved.configuration_bytes, &lease)?;
            blobs.put(&resolved.manifest_bytes, &lease)?;
            Ok::<_, BlobError>(lease)
        });
        let _lease = storing.await.expect("storing a blob does not panic")?;
        let origin = match source {
            AuthSource::Host => Origin::Registry,
            AuthSource::Given(_) => Origin::RegistryWithCredentials,
        };
        let arrival = Arrival {
            name: spec.name.clone(),
            manifest: resolved.manifest,
            config: resolved.configuration.config,
            tags: spec.tags,
            origin,
            pull: Some(Pull { name: spec.name, auth: source }),
        };
        let _content = self.inner.content.read().await;
        Ok(self.admit(arrival)?)
    }

    /// Takes the images out of a tar archive (OCI layout or `docker save`; plain, gzip or zstd)
    /// and queues their conversion.
    ///
    /// `name` names the image if the archive holds exactly one; otherwise the archive's own names
    /// are used. Returns the images, usually pending: [`Images::settled`] waits for one.
    ///
    /// # Errors
    ///
    /// [`ArchiveError`]; no name has changed.
    pub async fn load<R: AsyncRead + Unpin + Send>(
        &self,
        archive: R,
        name: Option<Reference>,
        tags: BTreeMap<String, String>,
    ) -> Result<Vec<Image>, ArchiveError> {
        let limit = self.inner.spec.limits.unpacked_bytes_max;
        let (found, _lease) = archive::read(archive, &self.inner.blobs, limit).await?;
        let _content = self.inner.content.read().await;
        let mut images = Vec::new();
        for ArchivedImage { names, manifest, configuration } in archive::named(found, name)? {
            for name in names {
                let arrival = Arrival {
                    name,
                    manifest: manifest.clone(),
                    config: configuration.config.clone(),
                    tags: tags.clone(),
                    origin: Origin::Archive,
                    pull: None,
                };
                images.push(self.admit(arrival)?);
            }
        }
        Ok(images)
    }

    /// The image of that name. By digest, any image of that repository with that digest.
    pub fn get(&self, name: &Reference) -> Option<Image> {
        self.shelf().find(name).map(|entry| entry.image())
    }

    /// All images, by name.
    pub fn list(&self) -> Vec<Image> {
        self.shelf().images()
    }

    /// The image of that name and everything that happens to it. The channel closes when the name
    /// is deleted.
    pub fn watch(&self, name: &Reference) -> Option<watch::Receiver<Image>> {
        self.shelf().find(name).map(|entry| entry.watch())
    }

    /// Waits until the image is ready or failed. `None` if there is no such name, or no more.
    pub async fn settled(&self, name: &Reference) -> Option<Image> {
        let mut watch = self.watch(name)?;
        let image = watch.wait_for(|image| image.status.is_settled()).await.ok()?;
        Some(image.clone())
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
        let mut shelf = self.shelf();
        let Some(entry) = shelf.find(name) else {
            return Err(ReadyError::Missing { name: name.to_string() });
        };
        let Some(digest) = entry.serves() else {
            let status = entry.image().status;
            return Err(ReadyError::NotReady { name: name.to_string(), status });
        };
        self.pinned(&mut shelf, &digest)
    }

    /// The root disk of a digest that an instance already has, whatever its names are now.
    ///
    /// # Errors
    ///
    /// [`ReadyError`].
    pub fn root_disk(&self, digest: &Digest) -> Result<RootDisk, ReadyError> {
        self.pinned(&mut self.shelf(), digest)
    }

    /// Removes a name; its root disk and blobs too once no name needs them. Work under way for it
    /// alone is cancelled. By digest, removes all names of that repository with that digest.
    ///
    /// `in_use` says of a digest whether an instance or snapshot needs it; it must not call back.
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
        {
            let mut shelf = self.shelf();
            let names = shelf.names(name);
            if names.is_empty() {
                return Err(DeleteError::Missing { name: name.to_string() });
            }
            if shelf.only_in(&names).iter().any(|digest| in_use(digest) || shelf.is_held(digest)) {
                return Err(DeleteError::InUse { name: name.to_string() });
            }
            for name in &names {
                let erase = |rows: &rusqlite::Connection| ImageRecord::delete(rows, name);
                self.inner.records.with(erase).map_err(ImagesError::Records)?;
                shelf.remove(name);
            }
        }
        self.collect(in_use).await?;
        Ok(())
    }

    /// Removes root disks and blobs that neither a name nor, as `in_use` says, a caller needs.
    /// Returns how many root disks were removed. To be called when instances are gone, and at
    /// start.
    ///
    /// # Errors
    ///
    /// [`ImagesError`]; what could not be removed stays until the next time.
    pub async fn collect(&self, in_use: impl Fn(&Digest) -> bool) -> Result<usize, ImagesError> {
        let _content = self.inner.content.write().await;
        let dir = &self.inner.spec.dir;
        let (removed, keep) = {
            let shelf = self.shelf();
            let needed = shelf.needed();
            let all = self.inner.roots.list().map_err(|source| failed(dir, source))?;
            let useless = |digest: &Digest| {
                !needed.contains(digest) && !shelf.is_held(digest) && !in_use(digest)
            };
            let away = |digest: Digest| self.inner.roots.remove(&digest, self.inner.blobs.tmp());
            let removed: io::Result<Vec<_>> = all.into_iter().filter(useless).map(away).collect();
            (removed.map_err(|source| failed(dir, source))?, shelf.needed_blobs())
        };
        let blobs = self.inner.blobs.clone();
        let sweeping = spawn_blocking(move || {
            let count = removed.len();
            drop(removed);
            blobs.sweep(&keep).map(|_| count)
        });
        let swept = sweeping.await.expect("sweeping blobs does not panic");
        swept.map_err(|source| failed(dir, source))
    }

    /// Makes `target` a name of the image `source`, or moves it there. Nothing is pulled.
    ///
    /// # Errors
    ///
    /// [`TagError`].
    pub fn tag(&self, source: &Reference, target: &Reference) -> Result<Image, TagError> {
        if target.digest().is_some() {
            return Err(TagError::TargetIsDigest { name: target.to_string() });
        }
        let mut shelf = self.shelf();
        let Some(entry) = shelf.find(source) else {
            return Err(TagError::Missing { name: source.to_string() });
        };
        let image = entry.image();
        if image.status != ImageStatus::Ready {
            return Err(TagError::NotReady { name: source.to_string(), status: image.status });
        }
        let origin = entry.origin();
        let known = shelf.find_exactly(target).map(|entry| entry.image().created_at);
        let image =
            Image { name: target.clone(), created_at: known.unwrap_or_else(Utc::now), ..image };
        self.keep(&image.record(Some(image.digest), origin))?;
        shelf.place(image.clone(), Some(image.digest), origin);
        Ok(image)
    }

    /// Cancels all work and waits until it has stopped. What was under way is queued again by the
    /// next [`Images::open`].
    pub async fn close(&self) {
        self.inner.closing.cancel();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        // What panicked has at worst left a status behind that is too old.
        self.inner.shelf.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn registry(&self, name: &Reference, auth: Auth) -> Result<Registry, RegistryError> {
        Registry::new(name, auth, &self.inner.spec.insecure_registries)
    }

    fn keep(&self, record: &ImageRecord) -> Result<(), ImagesError> {
        self.inner.records.with(|rows| record.upsert(rows)).map_err(ImagesError::Records)
    }

    fn pinned(
        &self,
        shelf: &mut MutexGuard<'_, Shelf>,
        digest: &Digest,
    ) -> Result<RootDisk, ReadyError> {
        let path = self.inner.roots.path(digest);
        match self.inner.roots.read(digest) {
            Ok((file, config)) => {
                let (file, _pin) = (Arc::new(file), shelf.hold(digest));
                Ok(RootDisk { digest: *digest, file, path, config, _pin })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ReadyError::Missing { name: digest.to_string() })
            }
            Err(source) => Err(failed(&path, source).into()),
        }
    }

    /// Takes an image whose documents are in the store: ready if its root disk is here, else
    /// queued, unless that work is under way.
    fn admit(&self, arrival: Arrival) -> Result<Image, ImagesError> {
        let size_bytes = self.inner.roots.size_bytes(&arrival.manifest.digest).ok();
        let image = {
            let mut shelf = self.shelf();
            let (image, serves) = shelf.describe(&arrival, size_bytes);
            self.keep(&image.record(serves, arrival.origin))?;
            shelf.receive(arrival, image, serves, &self.inner.closing)
        };
        self.start_jobs();
        Ok(image)
    }

    /// Puts a row of an earlier server back on the shelf.
    fn restore(&self, row: ImageRecord) -> Result<(), ImagesError> {
        let Ok(name) = row.name.parse::<Reference>() else {
            tracing::warn!(name = row.name, "image row with an impossible name is ignored");
            return Ok(());
        };
        let manifest = Roots::manifest(&self.inner.blobs, &row.digest).ok();
        let has_all = |manifest: &Manifest| manifest.blobs().all(|blob| self.inner.blobs.has(blob));
        let found = Found {
            is_complete: manifest.as_ref().is_some_and(has_all),
            manifest,
            size_bytes: self.inner.roots.size_bytes(&row.digest).ok(),
        };
        let changed = self.shelf().restore(row, name, found, &self.inner.closing);
        match changed {
            Some(record) => self.keep(&record),
            None => Ok(()),
        }
    }
}

fn failed(path: &Path, source: io::Error) -> ImagesError {
    ImagesError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests;
