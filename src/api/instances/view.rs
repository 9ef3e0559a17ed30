//! An instance as the API shows it.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::tags::Tags;
use crate::instances::Instance;
use crate::size::ByteSize;

/// The only platform there is.
pub(super) const PLATFORM: &str = "linux/amd64";

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
    /// Memory that is added after boot.
    pub hotplug_size: String,
    /// Size of the writable layer.
    pub overlay_size: String,
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
    /// Where the time of the boot went: `image`, `disks`, `worker`, `vmm`, `kernel`, `agent`,
    /// `workload`, `first_output`, one after the other, in milliseconds.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub phase_durations_ms: BTreeMap<String, u64>,
    /// Health checks.
    pub health_status: HealthStatusView,
}

/// The network of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkView {
    /// Whether it has one.
    pub enabled: bool,
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
}

impl From<&Instance> for InstanceView {
    fn from(instance: &Instance) -> Self {
        let Instance {
            id, spec, state, created_at, started_at, stopped_at, ending, phases, ..
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
            expires_at: None,
            size: ByteSize(spec.memory_bytes).to_string(),
            hotplug_size: ByteSize(0).to_string(),
            overlay_size: ByteSize(spec.overlay_bytes).to_string(),
            vcpus: spec.vcpus,
            network: NetworkView { enabled: false },
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
            health_status: HealthStatusView {
                status: "disabled".to_owned(),
                consecutive_failures: 0,
                consecutive_successes: 0,
            },
        }
    }
}
