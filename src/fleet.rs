//! The fleet: one worker process per running instance.
//!
//! [`Fleet::spawn`] has a worker forked (`nursery`) and hands it a machine and open files over a
//! socket pair; [`Worker`] is the server's end from then on. A worker outlives the server: after
//! a restart [`Fleet::adopt`] finds it again by what lies in its folder:
//!
//! ```text
//! worker.json    which process it is, written before it is told anything
//! control.sock   where it takes connections
//! events         what happened, one line each: the truth, whoever was connected
//! worker.log     what the process itself says
//! server.log     what the server says of the instance
//! ```
//!
//! Invariant: nothing here knows what runs in the guest. That is `agent`'s business.

use std::fs::{self, File};
use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use rustix::fs::{major, minor};
use tokio::time;

use crate::control::{
    DiskSpec, FileRole, HostDeviceSpec, HotplugPolicy, Launch, MEMORY_BYTES_STEP, MachineSpec,
    NetSpec, RateLimitSpec, RateSpec, Reply,
};
use crate::fleet::nursery::Newborn;
use crate::fleet::worker::Worker;
use crate::os::cgroup::{Cgroup, Share};
use crate::os::packets::{PacketListener, PacketSocket};
use crate::os::process::Process;
use crate::os::spawn::Identity;

pub use crate::os::cgroup::{Cgroups, ROOT as CGROUP_ROOT};
pub use crate::os::usage::{HostMemory, Usage};
pub use kernel_texts::KernelTexts;
pub use nursery::Nursery;

pub mod journal;
mod kernel_texts;
mod nursery;
pub mod worker;

/// How long a worker may take to build its machine. Seconds only where memory is short or KVM is
/// emulated.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(30);

/// How much longer for each GiB of a guest with devices: all of its memory is made ready at once.
const PIN_TIMEOUT_PER_GIB: Duration = Duration::from_secs(1);

/// What a worker with devices may keep in memory beside its guest's, in bytes: rings of its own.
const PINNED_BYTES_MIN: u64 = 64 << 20;

/// How long a worker may take to answer anything else.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Device number of /dev/kvm (misc device 232, Documentation/admin-guide/devices.txt).
const KVM_DEVICE: (u32, u32) = (10, 232);

/// The guest's vsock address. Each guest has a transport of its own, so all can have the same; 0 to
/// 2 are reserved (virtio 1.3, 5.10.4 "Device configuration layout").
const VSOCK_CID: u32 = 3;

/// What workers are made with.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// Where worker processes come from.
    pub nursery: Nursery,
    /// The KVM device.
    pub kvm: PathBuf,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// Where that kernel's text is kept for all workers, if they share it.
    pub kernel_texts: Option<KernelTexts>,
    /// Where workers get their share of the host, if they can.
    pub groups: Option<Cgroups>,
}

/// One machine to be started.
#[derive(Debug)]
pub struct WorkerSpec<'a> {
    /// The instance's folder: exists, has no worker. What an earlier one left there goes, but for
    /// what it and its guest said.
    pub dir: &'a Path,
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory, in bytes; rounded up to whole huge pages.
    pub memory_bytes: u64,
    /// Memory added after the boot, in bytes; rounded up likewise.
    pub hotplug_bytes: u64,
    /// When that is.
    pub hotplug: HotplugPolicy,
    /// Initramfs archives, in order.
    pub initramfs: Vec<File>,
    /// Disks, in the order in which the guest names them.
    pub disks: Vec<WorkerDisk<'a>>,
    /// The network interface, if there is one.
    pub net: Option<WorkerNet>,
    /// Bytes per second to and from all disks together, if there is a limit.
    pub disk_io_bps: Option<NonZeroU64>,
    /// Devices of the host that are lent to the guest, each by its directory in sysfs. The worker
    /// opens them, and their IOMMU groups have to be free by then. With any it has no balloon, and
    /// all its memory is taken at once and stays.
    pub devices: &'a [PathBuf],
    /// Slots for disks that are attached while it runs, as far as there are any left.
    pub spare_slots: u8,
    /// Whether the guest gets a vsock device.
    pub vsock: bool,
    /// Whether it ends when this process does, however that ends.
    pub ends_with_us: bool,
}

/// One disk of a machine to be started.
#[derive(Debug)]
pub struct WorkerDisk<'a> {
    /// What the guest reads as its serial number, at most 20 bytes.
    pub id: &'a str,
    /// The guest cannot write to it.
    pub read_only: bool,
    /// The file behind it.
    pub file: BorrowedFd<'a>,
}

/// The network interface of a machine to be started.
#[derive(Debug)]
pub struct WorkerNet {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The queues of the TAP behind it, which are the worker's alone from then on.
    pub taps: Vec<OwnedFd>,
    /// Bytes per second to the guest, if there is a limit.
    pub download_bps: Option<NonZeroU64>,
    /// Bytes per second from it, if there is a limit.
    pub upload_bps: Option<NonZeroU64>,
}

/// A worker that was just started: dropped, it is killed, unless it was kept.
#[derive(Debug)]
pub struct NewWorker(Option<Worker>);

impl NewWorker {
    /// The worker stays.
    pub fn keep(mut self) -> Worker {
        self.0.take().expect("whoever takes the worker is the last to see this")
    }

    /// The worker goes; returns when it has.
    pub async fn discard(mut self) {
        let Some(mut worker) = self.0.take() else { return };
        match worker.kill() {
            Ok(()) => worker.gone().await,
            Err(error) => tracing::error!(pid = worker.pid(), %error, "Failed to kill a worker"),
        }
    }
}

impl Drop for NewWorker {
    fn drop(&mut self) {
        if let Some(mut worker) = self.0.take() {
            if let Err(error) = worker.kill() {
                tracing::error!(pid = worker.pid(), %error, "Failed to kill a worker");
            }
            worker.leave_group();
        }
    }
}

/// Names of what lies in an instance's folder.
pub mod files {
    /// What the guest writes to its console.
    pub const CONSOLE: &str = "console.log";
    /// What happened in the machine.
    pub const EVENTS: &str = "events";
    /// What the worker process says.
    pub const WORKER_LOG: &str = "worker.log";
    /// What the server says about the instance.
    pub const SERVER_LOG: &str = "server.log";
    /// Where host processes reach the guest's vsock ports.
    pub const VSOCK: &str = "vsock.sock";
    pub(super) const CONTROL: &str = "control.sock";
    pub(super) const IDENTITY: &str = "worker.json";
}

impl Fleet {
    /// Starts a worker and returns once the machine runs.
    ///
    /// # Errors
    ///
    /// [`SpawnError`]; no process is left. Files may be: the folder is the caller's to remove.
    pub async fn spawn(&self, spec: WorkerSpec<'_>) -> Result<NewWorker, SpawnError> {
        let dir = spec.dir;
        let in_dir = |name: &str| {
            let path = dir.join(name);
            move |source| SpawnError::File { path, source }
        };
        clear(dir)?;
        let kvm = self.open_kvm()?;
        let kernel = File::open(&self.kernel)
            .map_err(|source| SpawnError::File { path: self.kernel.clone(), source })?;
        let console = append(&dir.join(files::CONSOLE)).map_err(in_dir(files::CONSOLE))?;
        let events = append(&dir.join(files::EVENTS)).map_err(in_dir(files::EVENTS))?;
        let log = append(&dir.join(files::WORKER_LOG)).map_err(in_dir(files::WORKER_LOG))?;
        let control =
            PacketListener::bind(&dir.join(files::CONTROL)).map_err(in_dir(files::CONTROL))?;
        let vsock = spec
            .vsock
            .then(|| UnixListener::bind(dir.join(files::VSOCK)))
            .transpose()
            .map_err(in_dir(files::VSOCK))?;

        let mut cargo = Cargo::default();
        cargo.add(FileRole::Kvm, kvm.as_fd());
        cargo.add(FileRole::Kernel, kernel.as_fd());
        // With devices the machine would not use it, and not fill it.
        let texts = self.kernel_texts.as_ref().filter(|_| spec.devices.is_empty());
        let text = texts.and_then(|texts| texts.find(&kernel, spec.vcpus));
        text.iter().for_each(|file| cargo.add(FileRole::KernelText, file.as_fd()));
        spec.initramfs.iter().for_each(|file| cargo.add(FileRole::Initramfs, file.as_fd()));
        spec.disks.iter().for_each(|disk| cargo.add(FileRole::Disk, disk.file));
        let taps = spec.net.iter().flat_map(|net| &net.taps);
        taps.for_each(|tap| cargo.add(FileRole::Tap, tap.as_fd()));
        cargo.add(FileRole::Console, console.as_fd());
        cargo.add(FileRole::Events, events.as_fd());
        cargo.add(FileRole::Control, control.as_fd());
        vsock.iter().for_each(|socket| cargo.add(FileRole::Vsock, socket.as_fd()));
        let lifeline = spec.ends_with_us.then(|| Process::open(process::id())).transpose();
        let lifeline = lifeline.map_err(SpawnError::Start)?;
        lifeline.iter().for_each(|process| cargo.add(FileRole::Lifeline, process.as_fd()));
        let Cargo { roles, files } = cargo;
        let launch = Launch { machine: machine(&spec), hotplug: spec.hotplug, files: roles };
        self.start(&launch, &files, dir, log).await
    }

    /// Starts the process, and tells it what to be: a server that dies in between leaves a process
    /// that hears of its death and ends.
    async fn start(
        &self,
        launch: &Launch,
        files: &[BorrowedFd<'_>],
        dir: &Path,
        log: File,
    ) -> Result<NewWorker, SpawnError> {
        let born = self.nursery.bear(log).await.map_err(SpawnError::Start)?;
        let Newborn { identity, launch: socket, unreaped: _until_told } = born;
        let process = identity.find().map_err(SpawnError::Start)?.ok_or(SpawnError::Died)?;
        let worker = Worker::new(identity, process, dir).map_err(SpawnError::Start)?;
        // Not before there is who removes it: a caller may go away while it waits for a birth.
        let group = self.group(dir, &launch.machine);
        Self::tell(NewWorker(Some(worker.in_group(group))), socket, launch, files).await
    }

    /// Writes down which process it is, and only then tells it what to be.
    async fn tell(
        mut worker: NewWorker,
        socket: PacketSocket,
        launch: &Launch,
        files: &[BorrowedFd<'_>],
    ) -> Result<NewWorker, SpawnError> {
        let Some(started) = worker.0.as_mut() else { return Err(SpawnError::Died) };
        // Before it has memory of its own.
        started.enter_group().map_err(SpawnError::Start)?;
        let path = started.dir().join(self::files::IDENTITY);
        fs::write(&path, serde_json::to_vec(started.identity()).unwrap_or_default())
            .map_err(|source| SpawnError::File { path, source })?;

        let MachineSpec { devices, memory_bytes, hotplug_bytes, .. } = &launch.machine;
        let mut timeout = LAUNCH_TIMEOUT;
        if !devices.is_empty() {
            let pinned_bytes = memory_bytes.saturating_add(*hotplug_bytes);
            let locked_bytes = pinned_bytes.saturating_add(PINNED_BYTES_MIN);
            started.identity().limit_locked_memory(locked_bytes).map_err(SpawnError::Start)?;
            let gib = u32::try_from(pinned_bytes.div_ceil(1 << 30)).unwrap_or(u32::MAX);
            timeout = timeout.saturating_add(PIN_TIMEOUT_PER_GIB.saturating_mul(gib));
        }
        let launch = serde_json::to_vec(launch).map_err(|e| SpawnError::Start(e.into()))?;
        socket.send(&launch, files).map_err(SpawnError::Start)?;
        started.connect_with(socket).map_err(SpawnError::Start)?;
        match time::timeout(timeout, started.reply()).await {
            Ok(Ok(Reply::Done(_))) => Ok(worker),
            Ok(Ok(Reply::Failed { message })) => Err(SpawnError::Refused { message }),
            Ok(Ok(Reply::Event(_)) | Err(_)) => Err(SpawnError::Died),
            Err(_elapsed) => Err(SpawnError::Silent { after: timeout }),
        }
    }

    /// Finds the worker in the folder `dir` again; `None` if there is none, or no more.
    ///
    /// A worker that runs but takes no connection is found too: it can be watched and killed.
    ///
    /// # Errors
    ///
    /// [`AdoptError`]; whether there is a worker is not known then.
    pub async fn adopt(&self, dir: &Path) -> Result<Option<Worker>, AdoptError> {
        let Some(mut worker) = self.find(dir)? else { return Ok(None) };
        match time::timeout(ANSWER_TIMEOUT, worker.status()).await {
            Ok(Ok(pid)) if pid == worker.pid() => {}
            Ok(Ok(pid)) => tracing::error!(pid, dir = %dir.display(), "Worker has another pid"),
            Ok(Err(error)) => {
                tracing::warn!(pid = worker.pid(), %error, "Worker takes no control connection");
            }
            Err(_elapsed) => tracing::warn!(pid = worker.pid(), "Worker does not answer"),
        }
        Ok(Some(worker))
    }

    /// As [`Self::adopt`], but says nothing to the worker: for one that shall be killed.
    ///
    /// # Errors
    ///
    /// As [`Self::adopt`].
    pub fn find(&self, dir: &Path) -> Result<Option<Worker>, AdoptError> {
        let failed = |source| AdoptError { dir: dir.to_owned(), source };
        let identity = match fs::read(dir.join(files::IDENTITY)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        // Half a file: the server died before it told the worker anything.
        let Ok(identity) = serde_json::from_slice::<Identity>(&identity) else { return Ok(None) };
        let Some(process) = identity.find().map_err(failed)? else { return Ok(None) };
        let worker = Worker::found(identity, process, dir).map_err(failed)?;
        let group = self.groups.as_ref().and_then(|groups| groups.find(&id_of(dir)));
        Ok(Some(worker.in_group(group)))
    }

    /// The group of the worker in the folder `dir`. One that cannot be made is done without.
    fn group(&self, dir: &Path, machine: &MachineSpec) -> Option<Cgroup> {
        let MachineSpec { vcpus, memory_bytes, hotplug_bytes, .. } = *machine;
        let memory_bytes = memory_bytes.saturating_add(hotplug_bytes);
        let group = self.groups.as_ref()?.create(&id_of(dir), Share { vcpus, memory_bytes });
        group.inspect_err(|error| tracing::warn!(%error, "A worker has no control group")).ok()
    }

    /// Whether machines can be started here, as far as can be told without starting one.
    pub fn is_able(&self) -> bool {
        self.open_kvm().is_ok()
    }

    /// What the worker in the folder `dir` costs the host; `None` if there is none.
    ///
    /// # Errors
    ///
    /// What the folder or /proc say.
    pub fn usage(&self, dir: &Path) -> io::Result<Option<Usage>> {
        let identity = match fs::read(dir.join(files::IDENTITY)) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let Ok(identity) = serde_json::from_slice(&identity) else { return Ok(None) };
        Usage::of(&identity)
    }

    fn open_kvm(&self) -> Result<File, SpawnError> {
        let failed = |source| SpawnError::Kvm { path: self.kvm.clone(), source };
        let kvm = File::options().read(true).write(true).open(&self.kvm).map_err(failed)?;
        let found = kvm.metadata().map_err(failed)?;
        let device = (major(found.rdev()), minor(found.rdev()));
        if found.file_type().is_char_device() && device == KVM_DEVICE {
            Ok(kvm)
        } else {
            Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not the KVM device")))
        }
    }
}

/// The files of a launch message with their roles, in step.
#[derive(Debug, Default)]
struct Cargo<'a> {
    roles: Vec<FileRole>,
    files: Vec<BorrowedFd<'a>>,
}

impl<'a> Cargo<'a> {
    fn add(&mut self, role: FileRole, file: BorrowedFd<'a>) {
        self.roles.push(role);
        self.files.push(file);
    }
}

/// What may pass at so many bytes per second, or without a limit.
pub fn byte_limit(bytes_per_second: Option<NonZeroU64>) -> RateLimitSpec {
    RateLimitSpec { bytes: bytes_per_second.map(RateSpec::steady), operations: None }
}

fn machine(spec: &WorkerSpec<'_>) -> MachineSpec {
    let disks = spec.disks.iter();
    MachineSpec {
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes.next_multiple_of(MEMORY_BYTES_STEP),
        hotplug_bytes: spec.hotplug_bytes.next_multiple_of(MEMORY_BYTES_STEP),
        balloon: spec.devices.is_empty(),
        cmdline: String::new(),
        disks: disks
            .map(|disk| DiskSpec { id: disk.id.to_owned(), read_only: disk.read_only })
            .collect(),
        spare_slots: spec.spare_slots,
        net: spec.net.as_ref().map(|net| NetSpec {
            mac: net.mac,
            download: byte_limit(net.download_bps),
            upload: byte_limit(net.upload_bps),
        }),
        disk_limit: byte_limit(spec.disk_io_bps),
        vsock_cid: spec.vsock.then_some(VSOCK_CID),
        devices: spec.devices.iter().map(|path| HostDeviceSpec { path: path.clone() }).collect(),
        serial: false,
    }
}

/// Removes what an earlier worker left in `dir`: whoever finds it would take it for this one's.
fn clear(dir: &Path) -> Result<(), SpawnError> {
    for name in [files::IDENTITY, files::CONTROL, files::VSOCK, files::EVENTS] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(SpawnError::File { path, source });
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

/// What a folder is called: its instance.
fn id_of(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn append(path: &Path) -> io::Result<File> {
    File::options().append(true).create(true).open(path)
}

/// Connects to the worker in `dir`.
fn connect(dir: &Path) -> io::Result<PacketSocket> {
    PacketSocket::connect(&dir.join(files::CONTROL))
}

/// Why there is no worker.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// KVM cannot be used.
    #[error(
        "Failed to open {path}: guests need KVM (`ovum doctor` says what to do)",
        path = path.display()
    )]
    Kvm {
        /// The device.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The kernel, or a file or socket in the instance's folder.
    #[error("Failed to use {path}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The process did not start.
    #[error("Failed to start a worker process")]
    Start(#[source] io::Error),
    /// It ended without an answer.
    #[error("The worker process ended before its machine ran; its log says more")]
    Died,
    /// It said no.
    #[error("The machine did not start: {message}")]
    Refused {
        /// The chain of causes, as the worker tells it.
        message: String,
    },
    /// It did not say anything.
    #[error("The worker process did not answer within {} s", after.as_secs())]
    Silent {
        /// For how long.
        after: Duration,
    },
}

/// Why it is not known whether there is a worker.
#[derive(Debug, thiserror::Error)]
#[error("Failed to look for the worker of {dir}", dir = dir.display())]
pub struct AdoptError {
    /// The instance's folder.
    pub dir: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

#[cfg(test)]
mod tests;
