//! `/devices`: what of the host could be given to instances, and what was registered for that.

use std::ops::Not;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::key::Key;
use crate::api::query::Query;
use crate::api::tags::{self, Tags};
use crate::devices::address::PciAddressError;
use crate::devices::spec::{DeviceNameError, DeviceSpec};
use crate::devices::{Available, Device, Devices};

/// A device to be registered.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct RegisterDevice {
    /// Where it is: `0000:a2:00.0`.
    pub pci_address: String,
    /// Its name, which no other has; made of the address if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The caller's labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Tags>,
}

/// A device that is registered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DeviceView {
    /// Unique on this host.
    pub id: String,
    /// Unique on this host.
    pub name: String,
    /// `gpu` or `pci`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it is.
    pub pci_address: String,
    /// Who made it: four hexadecimal digits.
    pub vendor_id: String,
    /// What it is: four hexadecimal digits of that one's.
    pub device_id: String,
    /// Devices of one group go to one instance.
    pub iommu_group: u32,
    /// Whether vfio-pci has it, as it has while an instance runs with it.
    pub bound_to_vfio: bool,
    /// Nothing is at its address any more: it was pulled out. Left out while it is there.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub gone: bool,
    /// The instance that has it, running or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attached_to: Option<String>,
    /// When it was registered.
    pub created_at: DateTime<Utc>,
    /// The caller's labels.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
}

/// A device that can be registered, or is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AvailableDevice {
    /// Where it is.
    pub pci_address: String,
    /// Who made it: four hexadecimal digits.
    pub vendor_id: String,
    /// What it is: four hexadecimal digits of that one's.
    pub device_id: String,
    /// Devices of one group go to one instance.
    pub iommu_group: u32,
    /// Who made it, if the host has a list of names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vendor_name: Option<String>,
    /// What it is, if the host has a list of names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_name: Option<String>,
    /// The driver that has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_driver: Option<String>,
}

impl From<Device> for DeviceView {
    fn from(device: Device) -> Self {
        Self {
            id: device.id,
            name: device.name.into(),
            kind: if device.is_gpu { "gpu" } else { "pci" }.to_owned(),
            pci_address: device.address.into(),
            vendor_id: digits(device.vendor),
            device_id: digits(device.device),
            iommu_group: device.group,
            bound_to_vfio: device.is_bound,
            gone: device.is_gone,
            attached_to: device.attached_to,
            created_at: device.created_at,
            tags: device.tags,
        }
    }
}

impl From<Available> for AvailableDevice {
    fn from(available: Available) -> Self {
        Self {
            pci_address: available.address.into(),
            vendor_id: digits(available.vendor),
            device_id: digits(available.device),
            iommu_group: available.group,
            vendor_name: available.vendor_name,
            device_name: available.device_name,
            current_driver: available.driver,
        }
    }
}

/// Lists devices of the host that instances could have.
#[utoipa::path(
    get, path = "/devices/available", tag = "devices",
    responses((status = 200, body = Vec<AvailableDevice>), (status = "default", body = ErrorBody)),
)]
pub(super) async fn available(
    State(app): State<App>,
) -> Result<Json<Vec<AvailableDevice>>, ApiError> {
    let available = look(&app, |devices| devices.available()).await??;
    Ok(Json(available.into_iter().map(AvailableDevice::from).collect()))
}

/// Lists registered devices, oldest first.
#[utoipa::path(
    get, path = "/devices", tag = "devices",
    params(
        ("tags" = Option<Tags>, Query, style = DeepObject, explode, description = "All must match"),
    ),
    responses((status = 200, body = Vec<DeviceView>), (status = "default", body = ErrorBody)),
)]
pub(super) async fn list(
    State(app): State<App>,
    query: Query,
) -> Result<Json<Vec<DeviceView>>, ApiError> {
    let wanted = query.tags();
    let devices = look(&app, |devices| devices.list()).await??.into_iter();
    let devices = devices.filter(|device| tags::have(&device.tags, &wanted));
    Ok(Json(devices.map(DeviceView::from).collect()))
}

/// Registers a device, so that instances can have it. Nothing of the host changes yet.
#[utoipa::path(
    post, path = "/devices", tag = "devices", request_body = RegisterDevice,
    responses((status = 201, body = DeviceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn register(
    State(app): State<App>,
    JsonBody(body): JsonBody<RegisterDevice>,
) -> Result<(StatusCode, Json<DeviceView>), ApiError> {
    let RegisterDevice { pci_address, name, tags } = body;
    let tags = tags.unwrap_or_default();
    tags::check(&tags)?;
    let name = name.filter(|name| !name.is_empty()).map(|name| name.parse()).transpose();
    let spec = DeviceSpec {
        address: pci_address.parse().map_err(DeviceSpecError::Address)?,
        name: name.map_err(DeviceSpecError::Name)?,
        tags,
    };
    let device = look(&app, move |devices| devices.register(spec)).await??;
    Ok((StatusCode::CREATED, Json(device.into())))
}

/// Reads one device.
#[utoipa::path(
    get, path = "/devices/{id}", tag = "devices",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = DeviceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(
    State(app): State<App>,
    Key(key): Key,
) -> Result<Json<DeviceView>, ApiError> {
    Ok(Json(look(&app, move |devices| devices.find(&key)).await??.into()))
}

/// Forgets a device that no instance has.
#[utoipa::path(
    delete, path = "/devices/{id}", tag = "devices",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 204), (status = "default", body = ErrorBody)),
)]
pub(super) async fn delete(State(app): State<App>, Key(key): Key) -> Result<StatusCode, ApiError> {
    look(&app, move |devices| devices.delete(&key)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// Does what reads the host's folders where nobody else has to wait for it.
async fn look<T: Send + 'static>(
    app: &App,
    work: impl FnOnce(&Devices) -> T + Send + 'static,
) -> Result<T, ApiError> {
    let devices = app.devices.clone();
    spawn_blocking(move || work(&devices)).await.map_err(|_panicked| ApiError::panicked())
}

fn digits(id: u16) -> String {
    format!("{id:04x}")
}

/// Why no device can be like that.
#[derive(Debug, thiserror::Error)]
pub(super) enum DeviceSpecError {
    /// The address.
    #[error("Value of pci_address is invalid")]
    Address(#[source] PciAddressError),
    /// The name.
    #[error("Value of name is invalid")]
    Name(#[source] DeviceNameError),
}
