//! Root disks on this host: `images/<hex>/root.erofs`, one per manifest digest, and beside it what
//! the image says about its processes.
//!
//! A folder is made in `tmp` and appears by one rename, so what has its name is whole.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::images::blobs::{Blobs, sync_parent};
use crate::images::config::ImageConfig;
use crate::images::digest::Digest;
use crate::images::erofs::{self, DataArea};
use crate::images::layers::{Layer, MergeError, Watch, merge};
use crate::images::manifest::{Configuration, Document, Manifest, ManifestError};

/// The root disk.
const ROOT: &str = "root.erofs";

/// The image's configuration.
const CONFIG: &str = "config.json";

/// Bytes of a block in stat(2), whatever the file system's are.
const STAT_BLOCK_BYTES: u64 = 512;

/// The root disks of one data folder. Clones are the same.
#[derive(Debug, Clone)]
pub struct Roots {
    dir: PathBuf,
}

impl Roots {
    /// Opens the folder, made if missing, and removes from it what is no root disk.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(data_dir: &Path) -> io::Result<Self> {
        let roots = Self { dir: data_dir.join("images") };
        fs::create_dir_all(&roots.dir)?;
        for entry in fs::read_dir(&roots.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let digest = name.to_str().and_then(|name| Digest::from_hex(name).ok());
            if digest.is_none_or(|digest| !roots.has(&digest)) {
                remove(&entry.path())?;
            }
        }
        Ok(roots)
    }

    /// Where the root disk of a digest is, or would be.
    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex()).join(ROOT)
    }

    /// Whether it is there.
    pub fn has(&self, digest: &Digest) -> bool {
        self.path(digest).is_file()
    }

    /// Its disk use, in bytes.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] and others.
    pub fn size_bytes(&self, digest: &Digest) -> io::Result<u64> {
        Ok(fs::metadata(self.path(digest))?.blocks() * STAT_BLOCK_BYTES)
    }

    /// Opens it, with the configuration beside it.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::NotFound`] and others.
    pub fn read(&self, digest: &Digest) -> io::Result<(File, ImageConfig)> {
        let file = File::open(self.path(digest))?;
        let config = fs::read(self.dir.join(digest.hex()).join(CONFIG))?;
        Ok((file, serde_json::from_slice(&config)?))
    }

    /// All digests that have one.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn list(&self) -> io::Result<HashSet<Digest>> {
        let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name()));
        let names: Vec<_> = names.collect::<io::Result<_>>()?;
        let digests = names.iter().filter_map(|name| Digest::from_hex(name.to_str()?).ok());
        Ok(digests.collect())
    }

    /// Takes a root disk out of sight, into `tmp`. Its blocks are given back when what comes back
    /// is dropped, which takes a while, and nobody has it open.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn remove(&self, digest: &Digest, tmp: &Path) -> io::Result<tempfile::TempDir> {
        let away = tempfile::Builder::new().prefix("removed-").tempdir_in(tmp)?;
        match fs::rename(self.dir.join(digest.hex()), away.path().join(ROOT)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(away),
            result => result.map(|()| away),
        }
    }

    /// Makes the root disk of a manifest out of its blobs, which are all in the store. Returns its
    /// disk use, in bytes. Blocks, for seconds.
    ///
    /// # Errors
    ///
    /// [`ConvertError`]; nothing is left.
    pub fn convert(
        &self,
        manifest: &Manifest,
        blobs: &Blobs,
        unpacked_bytes_max: u64,
        watch: &dyn Watch,
    ) -> Result<u64, ConvertError> {
        let configuration = fs_read(blobs, &manifest.config.digest)?;
        let configuration = Configuration::parse(&configuration, manifest.layers.len())?;
        let mut layers = Vec::with_capacity(manifest.layers.len());
        for (layer, diff_id) in manifest.layers.iter().zip(&configuration.diff_ids) {
            layers.push(Layer { blob: blobs.read(&layer.digest)?, diff_id: *diff_id });
        }
        let folder = tempfile::Builder::new().prefix("image-").tempdir_in(blobs.tmp())?;
        let path = folder.path().join(ROOT);
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        let mut data = DataArea::new(file, blobs.room().clone());
        let tree = merge(layers, unpacked_bytes_max, &mut data, watch)?;
        let file = erofs::finish(data, &tree, uuid(&manifest.digest))?;
        let size_bytes = file.metadata()?.blocks() * STAT_BLOCK_BYTES;
        let config = serde_json::to_vec(&configuration.config).map_err(io::Error::from)?;
        let config_path = folder.path().join(CONFIG);
        fs::write(&config_path, config)?;
        File::open(&config_path)?.sync_all()?;
        sync_parent(&config_path)?;
        let home = self.dir.join(manifest.digest.hex());
        match fs::rename(folder.path(), &home) {
            // Made meanwhile: it is the same.
            Err(_) if self.has(&manifest.digest) => {}
            result => result?,
        }
        sync_parent(&home)?;
        Ok(size_bytes)
    }

    /// The manifest of `digest` in the blob store.
    ///
    /// # Errors
    ///
    /// [`ConvertError`] if it is not there, or no manifest.
    pub fn manifest(blobs: &Blobs, digest: &Digest) -> Result<Manifest, ConvertError> {
        match Document::parse(&fs_read(blobs, digest)?)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => {
                Err(ManifestError::Unsupported { what: "an index".to_owned() }.into())
            }
        }
    }
}

fn fs_read(blobs: &Blobs, digest: &Digest) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    io::copy(&mut blobs.read(digest)?, &mut bytes)?;
    Ok(bytes)
}

fn remove(path: &Path) -> io::Result<()> {
    if fs::symlink_metadata(path)?.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    }
}

/// A UUID of what the image is: version 8 (RFC 9562, 5.8 "UUID Version 8"), of the digest's start.
fn uuid(digest: &Digest) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&digest.as_bytes()[..16]);
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}

/// Why there is no root disk.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The layers.
    #[error(transparent)]
    Merge(#[from] MergeError),
    /// The documents.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// Files.
    #[error("Failed to write root disk")]
    Io(#[from] io::Error),
}
