//! The body of `POST /instances`, made into an [`InstanceSpec`]: the door through which all of it
//! comes.
//!
//! Every field of the contract is read and checked. One that asks for what is not there yet is
//! refused by name ([`extras`](super::extras)): nothing is ignored in silence.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::num::NonZeroU64;
use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::devices::{self, Gpu};
use crate::api::instances::extras::{Credential, Network, SnapshotPolicy};
use crate::api::instances::upkeep::UpkeepFields;
use crate::api::instances::view::PLATFORM;
use crate::api::instances::volumes::{self, VolumeMount};
use crate::api::tags::{self, Tags, TagsError};
use crate::config::Limits;
use crate::images::reference::{Reference, ReferenceError};
use crate::instances::health::{self, Probe};
use crate::instances::spec::{
    Expiry, InstanceSpec, InterfaceSpec, KernelHeaders, MEMORY_BYTES_MIN, Upkeep,
};
use crate::size::{ByteRate, ByteSize};

/// vCPUs unless told otherwise.
const VCPUS: u8 = 2;

/// Memory unless told otherwise.
const SIZE: ByteSize = ByteSize(1 << 30);

/// Writable layer unless told otherwise.
const OVERLAY_SIZE: ByteSize = ByteSize(10 << 30);

/// Least limit of disks: below it a guest does not even boot within a minute.
const DISK_IO_BPS_MIN: ByteRate = ByteRate(256 << 10);

/// Name of the only runtime.
pub(in crate::api) const RUNTIME: &str = "native";

/// An instance to be created.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct CreateInstance {
    /// Image name, by tag or digest.
    pub image: String,
    /// Unique on this host: lower-case letters, digits and inner dashes.
    pub name: String,
    /// `linux/amd64`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Memory; `1GB` if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<String>,
    /// Memory added after the boot, as far as the guest can use it; none if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<String>,
    /// Size of the writable layer; `10GB` if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
    /// vCPUs; 2 if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<i64>,
    /// Bytes per second to and from all disks together; `0` is without limit, and if omitted the
    /// instance has its share of the host's `disk_io_capacity`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_io_bps: Option<String>,
    /// Environment, over that of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Secrets that never enter the guest. Not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<BTreeMap<String, Credential>>,
    /// The caller's labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Tags>,
    /// How it is looked after.
    #[serde(flatten, deserialize_with = "UpkeepFields::within")]
    pub upkeep: UpkeepFields,
    /// Network; if omitted, one without limits, unless the server has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Devices of the host, by id or name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<String>>,
    /// Part of a GPU of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<Gpu>,
    /// Volumes in the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volumes: Option<Vec<VolumeMount>>,
    /// A name for the runtime, echoed; all of them mean the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<Hypervisor>,
    /// How snapshots are kept. Not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// No kernel headers in the guest, and no cost of them. If omitted it has them if this host
    /// does; with `false` it is not started without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_kernel_headers: Option<bool>,
    /// The agent does not listen: no graceful stop, and `Running` does not wait for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_guest_agent: Option<bool>,
    /// Instead of the image's; empty is as if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Instead of the image's; empty is as if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
    /// However this server ends, the instance ends with it and is deleted: for a server that lives
    /// as long as one command. Not in the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ends_with_server: Option<bool>,
}

/// Names for the runtime that clients know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Hypervisor {
    /// Ours.
    Native,
    /// Means ours.
    CloudHypervisor,
    /// Means ours.
    Firecracker,
    /// Means ours.
    Qemu,
    /// Means ours.
    QemuMicrovm,
    /// Of another operating system: refused.
    Vz,
}

impl CreateInstance {
    /// Checks everything. What comes beside is when it is to be deleted by itself.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field. What is malformed goes before what is not there yet.
    pub fn into_spec(self, limits: &Limits) -> Result<(InstanceSpec, Expiry), SpecError> {
        let unsupported = self.check_extras()?;
        let name = self.name.parse().map_err(|error| SpecError::schema("name", error))?;
        let image: Reference = self.image.parse().map_err(SpecError::Image)?;
        check_platform(self.platform.as_deref().unwrap_or(PLATFORM))?;
        let range = MEMORY_BYTES_MIN..=limits.memory_bytes_max;
        let memory_bytes = sized("size", self.size.as_deref(), SIZE, range)?;
        let range = 0..=limits.memory_bytes_max - memory_bytes;
        let hotplug = self.hotplug_size.as_deref();
        let hotplug_bytes = sized("hotplug_size", hotplug, ByteSize(0), range)?;
        let overlay = self.overlay_size.as_deref();
        let overlay_bytes =
            sized("overlay_size", overlay, OVERLAY_SIZE, 1..=limits.overlay_bytes_max)?;
        let vcpus = checked_vcpus(self.vcpus, limits.vcpus_max)?;
        let disk_io_bps = match self.disk_io_bps.as_deref() {
            Some(text) => checked_disk_io(text)?,
            None => limits.disk_io_share(vcpus),
        };
        let env = self.env.unwrap_or_default();
        check_env(&env)?;
        let tags = self.tags.unwrap_or_default();
        tags::check(&tags).map_err(SpecError::Tags)?;
        let entrypoint = checked_words("entrypoint", self.entrypoint)?;
        let cmd = checked_words("cmd", self.cmd)?;
        let hypervisor = runtime_name(self.hypervisor)?.to_owned();
        let Upkeep { health_check, restart_policy, expiry, .. } = self.upkeep.parsed()?;
        let (health_check, restart_policy) = (health_check.flatten(), restart_policy.flatten());
        let agent = !self.skip_guest_agent.unwrap_or_default();
        let share = limits.network_share(vcpus);
        let network = self.network.unwrap_or_default().parsed(limits.has_network, share)?;
        if let Some(lack) = health_check.as_ref().and_then(|check| lack_of(check, agent, network)) {
            return Err(SpecError::invalid("health_check", lack));
        }
        let volumes = volumes::parsed(self.volumes, limits)?;
        let devices = devices::checked(self.devices)?;
        let gpu_profile = self.gpu.and_then(Gpu::asked);
        if let Some(field) = unsupported {
            return Err(SpecError::NotSupported { field });
        }
        let spec = InstanceSpec {
            name,
            image,
            memory_bytes,
            hotplug_bytes,
            overlay_bytes,
            disk_io_bps,
            vcpus,
            env,
            tags,
            hypervisor,
            agent,
            kernel_headers: match self.skip_kernel_headers {
                None => KernelHeaders::IfThere,
                Some(false) => KernelHeaders::Needed,
                Some(true) => KernelHeaders::Skipped,
            },
            entrypoint,
            cmd,
            network,
            health_check,
            restart_policy,
            volumes,
            devices,
            gpu_profile,
            ends_with_server: self.ends_with_server.unwrap_or_default(),
        };
        Ok((spec, expiry.unwrap_or(Expiry::Never)))
    }
}

/// What a check needs that the instance goes without.
fn lack_of(
    check: &health::HealthCheck,
    agent: bool,
    network: Option<InterfaceSpec>,
) -> Option<&'static str> {
    match check.probe {
        Probe::Exec { .. } => (!agent).then_some("by exec it needs the guest agent"),
        Probe::Http(_) | Probe::Tcp { .. } => {
            network.is_none().then_some("by http or tcp it needs a network")
        }
    }
}

fn sized(
    field: &'static str,
    text: Option<&str>,
    default: ByteSize,
    range: RangeInclusive<u64>,
) -> Result<u64, SpecError> {
    let ByteSize(bytes) = match text {
        Some(text) => text.parse().map_err(|error| SpecError::invalid(field, error))?,
        None => ByteSize(default.0.min(*range.end())),
    };
    if range.contains(&bytes) {
        return Ok(bytes);
    }
    let (least, most) = (ByteSize(*range.start()), ByteSize(*range.end()));
    Err(SpecError::invalid(field, format!("{} is not within {least} to {most}", ByteSize(bytes))))
}

pub(super) fn checked_disk_io(text: &str) -> Result<Option<NonZeroU64>, SpecError> {
    let rate = ByteRate::from_disk(text);
    let rate = rate.map_err(|error| SpecError::invalid("disk_io_bps", error))?;
    if rate != ByteRate(0) && rate < DISK_IO_BPS_MIN {
        let why = format!("{rate} is less than {DISK_IO_BPS_MIN}; 0 is without limit");
        return Err(SpecError::invalid("disk_io_bps", why));
    }
    Ok(NonZeroU64::new(rate.0))
}

fn checked_vcpus(asked: Option<i64>, vcpus_max: u8) -> Result<u8, SpecError> {
    let asked = asked.unwrap_or_else(|| VCPUS.min(vcpus_max).into());
    if asked < 1 {
        return Err(SpecError::schema("vcpus", "at least 1 expected"));
    }
    u8::try_from(asked).ok().filter(|&vcpus| vcpus <= vcpus_max).ok_or_else(|| {
        SpecError::invalid("vcpus", format!("{asked} is more than this host gives: {vcpus_max}"))
    })
}

/// What execve(2) takes: no NUL anywhere, no `=` in a name.
fn check_env(env: &BTreeMap<String, String>) -> Result<(), SpecError> {
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let name: String = name.chars().take(64).collect();
            return Err(SpecError::invalid("env", format!("{name:?} is no variable")));
        }
    }
    Ok(())
}

pub(super) fn checked_words(
    field: &'static str,
    words: Option<Vec<String>>,
) -> Result<Vec<String>, SpecError> {
    let words = words.unwrap_or_default();
    if words.iter().any(|word| word.contains('\0')) {
        return Err(SpecError::invalid(field, "a NUL byte is in it"));
    }
    Ok(words)
}

fn runtime_name(asked: Option<Hypervisor>) -> Result<&'static str, SpecError> {
    match asked {
        None | Some(Hypervisor::Native) => Ok(RUNTIME),
        Some(Hypervisor::CloudHypervisor) => Ok("cloud-hypervisor"),
        Some(Hypervisor::Firecracker) => Ok("firecracker"),
        Some(Hypervisor::Qemu) => Ok("qemu"),
        Some(Hypervisor::QemuMicrovm) => Ok("qemu-microvm"),
        Some(Hypervisor::Vz) => Err(SpecError::invalid("hypervisor", "vz is not for Linux hosts")),
    }
}

/// `os/arch[/variant]`, of which there is one.
fn check_platform(text: &str) -> Result<(), SpecError> {
    let parts: Vec<&str> = text.split('/').collect();
    let is_word = |part: &&str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
    };
    let platform = || text.chars().take(64).collect();
    match parts[..] {
        ["linux", "amd64"] => Ok(()),
        ["linux", "amd64" | "arm64", ..] if parts.len() <= 3 && parts.iter().all(is_word) => {
            Err(SpecError::OtherPlatform { platform: platform() })
        }
        _ => Err(SpecError::Platform { platform: platform() }),
    }
}

/// Why a body is no instance.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// A value is outside of what the contract's document allows.
    #[error("Value of {field} is invalid: {why}")]
    Schema {
        /// Which.
        field: &'static str,
        /// What it should be.
        why: String,
    },
    /// The image's name.
    #[error("Value of image is invalid")]
    Image(#[source] ReferenceError),
    /// The tags.
    #[error("Value of tags is invalid")]
    Tags(#[source] TagsError),
    /// No platform.
    #[error("Value of platform is invalid: {platform:?} is not os/arch of Linux")]
    Platform {
        /// The text.
        platform: String,
    },
    /// Another platform.
    #[error("Value of platform cannot be had: {platform:?} is not {PLATFORM}")]
    OtherPlatform {
        /// The text.
        platform: String,
    },
    /// A value makes no sense, or not on this host.
    #[error("Value of {field} is invalid: {why}")]
    Invalid {
        /// Which.
        field: &'static str,
        /// Why.
        why: String,
    },
    /// A field asks for what is not there yet.
    #[error("Not supported yet: {field}")]
    NotSupported {
        /// Which.
        field: &'static str,
    },
}

impl SpecError {
    pub(in crate::api) fn schema(field: &'static str, why: impl Display) -> Self {
        Self::Schema { field, why: format!("{why}") }
    }

    pub(in crate::api) fn invalid(field: &'static str, why: impl Display) -> Self {
        Self::Invalid { field, why: format!("{why}") }
    }
}

#[cfg(test)]
mod tests;
