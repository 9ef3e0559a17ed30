//! The GPUs of the host: whole ones to be given away, or parts that are made of them.

use std::fs;

use crate::devices::address::PciAddress;
use crate::devices::errors::{FindError, HostError};
use crate::devices::mediated::{Profile, profiles};
use crate::devices::{Device, Devices};

/// How this host gives GPUs to instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gpus {
    /// In parts.
    Parts {
        /// How many could be made, the small ones counted.
        total: u64,
        /// How many are made.
        used: u64,
        /// What they can be.
        profiles: Vec<Profile>,
    },
    /// Each to one instance.
    Whole {
        /// By name or else address, and whether nobody has it.
        devices: Vec<(String, bool)>,
    },
}

impl Devices {
    /// The GPUs of this host, if it has any that can be given away.
    ///
    /// # Errors
    ///
    /// [`FindError`], but for one that is missing.
    pub fn gpus(&self) -> Result<Option<Gpus>, FindError> {
        let sysfs = &self.shared.sysfs;
        let types = sysfs.mediated_types().map_err(HostError)?;
        if !types.is_empty() {
            let devices = fs::read_dir(sysfs.mediated("")).map(Iterator::count);
            let used = devices.map_or(0, |count| u64::try_from(count).unwrap_or(u64::MAX));
            let mut parents: Vec<_> = types.iter().map(|one| one.parent.as_str()).collect();
            parents.dedup();
            let most = |parent: &str| {
                let own = types.iter().filter(|one| one.parent == parent);
                own.map(|one| one.profile.available).max().unwrap_or_default()
            };
            let free = parents.into_iter().map(most).fold(0, u64::saturating_add);
            let total = used.saturating_add(free);
            return Ok(Some(Gpus::Parts { total, used, profiles: profiles(&types) }));
        }
        let registered = self.list()?;
        let name =
            |address: &PciAddress| registered.iter().find(|device| device.address == *address);
        let functions = sysfs.functions().map_err(HostError)?.into_iter();
        let devices: Vec<_> = functions
            .filter(|function| function.is_gpu() && function.group.is_some())
            .map(|function| match name(&function.address) {
                Some(Device { name, attached_to, .. }) => (name.to_string(), attached_to.is_none()),
                None => (function.address.to_string(), true),
            })
            .collect();
        Ok((!devices.is_empty()).then_some(Gpus::Whole { devices }))
    }
}
