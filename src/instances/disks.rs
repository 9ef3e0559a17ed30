//! The disks of an instance that can be written to, and its volumes: made once, opened at each
//! start.
//!
//! The order is that of the machine: the writable layer behind the root, then the volumes by path,
//! each with its own layer behind it if it has one.

use std::fs::File;
use std::path::{Path, PathBuf};

use ovum_agent_proto::config::{VolumeMode as GuestMode, VolumeMount as GuestMount};

use crate::disks::{self, DiskError, Disks};
use crate::instances::Shared;
use crate::instances::spec::{InstanceSpec, VolumeMode, VolumeMount};

/// The writable layer's file in an instance's folder.
const OVERLAY: &str = "overlay.ext4";

/// The image's disk, the first of the machine.
pub(super) const ROOT_DEVICE: &str = "/dev/vda";

/// The writable layer's, the second.
pub(super) const OVERLAY_DEVICE: &str = "/dev/vdb";

/// The first of a volume.
const FIRST_VOLUME: u8 = b'c';

/// One disk, open.
#[derive(Debug)]
pub(super) struct InstanceDisk {
    /// What the guest reads as its serial number.
    pub(super) id: String,
    pub(super) read_only: bool,
    pub(super) file: File,
    /// Where it was made just now, if it was.
    made_at: Option<PathBuf>,
}

/// Makes the layers of an instance in its folder, and opens them and its volumes. What is left on
/// an error goes with the folder.
///
/// # Errors
///
/// [`DiskError`].
pub(super) async fn create(
    shared: &Shared,
    spec: &InstanceSpec,
    dir: &Path,
) -> Result<Vec<InstanceDisk>, DiskError> {
    let make = async |id: String, path: PathBuf, size_bytes| {
        let file = shared.disks.create(&path, size_bytes).await?.keep();
        Ok::<_, DiskError>(InstanceDisk { made_at: Some(path), ..writable(id, file) })
    };
    let overlay = make("overlay".to_owned(), dir.join(OVERLAY), spec.overlay_bytes).await?;
    let mut disks = vec![overlay];
    for (index, mount) in spec.volumes.iter().enumerate() {
        disks.push(volume(shared, index, mount).await?);
        if let VolumeMode::Overlay { size_bytes } = mount.mode {
            disks.push(make(layer_id(index), layer_path(dir, mount), size_bytes).await?);
        }
    }
    Ok(disks)
}

/// Waits until what was made is on the host's disk.
///
/// # Errors
///
/// [`DiskError`].
pub(super) async fn settle(disks: &[InstanceDisk]) -> Result<(), DiskError> {
    for disk in disks {
        if let Some(path) = &disk.made_at {
            disks::settle(&disk.file, path).await?;
        }
    }
    Ok(())
}

/// Opens the layers of an instance and its volumes once more.
///
/// # Errors
///
/// [`DiskError`].
pub(super) async fn reopen(
    shared: &Shared,
    spec: &InstanceSpec,
    dir: &Path,
) -> Result<Vec<InstanceDisk>, DiskError> {
    let overlay = Disks::reopen(&dir.join(OVERLAY)).await?;
    let mut disks = vec![writable("overlay".to_owned(), overlay)];
    for (index, mount) in spec.volumes.iter().enumerate() {
        disks.push(volume(shared, index, mount).await?);
        if let VolumeMode::Overlay { .. } = mount.mode {
            let file = Disks::reopen(&layer_path(dir, mount)).await?;
            disks.push(writable(layer_id(index), file));
        }
    }
    Ok(disks)
}

/// Where the layer of a volume lies in the folder of the instance that has it.
pub(super) fn layer_path(dir: &Path, mount: &VolumeMount) -> PathBuf {
    dir.join(format!("volume-{}.ext4", mount.volume))
}

/// What the guest is told of its volumes.
pub(super) fn guest_mounts(spec: &InstanceSpec) -> Vec<GuestMount> {
    let mut letters = (FIRST_VOLUME..=b'z').map(|letter| format!("/dev/vd{}", char::from(letter)));
    let mut device = || letters.next().unwrap_or_default();
    let mounts = spec.volumes.iter().map(|mount| GuestMount {
        device: device(),
        path: mount.path.clone(),
        mode: match mount.mode {
            VolumeMode::ReadWrite => GuestMode::ReadWrite,
            VolumeMode::ReadOnly => GuestMode::ReadOnly,
            VolumeMode::Overlay { .. } => GuestMode::Overlay { device: device() },
        },
    });
    mounts.collect()
}

async fn volume(
    shared: &Shared,
    index: usize,
    mount: &VolumeMount,
) -> Result<InstanceDisk, DiskError> {
    let read_only = mount.mode.is_read_only();
    let file = shared.volumes.disk(&mount.volume, read_only).await?;
    Ok(InstanceDisk { id: format!("volume-{index}"), read_only, file, made_at: None })
}

fn writable(id: String, file: File) -> InstanceDisk {
    InstanceDisk { id, read_only: false, file, made_at: None }
}

fn layer_id(index: usize) -> String {
    format!("volume-{index}-layer")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(path: &str, mode: VolumeMode) -> VolumeMount {
        VolumeMount { volume: "v".to_owned(), path: path.to_owned(), mode }
    }

    #[test]
    fn the_guest_finds_a_layer_behind_its_volume() {
        let volumes = vec![
            mount("/a", VolumeMode::ReadOnly),
            mount("/b", VolumeMode::Overlay { size_bytes: 1 << 30 }),
            mount("/c", VolumeMode::ReadWrite),
        ];
        let spec = InstanceSpec { volumes, ..InstanceSpec::sample() };

        let told = guest_mounts(&spec);

        let devices: Vec<_> = told.iter().map(|mount| mount.device.as_str()).collect();
        assert_eq!(devices, ["/dev/vdc", "/dev/vdd", "/dev/vdf"]);
        assert_eq!(told[1].mode, GuestMode::Overlay { device: "/dev/vde".to_owned() });
    }

    /// The machine answers a request for a disk's id with 20 bytes at most.
    #[test]
    fn ids_have_room_in_a_disks_answer() {
        assert!(layer_id(99).len() <= 20);
    }
}
