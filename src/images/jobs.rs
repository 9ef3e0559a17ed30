//! The work: download what is missing, then make the root disk. One task per digest.

use tokio::task::spawn_blocking;
use tokio_util::sync::CancellationToken;

use crate::causes::chain;
use crate::images::Images;
use crate::images::digest::Digest;
use crate::images::image::{ImageStatus, Progress};
use crate::images::layers::{MergeError, Watch};
use crate::images::manifest::Manifest;
use crate::images::reference::Reference;
use crate::images::registry::{Auth, Credentials, RegistryError};
use crate::images::roots::{ConvertError, Roots};
use crate::images::shelf::Started;

/// Where to get the content of an image.
#[derive(Debug, Clone)]
pub(super) struct Pull {
    pub(super) name: Reference,
    pub(super) auth: AuthSource,
}

/// Where to get the login.
#[derive(Debug, Clone)]
pub(super) enum AuthSource {
    /// It came with the request.
    Given(Credentials),
    /// From the docker configuration of the server's user.
    Host,
}

impl AuthSource {
    /// The login for the registry of `name`.
    pub(super) async fn auth(&self, name: &Reference) -> Result<Auth, RegistryError> {
        match self {
            Self::Given(credentials) => Ok(Auth::As(credentials.clone())),
            Self::Host => {
                let name = name.clone();
                let asking = spawn_blocking(move || Auth::of_docker_config(&name));
                asking.await.expect("reading the docker configuration does not panic")
            }
        }
    }
}

impl Images {
    /// Starts tasks for waiting jobs as far as there is room.
    pub(super) fn start_jobs(&self) {
        while !self.inner.closing.is_cancelled() {
            let Some(started) = self.shelf().start(self.inner.spec.jobs_max) else { return };
            let images = self.clone();
            self.inner.tasks.spawn(async move { images.run_job(started).await });
        }
    }

    async fn run_job(self, job: Started) {
        let Started { id, digest, pull, cancel } = job;
        let result = self.build(id, digest, pull, cancel.clone()).await;
        let outcome = match result {
            _ if cancel.is_cancelled() => None,
            Ok(size_bytes) => {
                tracing::info!(%digest, size_bytes, "image is ready");
                Some(Ok(size_bytes))
            }
            Err(error) => {
                let why = chain(&error);
                tracing::warn!(%digest, why, "image failed");
                Some(Err(why))
            }
        };
        let changed = self.shelf().finish(id, &digest, outcome);
        for record in changed {
            // The row says unfinished, which is safe: the next server looks again.
            if let Err(error) = self.keep(&record) {
                tracing::error!(name = record.name, error = chain(&error), "image row not kept");
            }
        }
        self.start_jobs();
    }

    async fn build(
        &self,
        id: u64,
        digest: Digest,
        pull: Option<Pull>,
        cancel: CancellationToken,
    ) -> Result<u64, BuildError> {
        let blobs = self.inner.blobs.clone();
        let looking = spawn_blocking(move || {
            let manifest = Roots::manifest(&blobs, &digest)?;
            let is_complete = manifest.blobs().all(|blob| blobs.has(blob));
            Ok::<_, ConvertError>((manifest, is_complete))
        });
        let (manifest, is_complete) = looking.await.expect("reading a manifest does not panic")?;
        if !is_complete {
            let pull = pull.ok_or(BuildError::ContentGone)?;
            let download = self.download(id, &manifest, pull);
            match cancel.run_until_cancelled(download).await {
                Some(result) => result?,
                None => return Err(BuildError::Cancelled),
            }
        }
        self.shelf().advance(id, &digest, ImageStatus::Converting, None);
        let (roots, blobs) = (self.inner.roots.clone(), self.inner.blobs.clone());
        let unpacked_bytes_max = self.inner.spec.limits.unpacked_bytes_max;
        let converting =
            spawn_blocking(move || roots.convert(&manifest, &blobs, unpacked_bytes_max, &cancel));
        match converting.await.expect("layers are input: they do not panic") {
            Err(ConvertError::Merge(MergeError::Cancelled)) => Err(BuildError::Cancelled),
            result => Ok(result?),
        }
    }

    async fn download(&self, id: u64, manifest: &Manifest, pull: Pull) -> Result<(), BuildError> {
        let total_bytes = manifest.packed_bytes();
        let tell = |done_bytes| {
            let progress = Some(Progress { done_bytes, total_bytes });
            self.shelf().advance(id, &manifest.digest, ImageStatus::Pulling, progress);
        };
        tell(0);
        let auth = pull.auth.auth(&pull.name).await?;
        let registry = self.registry(&pull.name, auth)?;
        Ok(registry.download(manifest, &self.inner.blobs, tell).await?)
    }
}

impl Watch for CancellationToken {
    fn is_cancelled(&self) -> bool {
        self.is_cancelled()
    }
}

/// Why an image did not become ready.
#[derive(Debug, thiserror::Error)]
enum BuildError {
    #[error("Cancelled")]
    Cancelled,
    #[error("Its layers are not on this host any more: load or pull it again")]
    ContentGone,
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Convert(#[from] ConvertError),
}
