//! Devices of the host that instances can have: registered, claimed, lent, given back.
//!
//! ```text
//! register ──> claim, as long as an instance is there ──> lend, as long as its machine runs
//! ```
//!
//! A claim is a row beside two records ([`record`]). What is lent has another driver than before,
//! or was made for this ([`binding`], [`mediated`]); that is written down before it is done
//! ([`loans`]), and undone when the machine has ended, by whoever is there then: this server, or
//! the next one.
//!
//! Changes of the host happen one after the other, each in a thread, for a driver that does not let
//! go of its device keeps whoever asks waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use tokio::runtime::Handle;
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time;
use tokio_util::task::TaskTracker;

use crate::causes::chain;
use crate::devices::address::PciAddress;
use crate::devices::loans::{Lent, Rows};
use crate::devices::names::Names;
use crate::devices::record::Record;
use crate::devices::spec::{DeviceName, DeviceSpec};
use crate::devices::sysfs::{Function, Sysfs, VFIO_PCI};
use crate::store::Store;

pub use errors::{
    ClaimError, DeleteError, FindError, GiveBackError, HostError, LendError, OpenError,
    RegisterError, UnfitError, WantError,
};
pub use fitness::Lack;
pub use gpus::Gpus;
pub use mediated::Profile;
pub use record::{Wanted, claim};

pub mod address;
mod binding;
mod errors;
mod fitness;
mod gpus;
pub mod host_use;
mod lending;
mod loans;
mod mediated;
mod names;
mod record;
pub mod spec;
mod sysfs;
#[cfg(test)]
mod testing;

/// How long changes of the host may take: a driver lets go of its device, and another takes it and
/// finds out what it is.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(30);

/// What devices are found with.
#[derive(Debug)]
pub struct DevicesSpec {
    /// Where the kernel's folders are: `/`.
    pub root: PathBuf,
    /// The records.
    pub store: Store,
}

/// The devices of this host. Clones are the same.
#[derive(Debug, Clone)]
pub struct Devices {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    sysfs: Sysfs,
    store: Store,
    boot_id: String,
    /// One change of the host at a time; held by the thread that makes it.
    changing: Arc<AsyncMutex<()>>,
    tasks: TaskTracker,
}

/// A registered device as it is at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// Its name, which no other has.
    pub name: DeviceName,
    /// Where it is.
    pub address: PciAddress,
    /// Who made it, as a number.
    pub vendor: u16,
    /// What it is, as that one's number.
    pub device: u16,
    /// Whether it drives displays, or computes as those do.
    pub is_gpu: bool,
    /// Its IOMMU group.
    pub group: u32,
    /// Whether it can be given to a machine, or is.
    pub is_bound: bool,
    /// Whether nothing is at its address any more.
    pub is_gone: bool,
    /// The instance that has it, running or not.
    pub attached_to: Option<String>,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// The caller's labels.
    pub tags: BTreeMap<String, String>,
}

/// A device that could be registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Available {
    /// Where it is.
    pub address: PciAddress,
    /// Who made it, as a number.
    pub vendor: u16,
    /// What it is, as that one's number.
    pub device: u16,
    /// Its IOMMU group.
    pub group: u32,
    /// The vendor's name, if the host knows it.
    pub vendor_name: Option<String>,
    /// The device's name, if the host knows it.
    pub device_name: Option<String>,
    /// Who drives it.
    pub driver: Option<String>,
}

/// What is lent to a machine that runs. It stays lent when this is dropped, as the machine does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loan {
    id: String,
    /// Where sysfs lists the devices.
    pub paths: Vec<PathBuf>,
    /// The part of a GPU that was made.
    pub mdev_uuid: Option<String>,
}

/// What is lent to a machine that is about to run: dropped, it is given back, unless it was kept.
#[derive(Debug)]
pub struct NewLoan {
    devices: Devices,
    loan: Option<Loan>,
}

impl NewLoan {
    /// Where sysfs lists the devices.
    pub fn paths(&self) -> &[PathBuf] {
        self.loan.as_ref().map_or(&[], |loan| &loan.paths)
    }

    /// It stays lent.
    pub fn keep(mut self) -> Loan {
        self.loan.take().expect("whoever takes the loan is the last to see this")
    }
}

impl Drop for NewLoan {
    fn drop(&mut self) {
        // Without a runtime the server is at its end, and the next one finds what is lent.
        if let Some(loan) = self.loan.take()
            && Handle::try_current().is_ok()
        {
            drop(self.devices.give_back(loan));
        }
    }
}

impl Devices {
    /// Opens the devices of the host below `spec.root`. What is lent stays so, until its instance
    /// is asked for.
    ///
    /// # Errors
    ///
    /// [`OpenError`].
    pub fn open(spec: DevicesSpec) -> Result<Self, OpenError> {
        let DevicesSpec { root, store } = spec;
        let sysfs = Sysfs { root };
        let boot_id = sysfs.boot_id().map_err(OpenError::Boot)?;
        store.transact(|records| Lent::forget_others(records, &boot_id))?;
        let (changing, tasks) = (Arc::default(), TaskTracker::new());
        Ok(Self { shared: Arc::new(Shared { sysfs, store, boot_id, changing, tasks }) })
    }

    /// Whether anything of this host can be given away, as far as can be told without doing so.
    pub fn can_lend(&self) -> bool {
        self.shared.sysfs.lack().is_none()
    }

    /// Devices that can be registered, or are. Reads many small files: not for an async task.
    ///
    /// # Errors
    ///
    /// [`HostError`].
    pub fn available(&self) -> Result<Vec<Available>, HostError> {
        let sysfs = &self.shared.sysfs;
        let mut fit = Vec::new();
        for function in sysfs.functions()? {
            match sysfs.fit(&function.address) {
                Ok(function) => fit.extend(function.group.map(|group| (function, group))),
                Err(UnfitError::Host(error)) => return Err(error),
                Err(_unfit) => {}
            }
        }
        let wanted = fit.iter().map(|(function, _)| function.id()).collect();
        let names = Names::read(&sysfs.root, &wanted);
        let available = fit.into_iter().map(|(function, group)| Available {
            vendor_name: names.vendor(function.vendor),
            device_name: names.device(function.id()),
            address: function.address,
            vendor: function.vendor,
            device: function.device,
            group,
            driver: function.driver,
        });
        Ok(available.collect())
    }

    /// Registers a device. Nothing of the host changes yet.
    ///
    /// # Errors
    ///
    /// [`RegisterError`].
    pub fn register(&self, spec: DeviceSpec) -> Result<Device, RegisterError> {
        let DeviceSpec { address, name, tags } = spec;
        let function = self.shared.sysfs.fit(&address)?;
        let record = Record {
            id: cuid2::create_id(),
            name: name.unwrap_or_else(|| DeviceName::of(&address)),
            vendor: function.vendor,
            device: function.device,
            is_gpu: function.is_gpu(),
            group: function.group.unwrap_or_default(),
            created_at: Utc::now(),
            address,
            tags,
        };
        self.shared.store.transact(|records| {
            if let Some(name) = Record::at(records, &record.address)? {
                return Err(RegisterError::Registered { address: record.address.clone(), name });
            }
            let name = record.name.as_str();
            if Record::all(records)?.iter().any(|other| other.name.as_str() == name) {
                return Err(RegisterError::NameTaken { name: name.to_owned() });
            }
            Ok(record.insert(records)?)
        })?;
        Ok(Device::new(record, Some(&function), None))
    }

    /// The device that `key` means: its id, else its name.
    ///
    /// # Errors
    ///
    /// [`FindError`].
    pub fn find(&self, key: &str) -> Result<Device, FindError> {
        self.shared.find(key)
    }

    /// All devices that are registered, oldest first.
    ///
    /// # Errors
    ///
    /// [`FindError`], but for one that is missing.
    pub fn list(&self) -> Result<Vec<Device>, FindError> {
        let (mut all, mut claims) = self.shared.store.transact(|records| {
            Ok::<_, FindError>((Record::all(records)?, record::claims(records)?))
        })?;
        all.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let device = |record: Record| {
            let function = self.shared.sysfs.function(&record.address).map_err(HostError)?;
            let claim = claims.remove(&record.id);
            Ok(Device::new(record, function.as_ref(), claim))
        };
        all.into_iter().map(device).collect()
    }

    /// Forgets a device that nobody has.
    ///
    /// # Errors
    ///
    /// [`DeleteError`].
    pub fn delete(&self, key: &str) -> Result<(), DeleteError> {
        self.shared.store.transact(|records| {
            let found = Record::find(records, key)?;
            let record = found.ok_or_else(|| FindError::Missing { key: key.to_owned() })?;
            if let Some(instance) = record::claims(records)?.remove(&record.id) {
                return Err(DeleteError::InUse { device: record.name.to_string(), instance });
            }
            Ok(record.remove(records)?)
        })
    }

    /// What of the host is lent to the machine of an instance, which runs.
    ///
    /// # Errors
    ///
    /// SQLite's.
    pub fn resume(&self, instance_id: &str) -> rusqlite::Result<Option<Loan>> {
        let rows = Rows::Instance(instance_id);
        let lent = self.shared.store.transact(|records| Lent::find(records, rows))?;
        Ok(lending::resumed(&lent))
    }

    /// Gives back what was lent to a machine that has ended or is about to. Goes on by itself; what
    /// fails is tried again when the instance is started or deleted, or by the next server.
    pub fn give_back(&self, loan: Loan) -> JoinHandle<()> {
        let devices = self.clone();
        self.shared.tasks.spawn(async move {
            let id = loan.id.clone();
            let given = devices.change(move |shared| shared.give_back(Rows::Loan(&id)));
            if let Err(error) = given.await.unwrap_or_else(|after| Err(after.into())) {
                tracing::error!(error = chain(&error), "A device is still lent");
            }
        })
    }

    /// Gives back whatever is lent to an instance whose machine has ended.
    ///
    /// # Errors
    ///
    /// [`GiveBackError`].
    pub async fn release(&self, instance_id: &str) -> Result<(), GiveBackError> {
        let rows = Rows::Instance(instance_id);
        if self.shared.store.transact(|records| Lent::find(records, rows))?.is_empty() {
            return Ok(());
        }
        let id = instance_id.to_owned();
        let given = self.change(move |shared| shared.give_back(Rows::Instance(&id)));
        given.await.unwrap_or_else(|after| Err(after.into()))
    }

    /// Gives back what is lent to instances that are not there.
    pub async fn release_strays(&self, known: &BTreeSet<String>) {
        let lent = self.shared.store.transact(Lent::instances);
        let lent = lent.inspect_err(|error| tracing::error!(%error, "Loans cannot be read"));
        for id in lent.unwrap_or_default().iter().filter(|&id| !known.contains(id)) {
            match self.release(id).await {
                Ok(()) => tracing::info!(id, "Gave back devices of an instance that is gone"),
                Err(error) => tracing::error!(id, error = chain(&error), "Device is still lent"),
            }
        }
    }

    /// Waits for what is under way, for a while: a driver may never let go.
    pub async fn close(&self) {
        self.shared.tasks.close();
        let _late = time::timeout(CHANGE_TIMEOUT, self.shared.tasks.wait()).await;
    }

    /// Changes something of the host, alone, in a thread that goes on if nobody waits any more.
    async fn change<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> T + Send + 'static,
    ) -> Result<T, Stuck> {
        let changed = async {
            let alone = Arc::clone(&self.shared.changing).lock_owned().await;
            let shared = Arc::clone(&self.shared);
            let working = spawn_blocking(move || {
                let _alone = alone;
                work(&shared)
            });
            self.shared.tasks.track_future(working).await.expect("changing a host does not panic")
        };
        time::timeout(CHANGE_TIMEOUT, changed).await.map_err(|_elapsed| Stuck)
    }
}

/// What keeps the host with these folders from giving any device away.
pub fn lack(root: &Path) -> Option<Lack> {
    Sysfs { root: root.to_owned() }.lack()
}

impl Shared {
    fn find(&self, key: &str) -> Result<Device, FindError> {
        let (record, mut claims) = self.store.transact(|records| {
            let found = Record::find(records, key)?;
            let record = found.ok_or_else(|| FindError::Missing { key: key.to_owned() })?;
            Ok::<_, FindError>((record, record::claims(records)?))
        })?;
        let function = self.sysfs.function(&record.address).map_err(HostError)?;
        let claim = claims.remove(&record.id);
        Ok(Device::new(record, function.as_ref(), claim))
    }
}

impl Device {
    fn new(record: Record, function: Option<&Function>, attached_to: Option<String>) -> Self {
        let Record { id, name, address, vendor, device, is_gpu, group, created_at, tags } = record;
        let driver = function.and_then(|function| function.driver.as_deref());
        Self {
            id,
            name,
            address,
            vendor,
            device,
            is_gpu,
            group: function.and_then(|function| function.group).unwrap_or(group),
            is_bound: driver == Some(VFIO_PCI),
            is_gone: function.is_none(),
            attached_to,
            created_at,
            tags,
        }
    }
}

/// A change did not come to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stuck;

impl From<Stuck> for GiveBackError {
    fn from(_: Stuck) -> Self {
        Self::Stuck { after: CHANGE_TIMEOUT }
    }
}

impl From<Stuck> for LendError {
    fn from(_: Stuck) -> Self {
        Self::Stuck { after: CHANGE_TIMEOUT }
    }
}

#[cfg(test)]
mod tests;
