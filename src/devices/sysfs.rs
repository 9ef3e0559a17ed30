//! The host's PCI functions, as the kernel shows them in sysfs.
//!
//! ```text
//! /sys/bus/pci/devices/0000:01:00.0 ──> ../../../devices/pci0000:00/.../0000:01:00.0
//!     vendor, device, class, driver ──>, iommu_group ──>, driver_override
//! ```
//!
//! All of it is below a root that tests choose. What is read is small, and bounded.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::devices::address::PciAddress;

/// The driver that gives devices away.
pub(super) const VFIO_PCI: &str = "vfio-pci";

/// Most bytes of an attribute: sysfs has no longer ones than a page.
const ATTRIBUTE_BYTES_MAX: u64 = 4 << 10;

/// Most functions that are looked at.
const FUNCTIONS_MAX: usize = 64 << 10;

/// Classes of PCI: a display controller, and a bridge (PCI Code and ID Assignment 1.11, 1.4 and
/// 1.7).
const CLASS_DISPLAY: u32 = 0x03;
const CLASS_BRIDGE: u32 = 0x06;

/// The name of groups before which no IOMMU stands. A mediated device has one as well: it reaches
/// memory only through its driver.
const NO_IOMMU: &str = "vfio-noiommu";

/// Where the kernel's folders are.
#[derive(Debug, Clone)]
pub(super) struct Sysfs {
    pub(super) root: PathBuf,
}

/// One PCI function at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Function {
    pub(super) address: PciAddress,
    pub(super) vendor: u16,
    pub(super) device: u16,
    class: u32,
    /// The IOMMU group; none if no IOMMU stands before it.
    pub(super) group: Option<u32>,
    pub(super) driver: Option<String>,
}

impl Function {
    /// Whether it drives displays, or computes as those do.
    pub(super) fn is_gpu(&self) -> bool {
        self.class >> 16 == CLASS_DISPLAY
    }

    /// Whether it only connects buses.
    pub(super) fn is_bridge(&self) -> bool {
        self.class >> 16 == CLASS_BRIDGE
    }

    /// Vendor and device.
    pub(super) fn id(&self) -> (u16, u16) {
        (self.vendor, self.device)
    }
}

impl Sysfs {
    /// The folder of all functions.
    pub(super) fn pci(&self, name: &str) -> PathBuf {
        self.root.join("sys/bus/pci").join(name)
    }

    /// The folder of one function.
    pub(super) fn folder(&self, address: &PciAddress) -> PathBuf {
        self.pci("devices").join(address.as_str())
    }

    /// The folder of a driver of PCI devices, there or not.
    pub(super) fn driver(&self, name: &str) -> PathBuf {
        self.pci("drivers").join(name)
    }

    /// All functions, by address. One that goes away meanwhile is none.
    ///
    /// # Errors
    ///
    /// What the kernel says; a host without PCI has none.
    pub(super) fn functions(&self) -> io::Result<Vec<Function>> {
        let mut functions = Vec::new();
        for name in names_in(&self.pci("devices"))?.into_iter().take(FUNCTIONS_MAX) {
            let Ok(address) = name.parse() else { continue };
            functions.extend(self.function(&address)?);
        }
        functions.sort_by(|a, b| a.address.cmp(&b.address));
        Ok(functions)
    }

    /// The function at `address`, if there is one.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn function(&self, address: &PciAddress) -> io::Result<Option<Function>> {
        let folder = self.folder(address);
        let number = |name| {
            let text = attribute(&folder.join(name))?;
            Ok::<_, io::Error>(text.as_deref().and_then(hex))
        };
        let (Some(vendor), Some(device), Some(class)) =
            (number("vendor")?, number("device")?, number("class")?)
        else {
            return Ok(None);
        };
        let id = |number| u16::try_from(number).unwrap_or(u16::MAX);
        Ok(Some(Function {
            address: address.clone(),
            vendor: id(vendor),
            device: id(device),
            class,
            group: self.guarded_group(&folder)?,
            driver: link_name(&folder.join("driver"))?,
        }))
    }

    /// The other functions of a group.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn peers(&self, function: &Function) -> io::Result<Vec<Function>> {
        let Some(group) = function.group else { return Ok(Vec::new()) };
        let mut peers = Vec::new();
        for name in names_in(&self.group_folder(group).join("devices"))? {
            match name.parse() {
                Ok(address) if address != function.address => {
                    peers.extend(self.function(&address)?);
                }
                _itself_or_no_pci => {}
            }
        }
        peers.sort_by(|a, b| a.address.cmp(&b.address));
        Ok(peers)
    }

    /// Whether there is a file by which a machine can have the device in `folder`, once that is
    /// given away: its group's, or its own, as kernels with iommufd have them.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn has_file(&self, folder: &Path) -> io::Result<bool> {
        let files = self.root.join("dev/vfio");
        let group = self.group(folder)?.map(|group| files.join(group.to_string()));
        let own = names_in(&folder.join("vfio-dev"))?.into_iter();
        let own = own.map(|name| files.join("devices").join(name));
        Ok(group.into_iter().chain(own).any(|file| file.exists()))
    }

    /// The group of the device in `folder`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn group(&self, folder: &Path) -> io::Result<Option<u32>> {
        let name = link_name(&folder.join("iommu_group"))?;
        Ok(name.and_then(|name| name.parse().ok()))
    }

    /// The same, if an IOMMU stands before it.
    fn guarded_group(&self, folder: &Path) -> io::Result<Option<u32>> {
        let Some(group) = self.group(folder)? else { return Ok(None) };
        let kind = attribute(&self.group_folder(group).join("name"))?;
        Ok(Some(group).filter(|_| kind.as_deref() != Some(NO_IOMMU)))
    }

    fn group_folder(&self, group: u32) -> PathBuf {
        self.root.join("sys/kernel/iommu_groups").join(group.to_string())
    }

    /// Which boot of the host this is.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn boot_id(&self) -> io::Result<String> {
        let path = self.root.join("proc/sys/kernel/random/boot_id");
        attribute(&path)?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

/// What an attribute says, without space around it; `None` if it is not there.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn attribute(path: &Path) -> io::Result<Option<String>> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(ATTRIBUTE_BYTES_MAX).read_to_end(&mut text)) {
        Ok(_) => Ok(Some(String::from_utf8_lossy(&text).trim().to_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes to an attribute, which has to be there.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn set(path: &Path, text: &str) -> io::Result<()> {
    let mut file = File::options().write(true).truncate(true).open(path)?;
    // The kernel takes one write for one value.
    file.write_all(format!("{text}\n").as_bytes())
}

/// What is in a folder; nothing, if it is not there.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    names.collect()
}

/// The name of what a link leads to; `None` if it is not there.
///
/// # Errors
///
/// What the kernel says.
pub(super) fn link_name(link: &Path) -> io::Result<Option<String>> {
    match fs::read_link(link) {
        Ok(target) => Ok(target.file_name().map(|name| name.to_string_lossy().into_owned())),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A device can go while it is looked at, in the middle of a read, too.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

fn hex(text: &str) -> Option<u32> {
    u32::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16).ok()
}

#[cfg(test)]
mod tests {
    use crate::devices::testing::Tree;

    #[test]
    fn functions_are_read_with_driver_and_group() {
        let tree = Tree::new();
        tree.function("0000:01:00.0", "8086", "10d3", "0x020000").group("0000:01:00.0", 4);
        tree.driver("0000:01:00.0", "e1000e").function("0000:00:01.0", "8086", "1234", "0x060400");
        tree.function("0000:02:00.0", "10de", "27b8", "0x030200");

        let functions = tree.sysfs().functions().unwrap();

        let [bridge, network, gpu] = functions.as_slice() else { panic!("{functions:?}") };
        assert!(bridge.is_bridge() && !bridge.is_gpu());
        assert_eq!((network.id(), network.group), ((0x8086, 0x10d3), Some(4)));
        assert_eq!(network.driver.as_deref(), Some("e1000e"));
        assert!(gpu.is_gpu());
        assert_eq!((gpu.group, gpu.driver.as_deref()), (None, None));
    }

    #[test]
    fn a_group_without_an_iommu_is_none() {
        let tree = Tree::new();
        tree.function("0000:01:00.0", "8086", "10d3", "0x020000").group("0000:01:00.0", 0);
        tree.file("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n");

        assert_eq!(tree.sysfs().functions().unwrap()[0].group, None);
    }

    #[test]
    fn peers_are_the_others_of_the_group() {
        let tree = Tree::new();
        for address in ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"] {
            tree.function(address, "8086", "10d3", "0x020000");
        }
        tree.group("0000:01:00.0", 1).group("0000:01:00.1", 1).group("0000:02:00.0", 2);
        let functions = tree.sysfs().functions().unwrap();

        let peers = tree.sysfs().peers(&functions[0]).unwrap();

        assert_eq!(peers, functions[1..2]);
        assert_eq!(tree.sysfs().peers(&functions[2]).unwrap(), []);
    }

    #[test]
    fn a_device_is_had_by_a_file_of_its_group_or_its_own() {
        for file in ["dev/vfio/4", "dev/vfio/devices/vfio1"] {
            let tree = Tree::new();
            tree.function("0000:01:00.0", "8086", "10d3", "0x020000").group("0000:01:00.0", 4);
            let folder = tree.sysfs().folder(&"0000:01:00.0".parse().unwrap());
            tree.file("dev/vfio/vfio", "").file("dev/vfio/devices/vfio0", "");
            tree.file("sys/bus/pci/devices/0000:01:00.0/vfio-dev/vfio1/dev", "");
            assert!(!tree.sysfs().has_file(&folder).unwrap(), "those are others'");

            tree.file(file, "");

            assert!(tree.sysfs().has_file(&folder).unwrap(), "{file}");
        }
    }

    #[test]
    fn a_host_without_pci_has_no_functions() {
        assert_eq!(Tree::new().sysfs().functions().unwrap(), []);
    }
}
