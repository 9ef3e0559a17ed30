//! Devices of the host in the body that creates an instance, and in what is shown of one.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::create::SpecError;
use crate::instances::Instance;
use crate::instances::spec::{DEVICES_MAX, InstanceSpec};

/// Part of a GPU.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Gpu {
    /// Which, as `/resources` names them.
    pub profile: Option<String>,
}

/// The part of a GPU that an instance has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct GpuView {
    /// Which.
    pub profile: String,
    /// The mediated device that it is, while the instance runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mdev_uuid: Option<String>,
}

impl Gpu {
    /// The profile that is asked for, if one is.
    pub(super) fn asked(self) -> Option<String> {
        self.profile.filter(|profile| !profile.is_empty())
    }
}

impl GpuView {
    /// What `instance` has.
    pub(super) fn of(instance: &Instance) -> Option<Self> {
        let InstanceSpec { gpu_profile, .. } = &instance.spec;
        let mdev_uuid = instance.mdev_uuid.clone();
        gpu_profile.clone().map(|profile| Self { profile, mdev_uuid })
    }
}

/// Checks the devices of one instance, as far as that can be done without looking at any.
///
/// # Errors
///
/// [`SpecError`], which names the field.
pub(super) fn checked(devices: Option<Vec<String>>) -> Result<Vec<String>, SpecError> {
    let devices = devices.unwrap_or_default();
    // A part of a GPU is one more.
    if devices.len() >= DEVICES_MAX {
        let why =
            format!("{} are more than an instance can have: {}", devices.len(), DEVICES_MAX - 1);
        return Err(SpecError::invalid("devices", why));
    }
    if devices.iter().any(String::is_empty) {
        return Err(SpecError::invalid("devices", "one is empty"));
    }
    Ok(devices)
}
