//! Images out of a tar archive: an OCI layout (`index.json`), or what `docker save` writes
//! (`manifest.json`), or both in one; plain, gzip or zstd.
//!
//! The archive is read once, as it comes. Every file in it becomes a blob under the digest of its
//! bytes, whatever the archive calls it; what a blob means is looked up afterwards by its path in
//! the archive. Nothing is ever written to a path that the archive chose.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read};
use std::slice;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncRead;

use crate::images::blobs::{BlobError, Blobs, Lease};
use crate::images::digest::Digest;
use crate::images::errors::ImagesError;
use crate::images::manifest::{
    CONFIG_BYTES_MAX, Configuration, Descriptor, Document, MANIFEST_BYTES_MAX, Manifest,
    ManifestError, select,
};
use crate::images::reference::Reference;
use crate::tar::packed::unpack;
use crate::tar::stream::{CHUNK_BYTES, feed};
use crate::tar::{EntryKind, TarError, TarReader};

/// Most files in an archive: several thousand images.
const FILES_MAX: usize = 50_000;

/// Longest name kept of a file.
const PATH_BYTES_MAX: usize = 512;

/// Most symbolic links from one file of the archive to another.
const HOPS_MAX: usize = 8;

/// An image found in an archive. Its blobs are all in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedImage {
    /// The names the archive gives it.
    pub names: Vec<Reference>,
    /// Its manifest.
    pub manifest: Manifest,
    /// Its configuration.
    pub configuration: Configuration,
}

/// Reads an archive of at most `bytes_max` bytes into the store and finds its images. The lease
/// holds their blobs until they have names.
///
/// # Errors
///
/// [`ArchiveError`]; blobs that nothing refers to may be left for the next sweep.
pub async fn read<R: AsyncRead + Unpin>(
    archive: R,
    blobs: &Blobs,
    bytes_max: u64,
) -> Result<(Vec<ArchivedImage>, Lease), ArchiveError> {
    let blobs = blobs.clone();
    let reading = feed(archive, move |chunks| {
        let stream = BufReader::with_capacity(CHUNK_BYTES, chunks);
        let files = Files::store(stream, &blobs, bytes_max)?;
        Ok((files.images()?, files.lease))
    });
    reading.await
}

/// Gives the images the name that was asked for, or makes sure that each has one.
///
/// # Errors
///
/// [`ArchiveError::Several`], [`ArchiveError::Unnamed`] or [`ArchiveError::Name`].
pub fn named(
    mut images: Vec<ArchivedImage>,
    name: Option<Reference>,
) -> Result<Vec<ArchivedImage>, ArchiveError> {
    let Some(name) = name else {
        if images.iter().any(|image| image.names.is_empty()) {
            return Err(ArchiveError::Unnamed);
        }
        return Ok(images);
    };
    let [image] = images.as_mut_slice() else {
        return Err(ArchiveError::Several { images: images.len() });
    };
    if name.digest().is_some_and(|digest| digest != image.manifest.digest) {
        return Err(ArchiveError::Name { name: name.to_string() });
    }
    image.names = vec![name];
    Ok(images)
}

/// What a path of the archive is.
#[derive(Debug, Clone)]
enum Item {
    File { digest: Digest, size_bytes: u64 },
    Link { target: String },
}

/// The files of an archive, by cleaned path, as blobs.
struct Files<'a> {
    blobs: &'a Blobs,
    lease: Lease,
    items: BTreeMap<String, Item>,
}

impl<'a> Files<'a> {
    fn store(
        stream: impl io::BufRead,
        blobs: &'a Blobs,
        bytes_max: u64,
    ) -> Result<Self, ArchiveError> {
        let plain = unpack(stream).map_err(|_| ArchiveError::NotAnArchive)?;
        // One byte more than allowed, so that the end of the limit is not taken for the end.
        let limited = plain.take(bytes_max.saturating_add(1));
        let mut tar = TarReader::new(BufReader::with_capacity(CHUNK_BYTES, limited));
        let mut files = Self { blobs, lease: blobs.lease(), items: BTreeMap::new() };
        let result = files.store_entries(&mut tar);
        let drained = tar.drain();
        if tar.into_inner().into_inner().limit() == 0 {
            return Err(ArchiveError::TooLarge { bytes_max });
        }
        result?;
        drained?;
        Ok(files)
    }

    fn store_entries(&mut self, tar: &mut TarReader<impl Read>) -> Result<(), ArchiveError> {
        let mut buffer = vec![0; CHUNK_BYTES];
        while let Some(entry) = tar.next_entry()? {
            let Some(path) = clean(&entry.path, "") else { continue };
            let item = match entry.kind {
                EntryKind::File => {
                    let mut writer = self.blobs.write_unknown()?;
                    loop {
                        match tar.read(&mut buffer)? {
                            0 => break,
                            read => writer.push(&buffer[..read])?,
                        }
                    }
                    let (digest, size_bytes) = writer.finish(&self.lease)?;
                    check_name(&path, digest)?;
                    Item::File { digest, size_bytes }
                }
                EntryKind::Symlink => {
                    let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
                    let Some(target) = clean(&entry.link, folder) else { continue };
                    Item::Link { target }
                }
                EntryKind::HardLink => {
                    let Some(target) = clean(&entry.link, "") else { continue };
                    Item::Link { target }
                }
                _ => continue,
            };
            self.items.insert(path, item);
            if self.items.len() > FILES_MAX {
                return Err(ArchiveError::TooManyFiles);
            }
        }
        Ok(())
    }

    /// The images of the archive: by its index if it has one, by docker's manifest if not.
    fn images(&self) -> Result<Vec<ArchivedImage>, ArchiveError> {
        let saved: Vec<SavedImage> = match self.document("manifest.json", MANIFEST_BYTES_MAX)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(ManifestError::Json)?,
            None => Vec::new(),
        };
        let images = match self.document("index.json", MANIFEST_BYTES_MAX)? {
            Some(index) => self.indexed_images(&index, &saved)?,
            None => saved.iter().map(|saved| self.saved_image(saved)).collect::<Result<_, _>>()?,
        };
        if images.is_empty() {
            return Err(ArchiveError::NotAnArchive);
        }
        Ok(images)
    }

    fn indexed_images(
        &self,
        index: &[u8],
        saved: &[SavedImage],
    ) -> Result<Vec<ArchivedImage>, ArchiveError> {
        let Document::Index(entries) = Document::parse(index)? else {
            return Err(ArchiveError::NotAnArchive);
        };
        // Entries that say whom they are for are for us, or nothing is.
        let others: Vec<Descriptor> =
            entries.iter().filter(|entry| entry.platform.is_some()).cloned().collect();
        let all_others = others.len() == entries.len();
        if all_others && !entries.is_empty() {
            select(&others)?;
        }
        let mut images: Vec<ArchivedImage> = Vec::new();
        for entry in entries {
            if entry.platform.is_some() && select(slice::from_ref(&entry)).is_err() {
                continue;
            }
            let manifest = self.manifest(&entry.digest)?;
            let mut names: Vec<Reference> = name_of(&entry).into_iter().collect();
            for saved in saved {
                if self.resolve(&saved.config).is_some_and(|(it, _)| it == manifest.config.digest) {
                    names.extend(saved.names()?);
                }
            }
            match images.iter_mut().find(|known| known.manifest == manifest) {
                Some(known) => known.names.extend(names),
                None => images.push(self.image(names, manifest)?),
            }
        }
        for image in &mut images {
            image.names.sort_by_key(ToString::to_string);
            image.names.dedup();
        }
        Ok(images)
    }

    /// The manifest of our platform that `digest` names, directly or as an index.
    fn manifest(&self, digest: &Digest) -> Result<Manifest, ArchiveError> {
        match Document::parse(&self.blob(digest, MANIFEST_BYTES_MAX)?)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(entries) => {
                let ours = select(&entries)?;
                match Document::parse(&self.blob(&ours.digest, MANIFEST_BYTES_MAX)?)? {
                    Document::Manifest(manifest) => Ok(manifest),
                    Document::Index(_) => {
                        let what = "an index of indexes".to_owned();
                        Err(ManifestError::Unsupported { what }.into())
                    }
                }
            }
        }
    }

    /// An image of `docker save`'s older form, which has no manifest: it gets the one a push of it
    /// could have.
    fn saved_image(&self, saved: &SavedImage) -> Result<ArchivedImage, ArchiveError> {
        #[derive(Serialize)]
        #[serde(rename_all = "camelCase")]
        struct NewManifest {
            schema_version: u32,
            media_type: &'static str,
            config: Descriptor,
            layers: Vec<Descriptor>,
        }
        let descriptor = |path: &str, media_type: &str| {
            let missing = || ArchiveError::Missing { what: path.to_owned() };
            let (digest, size_bytes) = self.resolve(path).ok_or_else(missing)?;
            let media_type = media_type.to_owned();
            let annotations = BTreeMap::new();
            Ok(Descriptor { media_type, digest, size_bytes, platform: None, annotations })
        };
        let layer = |path: &String| descriptor(path, "application/vnd.oci.image.layer.v1.tar");
        let manifest = NewManifest {
            schema_version: 2,
            media_type: "application/vnd.oci.image.manifest.v1+json",
            config: descriptor(&saved.config, "application/vnd.oci.image.config.v1+json")?,
            layers: saved.layers.iter().map(layer).collect::<Result<_, ArchiveError>>()?,
        };
        let bytes = serde_json::to_vec(&manifest).map_err(ManifestError::Json)?;
        let Document::Manifest(manifest) = Document::parse(&bytes)? else {
            return Err(ArchiveError::NotAnArchive);
        };
        self.blobs.put(&bytes, &self.lease)?;
        self.image(saved.names()?, manifest)
    }

    fn image(
        &self,
        names: Vec<Reference>,
        manifest: Manifest,
    ) -> Result<ArchivedImage, ArchiveError> {
        if let Some(blob) = manifest.blobs().find(|blob| !self.blobs.has(blob)) {
            return Err(ArchiveError::Missing { what: blob.digest.to_string() });
        }
        let configuration = self.blob(&manifest.config.digest, CONFIG_BYTES_MAX)?;
        let configuration = Configuration::parse(&configuration, manifest.layers.len())?;
        Ok(ArchivedImage { names, manifest, configuration })
    }

    /// The blob behind a path of the archive, through its links.
    fn resolve(&self, path: &str) -> Option<(Digest, u64)> {
        let mut path = clean(path.as_bytes(), "")?;
        for _ in 0..HOPS_MAX {
            match self.items.get(&path)? {
                Item::File { digest, size_bytes } => return Some((*digest, *size_bytes)),
                Item::Link { target } => path.clone_from(target),
            }
        }
        None
    }

    fn document(&self, path: &str, bytes_max: u64) -> Result<Option<Vec<u8>>, ArchiveError> {
        self.resolve(path).map(|(digest, _)| self.blob(&digest, bytes_max)).transpose()
    }

    fn blob(&self, digest: &Digest, bytes_max: u64) -> Result<Vec<u8>, ArchiveError> {
        let missing = |_| ArchiveError::Missing { what: digest.to_string() };
        let mut bytes = Vec::new();
        let file = self.blobs.read(digest).map_err(missing)?;
        let read = file.take(bytes_max + 1).read_to_end(&mut bytes)?;
        if read as u64 > bytes_max {
            return Err(ArchiveError::DocumentTooLarge { digest: *digest });
        }
        Ok(bytes)
    }
}

/// One image of docker's `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

impl SavedImage {
    fn names(&self) -> Result<Vec<Reference>, ArchiveError> {
        let tags = self.repo_tags.iter().flatten();
        let name = |tag: &String| tag.parse().map_err(|_| ArchiveError::Name { name: tag.clone() });
        tags.map(name).collect()
    }
}

/// The name an index gives an image: containerd's is whole; OCI's may be a bare tag, which names
/// nothing.
fn name_of(entry: &Descriptor) -> Option<Reference> {
    let annotation = |key: &str| entry.annotations.get(key).map(String::as_str);
    let whole = annotation("io.containerd.image.name");
    let either = annotation("org.opencontainers.image.ref.name");
    let named = whole.or_else(|| either.filter(|name| name.contains(['/', ':'])));
    named?.parse().ok()
}

/// A path within the archive, cleaned. `None` if it is none of those we look for: not UTF-8, too
/// long, or out of the archive.
fn clean(path: &[u8], folder: &str) -> Option<String> {
    let path = str::from_utf8(path).ok()?;
    let absolute = path.starts_with('/');
    let start = folder.split('/').filter(|_| !absolute);
    let mut parts = Vec::new();
    for part in start.chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    let cleaned = parts.join("/");
    (!cleaned.is_empty() && cleaned.len() <= PATH_BYTES_MAX).then_some(cleaned)
}

/// A file that claims a digest must have it.
fn check_name(path: &str, found: Digest) -> Result<(), ArchiveError> {
    match path.strip_prefix("blobs/sha256/").map(Digest::from_hex) {
        Some(Ok(expected)) if expected != found => {
            Err(BlobError::Mismatch { expected, found }.into())
        }
        _ => Ok(()),
    }
}

/// Why an archive gives no images.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It has neither an index nor docker's manifest.
    #[error("Not an image archive: neither index.json nor manifest.json names an image")]
    NotAnArchive,
    /// Something it refers to is not in it.
    #[error("Archive lacks {what}")]
    Missing {
        /// A path or digest.
        what: String,
    },
    /// A name in it is none.
    #[error("Archive has no image of the name {name:?}")]
    Name {
        /// The name.
        name: String,
    },
    /// Its images have no names, and none was given.
    #[error("Archive does not name its image: a name must be given")]
    Unnamed,
    /// A name was given, but for which image?
    #[error("Archive has {images} images: one name is not enough")]
    Several {
        /// How many.
        images: usize,
    },
    /// It is larger than an image may be.
    #[error("Archive is larger than {bytes_max} bytes")]
    TooLarge {
        /// The limit.
        bytes_max: u64,
    },
    /// One of its documents is longer than any real one.
    #[error("Archive has a too large document {digest}")]
    DocumentTooLarge {
        /// Which.
        digest: Digest,
    },
    /// It has too many files.
    #[error("Archive has more than {FILES_MAX} files")]
    TooManyFiles,
    /// Its documents.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The store.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// The archive's form.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The stream.
    #[error("Failed to read archive")]
    Io(#[from] io::Error),
    /// Records.
    #[error(transparent)]
    Host(#[from] ImagesError),
}

#[cfg(test)]
mod tests;
