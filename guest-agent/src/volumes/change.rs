//! Volumes that come to a guest which runs, and go.
//!
//! A volume goes only if nothing in the guest uses it: nothing is unmounted by force, and a disk is
//! let go of only if no file system is on it any more, in whatever namespace. What turns out to be
//! in use after it was unmounted is mounted again, so that whoever is told so finds it as it was.
//!
//! That cannot be done with a layer above a volume: two overlays on one layer are undefined. So the
//! other namespaces are looked at before it is unmounted. Where that does not tell (a namespace
//! that no process is in, an overlay on top of this one), it is unmounted, and its disk held.
//! The layer's own disk goes after that, and can be held as well.

use std::io;
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use ovum_agent_proto::message::ErrorCode;
use ovum_agent_proto::volumes::{AttachSpec, DetachSpec};
use rustix::fs::{fstat, major, minor};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, unmount};

use super::mounts::{self, Mount};
use super::{READ_ONLY, Volumes, WRITABLE, attach, directories, handle};
use crate::disks::{self, Disk};

/// How long a disk may be held by what has ended, and how often it is looked at meanwhile.
const HOLD_TIME_MAX: Duration = Duration::from_millis(500);
const HOLD_PAUSE: Duration = Duration::from_millis(20);

/// Why a guest has the volumes that it had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChangeError {
    #[error("No disk has the serial number {serial:?}")]
    NoDisk { serial: String },
    #[error("{path} is in use: end what has files open or its working directory there")]
    Busy { path: String },
    #[error("The volume is in use beyond {path}: something else in the guest has mounted it, too")]
    Elsewhere { path: String },
    #[error("Something else is mounted on {path}: unmount that first")]
    Covered { path: String },
    #[error("It is not mounted any more, but something in the guest still has its disk")]
    Held,
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
        let all = mounts::ours().map_err(failed("read what is mounted"))?;
        let mut its = all.iter().filter(|mount| mount.is_of(&number, &device));
        match (its.next(), its.next()) {
            (None, _) => {}
            (Some(mount), None) => {
                let path = mount.path.clone();
                if all.iter().rfind(|other| other.path == path) != Some(mount) {
                    return Err(ChangeError::Covered { path });
                }
                self.unmount(&disk, &number, mount)?;
            }
            (Some(Mount { path, .. }), Some(_)) => {
                return Err(ChangeError::Elsewhere { path: path.clone() });
            }
        }
        // A layer has no path, and is ours to let go of.
        self.forget(&number);
        if !becomes_free(&disk) {
            return Err(ChangeError::Held);
        }
        disk.unbind().map_err(failed("let go of the volume's disk"))
    }

    fn unmount(&mut self, disk: &Disk, number: &str, mount: &Mount) -> Result<(), ChangeError> {
        let Mount { path, read_only, .. } = mount;
        let elsewhere = || ChangeError::Elsewhere { path: path.clone() };
        if mount.is_layered() {
            let others = mounts::others().map_err(failed("read what is mounted elsewhere"))?;
            let mut others = others.iter().filter(|other| other.is_of(number, &disk.device()));
            if others.any(|other| !other.follows(mount)) {
                return Err(elsewhere());
            }
        }
        // What we have open is in use, too.
        self.forget(number);
        if let Err(errno) = unmount(path.as_str(), UnmountFlags::NOFOLLOW) {
            if !mount.is_layered() {
                self.keep(path, *read_only);
            }
            return Err(match errno {
                Errno::BUSY => ChangeError::Busy { path: path.clone() },
                errno => failed(format!("unmount {path}"))(errno.into()),
            });
        }
        if mount.is_layered() || becomes_free(disk) {
            return Ok(());
        }
        let back = self.mount_there(disk, path, *read_only);
        back.map_err(|errno| failed(format!("mount {path} again"))(errno.into()))?;
        Err(elsewhere())
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

/// Whether a disk is free, or will be in a moment: a namespace whose last process has ended lets go
/// of its mounts a little later.
#[expect(clippy::disallowed_methods, reason = "nothing tells when a disk is free")]
fn becomes_free(disk: &Disk) -> bool {
    let deadline = Instant::now() + HOLD_TIME_MAX;
    while !disk.is_free() {
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(HOLD_PAUSE);
    }
    true
}

impl ChangeError {
    /// What kind of no that is.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            Self::NoDisk { .. } => ErrorCode::NotFound,
            Self::Busy { .. } | Self::Elsewhere { .. } | Self::Covered { .. } => ErrorCode::InUse,
            Self::Held => ErrorCode::Held,
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
