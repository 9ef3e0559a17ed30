//! Instances: create, find, wait, read, stop, start, delete.
//!
//! Each instance has one owner, a task in which all of its changes happen ([`owner`]): events of
//! its worker and orders of clients arrive there, one after the other. Everyone else looks at the
//! latest [`Instance`], which the owner publishes. So a list of all instances asks nobody.
//!
//! ```text
//! create ──> record ──> folder ──> overlay ──> worker ──> owner
//!              each step undone, in reverse, unless all of them worked
//! ```
//!
//! A killed server undoes nothing; the next one does it from the records ([`reconcile`]).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::TryFutureExt;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::{time, try_join};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agent::Agents;
use crate::control::HotplugPolicy;
use crate::devices::{Devices, NewLoan};
use crate::disks::Disks;
use crate::fleet::Fleet;
use crate::images::digest::Digest;
use crate::images::reference::Reference;
use crate::images::{ImageSpec, ImageStatus, Images, ReadyError, RootDisk};
use crate::instances::admission::Admission;
use crate::instances::boot::{Boot, Booted};
use crate::instances::follow::FOLLOWERS_MAX;
use crate::instances::health::Health;
use crate::instances::history::Ending;
use crate::instances::owner::{Done, Order, Owner};
use crate::instances::record::{Phase, ReserveError};
use crate::instances::reservation::Reservation;
use crate::instances::restart::RestartStatus;
use crate::instances::spec::{Command, Expiry, InstanceSpec, Upkeep, VolumeMount};
use crate::instances::state::State;
use crate::logs::watch::FileWatch;
use crate::network::Network;
use crate::resources::Resources;
use crate::store::Store;
use crate::timeline::{Moment, Timeline};
use crate::volumes::Volumes;

pub use crate::network::{Mac, NetworkError};
pub use boot::HEADERS;
pub use errors::{
    BootError, CreateError, DeleteError, EndError, FindError, OpenError, OrderError, RecordError,
    StartError, StopError, UpkeepError, VolumeError,
};

mod admission;
mod boot;
mod diary;
mod disks;
mod errors;
pub mod follow;
mod guest;
pub mod health;
pub mod history;
pub mod inside;
mod owner;
pub mod reclaim;
mod reconcile;
pub mod record;
mod reservation;
pub mod restart;
pub mod spec;
pub mod state;
pub mod stats;

/// How long a creation waits for an image that is not there yet.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Orders that may wait for an owner: clients that hang up leave theirs behind.
const ORDERS_MAX: usize = 32;

/// What instances are made with.
#[derive(Debug)]
pub struct InstancesSpec {
    /// Folder in which each instance gets its own.
    pub dir: PathBuf,
    /// The records.
    pub store: Store,
    /// Where root disks come from.
    pub images: Images,
    /// Where writable layers come from.
    pub disks: Disks,
    /// Where volumes come from.
    pub volumes: Volumes,
    /// Where devices of the host come from.
    pub devices: Devices,
    /// Whom to ask for everything else.
    pub resources: Resources,
    /// Where addresses and ways to guests come from.
    pub network: Network,
    /// Where workers come from.
    pub fleet: Fleet,
    /// The agent's program.
    pub agent: PathBuf,
    /// When guests get the memory beyond what they boot with.
    pub hotplug: HotplugPolicy,
}

/// The instances of this host. Clones are the same instances.
#[derive(Debug, Clone)]
pub struct Instances {
    shared: Arc<Shared>,
}

/// What [`Instances`] and the owners have in common.
#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    store: Store,
    images: Images,
    disks: Disks,
    volumes: Volumes,
    devices: Devices,
    resources: Resources,
    network: Network,
    fleet: Fleet,
    admission: Admission,
    agents: Agents,
    agent: PathBuf,
    hotplug: HotplugPolicy,
    /// The initramfs with the agent, once it was needed.
    base: OnceLock<File>,
    /// By id. Held for moments, never across an await.
    entries: RwLock<BTreeMap<String, Entry>>,
    log_watch: FileWatch,
    /// One for each log that may be followed.
    followers: Arc<Semaphore>,
    owners: TaskTracker,
    closing: CancellationToken,
}

/// One instance to those who are not its owner.
#[derive(Debug, Clone)]
struct Entry {
    view: watch::Receiver<Arc<Instance>>,
    orders: mpsc::Sender<Order>,
}

/// An instance as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// 24 letters and digits.
    pub id: String,
    /// What was asked for.
    pub spec: InstanceSpec,
    /// What the image's name stood for at creation.
    pub digest: Digest,
    /// Its address, if it has a network; the last one, if it has stopped.
    pub address: Option<Ipv4Addr>,
    /// Where it is in its life.
    pub state: State,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When it is to be deleted, if ever.
    pub expires_at: Option<DateTime<Utc>>,
    /// When its vCPUs first ran, if they did.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended, once it has.
    pub stopped_at: Option<DateTime<Utc>>,
    /// How it ended; empty before.
    pub ending: Ending,
    /// What it is at, and since when.
    pub phase: (&'static str, Option<DateTime<Utc>>),
    /// Where the time of its boot went.
    pub phases: Vec<(&'static str, Duration)>,
    /// Whether the workload is well.
    pub health: Health,
    /// Memory that it was asked to give up for a while, in bytes.
    pub held_bytes: u64,
    /// How starting it again by itself has gone.
    pub restart: RestartStatus,
    /// When it is to be started again by itself.
    pub restart_at: Option<DateTime<Utc>>,
    /// The part of a GPU that its machine has.
    pub mdev_uuid: Option<String>,
}

/// What came of waiting for a state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waited {
    /// The state now.
    pub state: State,
    /// What went wrong with the instance, if something did.
    pub error: Option<String>,
    /// The time was over first.
    pub timed_out: bool,
}

impl Instances {
    /// Opens the instances in `spec.dir`: takes back workers that still run, and undoes or
    /// finishes what a killed server had begun.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub async fn open(spec: InstancesSpec) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Dir { path: spec.dir.clone(), source };
        fs::create_dir_all(&spec.dir).map_err(failed)?;
        let log_watch = FileWatch::new().map_err(failed)?;
        let shared = Arc::new(Shared {
            dir: spec.dir,
            store: spec.store,
            images: spec.images,
            disks: spec.disks,
            volumes: spec.volumes,
            devices: spec.devices,
            resources: spec.resources,
            network: spec.network,
            fleet: spec.fleet,
            admission: Admission::for_host(),
            agents: Agents::default(),
            agent: spec.agent,
            hotplug: spec.hotplug,
            base: OnceLock::new(),
            entries: RwLock::default(),
            log_watch,
            followers: Arc::new(Semaphore::new(FOLLOWERS_MAX)),
            owners: TaskTracker::new(),
            closing: CancellationToken::new(),
        });
        reconcile::reconcile(&shared).await?;
        Ok(Self { shared })
    }

    /// Creates an instance and starts its machine; does not wait for the guest.
    ///
    /// Every step hands back a guard that undoes the step when dropped. Locals drop in reverse
    /// order, so `?` is the rollback, and so is a client that hangs up: worker killed, files
    /// removed, record erased.
    ///
    /// # Errors
    ///
    /// [`CreateError`]; nothing is left, except that a pull that was begun goes on.
    pub async fn create(
        &self,
        mut spec: InstanceSpec,
        expiry: Expiry,
    ) -> Result<Arc<Instance>, CreateError> {
        let mut timeline = Timeline::begin();
        for mount in &mut spec.volumes {
            mount.volume = self.shared.volumes.find(&mount.volume)?.id.into();
        }
        self.shared.settle_devices(&mut spec)?;
        if spec.network.is_some() {
            // A host that cannot have networks says so before an image is pulled for nothing.
            self.shared.network.prepare().await.map_err(BootError::from)?;
        }
        let image = self.root_disk(&spec.image).await?;
        timeline.mark(Moment::ImageReady);
        let digest = image.digest;
        let mut boot = Boot::prepare(&self.shared, &spec, image, None)?;
        let mut reservation = Reservation::make(&self.shared, spec, digest, timeline)?;
        let record = &mut reservation.record;
        record.expires_at = expiry.from(record.created_at);
        record.address = boot.address();
        let id = record.id.clone();
        boot.await_turn(&self.shared).await?;
        let Reservation { record, dir, .. } = &mut reservation;
        record.timeline.mark(Moment::Admitted);
        let disks = async { Ok(disks::create(&self.shared, &record.spec, dir).await?) };
        let connected = async {
            boot.connect(&self.shared, &id).await?;
            Ok::<_, CreateError>(boot.lend(&self.shared, &record.spec, &id).await?)
        };
        let (disks, ()) = try_join!(disks, connected)?;
        record.timeline.mark(Moment::DisksReady);
        let launch = boot.launch(&self.shared, &record.spec, dir, &disks);
        // A disk that is slow to write does not hold up the machine.
        let (booted, ()) = tokio::try_join!(
            launch.map_err(CreateError::from),
            disks::settle(&disks).map_err(CreateError::from)
        )?;
        self.keep(reservation, booted)
    }

    /// All steps worked: the record says so, and then nothing is undone any more.
    fn keep(
        &self,
        mut reservation: Reservation,
        Booted { worker, lease, loan, turn }: Booted,
    ) -> Result<Arc<Instance>, CreateError> {
        reservation.record.phase = Phase::Kept;
        let record = reservation.record.clone();
        self.shared.store.transact(|records| record.update(records)).map_err(|source| {
            CreateError::Reserve(ReserveError::from_sqlite(record.spec.name.as_str(), source))
        })?;
        let claim = reservation.keep();
        let owner = Owner::new(Arc::clone(&self.shared), record).with_claim(claim).with_turn(turn);
        let owner = owner.with_worker(worker.keep(), lease, loan.map(NewLoan::keep));
        Ok(Shared::add(&self.shared, owner))
    }

    /// The root disk of `name`, pulled first if it is not there; a pull that takes long goes on.
    async fn root_disk(&self, name: &Reference) -> Result<RootDisk, CreateError> {
        let images = &self.shared.images;
        match images.ready(name) {
            Ok(disk) => return Ok(disk),
            Err(ReadyError::Missing { .. }) => {
                let (platform, credentials, tags) = (None, None, BTreeMap::new());
                let spec = ImageSpec { name: name.clone(), platform, credentials, tags };
                images.request(spec).await?;
            }
            Err(ReadyError::NotReady { .. }) => {}
            Err(ReadyError::Host(error)) => return Err(CreateError::Images(error)),
        }
        // Elapsed or not: what counts is how the image is now.
        let _ = time::timeout(IMAGE_TIMEOUT, images.settled(name)).await;
        images.ready(name).map_err(|error| match error {
            ReadyError::Missing { name } => CreateError::ImageMissing { name },
            ReadyError::NotReady { name: text, status: ImageStatus::Failed } => {
                let why = images.get(name).and_then(|image| image.error).unwrap_or_default();
                CreateError::ImageFailed { name: text, why }
            }
            ReadyError::NotReady { name, .. } => CreateError::ImageNotReady { name },
            ReadyError::Host(error) => CreateError::Images(error),
        })
    }

    /// The instance that `key` means: its id, else its name, else the only id that begins so.
    ///
    /// # Errors
    ///
    /// [`FindError`].
    pub fn find(&self, key: &str) -> Result<Arc<Instance>, FindError> {
        Ok(Arc::clone(&self.entry(key)?.view.borrow()))
    }

    /// All instances, oldest first.
    pub fn list(&self) -> Vec<Arc<Instance>> {
        let mut list: Vec<_> =
            self.shared.read().values().map(|entry| Arc::clone(&entry.view.borrow())).collect();
        list.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        list
    }

    /// Whether an instance needs the root disk of `digest`.
    pub fn uses(&self, digest: &Digest) -> bool {
        self.shared.read().values().any(|entry| entry.view.borrow().digest == *digest)
    }

    /// Waits until the instance is in state `target`, can no longer get there by itself, or
    /// `timeout` is over.
    ///
    /// # Errors
    ///
    /// [`FindError`], also if it is deleted meanwhile.
    pub async fn wait(
        &self,
        key: &str,
        target: State,
        timeout: Duration,
    ) -> Result<Waited, FindError> {
        let mut view = self.entry(key)?.view;
        let settled = |instance: &Arc<Instance>| {
            instance.state == target || instance.state.is_dead_end_for(target)
        };
        let waited = |instance: &Arc<Instance>, timed_out| {
            let error = instance.ending.error.clone();
            Waited { state: instance.state, error, timed_out }
        };
        match time::timeout(timeout, view.wait_for(settled)).await {
            Ok(Ok(instance)) => return Ok(waited(&instance, false)),
            Ok(Err(_deleted)) if !self.shared.closing.is_cancelled() => {
                return Err(FindError::Missing);
            }
            // The server closes, or the time is over.
            Ok(Err(_)) | Err(_) => {}
        }
        let instance = view.borrow();
        Ok(waited(&instance, true))
    }

    /// Ends the instance's machine; its disk stays. Goes on if the caller goes away.
    ///
    /// # Errors
    ///
    /// [`StopError`].
    pub async fn stop(&self, key: &str) -> Result<Arc<Instance>, StopError> {
        self.order(key, |done| Order::Stop { done }).await
    }

    /// Starts an instance that has stopped, on its disk; what `command` has replaces what it was
    /// created with. Goes on if the caller goes away.
    ///
    /// # Errors
    ///
    /// [`StartError`]; the instance is as before.
    pub async fn start(&self, key: &str, command: Command) -> Result<Arc<Instance>, StartError> {
        self.order(key, |done| Order::Start { command, done }).await
    }

    /// Gives the instance a volume: in its guest, if it runs, or from its next start on. Goes on if
    /// the caller goes away.
    ///
    /// # Errors
    ///
    /// [`VolumeError`]; nothing has changed.
    pub async fn attach_volume(
        &self,
        key: &str,
        mut mount: VolumeMount,
    ) -> Result<Arc<Instance>, VolumeError> {
        mount.volume = self.shared.volumes.find(&mount.volume)?.id.into();
        self.order(key, |done| Order::Attach { mount, done }).await
    }

    /// Takes a volume from the instance, out of its guest if it runs. Goes on if the caller goes
    /// away.
    ///
    /// # Errors
    ///
    /// [`VolumeError`]; nothing has changed.
    pub async fn detach_volume(
        &self,
        key: &str,
        volume: &str,
    ) -> Result<Arc<Instance>, VolumeError> {
        let volume = self.shared.volumes.find(volume)?.id.into();
        self.order(key, |done| Order::Detach { volume, done }).await
    }

    /// Changes how the instance is looked after.
    ///
    /// # Errors
    ///
    /// [`UpkeepError`]; nothing has changed.
    pub async fn look_after(
        &self,
        key: &str,
        upkeep: Upkeep,
    ) -> Result<Arc<Instance>, UpkeepError> {
        self.order(key, |done| Order::LookAfter { upkeep, done }).await
    }

    /// Ends the instance, in whatever state it is, and removes all of it. `graceful` gives the
    /// workload a moment to end by itself. Goes on if the caller goes away.
    ///
    /// # Errors
    ///
    /// [`DeleteError`]; the instance is still there and can be deleted again.
    pub async fn delete(&self, key: &str, graceful: bool) -> Result<(), DeleteError> {
        self.order(key, |done| Order::Delete { graceful, done }).await
    }

    /// Gives an order to the owner of an instance and waits for the outcome.
    async fn order<T, E: From<OrderError>>(
        &self,
        key: &str,
        order: impl FnOnce(Done<T, E>) -> Order,
    ) -> Result<T, E> {
        let entry = self.entry(key).map_err(OrderError::Find)?;
        let (done, outcome) = oneshot::channel();
        // An owner that takes no orders, or never answers one, has deleted its instance, unless
        // the server closes.
        let gone = || match self.shared.closing.is_cancelled() {
            false => OrderError::Find(FindError::Missing),
            true => OrderError::Closing,
        };
        entry.orders.send(order(done)).await.map_err(|_| gone())?;
        outcome.await.unwrap_or_else(|_| Err(gone().into()))
    }

    /// Leaves all instances running and stops to watch them.
    pub async fn close(&self) {
        self.shared.admission.close();
        self.shared.closing.cancel();
        self.shared.agents.close().await;
        self.shared.owners.close();
        self.shared.owners.wait().await;
        self.shared.network.close().await;
    }

    fn entry(&self, key: &str) -> Result<Entry, FindError> {
        let entries = self.shared.read();
        if let Some(entry) = entries.get(key) {
            return Ok(entry.clone());
        }
        let named = |entry: &&Entry| entry.view.borrow().spec.name.as_str() == key;
        if let Some(entry) = entries.values().find(named) {
            return Ok(entry.clone());
        }
        let from_key = entries.range(key.to_owned()..);
        let mut matching = from_key.take_while(|(id, _)| !key.is_empty() && id.starts_with(key));
        match (matching.next(), matching.next()) {
            (Some((_, entry)), None) => Ok(entry.clone()),
            (Some(_), Some(_)) => Err(FindError::Ambiguous),
            (None, _) => Err(FindError::Missing),
        }
    }
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        self.entries.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Entry>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the instance `id` has its files.
    fn dir_of(&self, id: &str) -> PathBuf {
        self.dir.join(id)
    }

    /// Names the devices of `spec` by their ids, and finds out whether it could have them now.
    fn settle_devices(&self, spec: &mut InstanceSpec) -> Result<(), CreateError> {
        let wanted = self.devices.want(&spec.devices)?;
        spec.devices = wanted.iter().map(|wanted| wanted.id().to_owned()).collect();
        if let Some(profile) = &spec.gpu_profile {
            self.devices.want_profile(profile)?;
        }
        Ok(())
    }

    /// Lets `owner` own its instance from now on; returns the instance as it is.
    fn add(shared: &Arc<Self>, owner: Owner) -> Arc<Instance> {
        let view = owner.view();
        let (sender, receiver) = mpsc::channel(ORDERS_MAX);
        let instance = Arc::clone(&view.borrow());
        let entry = Entry { view, orders: sender };
        shared.write().insert(instance.id.clone(), entry);
        shared.owners.spawn(owner.run(receiver));
        instance
    }
}

/// Removes an instance's folder, which may not exist.
fn remove_folder(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}
