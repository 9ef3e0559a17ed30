//! Kernel headers: what modules for the running kernel are built with, on a disk of their own.
//!
//! It is mounted where Debian has headers, with the link below it that `make -C` and DKMS follow. A
//! guest that goes without is told so on its console: its workload may never ask for them.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ovum_agent_proto::config::HEADERS_SERIAL;
use rustix::mount::{self, MountFlags};
use rustix::system;

use crate::disks::Disk;

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
    let disk = Disk::find(HEADERS_SERIAL).ok_or(HeadersError::NoDisk)?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| HeadersError::Place { path, source }
    };
    fs::create_dir_all(&folder).map_err(failed(&folder))?;
    let flags = MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::NOSUID | MountFlags::NODEV;
    mount::mount(disk.device(), &folder, "erofs", flags, c"")
        .map_err(|errno| failed(&folder)(errno.into()))?;
    let modules = PathBuf::from(format!("/lib/modules/{release}"));
    link(&modules, &folder).map_err(failed(&modules))
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
