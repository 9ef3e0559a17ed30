//! What this host has to give, and to whom it is promised.
//!
//! Whoever is about to use something claims it first, in one step with the look at what is left, so
//! that any number of claims at once promise no more than there is. A [`Claim`] that is dropped
//! gives back what it had. What a server finds running when it starts is counted, fit or not.
//!
//! Capacity is the host's: its processors, its memory, the file system of the data folder. How many
//! times over each may be promised is configured.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::os::capacity;
use crate::ratio::Ratio;
use crate::size::{ByteRate, ByteSize};

/// How old a measure of what images take may be when something is claimed. Images grow under a
/// check of their own.
const MEASURE_AGE_MAX: Duration = Duration::from_secs(5);

/// What resources are made of.
#[derive(Debug, Clone)]
pub struct ResourcesSpec {
    /// The file system of this folder is the disk.
    pub data_dir: PathBuf,
    /// Where root disks are.
    pub images_dir: PathBuf,
    /// Where layers are.
    pub blobs_dir: PathBuf,
    /// How many times over things may be promised.
    pub ratios: Ratios,
    /// What was said of the host, and is not looked for.
    pub configured: Configured,
}

/// How many times over each thing may be promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ratios {
    /// vCPUs on processors.
    pub cpu: Ratio,
    /// Guest memory in memory.
    pub memory: Ratio,
    /// Disks, which are sparse, on the disk.
    pub disk: Ratio,
    /// Rates of guests on the network's.
    pub network: Ratio,
    /// Rates of guests on the disk's.
    pub disk_io: Ratio,
}

/// What was said of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Configured {
    /// Bytes of disk.
    pub disk_bytes: Option<u64>,
    /// Bytes per second of network; without it, what the link says of itself.
    pub network_bps: Option<u64>,
    /// Bytes per second of disk; without it that is not looked after.
    pub disk_io_bps: Option<u64>,
}

/// Something that is promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// vCPUs.
    Cpu,
    /// Bytes of memory.
    Memory,
    /// Bytes of disk.
    Disk,
    /// Bytes per second of network, the larger of both ways.
    Network,
    /// Bytes per second of disk.
    DiskIo,
}

/// What an instance needs while it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Need {
    /// vCPUs.
    pub vcpus: u64,
    /// Memory, what may be added later included.
    pub memory_bytes: u64,
    /// Writable layers.
    pub disk_bytes: u64,
    /// To the guest.
    pub download_bps: u64,
    /// From the guest.
    pub upload_bps: u64,
    /// To and from disks.
    pub disk_io_bps: u64,
}

/// An instance and what is promised to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// The instance.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What.
    pub need: Need,
}

/// How it stands with one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Of what.
    pub kind: Kind,
    /// What the host has.
    pub capacity: u64,
    /// Whether that was said, not found.
    pub is_configured: bool,
    /// How many times over it may be promised.
    pub ratio: Ratio,
    /// What is promised.
    pub allocated: u64,
}

/// What takes room on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskUse {
    /// Root disks.
    pub images_bytes: u64,
    /// Layers.
    pub blobs_bytes: u64,
    /// Volumes, as large as they may get.
    pub volumes_bytes: u64,
    /// Writable layers of instances, as large as they may get.
    pub overlays_bytes: u64,
}

/// How it stands with everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// By kind; network and disk rates only if the host's are known.
    pub statuses: BTreeMap<Kind, Status>,
    /// What the disk's allocation is made of.
    pub disk: DiskUse,
    /// Who has what, by id.
    pub allocations: Vec<Allocation>,
}

/// The resources of this host. Clones are the same.
#[derive(Debug, Clone)]
pub struct Resources {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    spec: ResourcesSpec,
    processors: u64,
    memory_bytes: u64,
    /// Held for moments, never across an await.
    ledger: Mutex<Ledger>,
}

/// Who has what.
#[derive(Debug, Default)]
struct Ledger {
    instances: BTreeMap<String, Allocation>,
    volumes: BTreeMap<String, u64>,
    measured: Option<Measured>,
}

/// What it takes a while to look for.
#[derive(Debug, Clone, Copy)]
struct Measured {
    at: Instant,
    images_bytes: u64,
    blobs_bytes: u64,
    /// The kernel lists a route for each instance before it is clear which is the one.
    uplink_bps: Option<u64>,
}

/// Something promised: dropped, it is free again.
#[derive(Debug)]
pub struct Claim {
    shared: Arc<Shared>,
    holder: Holder,
}

#[derive(Debug)]
enum Holder {
    Instance(String),
    Volume(String),
}

/// Something cannot be promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "Not enough {}: {} asked for, {} left of {}: ask for less, stop or delete others, or start the \
     server with a larger --overcommit-{}",
    kind.name(), kind.amount(*asked), kind.amount(*available), kind.amount(*limit),
    kind.name().replace('_', "-")
)]
pub struct Shortage {
    /// Of what.
    pub kind: Kind,
    /// How much was asked for.
    pub asked: u64,
    /// How much is left.
    pub available: u64,
    /// How much may be promised in all.
    pub limit: u64,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Cpu, Self::Memory, Self::Disk, Self::Network, Self::DiskIo];

    /// As the API calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Network => "network",
            Self::DiskIo => "disk_io",
        }
    }

    fn amount(self, amount: u64) -> String {
        match self {
            Self::Cpu => format!("{amount} vCPUs"),
            Self::Memory | Self::Disk => ByteSize(amount >> 20 << 20).to_string(),
            Self::Network | Self::DiskIo => ByteRate(amount).to_string(),
        }
    }
}

impl Need {
    fn of(&self, kind: Kind) -> u64 {
        match kind {
            Kind::Cpu => self.vcpus,
            Kind::Memory => self.memory_bytes,
            Kind::Disk => self.disk_bytes,
            Kind::Network => self.download_bps.max(self.upload_bps),
            Kind::DiskIo => self.disk_io_bps,
        }
    }
}

impl Status {
    /// What may be promised in all.
    pub fn limit(&self) -> u64 {
        self.ratio.of(self.capacity)
    }

    /// What may still be promised.
    pub fn available(&self) -> u64 {
        self.limit().saturating_sub(self.allocated)
    }

    fn check(&self, asked: u64) -> Result<(), Shortage> {
        let available = self.available();
        if asked <= available {
            return Ok(());
        }
        Err(Shortage { kind: self.kind, asked, available, limit: self.limit() })
    }
}

impl DiskUse {
    fn total(&self) -> u64 {
        let parts = [self.images_bytes, self.blobs_bytes, self.volumes_bytes, self.overlays_bytes];
        parts.into_iter().fold(0, u64::saturating_add)
    }
}

impl Resources {
    /// Looks at the host.
    pub fn new(spec: ResourcesSpec) -> Self {
        let (processors, memory_bytes) = (capacity::processors(), capacity::memory_bytes());
        let ledger = Mutex::default();
        Self { shared: Arc::new(Shared { spec, processors, memory_bytes, ledger }) }
    }

    /// Promises `need` to an instance, or nothing.
    ///
    /// # Errors
    ///
    /// [`Shortage`], of the first kind that there is too little of.
    pub fn claim_instance(&self, id: &str, name: &str, need: Need) -> Result<Claim, Shortage> {
        let mut ledger = self.shared.lock();
        let statuses = self.shared.statuses(&mut ledger, MEASURE_AGE_MAX);
        for kind in Kind::ALL {
            let asked = need.of(kind);
            if let Some(status) = statuses.get(&kind).filter(|_| asked > 0) {
                status.check(asked)?;
            }
        }
        Ok(self.enter_instance(&mut ledger, id, name, need))
    }

    /// Counts what an instance has already.
    pub fn count_instance(&self, id: &str, name: &str, need: Need) -> Claim {
        self.enter_instance(&mut self.shared.lock(), id, name, need)
    }

    /// Promises disk to a volume, or nothing.
    ///
    /// # Errors
    ///
    /// [`Shortage`].
    pub fn claim_volume(&self, id: &str, bytes: u64) -> Result<Claim, Shortage> {
        let mut ledger = self.shared.lock();
        let statuses = self.shared.statuses(&mut ledger, MEASURE_AGE_MAX);
        if let Some(disk) = statuses.get(&Kind::Disk) {
            disk.check(bytes)?;
        }
        Ok(self.enter_volume(&mut ledger, id, bytes))
    }

    /// Counts what a volume has already.
    pub fn count_volume(&self, id: &str, bytes: u64) -> Claim {
        self.enter_volume(&mut self.shared.lock(), id, bytes)
    }

    /// How it stands. Reads folders: blocks for a moment.
    pub fn report(&self) -> Report {
        let mut ledger = self.shared.lock();
        let statuses = self.shared.statuses(&mut ledger, Duration::ZERO);
        let measured = self.shared.measure(&mut ledger, MEASURE_AGE_MAX);
        let disk = ledger.disk_use(measured);
        Report { statuses, disk, allocations: ledger.instances.values().cloned().collect() }
    }

    fn enter_volume(&self, ledger: &mut Ledger, id: &str, bytes: u64) -> Claim {
        ledger.volumes.insert(id.to_owned(), bytes);
        Claim { shared: Arc::clone(&self.shared), holder: Holder::Volume(id.to_owned()) }
    }

    fn enter_instance(&self, ledger: &mut Ledger, id: &str, name: &str, need: Need) -> Claim {
        let allocation = Allocation { id: id.to_owned(), name: name.to_owned(), need };
        ledger.instances.insert(id.to_owned(), allocation);
        Claim { shared: Arc::clone(&self.shared), holder: Holder::Instance(id.to_owned()) }
    }
}

impl Ledger {
    fn disk_use(&self, measured: Measured) -> DiskUse {
        let Measured { images_bytes, blobs_bytes, .. } = measured;
        let overlays = self.instances.values().map(|allocation| allocation.need.disk_bytes);
        DiskUse {
            images_bytes,
            blobs_bytes,
            volumes_bytes: self.volumes.values().copied().fold(0, u64::saturating_add),
            overlays_bytes: overlays.fold(0, u64::saturating_add),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn measure(&self, ledger: &mut Ledger, age_max: Duration) -> Measured {
        let fresh = ledger.measured.filter(|measured| measured.at.elapsed() < age_max);
        *ledger.measured.insert(fresh.unwrap_or_else(|| Measured {
            images_bytes: capacity::used_bytes(&self.spec.images_dir),
            blobs_bytes: capacity::used_bytes(&self.spec.blobs_dir),
            uplink_bps: capacity::uplink_bps(),
            at: Instant::now(),
        }))
    }

    fn statuses(&self, ledger: &mut Ledger, age_max: Duration) -> BTreeMap<Kind, Status> {
        let Configured { disk_bytes, network_bps, disk_io_bps } = self.spec.configured;
        let Ratios { cpu, memory, disk, network, disk_io } = self.spec.ratios;
        let found_disk = || capacity::disk_bytes(&self.spec.data_dir);
        let measured = self.measure(ledger, age_max);
        let network_capacity = network_bps.or(measured.uplink_bps);
        let capacities = [
            (Kind::Cpu, Some(self.processors), false, cpu),
            (Kind::Memory, Some(self.memory_bytes), false, memory),
            (Kind::Disk, disk_bytes.or_else(found_disk), disk_bytes.is_some(), disk),
            (Kind::Network, network_capacity, network_bps.is_some(), network),
            (Kind::DiskIo, disk_io_bps, true, disk_io),
        ];
        let used = ledger.disk_use(measured);
        let mut statuses = BTreeMap::new();
        for (kind, capacity, is_configured, ratio) in capacities {
            let Some(capacity) = capacity else { continue };
            let promised = ledger.instances.values().map(|allocation| allocation.need.of(kind));
            let allocated = match kind {
                Kind::Disk => used.total(),
                _ => promised.fold(0, u64::saturating_add),
            };
            statuses.insert(kind, Status { kind, capacity, is_configured, ratio, allocated });
        }
        statuses
    }
}

impl Claim {
    /// Promises an instance this rate of the disk in place of the one it had, or leaves it that.
    ///
    /// # Errors
    ///
    /// [`Shortage`].
    pub fn change_disk_io(&self, bps: u64) -> Result<(), Shortage> {
        let Holder::Instance(id) = &self.holder else { return Ok(()) };
        let mut ledger = self.shared.lock();
        let statuses = self.shared.statuses(&mut ledger, MEASURE_AGE_MAX);
        let Some(Allocation { need, .. }) = ledger.instances.get_mut(id) else { return Ok(()) };
        if let Some(disk_io) = statuses.get(&Kind::DiskIo) {
            disk_io.check(bps.saturating_sub(need.disk_io_bps))?;
        }
        need.disk_io_bps = bps;
        Ok(())
    }

    /// Gives back what a volume does not need after all.
    pub fn shrink_volume(&self, bytes: u64) {
        if let Holder::Volume(id) = &self.holder {
            let mut ledger = self.shared.lock();
            if let Some(claimed) = ledger.volumes.get_mut(id) {
                *claimed = bytes.min(*claimed);
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut ledger = self.shared.lock();
        match &self.holder {
            Holder::Instance(id) => drop(ledger.instances.remove(id)),
            Holder::Volume(id) => drop(ledger.volumes.remove(id)),
        }
    }
}

#[cfg(test)]
mod tests;
