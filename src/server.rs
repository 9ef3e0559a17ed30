//! The server: opens what lies in its data folder, listens, and closes in reverse.
//!
//! ```text
//! lock          held by the one server of this folder
//! jwt_secret    what tokens are signed with, unless it came from outside
//! records.db    instances and images
//! instances/    a folder for each
//! overlays/     templates of writable layers
//! blobs/ images/ tmp/   what images are made of, and their root disks
//! ```

use std::fs::{self, File};
use std::future::IntoFuture;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use axum::Router;
use futures_util::future::try_join_all;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::api::{self, App};
use crate::config::Config;
use crate::disks::Disks;
use crate::fleet::Fleet;
use crate::images::records::Records;
use crate::images::{Images, ImagesSpec, Limits};
use crate::instances::{Instances, InstancesSpec};
use crate::store::{self, Store};
use crate::token::Secret;

/// How long requests under way may take to end once the server is told to.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Everything of a data folder, open.
#[derive(Debug)]
pub struct Opened {
    /// What the API works with.
    pub app: App,
    _lock: File,
}

impl Opened {
    /// Opens the data folder of `config`, made if need be, and takes back what runs there.
    ///
    /// # Errors
    ///
    /// If another server uses the folder, or something in it cannot be used.
    pub async fn open(config: &Config) -> anyhow::Result<Self> {
        let dir = &config.data_dir;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .with_context(|| format!("Failed to create data folder {}", dir.display()))?;
        let lock = lock(dir)?;
        let secret = match &config.jwt_secret {
            Some(secret) => Secret::new(secret),
            None => Secret::load_or_create(dir)?,
        };
        let records = dir.join("records.db");
        let store = Store::open(&records)?;
        let images = open_images(config, &records).await?;
        let instances = Instances::open(InstancesSpec {
            dir: dir.join("instances"),
            store,
            images: images.clone(),
            disks: Disks::open(&dir.join("overlays"))?,
            fleet: Fleet {
                program: PathBuf::from("/proc/self/exe"),
                kvm: config.kvm.clone(),
                kernel: config.kernel.clone(),
            },
            agent: config.agent.clone(),
        })
        .await?;
        let removed = images.collect(|digest| instances.uses(digest)).await?;
        if removed > 0 {
            tracing::info!(removed, "Removed root disks that nobody needs any more");
        }
        let app = App { images, instances, secret, limits: config.limits };
        Ok(Self { app, _lock: lock })
    }

    /// Leaves instances running, and stops everything else.
    pub async fn close(self) {
        self.app.instances.close().await;
        self.app.images.close().await;
    }
}

/// Serves until told to stop (SIGTERM or SIGINT). Instances run on.
///
/// # Errors
///
/// What keeps the server from starting, or from listening on.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    raise_file_limit();
    let opened = Opened::open(&config).await?;
    let closing = CancellationToken::new();
    let router = api::router(opened.app.clone());
    let mut listeners = Vec::new();
    for &address in &config.listen {
        listeners.push(listen(address, router.clone(), closing.clone()).await?);
    }
    let mut terminate = signal(SignalKind::terminate()).context("Failed to await SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("Failed to await SIGINT")?;
    let mut serving = std::pin::pin!(try_join_all(listeners));
    tokio::select! {
        served = &mut serving => return served.map(drop),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("Closing; instances run on");
    closing.cancel();
    // Logs that are followed end here; other requests get a moment.
    opened.close().await;
    let _late = time::timeout(CLOSE_TIMEOUT, serving).await;
    Ok(())
}

/// Listens at `address`; what comes back serves until `closing`.
async fn listen(
    address: SocketAddr,
    router: Router,
    closing: CancellationToken,
) -> anyhow::Result<impl Future<Output = anyhow::Result<()>>> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("Failed to listen at {address}"))?;
    let address = listener.local_addr().unwrap_or(address);
    tracing::info!(%address, "Listening");
    let closed = closing.cancelled_owned();
    let serving = axum::serve(listener, router).with_graceful_shutdown(closed).into_future();
    Ok(async move { serving.await.with_context(|| format!("Failed to serve at {address}")) })
}

async fn open_images(config: &Config, records: &Path) -> anyhow::Result<Images> {
    let records = Records::new(store::connect(records)?).context("Failed to open image records")?;
    let spec = ImagesSpec {
        dir: config.data_dir.clone(),
        insecure_registries: config.images.insecure_registries.clone(),
        jobs_max: config.images.jobs_max,
        limits: Limits {
            packed_bytes_max: config.images.packed_bytes_max,
            unpacked_bytes_max: config.images.unpacked_bytes_max,
            free_bytes_min: config.images.free_bytes_min,
        },
    };
    Ok(Images::open(spec, records).await?)
}

/// Takes the folder for this process, however it ends.
fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("Failed to open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => {
            bail!("Data folder {} is in use by another server", dir.display())
        }
        Err(error) => Err(error).with_context(|| format!("Failed to lock {}", path.display())),
    }
}

/// Each instance costs a handful of descriptors; the usual soft limit of 1024 is for select(2).
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(%error, "Failed to raise the limit of open files");
    }
}
