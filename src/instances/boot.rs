//! What a machine is started from, first or once more: root disk, initramfs, address.
//!
//! Everything that the request can be wrong about is found out by [`Boot::prepare`], before there
//! is anything to undo.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use ovum_agent_proto::config::HEADERS_SERIAL;

use crate::devices::NewLoan;
use crate::fleet::{NewWorker, WorkerDisk, WorkerNet, WorkerSpec};
use crate::images::RootDisk;
use crate::initramfs::Archive;
use crate::instances::admission::Turn;
use crate::instances::disks::InstanceDisk;
use crate::instances::errors::BootError;
use crate::instances::spec::{InstanceSpec, InterfaceSpec, KernelHeaders, SPARE_SLOTS};
use crate::instances::{Shared, guest};
use crate::network::{Lease, Mac};

/// Queues of a guest's TAP. More would be served by the same thread, behind the same interrupt.
const TAP_QUEUES: usize = 1;

/// The file with the headers of the kernel in whose folder it is.
pub const HEADERS: &str = "headers.erofs";

/// A boot that is ready but for the disks that can be written to and the way to the network.
#[derive(Debug)]
pub(super) struct Boot {
    image: RootDisk,
    lease: Option<Lease>,
    download_bps: Option<NonZeroU64>,
    taps: Vec<OwnedFd>,
    loan: Option<NewLoan>,
    headers: Option<File>,
    turn: Option<Turn>,
}

/// A machine that runs.
#[derive(Debug)]
pub(super) struct Booted {
    pub(super) worker: NewWorker,
    /// Its address, if it has a network.
    pub(super) lease: Option<Lease>,
    /// What of the host it has.
    pub(super) loan: Option<NewLoan>,
    /// Its guest boots in it.
    pub(super) turn: Option<Turn>,
}

impl Boot {
    /// For a guest of `spec` on `image`; `last` is the address it had before.
    ///
    /// # Errors
    ///
    /// [`BootError`].
    pub(super) fn prepare(
        shared: &Shared,
        spec: &InstanceSpec,
        image: RootDisk,
        last: Option<Ipv4Addr>,
    ) -> Result<Self, BootError> {
        let network = &shared.network;
        let lease = spec.network.map(|_| network.lease(last)).transpose()?;
        let headers = headers(&shared.fleet.kernel, spec.kernel_headers)?;
        let InterfaceSpec { download_bps, .. } = spec.network.unwrap_or_default();
        let taps = Vec::new();
        let boot = Self { image, lease, download_bps, taps, loan: None, headers, turn: None };
        boot.config(shared, spec)?;
        Ok(boot)
    }

    /// What the guest is told: the time, for one, so that it is made when the guest is started.
    fn config(&self, shared: &Shared, spec: &InstanceSpec) -> Result<Archive, BootError> {
        let wiring = self.lease.as_ref().map(|lease| shared.network.wiring(lease));
        let hotplug = spec.hotplug(shared.hotplug);
        let config =
            guest::config(spec, &self.image.config, wiring, self.headers.is_some(), hotplug)
                .ok_or(BootError::NothingToRun)?;
        Ok(Archive::config(&config)?)
    }

    /// The guest's address, if it has a network.
    pub(super) fn address(&self) -> Option<Ipv4Addr> {
        self.lease.as_ref().map(Lease::address)
    }

    /// Waits until it may boot. The turn ends with this, unless a machine was started in it.
    ///
    /// # Errors
    ///
    /// [`BootError::Closing`].
    pub(super) async fn await_turn(&mut self, shared: &Shared) -> Result<(), BootError> {
        self.turn = Some(shared.admission.turn().await?);
        Ok(())
    }

    /// Makes the way from the host to the guest of the instance `id`, if it has a network. It goes
    /// with this, unless a machine was started on it.
    ///
    /// # Errors
    ///
    /// [`BootError::Network`].
    pub(super) async fn connect(&mut self, shared: &Shared, id: &str) -> Result<(), BootError> {
        if let Some(lease) = &self.lease {
            let shape = (TAP_QUEUES, self.download_bps);
            self.taps = shared.network.connect(lease, id, shape).await?;
        }
        Ok(())
    }

    /// Takes the devices of the instance `id` from the host, if it has any. They go back with this,
    /// unless a machine was started with them.
    ///
    /// # Errors
    ///
    /// [`BootError::Devices`].
    pub(super) async fn lend(
        &mut self,
        shared: &Shared,
        spec: &InstanceSpec,
        id: &str,
    ) -> Result<(), BootError> {
        let profile = spec.gpu_profile.as_deref();
        self.loan = shared.devices.lend(id, &spec.devices, profile).await?;
        Ok(())
    }

    /// Starts the machine in the folder `dir`.
    ///
    /// # Errors
    ///
    /// [`BootError::Worker`]; no process is left.
    pub(super) async fn launch(
        self,
        shared: &Shared,
        spec: &InstanceSpec,
        dir: &Path,
        disks_of_its_own: &[InstanceDisk],
    ) -> Result<Booted, BootError> {
        let config = rewound(&self.config(shared, spec)?.to_file()?)?;
        let initramfs = vec![base_archive(shared)?, config];
        let Self { image, lease, taps, loan, headers, turn, .. } = self;
        let root = WorkerDisk { id: "root", read_only: true, file: image.file.as_fd() };
        let mut disks = vec![root];
        disks.extend(disks_of_its_own.iter().map(|disk| WorkerDisk {
            id: &disk.id,
            read_only: disk.read_only,
            file: disk.file.as_fd(),
        }));
        // The last: the agent finds it by its serial number, and the others by their places.
        disks.extend(headers.as_ref().map(|file| WorkerDisk {
            id: HEADERS_SERIAL,
            read_only: true,
            file: file.as_fd(),
        }));
        let InterfaceSpec { download_bps, upload_bps } = spec.network.unwrap_or_default();
        let net = lease.as_ref().map(|lease| {
            let mac = Mac::of(lease.address()).octets();
            WorkerNet { mac, taps, download_bps, upload_bps }
        });
        let worker = WorkerSpec {
            dir,
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            hotplug_bytes: spec.hotplug_bytes,
            hotplug: spec.hotplug(shared.hotplug),
            initramfs,
            disks,
            net,
            disk_io_bps: spec.disk_io_bps,
            devices: loan.as_ref().map_or(&[], NewLoan::paths),
            // Without an agent nobody in the guest would look for a disk.
            spare_slots: if spec.agent { SPARE_SLOTS } else { 0 },
            vsock: spec.agent,
            ends_with_us: spec.ends_with_server,
        };
        let worker = shared.fleet.spawn(worker).await?;
        Ok(Booted { worker, lease, loan, turn })
    }
}

/// The initramfs with the agent, the same for every guest of this server. Each worker gets a
/// description of its own, so that none moves another's place in the file.
fn base_archive(shared: &Shared) -> Result<File, BootError> {
    let base = match shared.base.get() {
        Some(base) => base,
        None => {
            let path = &shared.agent;
            let agent =
                fs::read(path).map_err(|source| BootError::File { path: path.clone(), source })?;
            let base = Archive::base(&agent)?.to_file()?;
            shared.base.get_or_init(|| base)
        }
    };
    rewound(base)
}

/// The disk with the headers of `kernel`, which lies beside it.
fn headers(kernel: &Path, asked: KernelHeaders) -> Result<Option<File>, BootError> {
    let path = kernel.with_file_name(HEADERS);
    match (asked, File::open(&path)) {
        (KernelHeaders::Skipped, _) => Ok(None),
        (_, Ok(file)) => Ok(Some(file)),
        (KernelHeaders::IfThere, Err(error)) if error.kind() == ErrorKind::NotFound => Ok(None),
        (_, Err(source)) => Err(BootError::Headers { path, source }),
    }
}

/// The same file with a position of its own, at the beginning.
fn rewound(file: &File) -> Result<File, BootError> {
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    File::open(&path).map_err(|source| BootError::File { path, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_asks_for_headers_is_refused_without() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        let has = |asked| headers(&kernel, asked).map(|file| file.is_some());

        assert!(!has(KernelHeaders::IfThere).unwrap());
        let error = has(KernelHeaders::Needed).unwrap_err().to_string();
        assert!(error.contains("headers.erofs, which skip_kernel_headers"), "{error}");
        fs::write(dir.path().join(HEADERS), b"").unwrap();
        assert!(!has(KernelHeaders::Skipped).unwrap());
        assert!(has(KernelHeaders::IfThere).unwrap() && has(KernelHeaders::Needed).unwrap());
    }
}
