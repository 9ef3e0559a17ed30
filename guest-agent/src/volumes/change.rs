//! Volumes that come to a guest which runs, and go.
//!
//! A volume goes only if nothing in the guest uses it: nothing is unmounted by force, and a disk
//! is let go of only if no file system is on it any more, in whatever namespace. Whoever is told
//! that it is in use finds it as it was.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use ovum_agent_proto::message::ErrorCode;
use ovum_agent_proto::volumes::{AttachSpec, DetachSpec};
use rustix::fs::{fstat, major, minor};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, unmount};

use super::{READ_ONLY, Volumes, WRITABLE, attach, directories, handle};
use crate::disks::{self, Disk};

/// What is mounted where (proc_pid_mountinfo(5)).
const MOUNTS: &str = "/proc/self/mountinfo";

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

/// A mount of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    path: String,
    read_only: bool,
}

impl Volumes {
    /// Mounts a volume whose disk has come.
    pub(crate) fn attach(&mut self, spec: &AttachSpec) -> Result<(), ChangeError> {
        let AttachSpec { serial, path, read_only } = spec;
        disks::look().map_err(failed("look for disks"))?;
        let no_disk = || ChangeError::NoDisk { serial: serial.clone() };
        let disk = Disk::find(serial).ok_or_else(no_disk)?;
        let mount = Mount { path: path.clone(), read_only: *read_only };
        let mounted = directories(path).and_then(|()| self.mount_there(&disk, &mount));
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
        let mounts = fs::read_to_string(MOUNTS).map_err(failed("read what is mounted"))?;
        let mounts: Vec<Mount> = mounts_of(&mounts, &number).collect();
        match &mounts[..] {
            [] if disk.is_free() => {}
            [mount] => self.unmount(&disk, &number, mount)?,
            others => {
                let path = others.first().map(|mount| mount.path.clone());
                let path = path.unwrap_or_else(|| "any folder seen from here".to_owned());
                return Err(ChangeError::Elsewhere { path });
            }
        }
        disk.unbind().map_err(failed("let go of the volume's disk"))
    }

    fn unmount(&mut self, disk: &Disk, number: &str, mount: &Mount) -> Result<(), ChangeError> {
        let path = &mount.path;
        // What we have open is in use, too.
        self.writable.retain(|file_system| number_of(file_system).as_deref() != Ok(number));
        if let Err(errno) = unmount(path.as_str(), UnmountFlags::NOFOLLOW) {
            self.keep(mount);
            return Err(match errno {
                Errno::BUSY => ChangeError::Busy { path: path.clone() },
                errno => failed(format!("unmount {path}"))(errno.into()),
            });
        }
        if disk.is_free() {
            return Ok(());
        }
        let back = self.mount_there(disk, mount);
        back.map_err(|errno| failed(format!("mount {path} again"))(errno.into()))?;
        Err(ChangeError::Elsewhere { path: path.clone() })
    }

    fn mount_there(&mut self, disk: &Disk, mount: &Mount) -> Result<(), Errno> {
        let device = disk.device();
        let device = device.to_str().ok_or(Errno::INVAL)?;
        let (flags, options) = if mount.read_only {
            (MountFlags::RDONLY, READ_ONLY)
        } else {
            (MountFlags::empty(), WRITABLE)
        };
        attach(device, &mount.path, "ext4", flags, options)?;
        self.keep(mount);
        Ok(())
    }

    /// Remembers to leave it clean.
    fn keep(&mut self, mount: &Mount) {
        if self.are_ours && !mount.read_only {
            // Without a handle it is left to its journal.
            self.writable.extend(handle(&mount.path));
        }
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

/// The mounts of the device with this number.
fn mounts_of<'m>(mounts: &'m str, number: &'m str) -> impl Iterator<Item = Mount> + 'm {
    mounts.lines().filter_map(move |line| {
        let mut fields = line.split(' ').skip(2);
        let (of, _root, path, options) =
            (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let read_only = options.split(',').any(|option| option == "ro");
        (of == number).then(|| Mount { path: unescaped(path), read_only })
    })
}

/// A path as it is: spaces, tabs, newlines and backslashes are written as three octal digits.
fn unescaped(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (escaped, plain)| path.replace(escaped, plain))
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
    fn the_mounts_of_a_disk_are_found_among_others() {
        let text = "22 1 0:20 / / rw,noatime shared:1 - overlay overlay rw\n\
            30 22 254:32 / /with\\040space\\134 rw,relatime - ext4 /dev/vdc rw\n\
            31 22 254:3 / /other rw - ext4 /dev/vdb rw\n\
            32 22 254:32 /sub /bound ro,relatime - ext4 /dev/vdc rw\n\
            broken";

        let found: Vec<_> = mounts_of(text, "254:32").collect();

        let expected = [("/with space\\", false), ("/bound", true)];
        assert_eq!(
            found,
            expected.map(|(path, read_only)| Mount { path: path.to_owned(), read_only })
        );
        assert_eq!(mounts_of(text, "9:9").count(), 0);
    }

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
