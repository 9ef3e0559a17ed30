//! The disks of an instance that can be written to, and its volumes: made once, opened at each
//! start.
//!
//! The order is that of the machine: the writable layer behind the root, then the volumes by path,
//! each with its own layer behind it if it has one. What is attached later has no place in it: the
//! guest finds that by its serial number, which is the same for a volume wherever it is.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use ovum_agent_proto::config::{VolumeMode as GuestMode, VolumeMount as GuestMount};
use sha2::{Digest as _, Sha256};

use crate::disks::{self, DiskError, Disks};
use crate::instances::Shared;
use crate::instances::record::Record;
use crate::instances::spec::{InstanceSpec, VolumeMode, VolumeMount};

/// The writable layer's file in an instance's folder.
const OVERLAY: &str = "overlay.ext4";

/// What names of layers above volumes begin with.
const LAYER_FILE: &str = "volume-";

/// The image's disk, the first of the machine.
pub(super) const ROOT_DEVICE: &str = "/dev/vda";

/// The writable layer's, the second.
pub(super) const OVERLAY_DEVICE: &str = "/dev/vdb";

/// The first of a volume.
const FIRST_VOLUME: u8 = b'c';

/// What serial numbers of volumes begin with, and of the layers above some of them.
const VOLUME: char = 'v';
const LAYER: char = 'l';

/// Bytes of a volume's key in a serial number, of which its hexadecimal digits, a letter and a dash
/// are all.
const SERIAL_KEY_BYTES: usize = 9;

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
    for mount in &spec.volumes {
        disks.push(volume(shared, mount).await?);
        if let VolumeMode::Overlay { size_bytes } = mount.mode {
            let serial = serial(LAYER, mount);
            disks.push(make(serial, layer_path(dir, mount), size_bytes).await?);
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
    for mount in &spec.volumes {
        disks.push(volume(shared, mount).await?);
        if let Some(serial) = layer_serial(mount) {
            let file = Disks::reopen(&layer_path(dir, mount)).await?;
            disks.push(writable(serial, file));
        }
    }
    Ok(disks)
}

/// Where the layer of a volume lies in the folder of the instance that has it.
pub(super) fn layer_path(dir: &Path, mount: &VolumeMount) -> PathBuf {
    dir.join(format!("{LAYER_FILE}{}.ext4", mount.volume))
}

/// Removes the layers of an instance that are above none of its volumes: one that leaves does so
/// in the records first. What cannot be removed goes with the instance.
pub(super) fn remove_stray_layers(shared: &Shared, record: &Record) {
    if let Err(error) = remove_others(&record.spec.volumes, &shared.dir_of(&record.id)) {
        tracing::warn!(id = record.id, %error, "A layer above no volume could not be removed");
    }
}

fn remove_others(volumes: &[VolumeMount], dir: &Path) -> io::Result<()> {
    let kept: Vec<_> = volumes.iter().map(|mount| layer_path(dir, mount)).collect();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let is_layer = entry.file_name().as_encoded_bytes().starts_with(LAYER_FILE.as_bytes());
        if is_layer && !kept.contains(&entry.path()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
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

/// Opens the disk of a volume.
///
/// # Errors
///
/// [`DiskError`].
pub(super) async fn volume(
    shared: &Shared,
    mount: &VolumeMount,
) -> Result<InstanceDisk, DiskError> {
    let read_only = mount.mode.is_read_only();
    let file = shared.volumes.disk(&mount.volume, read_only).await?;
    Ok(InstanceDisk { id: volume_serial(mount), read_only, file, made_at: None })
}

/// The serial number of a volume's disk.
pub(super) fn volume_serial(mount: &VolumeMount) -> String {
    serial(VOLUME, mount)
}

/// The serial number of the disk of the layer above a volume, if it has one.
pub(super) fn layer_serial(mount: &VolumeMount) -> Option<String> {
    let has_layer = matches!(mount.mode, VolumeMode::Overlay { .. });
    has_layer.then(|| serial(LAYER, mount))
}

/// A serial number made of the volume's id, which may be too long for one.
fn serial(kind: char, mount: &VolumeMount) -> String {
    let key = Sha256::digest(&mount.volume);
    format!("{kind}-{}", hex::encode(&key[..SERIAL_KEY_BYTES]))
}

fn writable(id: String, file: File) -> InstanceDisk {
    InstanceDisk { id, read_only: false, file, made_at: None }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ovum_agent_proto::volumes::SERIAL_BYTES_MAX;

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

    #[test]
    fn a_layer_above_no_volume_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let layered = mount("/a", VolumeMode::Overlay { size_bytes: 1 << 30 });
        let gone = VolumeMount { volume: "gone".to_owned(), ..layered.clone() };
        let [kept, stray] = [&layered, &gone].map(|mount| layer_path(dir.path(), mount));
        for path in [&kept, &stray, &dir.path().join(OVERLAY)] {
            fs::write(path, []).unwrap();
        }

        remove_others(&[layered], dir.path()).unwrap();

        assert!(kept.exists() && dir.path().join(OVERLAY).exists());
        assert!(!stray.exists());
    }

    #[test]
    fn a_serial_number_is_the_volumes_own_and_fits() {
        let named = |volume: &str| {
            let mount =
                VolumeMount { volume: volume.to_owned(), ..mount("/a", VolumeMode::ReadOnly) };
            [volume_serial(&mount), serial(LAYER, &mount)]
        };
        let all = [named("a"), named("b"), named(&"x".repeat(63))].concat();

        assert!(all.iter().all(|serial| serial.len() == SERIAL_BYTES_MAX), "{all:?}");
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        assert_eq!(named("a")[0], "v-ca978112ca1bbdcafa");
    }
}
