//! What is changed of the host for a machine, and how it is undone.
//!
//! ```text
//! driver_override = vfio-pci ──> DRIVER/unbind ──> drivers_probe      lent
//! driver_override = as before ──> vfio-pci/unbind ──> DRIVER/bind     given back
//! ```
//!
//! Each [`Change`] is written down before it is made, so undoing takes what it finds: a device that
//! is gone, a change that was only begun, one that is undone already.

use std::io;

use serde::{Deserialize, Serialize};

use crate::devices::address::PciAddress;
use crate::devices::sysfs::{Sysfs, VFIO_PCI, attribute, link_name, set};

/// What the kernel shows of an override that is none.
const NO_OVERRIDE: &str = "(null)";

/// Something of the host that is changed as long as a machine needs it so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Change {
    /// A device has vfio-pci as its driver.
    Bound {
        address: PciAddress,
        /// The driver that it had.
        driver: Option<String>,
        /// What `driver_override` was.
        driver_override: Option<String>,
    },
    /// A mediated device is there.
    Made { uuid: String },
}

impl Change {
    /// What is changed.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Bound { address, .. } => address.as_str(),
            Self::Made { uuid } => uuid,
        }
    }
}

impl Sysfs {
    /// What binding a device to vfio-pci would change; `None` if that is its driver.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn binding(&self, address: &PciAddress) -> io::Result<Option<Change>> {
        let folder = self.folder(address);
        let driver = link_name(&folder.join("driver"))?;
        if driver.as_deref() == Some(VFIO_PCI) {
            return Ok(None);
        }
        let driver_override = attribute(&folder.join("driver_override"))?;
        let driver_override =
            driver_override.filter(|text| !text.is_empty() && text != NO_OVERRIDE);
        Ok(Some(Change::Bound { address: address.clone(), driver, driver_override }))
    }

    /// Binds a device to vfio-pci. Blocks as long as its driver does not let go.
    ///
    /// # Errors
    ///
    /// What the kernel says; it may be half done.
    pub(super) fn bind(&self, address: &PciAddress) -> io::Result<()> {
        let folder = self.folder(address);
        set(&folder.join("driver_override"), VFIO_PCI)?;
        if let Some(driver) = link_name(&folder.join("driver"))? {
            set(&self.driver(&driver).join("unbind"), address.as_str())?;
        }
        set(&self.pci("drivers_probe"), address.as_str())?;
        self.expect_driver(address, Some(VFIO_PCI))
    }

    /// Undoes a change, as far as it was made. Blocks as long as a machine has the device.
    ///
    /// # Errors
    ///
    /// What the kernel says; it can be undone again.
    pub(super) fn undo(&self, change: &Change) -> io::Result<()> {
        match change {
            Change::Made { uuid } => self.remove_mediated(uuid),
            Change::Bound { address, driver, driver_override } => {
                let folder = self.folder(address);
                if !folder.is_dir() {
                    return Ok(());
                }
                let before = driver_override.as_deref().unwrap_or_default();
                let undone = set(&folder.join("driver_override"), before)
                    .and_then(|()| self.rebind(address, driver.as_deref()));
                // One that is pulled out meanwhile needs nothing more.
                if folder.is_dir() { undone } else { Ok(()) }
            }
        }
    }

    fn rebind(&self, address: &PciAddress, driver: Option<&str>) -> io::Result<()> {
        let current = link_name(&self.folder(address).join("driver"))?;
        if current.as_deref() == Some(VFIO_PCI) {
            set(&self.driver(VFIO_PCI).join("unbind"), address.as_str())?;
        } else if current.is_some() {
            // Somebody has given it away since.
            return Ok(());
        }
        let Some(driver) = driver else { return Ok(()) };
        if self.driver(driver).is_dir() {
            set(&self.driver(driver).join("bind"), address.as_str())?;
        } else {
            // Its module was unloaded meanwhile: whoever wants the device may have it.
            tracing::warn!(%address, driver, "The driver of a device is gone");
            return set(&self.pci("drivers_probe"), address.as_str());
        }
        self.expect_driver(address, Some(driver))
    }

    fn expect_driver(&self, address: &PciAddress, expected: Option<&str>) -> io::Result<()> {
        let found = link_name(&self.folder(address).join("driver"))?;
        if found.as_deref() == expected {
            return Ok(());
        }
        let name = |driver: Option<&str>| driver.unwrap_or("none").to_owned();
        Err(io::Error::other(format!(
            "its driver is {}, where {} was told to take it",
            name(found.as_deref()),
            name(expected)
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Tree;

    const NVME: &str = "0000:01:00.0";

    fn tree() -> (Tree, PciAddress) {
        let tree = Tree::new();
        tree.function(NVME, "1b36", "0010", "0x010802").group(NVME, 3).driver(NVME, "nvme");
        for name in ["bind", "unbind"] {
            tree.file(&format!("sys/bus/pci/drivers/vfio-pci/{name}"), "");
        }
        (tree, NVME.parse().unwrap())
    }

    fn override_of(tree: &Tree) -> String {
        tree.text(&format!("sys/bus/pci/devices/{NVME}/driver_override"))
    }

    /// The kernel of this host is made of files: no driver takes or leaves anything.
    #[test]
    fn a_binding_that_nobody_heard_of_is_an_error_and_can_be_undone() {
        let (tree, address) = tree();
        let change = tree.sysfs().binding(&address).unwrap().unwrap();

        let error = tree.sysfs().bind(&address).unwrap_err().to_string();

        assert_eq!(error, "its driver is nvme, where vfio-pci was told to take it");
        assert_eq!(tree.text("sys/bus/pci/drivers/nvme/unbind"), format!("{NVME}\n"));
        assert_eq!(tree.text("sys/bus/pci/drivers_probe"), format!("{NVME}\n"));
        assert_eq!(override_of(&tree), "vfio-pci\n");
        tree.sysfs().undo(&change).unwrap();
        assert_eq!(override_of(&tree).trim(), "");
    }

    #[test]
    fn what_is_given_back_is_as_it_was() {
        let (tree, address) = tree();
        tree.file(&format!("sys/devices/pci0000:00/{NVME}/driver_override"), "nvme\n");
        let change = tree.sysfs().binding(&address).unwrap().unwrap();
        tree.driver(NVME, "vfio-pci");

        let error = tree.sysfs().undo(&change).unwrap_err().to_string();

        assert_eq!(override_of(&tree), "nvme\n");
        assert_eq!(tree.text("sys/bus/pci/drivers/vfio-pci/unbind"), format!("{NVME}\n"));
        assert_eq!(tree.text("sys/bus/pci/drivers/nvme/bind"), format!("{NVME}\n"));
        assert_eq!(error, "its driver is vfio-pci, where nvme was told to take it");
    }

    #[test]
    fn what_is_gone_or_was_never_bound_is_undone() {
        let (tree, address) = tree();
        tree.driver(NVME, "vfio-pci");
        assert_eq!(tree.sysfs().binding(&address).unwrap(), None, "it is bound already");

        let gone = Change::Bound {
            address: "0000:02:00.0".parse().unwrap(),
            driver: Some("nvme".to_owned()),
            driver_override: None,
        };
        tree.sysfs().undo(&gone).unwrap();
        tree.sysfs().undo(&Change::Made { uuid: "gone".to_owned() }).unwrap();
    }
}
