//! The server: opens what lies in its data folder, listens, and closes in reverse.
//!
//! It runs by itself (`ovum serve`), or for a while inside a command that found none (`ovum run`).
//! Either way it also listens at a socket in the folder, where this host's commands find it.
//!
//! ```text
//! lock          held by the one server of this folder
//! api.sock      where it answers, for whoever may enter the folder
//! jwt_secret    what tokens are signed with, unless it came from outside
//! records.db    instances and images
//! instances/    a folder for each
//! overlays/     templates of writable layers
//! volumes/      a folder for each
//! blobs/ images/ tmp/   what images are made of, and their root disks
//! ```

use std::fmt::Debug;
use std::fs::{self, File};
use std::future::IntoFuture;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use axum::serve::{Listener, ListenerExt};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::{TcpListener, UnixListener};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::api::instances::texts::Texts;
use crate::api::{self, App};
use crate::config::{Config, HotplugConfig, NetworkConfig};
use crate::control::HotplugPolicy;
use crate::devices::{Devices, DevicesSpec};
use crate::disks::Disks;
use crate::fleet::{CGROUP_ROOT, Cgroups, Fleet, KernelTexts, Nursery};
use crate::images::records::Records;
use crate::images::{Images, ImagesSpec, Limits};
use crate::instances::{Instances, InstancesSpec};
use crate::network::{Network, NetworkSpec};
use crate::resources::{Configured, Ratios, Resources, ResourcesSpec};
use crate::store::{self, Store};
use crate::token::Secret;
use crate::volumes::{Volumes, VolumesSpec};

/// How long requests under way may take to end once the server is told to.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// The socket in the data folder.
const SOCKET: &str = "api.sock";

/// Where the server of `data_dir` answers this host's commands.
pub fn socket(data_dir: &Path) -> PathBuf {
    data_dir.join(SOCKET)
}

/// Everything of a data folder, open.
#[derive(Debug)]
pub struct Opened {
    /// What the API works with.
    pub app: App,
    door: Door,
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
        // From here on whoever knocks is heard, and answered once everything is open.
        let door = Door::open(socket(dir))?;
        let secret = match &config.jwt_secret {
            Some(secret) => Secret::new(secret),
            None => Secret::load_or_create(dir)?,
        };
        let records = dir.join("records.db");
        let store = Store::open(&records)?;
        let images = open_images(config, &records).await?;
        let resources = Resources::new(resources_spec(config));
        let volumes = Volumes::open(VolumesSpec {
            dir: dir.join("volumes"),
            store: store.clone(),
            resources: resources.clone(),
            free_bytes_min: config.images.free_bytes_min,
            total_gib_max: config.capacity.volumes_bytes_max.map(|bytes| bytes >> 30),
        })?;
        let devices = Devices::open(DevicesSpec { root: "/".into(), store: store.clone() })?;
        let instances = Instances::open(InstancesSpec {
            dir: dir.join("instances"),
            store,
            images: images.clone(),
            disks: Disks::open(&dir.join("overlays"))?,
            volumes: volumes.clone(),
            devices: devices.clone(),
            resources: resources.clone(),
            network: Network::open(config.network.clone().map(|NetworkConfig { subnet, dns }| {
                NetworkSpec { subnet, dns, owner: dir.clone() }
            })),
            fleet: Fleet {
                nursery: open_nursery().await,
                kvm: config.kvm.clone(),
                kernel: config.kernel.clone(),
                kernel_texts: config.shares_kernel.then(KernelTexts::default),
                groups: open_groups(dir),
            },
            agent: config.agent.clone(),
            hotplug: hotplug(config.hotplug),
        })
        .await?;
        let removed = images.collect(|digest| instances.uses(digest)).await?;
        if removed > 0 {
            tracing::info!(removed, "Removed root disks that nobody needs any more");
        }
        let limits = config.limits;
        let texts = Texts::default();
        let app = App { images, instances, volumes, devices, resources, secret, limits, texts };
        Ok(Self { app, door, _lock: lock })
    }

    /// Leaves instances running, and stops everything else.
    pub async fn close(self) {
        self.app.instances.close().await;
        self.app.devices.close().await;
        self.app.volumes.close().await;
        self.app.images.close().await;
    }
}

/// A server that listens.
#[derive(Debug)]
pub struct Running {
    opened: Opened,
    serving: JoinSet<anyhow::Result<()>>,
    closing: CancellationToken,
}

impl Running {
    /// Opens the data folder of `config` and listens at its socket, and at `addresses`.
    ///
    /// # Errors
    ///
    /// What keeps the server from starting; [`InUse`] if there is another.
    pub async fn start(config: &Config, addresses: &[SocketAddr]) -> anyhow::Result<Self> {
        raise_file_limit();
        let mut opened = Opened::open(config).await?;
        let mut listeners = Vec::new();
        for &address in addresses {
            let listener = TcpListener::bind(address).await;
            listeners.push(listener.with_context(|| format!("Failed to listen at {address}"))?);
        }
        let closing = CancellationToken::new();
        let router = api::router(opened.app.clone());
        let mut serving = JoinSet::new();
        if let Some(listener) = opened.door.listener.take() {
            serving.spawn(serve_at(listener, router.clone(), closing.clone()));
        }
        for listener in listeners {
            if let Ok(address) = listener.local_addr() {
                tracing::info!(%address, "Listening");
            }
            // Small messages follow each other: none of them shall wait for the client to
            // acknowledge the one before, which it does after 40 ms.
            let listener = listener.tap_io(|stream| {
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::warn!(%error, "A client will be answered slowly");
                }
            });
            serving.spawn(serve_at(listener, router.clone(), closing.clone()));
        }
        Ok(Self { opened, serving, closing })
    }

    /// What tokens are signed with.
    pub fn secret(&self) -> &Secret {
        &self.opened.app.secret
    }

    /// Ends requests under way; instances run on.
    pub async fn close(mut self) {
        self.closing.cancel();
        // Logs that are followed end here; other requests get a moment.
        self.opened.close().await;
        let end = async { while self.serving.join_next().await.is_some() {} };
        let _late = time::timeout(CLOSE_TIMEOUT, end).await;
    }
}

/// Serves until told to stop (SIGTERM or SIGINT). Instances run on.
///
/// # Errors
///
/// What keeps the server from starting, or from listening on.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    let mut running = Running::start(&config, &config.listen).await?;
    let mut terminate = signal(SignalKind::terminate()).context("Failed to await SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("Failed to await SIGINT")?;
    tokio::select! {
        Some(served) = running.serving.join_next() => return served?,
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("Closing; instances run on");
    running.close().await;
    Ok(())
}

/// Serves whoever comes to `listener` until `closing`.
async fn serve_at<L>(listener: L, router: Router, closing: CancellationToken) -> anyhow::Result<()>
where
    L: Listener<Addr: Debug>,
{
    let closed = closing.cancelled_owned();
    let serving = axum::serve(listener, router).with_graceful_shutdown(closed);
    serving.into_future().await.context("Failed to serve on")
}

/// The socket in the data folder. It goes when the server does.
#[derive(Debug)]
struct Door {
    path: PathBuf,
    listener: Option<UnixListener>,
}

impl Door {
    /// Listens at `path`. The caller holds the folder's lock, so whoever listened there is gone.
    fn open(path: PathBuf) -> anyhow::Result<Self> {
        let failed = || format!("Failed to listen at {}", path.display());
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(failed);
            }
            _removed => {}
        }
        let listener = UnixListener::bind(&path).with_context(failed)?;
        Ok(Self { path, listener: Some(listener) })
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        // One that stays answers nobody, and the next server removes it.
        let _ = fs::remove_file(&self.path);
    }
}

/// Workers are forks of this program: `/proc/self/exe` stays the same after an upgrade on disk.
async fn open_nursery() -> Nursery {
    let nursery = Nursery::new(PathBuf::from("/proc/self/exe"));
    nursery.prepare().await;
    nursery
}

/// Where workers get their share of the host. One that has no such thing works without.
fn open_groups(dir: &Path) -> Option<Cgroups> {
    Cgroups::open(Path::new(CGROUP_ROOT), dir)
        .inspect_err(|error| tracing::info!(%error, "Workers have no control groups"))
        .ok()
}

fn hotplug(config: HotplugConfig) -> HotplugPolicy {
    match config {
        HotplugConfig::Boot => HotplugPolicy::Boot,
        HotplugConfig::Demand { quiet } => {
            HotplugPolicy::Demand { quiet_ms: u32::try_from(quiet.as_millis()).unwrap_or(u32::MAX) }
        }
    }
}

fn resources_spec(config: &Config) -> ResourcesSpec {
    let (dir, capacity) = (&config.data_dir, &config.capacity);
    ResourcesSpec {
        data_dir: dir.clone(),
        images_dir: dir.join("images"),
        blobs_dir: dir.join("blobs"),
        ratios: Ratios {
            cpu: capacity.cpu_ratio,
            memory: capacity.memory_ratio,
            disk: capacity.disk_ratio,
            network: capacity.network_ratio,
            disk_io: capacity.disk_io_ratio,
        },
        configured: Configured {
            disk_bytes: capacity.disk_bytes,
            network_bps: capacity.network_bps,
            disk_io_bps: capacity.disk_io_bps,
        },
    }
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

/// There is one server for each data folder.
#[derive(Debug, thiserror::Error)]
#[error("Data folder {dir} is in use by another server", dir = dir.display())]
pub struct InUse {
    /// Which folder.
    pub dir: PathBuf,
}

/// Takes the folder for this process, however it ends.
fn lock(dir: &Path) -> anyhow::Result<File> {
    let path = dir.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path);
    let file = file.with_context(|| format!("Failed to open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(InUse { dir: dir.to_owned() }.into()),
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
