//! What a machine can be asked for, and what it is handed: the words of the outside.
//!
//! [`MachineSpec`] is plain data and travels between processes. [`MachineFiles`] holds the open
//! files that stand behind it: what it was not given it cannot reach, for this crate opens no path.
//! Devices of the host are the exception ([`HostDeviceSpec`]).

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layout::MMIO_SLOTS;
use crate::rate_limiter::RateLimitSpec;
use crate::vfio::{NAME_BYTES_MAX, is_device_path};

pub use crate::pci::DEVICES_MAX;

/// Most vCPUs a machine can have.
pub const VCPUS_MAX: u8 = 32;

/// Least guest memory, in bytes, with which the guest kernel boots.
pub const MEMORY_BYTES_MIN: u64 = 64 << 20;

/// Most guest memory, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Guest memory is given in multiples of this many bytes: one huge page.
pub const MEMORY_BYTES_STEP: u64 = 2 << 20;

/// Most guest memory, in bytes, that can be added later.
pub const HOTPLUG_BYTES_MAX: u64 = 1 << 40;

/// Most disks a machine can have: what its slots leave.
pub const DISKS_MAX: usize = 13;

/// Most devices that are no disks: interface, vsock, console, entropy, balloon, added memory.
const OTHER_DEVICES_MAX: usize = 6;

const _: () = assert!((DISKS_MAX + OTHER_DEVICES_MAX) as u64 == MMIO_SLOTS);

/// Most queues of a TAP that an interface uses: one device thread serves all of them.
pub const NET_LANES_MAX: usize = 8;

/// One machine: everything about it that is not an open file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// vCPUs, 1 to [`VCPUS_MAX`], presented as one socket with one thread per core.
    pub vcpus: u8,
    /// Guest memory in bytes: a multiple of [`MEMORY_BYTES_STEP`] between [`MEMORY_BYTES_MIN`]
    /// and [`MEMORY_BYTES_MAX`].
    pub memory_bytes: u64,
    /// Memory that can be added later, in bytes: a multiple of [`MEMORY_BYTES_STEP`], at most
    /// [`HOTPLUG_BYTES_MAX`]. Without any there is no memory device.
    pub hotplug_bytes: u64,
    /// Adds a balloon: memory that the guest does not use goes back to the host.
    pub balloon: bool,
    /// Words for the kernel's command line, after those the machine itself needs.
    pub cmdline: String,
    /// Block devices, in the order in which the guest names them (vda, vdb, ...).
    pub disks: Vec<DiskSpec>,
    /// Slots for disks that come while the machine runs: so many, or as many as are left. Each
    /// costs the guest three exits at boot.
    pub spare_slots: u8,
    /// What all of them may do together.
    pub disk_limit: RateLimitSpec,
    /// The network interface, if there is one.
    pub net: Option<NetSpec>,
    /// The guest's vsock address, 3 or more; without one there is no vsock device.
    pub vsock_cid: Option<u32>,
    /// Devices of the host that are lent to the guest. All guest memory is pinned for them.
    pub devices: Vec<HostDeviceSpec>,
    /// Adds a 16550 at the legacy port for the kernel's earliest messages; they go to the console
    /// file. Costs an exit for each byte: for people who develop a kernel.
    pub serial: bool,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// What GET_ID answers: at most 20 bytes (virtio 1.3, 5.2.6 "Device Operation").
    pub id: String,
    /// The guest cannot write, nor discard.
    pub read_only: bool,
}

/// A device of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostDeviceSpec {
    /// Where sysfs lists it: `/sys/bus/pci/devices/0000:03:00.0`, or a mediated device by its UUID
    /// in `/sys/bus/mdev/devices`. Its IOMMU group has to be free, and is opened with it.
    pub path: PathBuf,
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Its Ethernet address. What the guest sends from another is dropped.
    pub mac: [u8; 6],
    /// What may go to the guest.
    pub download: RateLimitSpec,
    /// What may come from it.
    pub upload: RateLimitSpec,
}

/// The open files of a machine.
#[derive(Debug)]
pub struct MachineFiles {
    /// /dev/kvm, read and write.
    pub kvm: OwnedFd,
    /// The guest kernel: an uncompressed x86-64 ELF.
    pub kernel: File,
    /// Where its text is kept as the first machine with it has patched it, or is to be: a file that
    /// can be sealed (memfd_create(2)), at least as long as the kernel's, and sealed once it is
    /// full. Without one, and with devices of the host, the kernel is copied and patches itself.
    pub kernel_text: Option<File>,
    /// Initramfs archives, loaded one after the other at 4-byte boundaries.
    pub initramfs: Vec<File>,
    /// The file behind each disk of the spec, in the same order.
    pub disks: Vec<File>,
    /// The queues of the TAP behind the network interface: 1 to [`NET_LANES_MAX`] files that are
    /// attached to it, with a virtio header before each frame. None if there is no interface.
    pub taps: Vec<OwnedFd>,
    /// Where the guest's console is written, from the file's present position on.
    pub console: File,
    /// Where host processes connect to reach a vsock port of the guest: a client writes
    /// `CONNECT <port>\n` and reads `OK <host port>\n`. Needed if the spec has a vsock address.
    pub vsock: Option<UnixListener>,
}

/// Why no machine can be what a description asks for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No vCPU, or too many.
    #[error("vcpus is {vcpus}: a machine has 1 to {VCPUS_MAX}")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// Too little memory, too much, or not a whole number of steps.
    #[error(
        "memory_bytes is {bytes}: it has to be {MEMORY_BYTES_MIN} to {MEMORY_BYTES_MAX}, \
         a multiple of {MEMORY_BYTES_STEP}"
    )]
    Memory {
        /// What was asked for.
        bytes: u64,
    },
    /// Too much memory to be added later, or not a whole number of steps.
    #[error(
        "hotplug_bytes is {bytes}: it has to be at most {HOTPLUG_BYTES_MAX}, a multiple of \
         {MEMORY_BYTES_STEP}"
    )]
    Hotplug {
        /// What was asked for.
        bytes: u64,
    },
    /// More disks than names for them.
    #[error("{disks} disks: a machine has at most {DISKS_MAX}")]
    Disks {
        /// What was asked for.
        disks: usize,
    },
    /// Disks and the files behind them do not match.
    #[error("{disks} disks and {files} files for them")]
    DiskFiles {
        /// In the description.
        disks: usize,
        /// Handed over.
        files: usize,
    },
    /// A network interface and its way to the host do not match.
    #[error("{taps} queues of a TAP: an interface has 1 to {NET_LANES_MAX}, no interface none")]
    Taps {
        /// Handed over.
        taps: usize,
    },
    /// An address that is not a guest's.
    #[error("vsock_cid is {cid}: guests have 3 to {}", u32::MAX - 1)]
    VsockCid {
        /// What was asked for.
        cid: u32,
    },
    /// More devices of the host than a bus has room for.
    #[error("{devices} devices of the host: a machine has at most {DEVICES_MAX}")]
    Devices {
        /// What was asked for.
        devices: usize,
    },
    /// A path that is no device's, or one that comes twice.
    #[error(
        "Device {path:?} has to be /sys/bus/pci/devices/ADDRESS or /sys/bus/mdev/devices/UUID, the \
         name at most {} bytes, and no device comes twice",
        NAME_BYTES_MAX - 1
    )]
    DevicePath {
        /// What was asked for.
        path: PathBuf,
    },
    /// A balloon and devices of the host: what the balloon gives back a device would still reach.
    #[error("balloon is set, and devices of the host keep all guest memory where it is")]
    PinnedBalloon,
    /// An address without a listening socket.
    #[error("vsock_cid is set, and no listening socket came with it")]
    VsockListener,
}

impl MachineSpec {
    /// Whether a machine can be this, with these files.
    ///
    /// # Errors
    ///
    /// The first [`SpecError`] found.
    pub fn check(&self, files: &MachineFiles) -> Result<(), SpecError> {
        let Self {
            vcpus,
            memory_bytes,
            hotplug_bytes,
            balloon,
            cmdline: _,
            disks,
            spare_slots: _,
            disk_limit: _,
            net,
            vsock_cid,
            devices,
            serial: _,
        } = self;
        if !(1..=VCPUS_MAX).contains(vcpus) {
            return Err(SpecError::Vcpus { vcpus: *vcpus });
        }
        let in_range = (MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(memory_bytes);
        if !in_range || !memory_bytes.is_multiple_of(MEMORY_BYTES_STEP) {
            return Err(SpecError::Memory { bytes: *memory_bytes });
        }
        let in_range = *hotplug_bytes <= HOTPLUG_BYTES_MAX;
        if !in_range || !hotplug_bytes.is_multiple_of(MEMORY_BYTES_STEP) {
            return Err(SpecError::Hotplug { bytes: *hotplug_bytes });
        }
        if disks.len() > DISKS_MAX {
            return Err(SpecError::Disks { disks: disks.len() });
        }
        if disks.len() != files.disks.len() {
            return Err(SpecError::DiskFiles { disks: disks.len(), files: files.disks.len() });
        }
        let taps = files.taps.len();
        if net.is_some() != (1..=NET_LANES_MAX).contains(&taps) || net.is_none() && taps > 0 {
            return Err(SpecError::Taps { taps });
        }
        check_devices(devices)?;
        if *balloon && !devices.is_empty() {
            return Err(SpecError::PinnedBalloon);
        }
        match vsock_cid {
            Some(cid @ (0..=2 | u32::MAX)) => Err(SpecError::VsockCid { cid: *cid }),
            Some(_) if files.vsock.is_none() => Err(SpecError::VsockListener),
            _ => Ok(()),
        }
    }
}

fn check_devices(devices: &[HostDeviceSpec]) -> Result<(), SpecError> {
    if devices.len() > DEVICES_MAX {
        return Err(SpecError::Devices { devices: devices.len() });
    }
    let is_right = |(index, device): (usize, &HostDeviceSpec)| {
        is_device_path(&device.path) && !devices[..index].contains(device)
    };
    match devices.iter().enumerate().find(|device| !is_right(*device)) {
        Some((_, HostDeviceSpec { path })) => Err(SpecError::DevicePath { path: path.clone() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            vcpus: 1,
            memory_bytes: 256 << 20,
            hotplug_bytes: 0,
            balloon: false,
            cmdline: String::new(),
            disks: Vec::new(),
            spare_slots: 0,
            disk_limit: RateLimitSpec::default(),
            net: None,
            vsock_cid: None,
            devices: Vec::new(),
            serial: false,
        }
    }

    fn disks(count: usize) -> Vec<DiskSpec> {
        vec![DiskSpec { id: "disk".into(), read_only: true }; count]
    }

    /// Whether `spec` can be, with so many disk files and no listening socket.
    fn check(spec: &MachineSpec, disk_files: usize) -> Result<(), SpecError> {
        check_with(spec, disk_files, 0)
    }

    fn check_with(spec: &MachineSpec, disk_files: usize, taps: usize) -> Result<(), SpecError> {
        let file = || tempfile::tempfile().unwrap();
        spec.check(&MachineFiles {
            kvm: file().into(),
            kernel: file(),
            kernel_text: None,
            initramfs: Vec::new(),
            disks: (0..disk_files).map(|_| file()).collect(),
            taps: (0..taps).map(|_| file().into()).collect(),
            console: file(),
            vsock: None,
        })
    }

    /// Its memory is where a device finds it, as long as the machine runs.
    #[test]
    fn devices_of_the_host_are_each_in_sysfs_and_go_with_no_balloon() {
        let device = |name| HostDeviceSpec { path: format!("/sys/bus/pci/devices/{name}").into() };
        let asked = |devices: Vec<HostDeviceSpec>| MachineSpec { devices, ..spec() };
        let first = device("0000:00:02.0");
        let check = |spec: MachineSpec| check(&spec, 0);

        assert_eq!(check(asked(vec![first.clone(), device("0000:00:03.0")])), Ok(()));
        let refused = Err(SpecError::DevicePath { path: first.path.clone() });
        assert_eq!(check(asked(vec![first.clone(), first.clone()])), refused);
        let refused = Err(SpecError::DevicePath { path: "/etc/passwd".into() });
        assert_eq!(check(asked(vec![HostDeviceSpec { path: "/etc/passwd".into() }])), refused);
        let refused = Err(SpecError::Devices { devices: DEVICES_MAX + 1 });
        assert_eq!(check(asked(vec![first.clone(); DEVICES_MAX + 1])), refused);
        let balloon = MachineSpec { balloon: true, ..asked(vec![first]) };
        assert_eq!(check(balloon), Err(SpecError::PinnedBalloon));
    }

    #[test]
    fn a_machine_has_1_to_32_vcpus() {
        for vcpus in [1, 32] {
            assert_eq!(check(&MachineSpec { vcpus, ..spec() }, 0), Ok(()));
        }
        for vcpus in [0, 33, u8::MAX] {
            let refused = Err(SpecError::Vcpus { vcpus });
            assert_eq!(check(&MachineSpec { vcpus, ..spec() }, 0), refused);
        }
    }

    #[test]
    fn memory_comes_in_huge_pages_and_within_bounds() {
        for memory_bytes in [64 << 20, 66 << 20, 1 << 40] {
            assert_eq!(check(&MachineSpec { memory_bytes, ..spec() }, 0), Ok(()));
        }
        let refused = [0, 62 << 20, (64 << 20) + 4096, 65 << 20, (1 << 40) + (2 << 20), u64::MAX];
        for bytes in refused {
            let asked = MachineSpec { memory_bytes: bytes, ..spec() };
            assert_eq!(check(&asked, 0), Err(SpecError::Memory { bytes }));
        }
    }

    #[test]
    fn memory_to_be_added_comes_in_huge_pages_and_has_a_bound() {
        for hotplug_bytes in [0, 2 << 20, 1 << 40] {
            assert_eq!(check(&MachineSpec { hotplug_bytes, ..spec() }, 0), Ok(()));
        }
        for bytes in [1, 1 << 20, (1 << 40) + (2 << 20), u64::MAX] {
            let asked = MachineSpec { hotplug_bytes: bytes, ..spec() };
            assert_eq!(check(&asked, 0), Err(SpecError::Hotplug { bytes }));
        }
    }

    #[test]
    fn there_are_at_most_13_disks_and_a_file_for_each() {
        assert_eq!(check(&MachineSpec { disks: disks(13), ..spec() }, 13), Ok(()));

        let refused = Err(SpecError::Disks { disks: 14 });
        assert_eq!(check(&MachineSpec { disks: disks(14), ..spec() }, 14), refused);
        for files in [0, 2] {
            let refused = Err(SpecError::DiskFiles { disks: 1, files });
            assert_eq!(check(&MachineSpec { disks: disks(1), ..spec() }, files), refused);
        }
    }

    #[test]
    fn an_interface_has_1_to_8_queues_of_a_tap() {
        let unlimited = RateLimitSpec::default();
        let net = NetSpec { mac: [2, 0, 0, 0, 0, 5], download: unlimited, upload: unlimited };
        let net = Some(net);
        for taps in [1, 8] {
            assert_eq!(check_with(&MachineSpec { net: net.clone(), ..spec() }, 0, taps), Ok(()));
        }
        for taps in [0, 9] {
            let refused = Err(SpecError::Taps { taps });
            let asked = MachineSpec { net: net.clone(), ..spec() };
            assert_eq!(check_with(&asked, 0, taps), refused);
        }
        for taps in [1, 9] {
            assert_eq!(check_with(&spec(), 0, taps), Err(SpecError::Taps { taps }));
        }
    }

    #[test]
    fn a_vsock_address_is_a_guests_and_needs_a_socket() {
        for cid in [0, 1, 2, u32::MAX] {
            let refused = Err(SpecError::VsockCid { cid });
            assert_eq!(check(&MachineSpec { vsock_cid: Some(cid), ..spec() }, 0), refused);
        }
        for cid in [3, u32::MAX - 1] {
            let refused = Err(SpecError::VsockListener);
            assert_eq!(check(&MachineSpec { vsock_cid: Some(cid), ..spec() }, 0), refused);
        }
    }

    /// An older or newer process must not be half understood.
    #[test]
    fn a_description_with_a_word_too_many_is_refused() {
        let text = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<MachineSpec>(&text).unwrap(), spec());
        let text = text.replace("\"vcpus\":1", "\"vcpus\":1,\"hugepages\":true");
        assert!(serde_json::from_str::<MachineSpec>(&text).is_err());
    }
}
