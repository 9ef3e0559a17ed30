//! What can go wrong with devices of the host, seen from outside: one type per thing a caller asks
//! for.

use std::io;
use std::time::Duration;

use crate::devices::address::PciAddress;
use crate::devices::host_use::HostUse;

/// What stands between a device and a group that can be given away.
pub(super) const NO_IOMMU_MEND: &str = "turn on VT-d or AMD-Vi in the firmware, and boot the \
                                        host with intel_iommu=on if its processor is Intel's";

/// Why devices cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Which boot this is.
    #[error("Failed to find out which boot of the host this is")]
    Boot(#[source] io::Error),
    /// Their records.
    #[error("Failed to read what is lent of the host")]
    Records(#[from] rusqlite::Error),
}

/// The kernel does not say how its devices are.
#[derive(Debug, thiserror::Error)]
#[error("Failed to look at the host's devices")]
pub struct HostError(#[from] pub io::Error);

/// Why no device is meant.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// None has this id or name.
    #[error("No such device: {key:?}: `ovum device list` shows those that are registered")]
    Missing {
        /// The text.
        key: String,
    },
    /// The records.
    #[error("Failed to read the records of devices")]
    Records(#[from] rusqlite::Error),
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Why a device cannot be given away, however much it is asked for.
#[derive(Debug, thiserror::Error)]
pub enum UnfitError {
    /// It is not there, or not any more.
    #[error("No PCI device is at {address}: `ovum device available` shows those that are there")]
    Missing {
        /// Where.
        address: PciAddress,
    },
    /// Nothing keeps it from reaching all memory of the host.
    #[error("Device {address} is in no IOMMU group: {NO_IOMMU_MEND}")]
    NoIommu {
        /// Where.
        address: PciAddress,
    },
    /// It connects others.
    #[error("Device {address} is a bridge: what is behind it can be registered")]
    Bridge {
        /// Where.
        address: PciAddress,
    },
    /// The host needs it.
    #[error("The host needs device {address}: {used}")]
    HostUse {
        /// Where.
        address: PciAddress,
        /// What for.
        used: HostUse,
    },
    /// Another device would come with it, which somebody uses.
    #[error(
        "Device {address} shares IOMMU group {group} with {peer}, which driver {driver} has: \
         unbind that one first, or bind it to vfio-pci"
    )]
    Group {
        /// Where.
        address: PciAddress,
        /// Their group.
        group: u32,
        /// The other.
        peer: PciAddress,
        /// Of the other.
        driver: String,
    },
    /// The driver that gives devices away is not there.
    #[error("The host has no driver vfio-pci, by which devices are given away: modprobe vfio-pci")]
    NoDriver,
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Why a device was not registered.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// It cannot be given away.
    #[error(transparent)]
    Unfit(#[from] UnfitError),
    /// Another has the name.
    #[error("Device name {name:?} is taken")]
    NameTaken {
        /// Which.
        name: String,
    },
    /// It is registered.
    #[error("Device {address} is registered already, as {name:?}")]
    Registered {
        /// Where.
        address: PciAddress,
        /// As what.
        name: String,
    },
    /// The record.
    #[error("Failed to keep the record of a device")]
    Records(#[from] rusqlite::Error),
}

/// Why a device is still registered.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// Somebody has it.
    #[error("Device {device} is attached to instance {instance}: delete that first")]
    InUse {
        /// The device.
        device: String,
        /// Who.
        instance: String,
    },
    /// The record.
    #[error("Failed to remove the record of a device")]
    Records(#[from] rusqlite::Error),
}

/// Why an instance cannot have devices like these.
#[derive(Debug, thiserror::Error)]
pub enum WantError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// One cannot be given away.
    #[error(transparent)]
    Unfit(#[from] UnfitError),
    /// One is named twice.
    #[error("Device {device} is named twice")]
    Twice {
        /// Which.
        device: String,
    },
    /// No device of the host makes such parts.
    #[error("No GPU profile {profile:?} is offered by this host; it offers: {offered}")]
    NoProfile {
        /// Which.
        profile: String,
        /// Those there are.
        offered: String,
    },
    /// All that can be made are made.
    #[error("All of GPU profile {profile:?} are taken")]
    NoSlot {
        /// Which.
        profile: String,
    },
}

/// Why an instance does not get a device.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// It is not there, or not any more.
    #[error("No such device: {device:?}")]
    Missing {
        /// Which.
        device: String,
    },
    /// Another has it.
    #[error("Device {device} is attached to instance {instance}: one at a time can have it")]
    Taken {
        /// The device.
        device: String,
        /// Who has it.
        instance: String,
    },
    /// Another has one that comes with it.
    #[error(
        "Device {device} shares its IOMMU group with device {other}, which is attached to \
         instance {instance}: only one can have devices of a group"
    )]
    GroupTaken {
        /// The device.
        device: String,
        /// The one of its group.
        other: String,
        /// Who has that.
        instance: String,
    },
    /// The records.
    #[error("Failed to keep who has a device")]
    Records(#[from] rusqlite::Error),
}

/// Why a machine does not get the devices of its instance.
#[derive(Debug, thiserror::Error)]
pub enum LendError {
    /// They are not what they were.
    #[error(transparent)]
    Want(#[from] WantError),
    /// A driver did not let go, or vfio-pci does not take it. It is as it was before.
    #[error("Failed to bind device {address} to vfio-pci")]
    Bind {
        /// Where.
        address: PciAddress,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// No part was made.
    #[error("Failed to make a device of GPU profile {profile:?}")]
    Make {
        /// Which.
        profile: String,
        /// What the driver says.
        #[source]
        source: io::Error,
    },
    /// The file that stands for the device or its group is missing.
    #[error("Device {name} has no file in /dev/vfio, by which a machine would get it")]
    NoFile {
        /// A PCI address, or the UUID of a mediated device.
        name: String,
    },
    /// What an earlier machine had was not given back.
    #[error(transparent)]
    GiveBack(#[from] GiveBackError),
    /// The records.
    #[error("Failed to write down what is lent")]
    Records(#[from] rusqlite::Error),
    /// Another change does not come to an end.
    #[error("Devices of the host did not change within {} s", after.as_secs())]
    Stuck {
        /// After so long.
        after: Duration,
    },
}

/// Why something of the host is still lent. What is written down of it stays, and it is tried
/// again.
#[derive(Debug, thiserror::Error)]
pub enum GiveBackError {
    /// The kernel did not do it.
    #[error("Failed to give device {name} back to the host")]
    Host {
        /// A PCI address, or the UUID of a mediated device.
        name: String,
        /// What it says.
        #[source]
        source: io::Error,
    },
    /// The records.
    #[error("Failed to write down what was given back")]
    Records(#[from] rusqlite::Error),
    /// It does not come to an end.
    #[error("Devices of the host did not change within {} s", after.as_secs())]
    Stuck {
        /// After so long.
        after: Duration,
    },
}
