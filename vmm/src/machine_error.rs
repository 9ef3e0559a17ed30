//! Why a machine could not be built or saved.

use std::io;

use crate::arch::acpi::AcpiError;
use crate::arch::boot::BootError;
use crate::memory::MemoryError;
use crate::pci::NoRoom;
use crate::spec::SpecError;
use crate::vcpu_state::VcpuStateError;
use crate::vfio::VfioError;
use crate::virtio::blk::BlkError;
use crate::virtio::console::ConsoleError;
use crate::virtio::mem::MemError;
use crate::virtio::net::NetError;
use crate::virtio::vsock::VsockError;

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The description asks for what no machine can be.
    #[error("Machine description is not valid")]
    Spec(#[from] SpecError),
    /// The file handed over as /dev/kvm is something else.
    #[error("The file given as /dev/kvm is not KVM (it answers API version {version})")]
    NotKvm {
        /// What it answered; KVM says 12.
        version: i32,
    },
    /// KVM refused.
    #[error("KVM failed to {what}")]
    Kvm {
        /// What was asked.
        what: &'static str,
        /// What it says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// No memory for the guest.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A disk's file cannot be used.
    #[error("Failed to use the file of disk {id:?}")]
    Disk {
        /// Which disk.
        id: String,
        /// Why.
        #[source]
        source: BlkError,
    },
    /// The TAP cannot be used.
    #[error("Failed to use the network interface")]
    Net(#[source] NetError),
    /// The listening socket of the vsock device cannot be used.
    #[error("Failed to use the vsock socket")]
    Vsock(#[source] VsockError),
    /// The console's log cannot be used.
    #[error("Failed to use the console log")]
    Console(#[source] ConsoleError),
    /// No device for memory that is added later.
    #[error("Failed to set up memory that can be added")]
    Hotplug(#[from] MemError),
    /// A device of the host cannot be lent.
    #[error(transparent)]
    Vfio(#[from] VfioError),
    /// Nor can all of them together.
    #[error(transparent)]
    Bars(#[from] NoRoom),
    /// More devices than slots.
    #[error("More than {max} virtio devices")]
    TooManyDevices {
        /// Slots there are.
        max: u64,
    },
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Kernel, initramfs or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Page tables and GDT.
    #[error("Failed to write page tables")]
    Tables(#[source] vm_memory::GuestMemoryError),
    /// CPUID has more leaves than KVM takes.
    #[error("CPUID of this host has more leaves than KVM takes")]
    TooManyLeaves,
    /// This process has no descriptor or thread left.
    #[error("Failed to get a thread or descriptor")]
    Thread(#[source] io::Error),
}

impl BuildError {
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}

/// Why a machine that is built has no other disk than before.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Disks are told apart by their ids.
    #[error("The machine has a disk {id:?} already")]
    IdTaken {
        /// The id.
        id: String,
    },
    /// All slots that the guest knows of are taken.
    #[error("The machine has no slot left for a disk")]
    NoSlot,
    /// The disk, or its place in the machine.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// The machine has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// Why a machine could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// KVM refused.
    #[error("Failed to read the {part}")]
    Kvm {
        /// What was read.
        part: &'static str,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// It runs: what would be read would be of different moments.
    #[error("The machine is not paused")]
    Running,
    /// It has devices of the host, whose state is in the devices.
    #[error("The machine has devices of the host, and what is in them cannot be saved")]
    HostDevices,
    /// The machine has ended.
    #[error(transparent)]
    Ended(#[from] Ended),
}

/// A thread of the machine is no more, and with it the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("The machine has ended")]
pub struct Ended;

impl SaveError {
    pub(crate) fn kvm(part: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { part, source }
    }
}
