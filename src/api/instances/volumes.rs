//! Volumes of an instance: in the body that creates it, and given to and taken from one that runs
//! or has stopped.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::App;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::instances::create::SpecError;
use crate::api::instances::view::InstanceView;
use crate::config::Limits;
use crate::instances::spec::{VOLUME_DISKS_MAX, VolumeMode, VolumeMount as Mount};
use crate::size::ByteSize;

/// Folders of the guest that nothing may be mounted over.
const SYSTEM_FOLDERS: [&str; 14] = [
    "/bin", "/boot", "/dev", "/etc", "/lib", "/lib64", "/proc", "/root", "/run", "/sbin", "/sys",
    "/tmp", "/usr", "/var",
];

/// File systems of the guest's kernel, in which nothing may be mounted either.
const KERNEL_FOLDERS: [&str; 3] = ["/dev/", "/proc/", "/sys/"];

/// Longest path to mount at, and longest name in it (Linux PATH_MAX less its NUL, and NAME_MAX).
const PATH_BYTES_MAX: usize = 4095;
const NAME_BYTES_MAX: usize = 255;

/// A volume in an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeMount {
    /// Id or name.
    pub volume_id: String,
    /// Where in the guest: absolute, and no folder of the system.
    pub mount_path: String,
    /// The guest cannot write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readonly: Option<bool>,
    /// What the guest writes goes into a layer of its own; the volume is only read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<bool>,
    /// Size of that layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay_size: Option<String>,
}

/// Where a volume goes.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct AttachVolume {
    /// Where in the guest.
    pub mount_path: String,
    /// The guest cannot write.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub readonly: Option<bool>,
}

/// Checks all of the volumes of one instance; by path, so that none is below one that follows.
///
/// # Errors
///
/// [`SpecError`], which names the field.
pub(super) fn parsed(
    volumes: Option<Vec<VolumeMount>>,
    limits: &Limits,
) -> Result<Vec<Mount>, SpecError> {
    let mut mounts = Vec::new();
    let mut paths = BTreeSet::new();
    for volume in volumes.unwrap_or_default() {
        let mount = volume.parsed(limits)?;
        if !paths.insert(mount.path.clone()) {
            let why = format!("{:?} is there twice", mount.path);
            return Err(SpecError::invalid("volumes.mount_path", why));
        }
        mounts.push(mount);
        let disks: usize = mounts.iter().map(|mount| mount.mode.disks()).sum();
        if disks > VOLUME_DISKS_MAX {
            let why = format!("more than {VOLUME_DISKS_MAX}, where one with an overlay counts two");
            return Err(SpecError::invalid("volumes", why));
        }
    }
    mounts.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(mounts)
}

impl VolumeMount {
    fn parsed(self, limits: &Limits) -> Result<Mount, SpecError> {
        let Self { volume_id, mount_path, readonly, overlay, overlay_size } = self;
        if volume_id.is_empty() {
            return Err(SpecError::invalid("volumes.volume_id", "it is empty"));
        }
        check_path("volumes.mount_path", &mount_path)?;
        let field = "volumes.overlay_size";
        let mode = match (overlay.unwrap_or_default(), overlay_size) {
            (false, None) if readonly.unwrap_or_default() => VolumeMode::ReadOnly,
            (false, None) => VolumeMode::ReadWrite,
            (true, Some(size)) => {
                let size: ByteSize =
                    size.parse().map_err(|error| SpecError::invalid(field, error))?;
                let most = ByteSize(limits.overlay_bytes_max);
                if size.0 == 0 || size > most {
                    let why = format!("{size} is not within 1B to {most}");
                    return Err(SpecError::invalid(field, why));
                }
                VolumeMode::Overlay { size_bytes: size.0 }
            }
            (true, None) => return Err(SpecError::invalid(field, "an overlay needs a size")),
            (false, Some(_)) => {
                return Err(SpecError::invalid(field, "only an overlay has a size"));
            }
        };
        Ok(Mount { volume: volume_id, path: mount_path, mode })
    }
}

impl From<&Mount> for VolumeMount {
    fn from(mount: &Mount) -> Self {
        let Mount { volume, path, mode } = mount;
        let size = match mode {
            VolumeMode::Overlay { size_bytes } => Some(ByteSize(*size_bytes).to_string()),
            VolumeMode::ReadWrite | VolumeMode::ReadOnly => None,
        };
        Self {
            volume_id: volume.clone(),
            mount_path: path.clone(),
            readonly: Some(mode.is_read_only()),
            overlay: Some(size.is_some()),
            overlay_size: size,
        }
    }
}

fn check_path(field: &'static str, path: &str) -> Result<(), SpecError> {
    let is_name = |name: &str| {
        !matches!(name, "" | "." | "..") && name.len() <= NAME_BYTES_MAX && !name.contains('\0')
    };
    let is_normal = path.len() <= PATH_BYTES_MAX
        && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(is_name));
    let is_systems = SYSTEM_FOLDERS.contains(&path)
        || KERNEL_FOLDERS.iter().any(|folder| path.starts_with(folder));
    if is_normal && !is_systems {
        return Ok(());
    }
    let path: String = path.chars().take(NAME_BYTES_MAX).collect();
    Err(SpecError::invalid(field, format!("{path:?} is no folder to mount at")))
}

/// Gives an instance a volume. The guest of one that runs has it when this is answered, that of one
/// that has stopped from the next start on.
#[utoipa::path(
    post, path = "/instances/{id}/volumes/{volumeId}", tag = "instances",
    params(
        ("id" = String, Path, description = "Id, name, or the beginning of an id"),
        ("volumeId" = String, Path, description = "Id or name"),
    ),
    request_body = AttachVolume,
    responses((status = 200, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(in crate::api) async fn attach(
    State(app): State<App>,
    Path((key, volume)): Path<(String, String)>,
    JsonBody(body): JsonBody<AttachVolume>,
) -> Result<Json<InstanceView>, ApiError> {
    check_path("mount_path", &body.mount_path)?;
    let read_only = body.readonly.unwrap_or_default();
    let mode = if read_only { VolumeMode::ReadOnly } else { VolumeMode::ReadWrite };
    let mount = Mount { volume, path: body.mount_path, mode };
    Ok(Json((&*app.instances.attach_volume(&key, mount).await?).into()))
}

/// Takes a volume from an instance that has stopped, or that runs and does not use it. What was
/// written into a layer above it is lost.
#[utoipa::path(
    delete, path = "/instances/{id}/volumes/{volumeId}", tag = "instances",
    params(
        ("id" = String, Path, description = "Id, name, or the beginning of an id"),
        ("volumeId" = String, Path, description = "Id or name"),
    ),
    responses((status = 200, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(in crate::api) async fn detach(
    State(app): State<App>,
    Path((key, volume)): Path<(String, String)>,
) -> Result<Json<InstanceView>, ApiError> {
    Ok(Json((&*app.instances.detach_volume(&key, &volume).await?).into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(path: &str) -> VolumeMount {
        VolumeMount {
            volume_id: "v".to_owned(),
            mount_path: path.to_owned(),
            readonly: None,
            overlay: None,
            overlay_size: None,
        }
    }

    fn refused(volumes: Vec<VolumeMount>) -> String {
        parsed(Some(volumes), &Limits::default()).unwrap_err().to_string()
    }

    #[test]
    fn what_lies_below_another_comes_behind_it() {
        let volumes = ["/data/b/c", "/data-2", "/data", "/var/lib/x"].map(volume).to_vec();

        let mounts = parsed(Some(volumes), &Limits::default()).unwrap();

        let paths: Vec<_> = mounts.iter().map(|mount| mount.path.as_str()).collect();
        assert_eq!(paths, ["/data", "/data-2", "/data/b/c", "/var/lib/x"]);
    }

    #[test]
    fn only_folders_of_the_workloads_own_are_mounted_at() {
        for path in ["/data", "/var/lib/postgresql", "/usr/local/share", "/a b"] {
            assert!(parsed(Some(vec![volume(path)]), &Limits::default()).is_ok(), "{path}");
        }
        let long = format!("/{}", "x".repeat(256));
        for path in [
            "",
            "/",
            "data",
            "/data/",
            "//data",
            "/data/../etc",
            "/./data",
            "/etc",
            "/usr",
            "/tmp",
            "/proc/1",
            "/sys/fs",
            "/dev/shm",
            "/a\0b",
            &long,
        ] {
            assert!(refused(vec![volume(path)]).contains("volumes.mount_path"), "{path:?}");
        }
        assert!(refused(vec![volume("/a"), volume("/a")]).contains("twice"));
    }

    #[test]
    fn an_overlay_has_a_size_and_nothing_else_has() {
        let sized = |overlay, size: Option<&str>| VolumeMount {
            overlay: Some(overlay),
            overlay_size: size.map(str::to_owned),
            ..volume("/a")
        };
        let mode = |volume| parsed(Some(vec![volume]), &Limits::default()).unwrap()[0].mode;

        assert_eq!(mode(sized(true, Some("1GB"))), VolumeMode::Overlay { size_bytes: 1 << 30 });
        assert_eq!(
            mode(VolumeMount { readonly: Some(true), ..volume("/a") }),
            VolumeMode::ReadOnly
        );
        for bad in [
            sized(true, None),
            sized(true, Some("0")),
            sized(true, Some("10TB")),
            sized(true, Some("1.5GB")),
            sized(false, Some("1GB")),
        ] {
            assert!(refused(vec![bad]).contains("volumes.overlay_size"));
        }
    }

    #[test]
    fn a_layer_counts_as_a_disk() {
        let many = |count: usize| (0..count).map(|n| volume(&format!("/v{n}"))).collect::<Vec<_>>();

        assert!(parsed(Some(many(VOLUME_DISKS_MAX)), &Limits::default()).is_ok());
        let refused = refused(many(VOLUME_DISKS_MAX + 1));
        assert!(refused.contains("more than 10"), "{refused}");
    }
}
