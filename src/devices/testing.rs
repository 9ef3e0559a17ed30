//! A host for tests: the kernel's folders as files and links, which do nothing by themselves.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::devices::sysfs::Sysfs;

/// The root of such a host.
pub(super) struct Tree {
    dir: TempDir,
}

impl Tree {
    pub(super) fn new() -> Self {
        let tree = Self { dir: tempfile::tempdir().unwrap() };
        tree.file("proc/sys/kernel/random/boot_id", "this-boot\n");
        tree
    }

    pub(super) fn root(&self) -> &Path {
        self.dir.path()
    }

    pub(super) fn sysfs(&self) -> Sysfs {
        Sysfs { root: self.root().to_owned() }
    }

    /// Writes a file and the folders above it.
    pub(super) fn file(&self, path: &str, text: &str) -> &Self {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    /// Makes a link and the folders above it.
    pub(super) fn link(&self, path: &str, target: &Path) -> &Self {
        let path = self.root().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&path);
        symlink(target, path).unwrap();
        self
    }

    /// The text of a file.
    pub(super) fn text(&self, path: &str) -> String {
        fs::read_to_string(self.root().join(path)).unwrap()
    }

    /// Where a function really is.
    pub(super) fn place(&self, address: &str) -> PathBuf {
        self.root().join("sys/devices/pci0000:00").join(address)
    }

    /// A PCI function.
    pub(super) fn function(&self, address: &str, vendor: &str, device: &str, class: &str) -> &Self {
        let place = format!("sys/devices/pci0000:00/{address}");
        self.file(&format!("{place}/vendor"), &format!("0x{vendor}\n"));
        self.file(&format!("{place}/device"), &format!("0x{device}\n"));
        self.file(&format!("{place}/class"), &format!("{class}\n"));
        self.file(&format!("{place}/driver_override"), "(null)\n");
        self.link(&format!("sys/bus/pci/devices/{address}"), &self.place(address))
    }

    /// Puts a function into a group.
    pub(super) fn group(&self, address: &str, group: u32) -> &Self {
        let folder = format!("sys/kernel/iommu_groups/{group}");
        self.link(&format!("{folder}/devices/{address}"), &self.place(address));
        let folder = self.root().join(folder);
        self.link(&format!("sys/devices/pci0000:00/{address}/iommu_group"), &folder)
    }

    /// Binds a function to a driver.
    pub(super) fn driver(&self, address: &str, driver: &str) -> &Self {
        let folder = format!("sys/bus/pci/drivers/{driver}");
        for name in ["bind", "unbind"] {
            self.file(&format!("{folder}/{name}"), "");
        }
        self.file("sys/bus/pci/drivers_probe", "");
        let folder = self.root().join(folder);
        self.link(&format!("sys/devices/pci0000:00/{address}/driver"), &folder)
    }
}
