//! Images made in tests: blobs, manifests and indexes, as OCI layouts on disk.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::images::digest::Digest;
use crate::tar::testing::{TarBuilder, gzip};

/// An OCI image layout in the making: content by digest, and names for some of it.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    pub(crate) blobs: BTreeMap<Digest, Vec<u8>>,
    index: Vec<Value>,
}

impl Layout {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn blob(&mut self, content: impl Into<Vec<u8>>) -> Digest {
        let content = content.into();
        let digest = Digest::of(&content);
        self.blobs.insert(digest, content);
        digest
    }

    fn descriptor(&self, media_type: &str, digest: Digest) -> Value {
        let size = self.blobs[&digest].len();
        json!({ "mediaType": media_type, "digest": digest, "size": size })
    }

    /// An image of gzip layers for `os/arch`. Returns its manifest's digest.
    pub(crate) fn image(&mut self, platform: &str, layers: Vec<TarBuilder>) -> Digest {
        let tars: Vec<Vec<u8>> = layers.into_iter().map(TarBuilder::build).collect();
        let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
        let layers: Vec<Value> = tars
            .iter()
            .map(|tar| {
                let digest = self.blob(gzip(tar));
                self.descriptor("application/vnd.oci.image.layer.v1.tar+gzip", digest)
            })
            .collect();
        let (os, architecture) = platform.split_once('/').unwrap();
        let config = json!({
            "os": os,
            "architecture": architecture,
            "config": { "Entrypoint": ["/init"], "Env": ["PATH=/bin"], "WorkingDir": "/srv" },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob(config.to_string());
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": layers,
        });
        self.blob(manifest.to_string())
    }

    /// An index of images, by platform.
    pub(crate) fn index(&mut self, images: &[(&str, Digest)]) -> Digest {
        let manifests: Vec<Value> = images
            .iter()
            .map(|(platform, digest)| {
                let (os, architecture) = platform.split_once('/').unwrap();
                let mut entry =
                    self.descriptor("application/vnd.oci.image.manifest.v1+json", *digest);
                entry["platform"] = json!({ "os": os, "architecture": architecture });
                entry
            })
            .collect();
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        self.blob(index.to_string())
    }

    /// Names a manifest or index.
    pub(crate) fn name(&mut self, digest: Digest, name: &str) {
        let text = String::from_utf8(self.blobs[&digest].clone()).unwrap();
        let document: Value = serde_json::from_str(&text).unwrap();
        let mut entry = self.descriptor(document["mediaType"].as_str().unwrap(), digest);
        entry["annotations"] = json!({ "org.opencontainers.image.ref.name": name });
        self.index.push(entry);
    }

    /// All files of the layout: path and content.
    pub(crate) fn files(&self) -> Vec<(String, Vec<u8>)> {
        let index = json!({ "schemaVersion": 2, "manifests": self.index });
        let mut files = vec![
            ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
            ("index.json".to_owned(), index.to_string().into_bytes()),
        ];
        files.extend(
            self.blobs.iter().map(|(digest, content)| {
                (format!("blobs/sha256/{}", digest.hex()), content.clone())
            }),
        );
        files
    }

    /// Writes the layout into `dir`.
    pub(crate) fn write(&self, dir: &Path) -> PathBuf {
        for (path, content) in self.files() {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir.to_owned()
    }

    /// The layout as a tar archive.
    pub(crate) fn archive(&self) -> Vec<u8> {
        let tar = TarBuilder::new();
        self.files().into_iter().fold(tar, |tar, (path, content)| tar.file(path, content)).build()
    }
}
