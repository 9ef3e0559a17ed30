//! What an instance is asked to be, known to be well-formed.
//!
//! Grammar of texts and limits of this host are checked at the door (`api/instances/create.rs`);
//! what a value of these types can be at all is checked here.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::control::{DISKS_MAX, HotplugPolicy};
use crate::images::reference::Reference;
use crate::instances::health::HealthCheck;
use crate::instances::restart::{RestartPolicy, later};
use crate::resources::Need;
use crate::text::text_type;

pub use crate::control::{DEVICES_MAX, MEMORY_BYTES_MIN};

/// Longest name: it becomes the guest's host name, a DNS label (RFC 1035, 2.3.4 "Size limits").
const NAME_BYTES_MAX: usize = 63;

/// Most disks that the volumes of an instance take: those that a machine can have, but for its
/// root, the writable layer and the headers of its kernel.
pub const VOLUME_DISKS_MAX: usize = DISKS_MAX - 3;

/// Volumes that can be attached while an instance runs, beside those that it was started with; each
/// slot of a volume that is detached can be used again. A machine with many devices has fewer.
pub const SPARE_SLOTS: u8 = 4;

/// An instance someone asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSpec {
    /// Its name, unique on this host.
    pub name: InstanceName,
    /// The image; what the name stands for is settled once, at creation.
    #[serde(with = "reference_text")]
    pub image: Reference,
    /// Guest memory, in bytes, as asked for; the machine's is rounded up to its step.
    pub memory_bytes: u64,
    /// Memory added after the boot, in bytes.
    #[serde(default)]
    pub hotplug_bytes: u64,
    /// Size of the writable layer, in bytes.
    pub overlay_bytes: u64,
    /// Bytes per second to and from all disks together, if there is a limit.
    #[serde(default)]
    pub disk_io_bps: Option<NonZeroU64>,
    /// vCPUs, at least 1.
    pub vcpus: u8,
    /// Environment, over that of the image.
    pub env: BTreeMap<String, String>,
    /// The caller's labels.
    pub tags: BTreeMap<String, String>,
    /// The runtime by the name the caller gave it. There is one, whatever it is called.
    pub hypervisor: String,
    /// Whether the guest's agent listens; without it there is no graceful stop.
    pub agent: bool,
    /// Whether the guest gets the headers of its kernel.
    #[serde(default)]
    pub kernel_headers: KernelHeaders,
    /// Instead of the image's entrypoint; empty: the image's.
    pub entrypoint: Vec<String>,
    /// Instead of the image's arguments; empty: the image's.
    pub cmd: Vec<String>,
    /// Its network, if it has one.
    #[serde(default)]
    pub network: Option<InterfaceSpec>,
    /// How it is found out whether the workload is well, if it is.
    #[serde(default)]
    pub health_check: Option<HealthCheck>,
    /// When it is started again, if ever.
    #[serde(default)]
    pub restart_policy: Option<RestartPolicy>,
    /// Nobody wants it any more once this server has ended.
    #[serde(default)]
    pub ends_with_server: bool,
    /// Volumes in its guest, by path: none of them below one that comes later.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Devices of the host, by id or name; of an instance that is there, by id.
    #[serde(default)]
    pub devices: Vec<String>,
    /// What part of a GPU it has, if it has one.
    #[serde(default)]
    pub gpu_profile: Option<String>,
}

/// A volume in an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Its id or name; of an instance that is there, its id.
    pub volume: String,
    /// Where in the guest: absolute and normal.
    pub path: String,
    /// How.
    pub mode: VolumeMode,
}

/// How an instance has a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeMode {
    /// Alone.
    ReadWrite,
    /// Beside others who only read.
    ReadOnly,
    /// As read only, with a writable layer of its own above.
    Overlay {
        /// Size of that layer.
        size_bytes: u64,
    },
}

impl VolumeMode {
    /// Whether the volume itself is not written to.
    pub fn is_read_only(self) -> bool {
        match self {
            Self::ReadWrite => false,
            Self::ReadOnly | Self::Overlay { .. } => true,
        }
    }

    /// Disks of a machine that it takes.
    pub fn disks(self) -> usize {
        match self {
            Self::ReadWrite | Self::ReadOnly => 1,
            Self::Overlay { .. } => 2,
        }
    }

    /// Bytes of disk that it may take beside the volume's.
    pub fn layer_bytes(self) -> u64 {
        match self {
            Self::ReadWrite | Self::ReadOnly => 0,
            Self::Overlay { size_bytes } => size_bytes,
        }
    }
}

/// Whether a guest gets the headers of its kernel, to build modules with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelHeaders {
    /// It goes without, at no cost.
    #[default]
    Skipped,
    /// If they lie beside the kernel.
    IfThere,
    /// It is not started without.
    Needed,
}

/// The network of an instance.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceSpec {
    /// Bytes per second to the guest, if there is a limit.
    pub download_bps: Option<NonZeroU64>,
    /// Bytes per second from it, if there is a limit.
    pub upload_bps: Option<NonZeroU64>,
}

/// When an instance is to be deleted by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// Never.
    Never,
    /// Then.
    At(DateTime<Utc>),
    /// So long after this takes effect.
    In(Duration),
}

impl Expiry {
    /// The time that is, if this takes effect at `now`.
    pub fn from(self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Self::Never => None,
            Self::At(at) => Some(at),
            Self::In(after) => Some(later(now, after)),
        }
    }
}

/// How an instance is looked after from now on; what is `None` stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// How it is found out whether the workload is well; `Some(None)`: not at all.
    pub health_check: Option<Option<HealthCheck>>,
    /// When it is started again; `Some(None)`: never.
    pub restart_policy: Option<Option<RestartPolicy>>,
    /// When it is deleted.
    pub expiry: Option<Expiry>,
    /// Bytes per second to and from its disks; `Some(None)`: no limit.
    pub disk_io_bps: Option<Option<NonZeroU64>>,
}

/// What to run instead of what was run before; what is empty stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Command {
    /// Instead of the entrypoint.
    pub entrypoint: Vec<String>,
    /// Instead of the arguments.
    pub cmd: Vec<String>,
}

impl Command {
    /// Whether nothing changes.
    pub fn is_empty(&self) -> bool {
        self.entrypoint.is_empty() && self.cmd.is_empty()
    }
}

impl InstanceSpec {
    /// What the host has to have for it.
    pub fn need(&self) -> Need {
        let layers = self.volumes.iter().map(|mount| mount.mode.layer_bytes());
        let network = self.network.unwrap_or_default();
        Need {
            vcpus: self.vcpus.into(),
            memory_bytes: self.all_memory(),
            disk_bytes: layers.fold(self.overlay_bytes, u64::saturating_add),
            download_bps: network.download_bps.map_or(0, NonZeroU64::get),
            upload_bps: network.upload_bps.map_or(0, NonZeroU64::get),
            disk_io_bps: self.disk_io_bps.map_or(0, NonZeroU64::get),
        }
    }

    /// All the memory it may have, in bytes.
    pub fn all_memory(&self) -> u64 {
        self.memory_bytes.saturating_add(self.hotplug_bytes)
    }

    /// Whether its machine has something of the host's that reaches its memory by itself. All of
    /// that is there from the start then, and stays.
    pub fn is_pinned(&self) -> bool {
        !self.devices.is_empty() || self.gpu_profile.is_some()
    }

    /// When its guest gets more memory, where others get it by `policy`.
    pub fn hotplug(&self, policy: HotplugPolicy) -> HotplugPolicy {
        if self.is_pinned() { HotplugPolicy::Boot } else { policy }
    }

    /// The same with another command.
    #[must_use]
    pub fn with_command(mut self, command: Command) -> Self {
        let Command { entrypoint, cmd } = command;
        if !entrypoint.is_empty() {
            self.entrypoint = entrypoint;
        }
        if !cmd.is_empty() {
            self.cmd = cmd;
        }
        self
    }
}

/// The name of an instance: lower-case letters, digits and inner dashes, 1 to 63 of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct InstanceName(String);

text_type!(InstanceName, NameError);

impl FromStr for InstanceName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let bytes = text.as_bytes();
        let ends = [bytes.first(), bytes.last()];
        let well_formed = bytes.len() <= NAME_BYTES_MAX
            && ends.into_iter().all(|end| end.is_some_and(|&byte| is_inner(byte)))
            && bytes.iter().all(|&byte| is_inner(byte) || byte == b'-');
        if well_formed { Ok(Self(text.to_owned())) } else { Err(NameError) }
    }
}

/// The text is not the name of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "Instance name must be 1 to {NAME_BYTES_MAX} lower-case letters, digits and dashes, with no \
     dash at its ends"
)]
pub struct NameError;

/// A reference in a record is its normalised text.
mod reference_text {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Reference;

    pub(super) fn serialize<S: Serializer>(
        reference: &Reference,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_str(reference)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Reference, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
impl InstanceSpec {
    /// An instance like most.
    pub(crate) fn sample() -> Self {
        Self {
            name: InstanceName("sample".to_owned()),
            image: "alpine".parse().unwrap(),
            memory_bytes: 1 << 30,
            hotplug_bytes: 0,
            overlay_bytes: 10 << 30,
            disk_io_bps: None,
            vcpus: 2,
            env: BTreeMap::new(),
            tags: BTreeMap::new(),
            hypervisor: "native".to_owned(),
            agent: true,
            kernel_headers: KernelHeaders::Skipped,
            entrypoint: Vec::new(),
            cmd: Vec::new(),
            network: None,
            health_check: None,
            restart_policy: None,
            ends_with_server: false,
            volumes: Vec::new(),
            devices: Vec::new(),
            gpu_profile: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_devices_reach_is_there_from_the_boot_on() {
        let demand = HotplugPolicy::Demand { quiet_ms: 5 };
        let plain = InstanceSpec::sample();
        let devices = vec!["disk".to_owned()];
        let with_device = InstanceSpec { devices, ..InstanceSpec::sample() };
        let gpu_profile = Some("L40S-1Q".to_owned());
        let with_part = InstanceSpec { gpu_profile, ..InstanceSpec::sample() };

        assert_eq!(plain.hotplug(demand), demand);
        for pinned in [with_device, with_part] {
            assert_eq!(pinned.hotplug(demand), HotplugPolicy::Boot);
        }
    }

    #[test]
    fn names_are_host_names() {
        for name in ["a", "a-b", "0", "web-1", &"x".repeat(63)] {
            assert!(name.parse::<InstanceName>().is_ok(), "{name}");
        }
        for name in ["", "-", "-a", "a-", "A", "a_b", "a.b", "a/b", "ü", "../a", &"x".repeat(64)] {
            assert_eq!(name.parse::<InstanceName>(), Err(NameError), "{name}");
        }
    }
}
