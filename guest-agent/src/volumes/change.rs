//! Volumes that come to a guest which runs, and go.
//!
//! A volume goes only if nothing in the guest uses it: nothing is unmounted by force, and nothing
//! at all if it is mounted somewhere else, too, in whatever namespace. Whoever is told that it is
//! in use finds it as it was. A namespace that no process is in is not seen: then the volume is
//! unmounted, and its disk stays.
//!
//! A layer above a volume is a disk of its own, which can go once the volume is unmounted.

use std::io;
use std::os::fd::AsFd;

use ovum_agent_proto::message::ErrorCode;
use ovum_agent_proto::volumes::{AttachSpec, DetachSpec};
use rustix::fs::{fstat, major, minor};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, unmount};

use super::mounts::{self, Mount};
use super::{READ_ONLY, Volumes, WRITABLE, attach, directories, handle};
use crate::disks::{self, Disk};

/// Why a guest has the volumes that it had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("No disk has the serial number {serial:?}")]
    NoDisk { serial: String },
    #[error("{path} is in use: end what has files open or its working directory there")]
    Busy { path: String },
    #[error("The volume is in use beyond {path}: something else in the guest has mounted it, too")]
    Elsewhere { path: String },
    #[error("Failed to {what}")]
    System {
        what: String,
        #[source]
        source: io::Error,
    },
}

impl Volumes {
    /// Mounts a volume whose disk has come.
    pub(crate) fn attach(&mut self, spec: &AttachSpec) -> Result<(), ChangeError> {
        let AttachSpec { serial, path, read_only } = spec;
        disks::look().map_err(failed("look for disks"))?;
        let no_disk = || ChangeError::NoDisk { serial: serial.clone() };
        let disk = Disk::find(serial).ok_or_else(no_disk)?;
        let mounted = directories(path).and_then(|()| self.mount_there(&disk, path, *read_only));
        mounted.map_err(|errno| {
            if disk.is_free() {
                // One that stays bound is found by whoever takes the disk away.
                let _ = disk.unbind();
            }
            failed(format!("mount the volume on {path}"))(errno.into())
        })
    }

    /// Unmounts a volume and lets go of its disk. That there is none is as good.
    pub(crate) fn detach(&mut self, spec: &DetachSpec) -> Result<(), ChangeError> {
        let Some(disk) = Disk::find(&spec.serial) else { return Ok(()) };
        let number = disk.number().map_err(failed("look at the volume's disk"))?;
        let device = disk.device();
        let of_disk = |mount: &Mount| mount.is_of(&number, &device);
        let all = mounts::seen_by_all().map_err(failed("read what is mounted"))?;
        let path = match &all.ours.iter().filter(|mount| of_disk(mount)).collect::<Vec<_>>()[..] {
            [] => None,
            [mount] if !all.others.iter().any(|other| of_disk(other) && !other.follows(mount)) => {
                self.unmount(mount, &number)?;
                Some(&mount.path)
            }
            [mount, ..] => return Err(ChangeError::Elsewhere { path: mount.path.clone() }),
        };
        // A layer has no path, and is ours to let go of.
        self.forget(&number);
        if !disk.is_free() {
            let path = path.cloned().unwrap_or_else(|| "any folder seen from here".to_owned());
            return Err(ChangeError::Elsewhere { path });
        }
        disk.unbind().map_err(failed("let go of the volume's disk"))
    }

    fn unmount(&mut self, mount: &Mount, number: &str) -> Result<(), ChangeError> {
        let path = mount.path.as_str();
        // What we have open is in use, too.
        self.forget(number);
        unmount(path, UnmountFlags::NOFOLLOW).map_err(|errno| {
            if !mount.is_layered() {
                self.keep(path, mount.read_only);
            }
            match errno {
                Errno::BUSY => ChangeError::Busy { path: path.to_owned() },
                errno => failed(format!("unmount {path}"))(errno.into()),
            }
        })
    }

    fn mount_there(&mut self, disk: &Disk, path: &str, read_only: bool) -> Result<(), Errno> {
        let device = disk.device();
        let device = device.to_str().ok_or(Errno::INVAL)?;
        let (flags, options) = if read_only {
            (MountFlags::RDONLY, READ_ONLY)
        } else {
            (MountFlags::empty(), WRITABLE)
        };
        attach(device, path, "ext4", flags, options)?;
        self.keep(path, read_only);
        Ok(())
    }

    /// Remembers to leave clean what is mounted on `path`.
    fn keep(&mut self, path: &str, read_only: bool) {
        if self.are_ours && !read_only {
            // Without a handle it is left to its journal.
            self.writable.extend(handle(path));
        }
    }

    fn forget(&mut self, number: &str) {
        self.writable.retain(|file_system| number_of(file_system).as_deref() != Ok(number));
    }
}

impl ChangeError {
    /// What kind of no that is.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Self::NoDisk { .. } => ErrorCode::NotFound,
            Self::Busy { .. } | Self::Elsewhere { .. } => ErrorCode::InUse,
            Self::System { .. } => ErrorCode::System,
        }
    }
}

fn number_of(file: &impl AsFd) -> Result<String, Errno> {
    let device = fstat(file)?.st_dev;
    Ok(format!("{}:{}", major(device), minor(device)))
}

fn failed(what: impl Into<String>) -> impl Fn(io::Error) -> ChangeError {
    let what = what.into();
    move |source| ChangeError::System { what: what.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_not_there_cannot_come_and_has_gone() {
        let serial = "no-such-disk".to_owned();
        let mut volumes = Volumes::default();
        let spec = AttachSpec { serial: serial.clone(), path: "/a".into(), read_only: true };

        let refused = volumes.attach(&spec).unwrap_err();

        assert_eq!(refused.code(), ErrorCode::NotFound, "{refused}");
        assert!(volumes.detach(&DetachSpec { serial }).is_ok());
    }
}
