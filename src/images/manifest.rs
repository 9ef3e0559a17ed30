//! The documents that describe an image: manifest, index, configuration.
//!
//! Both families of media types are read, OCI's (image specification 1.1) and Docker's (image
//! manifest version 2, schema 2): the fields we obey are the same. All of it comes from strangers,
//! so every digest is checked to be one and every list is bounded.

use std::collections::BTreeMap;
use std::iter;

use serde::{Deserialize, Serialize};

use crate::images::config::ImageConfig;
use crate::images::digest::Digest;
use crate::images::layers::LAYERS_MAX;

/// Longest manifest or index: what registries accept.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// Longest configuration.
pub const CONFIG_BYTES_MAX: u64 = 8 << 20;

/// Most bytes of environment, arguments and labels kept of a configuration.
const CONFIG_TEXT_BYTES_MAX: usize = 1 << 20;

/// The platform of our guests.
pub const PLATFORM: &str = "linux/amd64";

/// A reference to content, with what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Its name.
    pub digest: Digest,
    /// Its length.
    #[serde(rename = "size")]
    pub size_bytes: u64,
    /// In an index: what runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// In the index of an archive: its name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What runs an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// Architecture.
    #[serde(default)]
    pub architecture: String,
    /// Of the architecture; empty is the plain one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// What a registry or an archive answers to a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// One image per platform.
    Index(Vec<Descriptor>),
}

/// One image: its configuration and layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Of the bytes it was read from.
    pub digest: Digest,
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, lowest first.
    pub layers: Vec<Descriptor>,
}

impl Manifest {
    /// Bytes of layers and configuration, as the manifest says.
    pub fn packed_bytes(&self) -> u64 {
        let sizes = self.blobs().map(|blob| blob.size_bytes);
        sizes.fold(0, u64::saturating_add)
    }

    /// Configuration and layers.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        iter::once(&self.config).chain(&self.layers)
    }
}

/// A manifest or an index, before it is known which.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AnyDocument {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// Reads a manifest or an index.
    ///
    /// # Errors
    ///
    /// [`ManifestError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let document: AnyDocument = serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        let unsupported = |what: &str| ManifestError::Unsupported { what: what.to_owned() };
        if document.schema_version != 2 {
            return Err(unsupported("schema version 1"));
        }
        match document {
            AnyDocument { manifests: Some(manifests), config: None, layers: None, .. } => {
                Ok(Self::Index(manifests))
            }
            AnyDocument { manifests: None, config: Some(config), layers, .. } => {
                let layers = layers.unwrap_or_default();
                if !is_image_config(&config.media_type) {
                    return Err(unsupported(&config.media_type));
                }
                if let Some(layer) = layers.iter().find(|layer| !is_layer(&layer.media_type)) {
                    return Err(unsupported(&layer.media_type));
                }
                if layers.len() > LAYERS_MAX {
                    return Err(ManifestError::TooManyLayers { layers: layers.len() });
                }
                Ok(Self::Manifest(Manifest { digest: Digest::of(bytes), config, layers }))
            }
            AnyDocument { media_type, .. } => Err(unsupported(&media_type)),
        }
    }
}

fn is_image_config(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
    )
}

/// Tar layers, whatever compresses them: that is seen from the bytes.
fn is_layer(media_type: &str) -> bool {
    let (kind, compression) = match media_type.split_once('+') {
        Some((kind, compression)) => (kind, compression),
        None => (media_type, ""),
    };
    matches!(
        (kind, compression),
        ("application/vnd.oci.image.layer.v1.tar", "" | "gzip" | "zstd")
            | ("application/vnd.oci.image.layer.nondistributable.v1.tar", "" | "gzip" | "zstd")
            | (
                "application/vnd.docker.image.rootfs.diff.tar"
                    | "application/vnd.docker.image.rootfs.diff.tar.gzip"
                    | "application/vnd.docker.image.rootfs.diff.tar.zstd",
                ""
            )
    )
}

/// Picks our platform from an index: the plain architecture first, then its lowest variant.
///
/// # Errors
///
/// [`ManifestError::Platform`] naming what there is.
pub fn select(manifests: &[Descriptor]) -> Result<&Descriptor, ManifestError> {
    let ours = manifests.iter().filter(|entry| {
        entry.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
    });
    let variant = |entry: &&Descriptor| entry.platform.as_ref().map(|p| p.variant.clone());
    ours.min_by_key(variant).ok_or_else(|| ManifestError::Platform {
        available: manifests.iter().filter_map(|entry| entry.platform.as_ref()).map(name).collect(),
    })
}

fn name(platform: &Platform) -> String {
    let Platform { os, architecture, variant } = platform;
    match variant.as_str() {
        "" => format!("{os}/{architecture}"),
        variant => format!("{os}/{architecture}/{variant}"),
    }
}

/// An image's configuration, as far as we obey it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// For its processes.
    pub config: ImageConfig,
    /// Digest of each layer unpacked, lowest first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
struct AnyConfiguration {
    #[serde(flatten)]
    platform: Platform,
    config: Option<RawConfig>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Vec<Digest>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct RawConfig {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    working_dir: Option<String>,
    user: Option<String>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
}

impl Configuration {
    /// Reads the configuration of an image with `layers` layers.
    ///
    /// # Errors
    ///
    /// [`ManifestError`], also if the image is for another platform.
    pub fn parse(bytes: &[u8], layers: usize) -> Result<Self, ManifestError> {
        let document: AnyConfiguration =
            serde_json::from_slice(bytes).map_err(ManifestError::Json)?;
        let platform = document.platform;
        if (platform.os.as_str(), platform.architecture.as_str()) != ("linux", "amd64") {
            return Err(ManifestError::Platform { available: vec![name(&platform)] });
        }
        let diff_ids = document.rootfs.diff_ids;
        if diff_ids.len() != layers {
            return Err(ManifestError::LayerCount { layers, diff_ids: diff_ids.len() });
        }
        let raw = document.config.unwrap_or_default();
        let env = raw.env.unwrap_or_default().into_iter().map(|line| match line.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (line, String::new()),
        });
        let config = ImageConfig {
            entrypoint: raw.entrypoint.unwrap_or_default(),
            cmd: raw.cmd.unwrap_or_default(),
            env: env.collect(),
            working_dir: raw.working_dir.unwrap_or_default(),
            user: raw.user.unwrap_or_default(),
            stop_signal: raw.stop_signal.unwrap_or_default(),
            labels: raw.labels.unwrap_or_default(),
        };
        if text_bytes(&config) > CONFIG_TEXT_BYTES_MAX {
            return Err(ManifestError::TooMuchText);
        }
        Ok(Self { config, diff_ids })
    }
}

fn text_bytes(config: &ImageConfig) -> usize {
    let words = config.entrypoint.iter().chain(&config.cmd);
    let pairs = config.env.iter().chain(&config.labels);
    words.map(String::len).sum::<usize>()
        + pairs.map(|(key, value)| key.len() + value.len()).sum::<usize>()
}

/// Why an image's documents are refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or not this document.
    #[error("Malformed image document")]
    Json(#[source] serde_json::Error),
    /// Not an image, or one of a kind we do not run.
    #[error("Unsupported media type {what:?}")]
    Unsupported {
        /// What it is.
        what: String,
    },
    /// Not for our guests.
    #[error("Image has no {PLATFORM}, only {}", available.join(", "))]
    Platform {
        /// What it is for.
        available: Vec<String>,
    },
    /// More layers than any file system stacks.
    #[error("Image has {layers} layers, more than {LAYERS_MAX}")]
    TooManyLayers {
        /// How many.
        layers: usize,
    },
    /// Manifest and configuration do not belong together.
    #[error("Image has {layers} layers but {diff_ids} digests of unpacked ones")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// No process starts with that.
    #[error("Image configuration has more than {CONFIG_TEXT_BYTES_MAX} bytes of text")]
    TooMuchText,
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn descriptor(media_type: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{HEX}","size":7}}"#)
    }

    fn manifest(config: &str, layer: &str) -> String {
        let (config, layer) = (descriptor(config), descriptor(layer));
        format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer},{layer}]}}"#)
    }

    const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";

    #[test]
    fn manifests_of_both_families_are_read() {
        for (config, layer) in [
            (OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+zstd"),
            (OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar"),
            (
                "application/vnd.docker.container.image.v1+json",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ),
        ] {
            let text = manifest(config, layer);
            let Ok(Document::Manifest(manifest)) = Document::parse(text.as_bytes()) else {
                panic!("{text}")
            };
            assert_eq!(manifest.layers.len(), 2);
            assert_eq!(manifest.packed_bytes(), 21);
            assert_eq!(manifest.digest, Digest::of(text.as_bytes()));
        }
    }

    #[test]
    fn what_is_no_image_is_refused_with_its_type() {
        let refused = |text: String| Document::parse(text.as_bytes()).unwrap_err().to_string();

        assert_eq!(
            refused(manifest("application/vnd.cncf.helm.config.v1+json", "x")),
            "Unsupported media type \"application/vnd.cncf.helm.config.v1+json\""
        );
        assert_eq!(
            refused(manifest(OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted")),
            "Unsupported media type \"application/vnd.oci.image.layer.v1.tar+gzip+encrypted\""
        );
        assert_eq!(
            refused(r#"{"schemaVersion":1,"fsLayers":[]}"#.to_owned()),
            "Unsupported media type \"schema version 1\""
        );
        assert_eq!(refused("[]".to_owned()), "Malformed image document");
        let climbing = manifest(OCI_CONFIG, "x").replace(HEX, "../../../etc/passwd");
        assert_eq!(refused(climbing), "Malformed image document");
        let layer = descriptor("application/vnd.oci.image.layer.v1.tar");
        let layers = vec![layer.as_str(); 129].join(",");
        let config = descriptor(OCI_CONFIG);
        assert_eq!(
            refused(format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layers}]}}"#)),
            "Image has 129 layers, more than 128"
        );
    }

    fn entry(os: &str, architecture: &str, variant: &str, size_bytes: u64) -> Descriptor {
        let platform = Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
        };
        Descriptor {
            media_type: String::new(),
            digest: HEX.parse().unwrap_or(Digest::of(b"")),
            size_bytes,
            platform: Some(platform),
            annotations: BTreeMap::new(),
        }
    }

    #[test]
    fn the_plain_variant_of_our_platform_is_picked() {
        let index = [
            entry("windows", "amd64", "", 1),
            entry("linux", "arm64", "v8", 2),
            entry("linux", "amd64", "v3", 3),
            entry("linux", "amd64", "", 4),
            entry("unknown", "unknown", "", 5),
        ];

        assert_eq!(select(&index).unwrap().size_bytes, 4);
        assert_eq!(select(&index[..3]).unwrap().size_bytes, 3);
    }

    #[test]
    fn a_missing_platform_names_what_there_is() {
        let index = [entry("linux", "arm64", "v8", 1), entry("windows", "amd64", "", 2)];

        assert_eq!(
            select(&index).unwrap_err().to_string(),
            "Image has no linux/amd64, only linux/arm64/v8, windows/amd64"
        );
    }

    #[test]
    fn a_configuration_gives_what_processes_need() {
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","rootfs":{{"type":"layers",
            "diff_ids":["sha256:{HEX}"]}},"config":{{"Entrypoint":["/bin/sh","-c"],"Cmd":null,
            "Env":["PATH=/bin:/x","EMPTY=","ODD","A=b=c"],"WorkingDir":"/srv","User":"app:1",
            "StopSignal":"SIGQUIT","Labels":{{"k":"v"}}}}}}"#
        );

        let parsed = Configuration::parse(text.as_bytes(), 1).unwrap();

        assert_eq!(parsed.config.entrypoint, ["/bin/sh", "-c"]);
        assert_eq!(parsed.config.cmd, [""; 0]);
        let env: Vec<_> = parsed.config.env.iter().map(|(k, v)| format!("{k}:{v}")).collect();
        assert_eq!(env, ["A:b=c", "EMPTY:", "ODD:", "PATH:/bin:/x"]);
        assert_eq!(parsed.config.user, "app:1");
        assert_eq!(parsed.diff_ids, [HEX].map(|hex| Digest::from_hex(hex).unwrap()));
        assert!(matches!(
            Configuration::parse(text.as_bytes(), 2),
            Err(ManifestError::LayerCount { layers: 2, diff_ids: 1 })
        ));
        let arm = text.replace("amd64", "arm64");
        assert_eq!(
            Configuration::parse(arm.as_bytes(), 1).unwrap_err().to_string(),
            "Image has no linux/amd64, only linux/arm64"
        );
    }
}
