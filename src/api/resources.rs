//! `/resources`: what the host has, and who was promised what.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::error::{ApiError, ErrorBody};
use crate::devices::{Gpus, Profile};
use crate::resources::{Allocation, DiskUse, Kind, Report, Status};

/// How it stands with everything.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ResourcesView {
    /// vCPUs.
    pub cpu: StatusView,
    /// Bytes of memory.
    pub memory: StatusView,
    /// Bytes of disk.
    pub disk: StatusView,
    /// Bytes per second of network, the larger of both ways; nothing if the host's is not known.
    pub network: StatusView,
    /// Bytes per second of disk, if the host's are known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_io: Option<StatusView>,
    /// What the disk's allocation is made of.
    pub disk_breakdown: DiskBreakdown,
    /// The GPUs of the host, if it has any that can be given away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuStatusView>,
    /// Who has what: instances that have not ended.
    pub allocations: Vec<AllocationView>,
}

/// How it stands with one thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StatusView {
    /// Which.
    #[serde(rename = "type")]
    pub kind: String,
    /// What the host has.
    pub capacity: u64,
    /// What may be promised.
    pub effective_limit: u64,
    /// What is promised.
    pub allocated: u64,
    /// What may still be promised.
    pub available: u64,
    /// How many times over it may be promised.
    pub oversub_ratio: f64,
    /// `detected` or `configured`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
}

/// What takes room on the disk, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskBreakdown {
    /// Root disks of images.
    pub images_bytes: u64,
    /// Layers of images.
    pub oci_cache_bytes: u64,
    /// Volumes, as large as they may get.
    pub volumes_bytes: u64,
    /// Writable layers, as large as they may get.
    pub overlays_bytes: u64,
}

/// How the host gives GPUs away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuStatusView {
    /// `vgpu`, in parts, or `passthrough`, whole.
    pub mode: String,
    /// How many can be had.
    pub total_slots: u64,
    /// How many are.
    pub used_slots: u64,
    /// What parts can be.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub profiles: Vec<GpuProfileView>,
    /// Those that are given away whole.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<GpuDeviceView>,
}

/// What a part of a GPU can be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuProfileView {
    /// What it is asked for by.
    pub name: String,
    /// Memory of its own, in MiB; nothing if it does not say.
    pub framebuffer_mb: u64,
    /// How many can still be had.
    pub available: u64,
}

/// A GPU that is given away whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuDeviceView {
    /// The name that it is registered by, or its address.
    pub name: String,
    /// Nobody has it.
    pub available: bool,
}

impl From<Gpus> for GpuStatusView {
    fn from(gpus: Gpus) -> Self {
        match gpus {
            Gpus::Parts { total, used, profiles } => {
                let profile = |Profile { name, framebuffer_mib, available }| GpuProfileView {
                    name,
                    framebuffer_mb: framebuffer_mib,
                    available,
                };
                Self {
                    mode: "vgpu".to_owned(),
                    total_slots: total,
                    used_slots: used,
                    profiles: profiles.into_iter().map(profile).collect(),
                    devices: Vec::new(),
                }
            }
            Gpus::Whole { devices } => {
                let count = |used: usize| u64::try_from(used).unwrap_or(u64::MAX);
                let used = devices.iter().filter(|(_, available)| !available).count();
                let device = |(name, available)| GpuDeviceView { name, available };
                Self {
                    mode: "passthrough".to_owned(),
                    total_slots: count(devices.len()),
                    used_slots: count(used),
                    profiles: Vec::new(),
                    devices: devices.into_iter().map(device).collect(),
                }
            }
        }
    }
}

/// What an instance was promised.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AllocationView {
    /// Which.
    pub instance_id: String,
    /// Its name.
    pub instance_name: String,
    /// vCPUs.
    pub cpu: u64,
    /// Memory.
    pub memory_bytes: u64,
    /// Writable layers.
    pub disk_bytes: u64,
    /// To the guest.
    pub network_download_bps: u64,
    /// From the guest.
    pub network_upload_bps: u64,
    /// To and from disks.
    pub disk_io_bps: u64,
}

impl From<Status> for StatusView {
    fn from(status: Status) -> Self {
        Self {
            kind: status.kind.name().to_owned(),
            capacity: status.capacity,
            effective_limit: status.limit(),
            allocated: status.allocated,
            available: status.available(),
            oversub_ratio: status.ratio.as_f64(),
            source: Some(if status.is_configured { "configured" } else { "detected" }.to_owned()),
        }
    }
}

impl From<Allocation> for AllocationView {
    fn from(allocation: Allocation) -> Self {
        let Allocation { id, name, need } = allocation;
        Self {
            instance_id: id,
            instance_name: name,
            cpu: need.vcpus,
            memory_bytes: need.memory_bytes,
            disk_bytes: need.disk_bytes,
            network_download_bps: need.download_bps,
            network_upload_bps: need.upload_bps,
            disk_io_bps: need.disk_io_bps,
        }
    }
}

impl From<Report> for ResourcesView {
    fn from(report: Report) -> Self {
        let status = |kind| report.statuses.get(&kind).copied().map(StatusView::from);
        // The contract wants a number for each of these.
        let or_nothing = |kind: Kind| {
            status(kind).unwrap_or_else(|| StatusView {
                kind: kind.name().to_owned(),
                capacity: 0,
                effective_limit: 0,
                allocated: 0,
                available: 0,
                oversub_ratio: 1.0,
                source: None,
            })
        };
        let DiskUse { images_bytes, blobs_bytes, volumes_bytes, overlays_bytes } = report.disk;
        Self {
            cpu: or_nothing(Kind::Cpu),
            memory: or_nothing(Kind::Memory),
            disk: or_nothing(Kind::Disk),
            network: or_nothing(Kind::Network),
            disk_io: status(Kind::DiskIo),
            disk_breakdown: DiskBreakdown {
                images_bytes,
                oci_cache_bytes: blobs_bytes,
                volumes_bytes,
                overlays_bytes,
            },
            gpu: None,
            allocations: report.allocations.into_iter().map(AllocationView::from).collect(),
        }
    }
}

/// Reads what the host has, and who was promised what.
#[utoipa::path(
    get, path = "/resources", tag = "resources",
    responses((status = 200, body = ResourcesView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(State(app): State<App>) -> Result<Json<ResourcesView>, ApiError> {
    let looked = spawn_blocking(move || (app.resources.report(), app.devices.gpus())).await;
    let (report, gpus) = looked.map_err(|_panicked| ApiError::panicked())?;
    Ok(Json(ResourcesView { gpu: gpus?.map(GpuStatusView::from), ..report.into() }))
}
