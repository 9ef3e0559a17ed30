//! An instance as the API shows it.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::devices::GpuView;
use crate::api::instances::policies::{HealthCheck, RestartPolicy};
use crate::api::instances::volumes::VolumeMount;
use crate::api::tags::Tags;
use crate::instances::health::Health;
use crate::instances::restart::RestartStatus;
use crate::instances::spec::InterfaceSpec;
use crate::instances::{Instance, Mac};
use crate::size::{ByteRate, ByteSize};

/// The only platform there is.
pub(in crate::api) const PLATFORM: &str = "linux/amd64";

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceView {
    /// 24 letters and digits.
    pub id: String,
    /// Unique on this host.
    pub name: String,
    /// Normalised image name.
    pub image: String,
    /// `Created`, `Initializing`, `Running`, `Paused`, `Shutdown`, `Stopped`, `Standby` or
    /// `Unknown`.
    pub state: String,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// When it will be deleted; null: never.
    pub expires_at: Option<DateTime<Utc>>,
    /// Memory.
    pub size: String,
    /// Memory that is added after the boot.
    pub hotplug_size: String,
    /// Size of the writable layer.
    pub overlay_size: String,
    /// Bytes per second to and from all disks together; missing if there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_io_bps: Option<String>,
    /// vCPUs.
    pub vcpus: u8,
    /// Its network.
    pub network: NetworkView,
    /// As asked for; there is one runtime, whatever it is called.
    pub hypervisor: String,
    /// Whether its memory is on disk.
    pub has_snapshot: bool,
    /// `os/arch`.
    pub platform: String,
    /// When its vCPUs first ran.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub stopped_at: Option<DateTime<Utc>>,
    /// Environment over that of the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// The caller's labels.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    /// What went wrong outside of the workload.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
    /// The workload's exit status; 128 + N if signal N ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<u8>,
    /// What that means.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_message: Option<String>,
    /// Where the time of the boot went: `image`, `queue`, `disks`, `worker`, `vmm`, `kernel`,
    /// `agent`, `workload`, `first_output`, one after the other, in milliseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phase_durations_ms: BTreeMap<String, u64>,
    /// What it is at: one of those while it boots, then its state in lower case.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_phase: Option<String>,
    /// Since when.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_phase_since: Option<DateTime<Utc>>,
    /// Health checks.
    pub health_status: HealthStatusView,
    /// How it is found out whether the workload is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// When it is started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Volumes in its guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<VolumeMount>,
    /// Devices of the host, by id.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    /// Part of a GPU of the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuView>,
    /// How that has gone; missing as long as there is nothing to say.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_status: Option<RestartStatusView>,
}

/// The network of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// Whether it has one.
    pub enabled: bool,
    /// `default`, if it has one: there is only one to be in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Its address: a new one at each start, and that of the last start once it has stopped.
    pub ip: Option<String>,
    /// Its Ethernet address, likewise.
    pub mac: Option<String>,
    /// Rate to the guest; missing if there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_download: Option<String>,
    /// Rate from the guest; missing if there is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth_upload: Option<String>,
}

impl NetworkView {
    fn of(instance: &Instance) -> Self {
        let address = instance.address.filter(|_| instance.spec.network.is_some());
        let InterfaceSpec { download_bps, upload_bps } = instance.spec.network.unwrap_or_default();
        let rate = |bps: Option<NonZeroU64>| bps.map(|bps| ByteRate(bps.get()).to_string());
        Self {
            bandwidth_download: rate(download_bps),
            bandwidth_upload: rate(upload_bps),
            enabled: instance.spec.network.is_some(),
            name: instance.spec.network.map(|_| "default".to_owned()),
            ip: address.map(|address| address.to_string()),
            mac: address.map(|address| Mac::of(address).to_string()),
        }
    }
}

/// What health checks say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthStatusView {
    /// `disabled`, `starting`, `healthy`, `unhealthy` or `unknown`.
    pub status: String,
    /// Failures since the last success.
    pub consecutive_failures: u32,
    /// Successes since the last failure.
    pub consecutive_successes: u32,
    /// When the last check ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_checked_at: Option<DateTime<Utc>>,
    /// When the last good one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_success_at: Option<DateTime<Utc>>,
    /// When the last bad one did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_failure_at: Option<DateTime<Utc>>,
    /// What it said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

/// How starting an instance again by itself has gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestartStatusView {
    /// Attempts since it last ran stably.
    pub attempts: u32,
    /// When the next one begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<DateTime<Utc>>,
    /// When the last one began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_attempt_at: Option<DateTime<Utc>>,
    /// `health_check_failed`, if that was why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_reason: Option<String>,
    /// `manual_stop` or `max_attempts_exceeded`: there are no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocked_reason: Option<String>,
}

impl From<&Health> for HealthStatusView {
    fn from(health: &Health) -> Self {
        Self {
            status: health.state.name().to_owned(),
            consecutive_failures: health.failures,
            consecutive_successes: health.successes,
            last_checked_at: health.last_checked_at,
            last_success_at: health.last_success_at,
            last_failure_at: health.last_failure_at,
            last_error: health.last_error.clone(),
        }
    }
}

fn restart_status(instance: &Instance) -> Option<RestartStatusView> {
    let status = &instance.restart;
    let says_something = *status != RestartStatus::default() || instance.restart_at.is_some();
    says_something.then_some(RestartStatusView {
        attempts: status.attempts,
        next_attempt_at: instance.restart_at,
        last_attempt_at: status.last_attempt_at,
        last_reason: status.last_reason.map(|reason| reason.name().to_owned()),
        blocked_reason: status.blocked.map(|blocked| blocked.name().to_owned()),
    })
}

impl From<&Instance> for InstanceView {
    fn from(instance: &Instance) -> Self {
        let Instance {
            id,
            spec,
            state,
            created_at,
            expires_at,
            started_at,
            stopped_at,
            ending,
            phase,
            phases,
            health,
            ..
        } = instance;
        let in_ms = |(name, took): &(&str, Duration)| {
            let rounded = (took.as_micros() + 500) / 1000;
            ((*name).to_owned(), u64::try_from(rounded).unwrap_or(u64::MAX))
        };
        Self {
            id: id.clone(),
            name: spec.name.to_string(),
            image: spec.image.to_string(),
            state: state.to_string(),
            created_at: *created_at,
            expires_at: *expires_at,
            size: ByteSize(spec.memory_bytes).to_string(),
            hotplug_size: ByteSize(spec.hotplug_bytes).to_string(),
            overlay_size: ByteSize(spec.overlay_bytes).to_string(),
            disk_io_bps: spec.disk_io_bps.map(|rate| ByteRate(rate.get()).to_string()),
            vcpus: spec.vcpus,
            network: NetworkView::of(instance),
            hypervisor: spec.hypervisor.clone(),
            has_snapshot: false,
            platform: PLATFORM.to_owned(),
            started_at: *started_at,
            stopped_at: *stopped_at,
            env: spec.env.clone(),
            tags: spec.tags.clone(),
            state_error: ending.error.clone(),
            exit_code: ending.exit_code,
            exit_message: ending.exit_message.clone(),
            phase_durations_ms: phases.iter().map(in_ms).collect(),
            current_phase: Some(phase.0.to_owned()),
            current_phase_since: phase.1,
            health_status: health.into(),
            health_check: spec.health_check.as_ref().map(HealthCheck::from),
            restart_policy: spec.restart_policy.as_ref().map(RestartPolicy::from),
            volumes: spec.volumes.iter().map(VolumeMount::from).collect(),
            devices: spec.devices.clone(),
            gpu: GpuView::of(instance),
            restart_status: restart_status(instance),
        }
    }
}
