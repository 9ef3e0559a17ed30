//! Kernel headers: what modules for the running kernel are built with, on a disk of their own.
//!
//! The disk is found by its serial number, since its name depends on how many others there are. It
//! is mounted where Debian has headers, with the link below it that `make -C` and DKMS follow. A
//! guest that goes without is told so on its console: its workload may never ask for them.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ovum_agent_proto::config::HEADERS_SERIAL;
use rustix::mount::{self, MountFlags};
use rustix::system;

/// Where the kernel lists its disks.
const DISKS: &str = "/sys/block";

/// Why there are no headers.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HeadersError {
    #[error("No disk has the kernel headers")]
    NoDisk,
    #[error("Failed to put kernel headers at {path}", path = path.display())]
    Place {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Mounts the headers in the root, which has been entered.
pub(crate) fn attach() -> Result<(), HeadersError> {
    let name = system::uname();
    let release = name.release().to_string_lossy();
    let folder = PathBuf::from(format!("/usr/src/linux-headers-{release}"));
    let disk = find(Path::new(DISKS)).ok_or(HeadersError::NoDisk)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| HeadersError::Place { path, source }
    };
    fs::create_dir_all(&folder).map_err(failed(&folder))?;
    let flags = MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV;
    mount::mount(disk, &folder, "erofs", flags, c"")
        .map_err(|errno| failed(&folder)(errno.into()))?;
    let modules = PathBuf::from(format!("/lib/modules/{release}"));
    link(&modules, &folder).map_err(failed(&modules))
}

/// The device of the disk with the headers.
fn find(disks: &Path) -> Option<PathBuf> {
    let mut disks = fs::read_dir(disks).ok()?.flatten();
    let disk = disks.find(|disk| {
        let serial = fs::read_to_string(disk.path().join("serial"));
        serial.is_ok_and(|serial| serial.trim_end() == HEADERS_SERIAL)
    })?;
    Some(Path::new("/dev").join(disk.file_name()))
}

/// Makes the link in `modules` that leads to `folder`. One that is there is from an earlier boot.
fn link(modules: &Path, folder: &Path) -> io::Result<()> {
    fs::create_dir_all(modules)?;
    match symlink(folder, modules.join("build")) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        linked => linked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_found_by_its_serial_number() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("root")), ("loop0", None), ("vdz", Some("headers"))] {
            let disk = disks.path().join(name);
            fs::create_dir(&disk).unwrap();
            if let Some(serial) = serial {
                fs::write(disk.join("serial"), format!("{serial}\n")).unwrap();
            }
        }

        assert_eq!(find(disks.path()), Some(PathBuf::from("/dev/vdz")));
        fs::remove_dir_all(disks.path().join("vdz")).unwrap();
        assert_eq!(find(disks.path()), None);
    }

    /// The layer that it is on outlives a boot.
    #[test]
    fn the_link_may_be_there_already() {
        let dir = tempfile::tempdir().unwrap();
        let (modules, folder) = (dir.path().join("lib/modules/6"), dir.path().join("headers"));

        link(&modules, &folder).unwrap();
        link(&modules, &folder).unwrap();

        assert_eq!(fs::read_link(modules.join("build")).unwrap(), folder);
    }
}
