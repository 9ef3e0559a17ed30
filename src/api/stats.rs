//! `/instances/{id}/stats`: what an instance costs the host.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::App;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::key::Key;
use crate::instances::stats::Stats;

/// What an instance costs the host at this moment; nothing unless it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatsView {
    /// Its id.
    pub instance_id: String,
    /// Its name.
    pub instance_name: String,
    /// CPU time since it was started, the guest's included.
    pub cpu_seconds: f64,
    /// Memory of the host that it has touched.
    pub memory_rss_bytes: u64,
    /// Memory that is mapped.
    pub memory_vms_bytes: u64,
    /// Bytes received; there is no network yet.
    pub network_rx_bytes: u64,
    /// Bytes sent; there is no network yet.
    pub network_tx_bytes: u64,
    /// vCPUs.
    pub allocated_vcpus: u8,
    /// Guest memory.
    pub allocated_memory_bytes: u64,
    /// Memory touched to memory allocated.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_utilization_ratio: Option<f64>,
}

impl From<&Stats> for StatsView {
    fn from(stats: &Stats) -> Self {
        let Stats { instance, usage } = stats;
        let allocated = instance.spec.all_memory();
        #[expect(clippy::cast_precision_loss, reason = "a ratio for people")]
        let ratio = usage.resident_bytes as f64 / allocated.max(1) as f64;
        Self {
            instance_id: instance.id.clone(),
            instance_name: instance.spec.name.to_string(),
            cpu_seconds: usage.cpu.as_secs_f64(),
            memory_rss_bytes: usage.resident_bytes,
            memory_vms_bytes: usage.virtual_bytes,
            network_rx_bytes: 0,
            network_tx_bytes: 0,
            allocated_vcpus: instance.spec.vcpus,
            allocated_memory_bytes: allocated,
            memory_utilization_ratio: (usage.resident_bytes > 0).then_some(ratio),
        }
    }
}

/// Reads what an instance costs the host.
#[utoipa::path(
    get, path = "/instances/{id}/stats", tag = "instances",
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    responses((status = 200, body = StatsView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(
    State(app): State<App>,
    Key(key): Key,
) -> Result<Json<StatsView>, ApiError> {
    Ok(Json((&app.instances.stats(&key)?).into()))
}
