//! Volumes: disks that outlive the guest, mounted where the server says.
//!
//! They are mounted in the initramfs, where their devices and the layers above some of them have
//! paths, and moved to their places once the root is entered. A volume that cannot be mounted ends
//! the boot: a workload that wrote into the folder below it would lose what it wrote. Volumes that
//! come or go later are in [`change`].

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;

use ovum_agent_proto::config::{VolumeMode, VolumeMount};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags, MoveMountFlags, UnmountFlags};
use rustix::{fs, mount};

use crate::console;
use crate::root::directory;

mod change;
mod mounts;

/// What a guest frees is given back to the host. For the rest see the root's layer.
const WRITABLE: &str = "discard,noinit_itable,no_prefetch_block_bitmaps";

/// Others may be reading it, too: the journal is left alone. The host has emptied it.
const READ_ONLY: &str = "noload,no_prefetch_block_bitmaps";

/// The volumes of a guest, mounted. Dropping it leaves the disks it wrote to clean.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    /// On their way to their places.
    mounted: Vec<Mounted>,
    /// File systems that are written to.
    writable: Vec<OwnedFd>,
    /// They are ours to leave clean; else an init system unmounts them.
    are_ours: bool,
}

/// A volume that is mounted somewhere.
#[derive(Debug)]
struct Mounted {
    path: String,
    mount: OwnedFd,
}

/// Why a guest is without a volume.
#[derive(Debug, thiserror::Error)]
#[error("Failed to mount {device} on {path}")]
pub(crate) struct VolumeError {
    device: String,
    path: String,
    #[source]
    source: io::Error,
}

impl Volumes {
    /// Mounts all of `volumes` in the initramfs.
    pub(crate) fn mount(volumes: &[VolumeMount]) -> Result<Self, VolumeError> {
        let mut all = Self { mounted: Vec::new(), writable: Vec::new(), are_ours: true };
        for (index, volume) in volumes.iter().enumerate() {
            let VolumeMount { device, path, .. } = volume;
            let mounted = all.mount_one(index, volume).map_err(|errno| VolumeError {
                device: device.clone(),
                path: path.clone(),
                source: errno.into(),
            })?;
            all.mounted.push(Mounted { path: path.clone(), mount: mounted });
        }
        Ok(all)
    }

    fn mount_one(&mut self, index: usize, volume: &VolumeMount) -> Result<OwnedFd, Errno> {
        let base = format!("/volume-{index}");
        match &volume.mode {
            VolumeMode::ReadWrite => {
                let mounted = ext4(&volume.device, &base, MountFlags::empty(), WRITABLE)?;
                self.writable.push(handle(&base)?);
                Ok(mounted)
            }
            VolumeMode::ReadOnly => ext4(&volume.device, &base, MountFlags::RDONLY, READ_ONLY),
            VolumeMode::Overlay { device } => {
                ext4(&volume.device, &base, MountFlags::RDONLY, READ_ONLY)?;
                let layer = format!("{base}-layer");
                let merged = format!("{base}-merged");
                self.writable.push(ext4(device, &layer, MountFlags::empty(), WRITABLE)?);
                let changes = format!("{layer}/changes");
                let scratch = format!("{layer}/scratch");
                if fs::mkdirat(CWD, &changes, Mode::from_raw_mode(0o755)).is_ok() {
                    like(&base, &changes)?;
                }
                directory(&scratch)?;
                directory(&merged)?;
                let options = format!(
                    "lowerdir={base},upperdir={changes},workdir={scratch},metacopy=on,\
                     redirect_dir=on"
                );
                // The volume's disk is its source, by which it is known when it has to go.
                attach(&volume.device, &merged, "overlay", MountFlags::empty(), &options)?;
                // It has mounts of its own of both: with it they go, too.
                for part in [&base, &layer] {
                    mount::unmount(part.as_str(), UnmountFlags::DETACH)?;
                }
                handle(&merged)
            }
        }
    }

    /// Moves them to their places in the root, which has been entered.
    pub(crate) fn settle(&mut self) -> Result<(), VolumeError> {
        for Mounted { path, mount } in self.mounted.drain(..) {
            let flags =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
            let settled = directories(&path)
                .and_then(|()| mount::move_mount(&mount, "", CWD, path.as_str(), flags));
            settled.map_err(|errno| VolumeError {
                device: "a volume".to_owned(),
                path,
                source: errno.into(),
            })?;
        }
        Ok(())
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        // As the root does it with its layer.
        for file_system in &self.writable {
            let clean =
                mount::fspick(file_system, "", FsPickFlags::FSPICK_EMPTY_PATH).and_then(|picked| {
                    mount::fsconfig_set_flag(&picked, "ro")?;
                    mount::fsconfig_reconfigure(&picked)
                });
            if let Err(errno) = clean {
                console::say(format_args!("a volume is left to its journal: {errno}"));
            }
        }
    }
}

fn ext4(device: &str, target: &str, flags: MountFlags, options: &str) -> Result<OwnedFd, Errno> {
    directory(target)?;
    attach(device, target, "ext4", flags, options)?;
    handle(target)
}

fn attach(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), Errno> {
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    mount::mount(source, target, kind, flags, options.as_c_str())
}

/// A mount by its root, wherever it moves, and if it is nowhere.
fn handle(path: &str) -> Result<OwnedFd, Errno> {
    fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
}

/// Gives the directory `to` the owner and mode of `from`.
fn like(from: &str, to: &str) -> Result<(), Errno> {
    let stat = fs::stat(from)?;
    let (owner, group) = (fs::Uid::from_raw(stat.st_uid), fs::Gid::from_raw(stat.st_gid));
    fs::chownat(CWD, to, Some(owner), Some(group), AtFlags::empty())?;
    fs::chmodat(CWD, to, Mode::from_raw_mode(stat.st_mode), AtFlags::empty())
}

/// Makes a directory and those above it, unless they are there.
fn directories(path: &str) -> Result<(), Errno> {
    let ends = path.match_indices('/').map(|(end, _)| end).skip(1).chain([path.len()]);
    for end in ends {
        directory(&path[..end])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_made_one_in_the_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/c");
        let path = path.to_str().unwrap();

        directories(path).unwrap();
        directories(path).unwrap();

        assert!(fs::stat(path).is_ok());
    }
}
