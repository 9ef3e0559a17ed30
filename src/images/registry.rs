//! Pulls one image from its registry (OCI distribution specification 1.1, "Pull").
//!
//! [`Registry::resolve`] asks for the manifest of our platform and the configuration, both small;
//! [`Registry::download`] streams the blobs that are missing into the store, several at once,
//! each digested as it comes. A `Registry` is made for one pull: credentials and tokens die with
//! it and are never seen by another one.
//!
//! Everything a registry sends is bounded, and an error says which kind it is, because callers act
//! on that: a name that does not exist, a refused login, a rate limit, no network, wrong bytes.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use oci_client::errors::{DigestError, OciDistributionError};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use crate::images::blobs::{BlobError, Blobs};
use crate::images::digest::Digest;
use crate::images::manifest::{
    CONFIG_BYTES_MAX, Configuration, Descriptor, Document, MANIFEST_BYTES_MAX, Manifest,
    ManifestError, select,
};
use crate::images::reference::Reference;
use crate::images::registry::connection::Connection;

mod connection;
mod credentials;

pub use credentials::{Auth, Credentials};

/// Blobs downloaded at the same time.
const BLOBS_AT_ONCE: usize = 4;

/// Chunks between the network and the disk, per blob: some hundred KiB.
const CHUNKS_MAX: usize = 16;

/// Tries to resolve a name. Someone waits for the answer.
const RESOLVE_TRIES: u32 = 2;

/// Tries to download a blob. Nobody waits.
const DOWNLOAD_TRIES: u32 = 6;

/// Pause before the second try; doubles with each further one. Tests fail on purpose and often.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 500 });

/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_secs(15);

/// Longest time to resolve a name: clients give up on the whole request after a minute.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(45);

/// A registry, for one pull of one reference.
#[derive(Debug)]
pub struct Registry {
    connection: Connection,
    name: Reference,
}

/// What a reference stands for.
#[derive(Debug)]
pub struct Resolved {
    /// The manifest of our platform.
    pub manifest: Manifest,
    /// Its bytes.
    pub manifest_bytes: Vec<u8>,
    /// The configuration.
    pub configuration: Configuration,
    /// Its bytes.
    pub configuration_bytes: Vec<u8>,
}

impl Registry {
    /// Prepares to pull `name`. Plain HTTP is spoken to loopback hosts and those of
    /// `insecure_registries` only.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Setup`].
    pub fn new(
        name: &Reference,
        auth: Auth,
        insecure_registries: &[String],
    ) -> Result<Self, RegistryError> {
        let connection = Connection::new(name, auth, insecure_registries)?;
        Ok(Self { connection, name: name.clone() })
    }

    /// Finds the manifest of our platform and its configuration.
    ///
    /// # Errors
    ///
    /// [`RegistryError`].
    pub async fn resolve(&self) -> Result<Resolved, RegistryError> {
        let resolving = retry(RESOLVE_TRIES, || self.try_resolve());
        let Ok(result) = timeout(RESOLVE_TIMEOUT, resolving).await else {
            return Err(RegistryError::TimedOut { host: self.name.host().to_owned() });
        };
        result
    }

    async fn try_resolve(&self) -> Result<Resolved, RegistryError> {
        let digest = self.name.digest();
        let wanted = digest.map_or_else(
            || self.name.tag().unwrap_or_default().to_owned(),
            |digest| digest.to_string(),
        );
        let mut bytes = self.manifest(&wanted, digest).await?;
        let manifest = match Document::parse(&bytes)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(entries) => {
                let digest = select(&entries)?.digest;
                bytes = self.manifest(&digest.to_string(), Some(digest)).await?;
                match Document::parse(&bytes)? {
                    Document::Manifest(manifest) => manifest,
                    Document::Index(_) => {
                        let what = "an index of indexes".to_owned();
                        return Err(ManifestError::Unsupported { what }.into());
                    }
                }
            }
        };
        let configuration_bytes = self.configuration(&manifest.config).await?;
        let configuration = Configuration::parse(&configuration_bytes, manifest.layers.len())?;
        Ok(Resolved { manifest, manifest_bytes: bytes, configuration, configuration_bytes })
    }

    async fn manifest(
        &self,
        reference: &str,
        digest: Option<Digest>,
    ) -> Result<Vec<u8>, RegistryError> {
        let bytes = self.connection.manifest(reference, MANIFEST_BYTES_MAX).await?;
        match (digest, Digest::of(&bytes)) {
            (Some(expected), found) if expected != found => {
                Err(BlobError::Mismatch { expected, found }.into())
            }
            _ => Ok(bytes),
        }
    }

    async fn configuration(&self, config: &Descriptor) -> Result<Vec<u8>, RegistryError> {
        if config.size_bytes > CONFIG_BYTES_MAX {
            return Err(RegistryError::TooLarge { limit_bytes: CONFIG_BYTES_MAX });
        }
        let mut chunks = self.connection.blob(&config.digest).await?;
        let mut bytes = Vec::new();
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(chunk) => bytes.extend_from_slice(&chunk),
                Err(error) if is_mismatch(&error) => break,
                Err(source) => {
                    return Err(RegistryError::Interrupted { digest: config.digest, source });
                }
            }
            if bytes.len() as u64 > CONFIG_BYTES_MAX {
                return Err(RegistryError::TooLarge { limit_bytes: CONFIG_BYTES_MAX });
            }
        }
        let found = Digest::of(&bytes);
        if found != config.digest {
            return Err(BlobError::Mismatch { expected: config.digest, found }.into());
        }
        Ok(bytes)
    }

    /// Downloads the blobs of `manifest` that are not in the store. `on_progress` is told, now and
    /// then, how many bytes of all of them are here.
    ///
    /// # Errors
    ///
    /// [`RegistryError`]; blobs that were complete stay.
    pub async fn download(
        &self,
        manifest: &Manifest,
        blobs: &Blobs,
        on_progress: impl Fn(u64) + Send + Sync,
    ) -> Result<(), RegistryError> {
        let mut wanted: Vec<&Descriptor> = manifest.blobs().collect();
        wanted.sort_by_key(|blob| blob.digest);
        wanted.dedup_by_key(|blob| blob.digest);
        let progress = Progress { done_bytes: AtomicU64::new(0), tell: &on_progress };
        let store = Store { blobs, writers: TaskTracker::new() };
        let result = stream::iter(wanted.into_iter().map(Ok))
            .try_for_each_concurrent(BLOBS_AT_ONCE, |blob| self.blob(blob, &store, &progress))
            .await;
        // After an error the writers of other blobs are still cleaning up.
        store.writers.close();
        store.writers.wait().await;
        result
    }

    async fn blob<F: Fn(u64)>(
        &self,
        blob: &Descriptor,
        store: &Store<'_>,
        progress: &Progress<'_, F>,
    ) -> Result<(), RegistryError> {
        if store.blobs.has(blob) {
            progress.add(blob.size_bytes);
            return Ok(());
        }
        retry(DOWNLOAD_TRIES, || async {
            let mut counted = Counted { progress, bytes: 0 };
            self.try_blob(blob, store, &mut counted).await?;
            counted.bytes = 0;
            Ok(())
        })
        .await
    }

    /// Streams one blob: this task reads the network, a blocking one digests and writes.
    async fn try_blob<F: Fn(u64)>(
        &self,
        blob: &Descriptor,
        store: &Store<'_>,
        counted: &mut Counted<'_, '_, F>,
    ) -> Result<(), RegistryError> {
        let mut chunks = self.connection.blob(&blob.digest).await?;
        let (sender, mut receiver) = mpsc::channel::<Bytes>(CHUNKS_MAX);
        let (promised, blobs) = (blob.clone(), store.blobs.clone());
        let (whole, mut is_whole) = oneshot::channel();
        let writing = store.writers.spawn_blocking(move || {
            let mut writer = blobs.write(&promised)?;
            while let Some(chunk) = receiver.blocking_recv() {
                writer.push(&chunk)?;
            }
            // The other side went away without saying that this was all.
            if is_whole.try_recv().is_err() {
                return Ok(());
            }
            writer.finish()
        });
        let mut broken = None;
        while let Some(chunk) = chunks.next().await {
            match chunk {
                Ok(chunk) => {
                    counted.add(chunk.len() as u64);
                    // The writer ended: its own error says why.
                    if sender.send(chunk).await.is_err() {
                        break;
                    }
                }
                // All of it came: what is wrong with it the writer says better.
                Err(error) if is_mismatch(&error) => break,
                Err(error) => {
                    broken = Some(error);
                    break;
                }
            }
        }
        if broken.is_none() {
            whole.send(()).ok();
        }
        drop(sender);
        let written = writing.await.expect("writing a blob does not panic");
        match broken {
            Some(source) => Err(RegistryError::Interrupted { digest: blob.digest, source }),
            None => Ok(written?),
        }
    }
}

/// Where blobs go, and who is writing there.
struct Store<'a> {
    blobs: &'a Blobs,
    writers: TaskTracker,
}

/// Bytes of a download, and who wants to know.
struct Progress<'a, F> {
    done_bytes: AtomicU64,
    tell: &'a F,
}

impl<F: Fn(u64)> Progress<'_, F> {
    /// Tells at each MiB.
    fn add(&self, bytes: u64) {
        const STEP_BITS: u32 = 20;
        let before = self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
        let after = before + bytes;
        if before >> STEP_BITS != after >> STEP_BITS {
            (self.tell)(after);
        }
    }
}

/// Bytes of one try, taken back if it fails.
struct Counted<'a, 'b, F> {
    progress: &'a Progress<'b, F>,
    bytes: u64,
}

impl<F: Fn(u64)> Counted<'_, '_, F> {
    fn add(&mut self, bytes: u64) {
        self.bytes += bytes;
        self.progress.add(bytes);
    }
}

impl<F> Drop for Counted<'_, '_, F> {
    fn drop(&mut self) {
        self.progress.done_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Tries again what may pass, with growing pauses.
async fn retry<T, F>(tries: u32, operation: impl Fn() -> F) -> Result<T, RegistryError>
where
    F: Future<Output = Result<T, RegistryError>>,
{
    let mut pause = PAUSE;
    for _ in 1..tries {
        match operation().await {
            Err(error) if error.may_pass() => {
                tracing::debug!(?error, "registry request will be tried again");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
            result => return result,
        }
    }
    operation().await
}

/// Whether a stream ended because its content does not have the digest.
fn is_mismatch(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<DigestError>())
}

/// Why an image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No such repository, tag, digest or blob.
    #[error("Registry {host} has no {what}")]
    NotFound {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// Credentials are missing, wrong or not enough. Registries also say this of repositories that
    /// do not exist.
    #[error("Registry {host} refuses access to {what}")]
    Unauthorised {
        /// The registry.
        host: String,
        /// What was asked for.
        what: String,
    },
    /// Too many requests.
    #[error("Registry {host} limits the rate of requests")]
    RateLimited {
        /// The registry.
        host: String,
    },
    /// No such host, no route, nobody listens, no trust.
    #[error("Registry {host} cannot be reached")]
    Unreachable {
        /// The registry.
        host: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It is there but does not answer.
    #[error("Registry {host} does not answer in time")]
    TimedOut {
        /// The registry.
        host: String,
    },
    /// It answers, but not as a registry.
    #[error("Registry {host} answers {what:?}")]
    Unexpected {
        /// The registry.
        host: String,
        /// What it says.
        what: String,
        /// Whether it is its own fault (5xx).
        is_fault: bool,
    },
    /// The connection broke while content was on its way.
    #[error("Download of {digest} was interrupted")]
    Interrupted {
        /// Of what.
        digest: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A document is longer than any real one.
    #[error("Registry sent a document longer than {limit_bytes} bytes")]
    TooLarge {
        /// The limit.
        limit_bytes: u64,
    },
    /// The content is wrong, truncated, or does not fit the disk.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// It is no image, or not for our platform.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The docker configuration of the server's user has credentials that cannot be used.
    #[error("Failed to get credentials for {host}: {why}")]
    Credentials {
        /// The registry.
        host: String,
        /// What the configuration's reader says.
        why: String,
    },
    /// The HTTP client cannot be made.
    #[error("Failed to set up the registry client")]
    Setup(#[source] OciDistributionError),
}

impl RegistryError {
    /// Whether the same request may succeed later.
    fn may_pass(&self) -> bool {
        match self {
            Self::RateLimited { .. }
            | Self::Unreachable { .. }
            | Self::TimedOut { .. }
            | Self::Interrupted { .. }
            | Self::Unexpected { is_fault: true, .. } => true,
            // A proxy may have cut the body; once more is cheap.
            Self::Blob(BlobError::Truncated { .. }) => true,
            Self::NotFound { .. }
            | Self::Unauthorised { .. }
            | Self::Unexpected { is_fault: false, .. }
            | Self::TooLarge { .. }
            | Self::Blob(_)
            | Self::Manifest(_)
            | Self::Credentials { .. }
            | Self::Setup(_) => false,
        }
    }
}

#[cfg(test)]
mod tests;
