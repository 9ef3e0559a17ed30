//! Which devices of the host can be given away, and why the others cannot.

use std::collections::BTreeSet;

use crate::devices::address::PciAddress;
use crate::devices::errors::{HostError, NO_IOMMU_MEND, UnfitError};
use crate::devices::sysfs::{Function, Sysfs, VFIO_PCI, names_in};

/// Drivers beside which a device of the same group can be given away: the kernel trusts them not to
/// let their device reach memory (Documentation/driver-api/vfio.rst, "Groups, Devices, and
/// IOMMUs").
const HARMLESS_DRIVERS: [&str; 3] = [VFIO_PCI, "pci-stub", "pcieport"];

/// What a host lacks to give devices away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Lack {
    /// Nothing would keep a device within the memory of its guest.
    #[error("there is no IOMMU: {NO_IOMMU_MEND}")]
    Iommu,
    /// The modules.
    #[error("there is no vfio-pci: modprobe vfio-pci")]
    Driver,
}

impl Sysfs {
    /// What keeps this host from giving any device away.
    pub(super) fn lack(&self) -> Option<Lack> {
        let groups = names_in(&self.root.join("sys/kernel/iommu_groups"));
        if !groups.is_ok_and(|groups| !groups.is_empty()) {
            return Some(Lack::Iommu);
        }
        // Groups and a container, or files of devices and iommufd: a machine takes what is there.
        let has_files = ["dev/vfio/vfio", "dev/iommu"].iter().any(|f| self.root.join(f).exists());
        let is_there = self.driver(VFIO_PCI).is_dir() && has_files;
        (!is_there).then_some(Lack::Driver)
    }

    /// The function at `address`, if it could be given away.
    ///
    /// # Errors
    ///
    /// [`UnfitError`].
    pub(super) fn fit(&self, address: &PciAddress) -> Result<Function, UnfitError> {
        let function = self.function(address).map_err(HostError)?;
        let function = function.ok_or_else(|| UnfitError::Missing { address: address.clone() })?;
        if function.is_bridge() {
            return Err(UnfitError::Bridge { address: address.clone() });
        }
        if function.group.is_none() {
            return Err(UnfitError::NoIommu { address: address.clone() });
        }
        match self.use_of(address).map_err(HostError)? {
            Some(used) => Err(UnfitError::HostUse { address: address.clone(), used }),
            None => Ok(function),
        }
    }

    /// The rest of a function's group, if nothing keeps it from being given away now, together with
    /// `others`.
    ///
    /// # Errors
    ///
    /// [`UnfitError`].
    pub(super) fn free_group(
        &self,
        function: &Function,
        others: &BTreeSet<PciAddress>,
    ) -> Result<Vec<PciAddress>, UnfitError> {
        if !self.driver(VFIO_PCI).is_dir() {
            return Err(UnfitError::NoDriver);
        }
        if let Some(used) = self.holds(&function.address).map_err(HostError)? {
            return Err(UnfitError::HostUse { address: function.address.clone(), used });
        }
        let peers = self.peers(function).map_err(HostError)?;
        let strangers = peers.iter().filter(|peer| !others.contains(&peer.address));
        let busy = strangers.into_iter().find_map(|peer| {
            let driver = peer.driver.as_deref()?;
            (!HARMLESS_DRIVERS.contains(&driver)).then_some((peer, driver))
        });
        if let Some((peer, driver)) = busy {
            return Err(UnfitError::Group {
                address: function.address.clone(),
                group: function.group.unwrap_or_default(),
                peer: peer.address.clone(),
                driver: driver.to_owned(),
            });
        }
        Ok(peers.into_iter().map(|peer| peer.address).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use super::Lack;
    use crate::devices::testing::Tree;

    const FIRST: &str = "0000:01:00.0";
    const SECOND: &str = "0000:01:00.1";

    fn two_of_a_group() -> Tree {
        let tree = Tree::new();
        for address in [FIRST, SECOND] {
            tree.function(address, "8086", "10d3", "0x020000").group(address, 7);
        }
        tree.file("sys/bus/pci/drivers/vfio-pci/bind", "");
        tree
    }

    fn refusal(tree: &Tree) -> Option<String> {
        let function = tree.sysfs().fit(&FIRST.parse().unwrap());
        let others = BTreeSet::new();
        let free = function.and_then(|function| tree.sysfs().free_group(&function, &others));
        free.err().map(|error| error.to_string())
    }

    #[test]
    fn a_whole_group_is_looked_at() {
        let tree = two_of_a_group();
        assert_eq!(refusal(&tree), None, "nobody drives the other");

        tree.driver(SECOND, "e1000e");
        let why = refusal(&tree).unwrap();
        assert!(why.contains("group 7 with 0000:01:00.1, which driver e1000e has"), "{why}");
        let function = tree.sysfs().fit(&FIRST.parse().unwrap()).unwrap();
        let together = BTreeSet::from([SECOND.parse().unwrap()]);
        assert!(tree.sysfs().free_group(&function, &together).is_ok(), "both are given away");
        tree.driver(SECOND, "vfio-pci");
        assert_eq!(refusal(&tree), None);
        tree.function(SECOND, "8086", "1", "0x060400").driver(SECOND, "pcieport");
        assert_eq!(refusal(&tree), None, "a bridge comes with what is behind it");
    }

    #[test]
    fn what_the_host_lacks_is_told_with_the_mend() {
        let tree = Tree::new();
        assert_eq!(tree.sysfs().lack(), Some(Lack::Iommu));
        tree.file("sys/kernel/iommu_groups/0/type", "DMA");
        assert_eq!(tree.sysfs().lack(), Some(Lack::Driver));
        tree.file("sys/bus/pci/drivers/vfio-pci/bind", "");
        assert_eq!(tree.sysfs().lack(), Some(Lack::Driver), "modules that map memory are others");
        for maps_memory in ["dev/vfio/vfio", "dev/iommu"] {
            tree.file(maps_memory, "");
            assert_eq!(tree.sysfs().lack(), None, "{maps_memory} is enough");
            fs::remove_file(tree.root().join(maps_memory)).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_given_away_is_told_with_the_mend() {
        let tree = two_of_a_group();
        fs::remove_dir_all(tree.root().join("sys/bus/pci/drivers/vfio-pci")).unwrap();
        assert!(refusal(&tree).unwrap().ends_with("modprobe vfio-pci"));

        tree.function(FIRST, "8086", "1", "0x060400");
        assert!(refusal(&tree).unwrap().contains("is a bridge"));
        let tree = Tree::new();
        assert!(refusal(&tree).unwrap().starts_with("No PCI device is at 0000:01:00.0"));
        tree.function(FIRST, "8086", "10d3", "0x020000");
        assert!(refusal(&tree).unwrap().contains("intel_iommu=on"));
    }
}
