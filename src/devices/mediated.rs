//! Mediated devices: parts that a driver of the host makes of its device, such as of a GPU.
//!
//! ```text
//! /sys/class/mdev_bus/PARENT/mdev_supported_types/TYPE/
//!     name, description, available_instances, create
//! /sys/bus/mdev/devices/UUID ──> below the parent, with a file `remove`
//! ```
//!
//! A profile is what a type is called, less the word that all names of a vendor begin with: one
//! profile, however many devices of the host offer it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::devices::sysfs::{Sysfs, attribute, is_gone, names_in, set};

/// Words that stand before the name of a profile.
const VENDOR_WORDS: [&str; 3] = ["GRID ", "NVIDIA ", "Intel "];

/// What a description says before the size of the memory, in MiB (NVIDIA vGPU).
const FRAMEBUFFER: &str = "framebuffer=";

/// Longest id of a device: a UUID.
const UUID_BYTES: usize = 36;

/// A kind of mediated device, wherever there are any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// What it is asked for by.
    pub name: String,
    /// Memory of its own, in MiB, if it says so.
    pub framebuffer_mib: u64,
    /// How many can still be made.
    pub available: u64,
}

/// A type of one parent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MediatedType {
    pub(super) parent: String,
    pub(super) id: String,
    pub(super) profile: Profile,
}

impl Sysfs {
    /// All types of all parents.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn mediated_types(&self) -> io::Result<Vec<MediatedType>> {
        let parents = self.parents();
        let mut types = Vec::new();
        for parent in sorted(names_in(&parents)?) {
            let folder = parents.join(&parent).join("mdev_supported_types");
            for id in sorted(names_in(&folder)?) {
                let text = |name: &str| attribute(&folder.join(&id).join(name));
                let Some(available) = text("available_instances")? else { continue };
                let description = text("description")?.unwrap_or_default();
                types.push(MediatedType {
                    parent: parent.clone(),
                    profile: Profile {
                        name: profile_name(text("name")?, &id),
                        framebuffer_mib: framebuffer_mib(&description),
                        available: available.parse().unwrap_or_default(),
                    },
                    id,
                });
            }
        }
        Ok(types)
    }

    /// Makes a device of a type. Blocks.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(super) fn make_mediated(&self, from: &MediatedType, uuid: &str) -> io::Result<()> {
        let folder = self.parents().join(&from.parent).join("mdev_supported_types");
        set(&folder.join(&from.id).join("create"), uuid)
    }

    /// Removes a device that may be gone already. Blocks as long as a machine has it.
    ///
    /// # Errors
    ///
    /// What the driver says.
    pub(super) fn remove_mediated(&self, uuid: &str) -> io::Result<()> {
        match set(&self.mediated(uuid).join("remove"), "1") {
            Err(error) if !is_gone(&error) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Where a device is.
    pub(super) fn mediated(&self, uuid: &str) -> PathBuf {
        self.root.join("sys/bus/mdev/devices").join(uuid)
    }

    /// Whether there are mediated devices of the device in `folder`.
    pub(super) fn has_mediated(&self, folder: &Path) -> io::Result<bool> {
        let all = self.root.join("sys/bus/mdev/devices");
        let names = names_in(&all)?;
        let mut places = names.iter().filter_map(|name| fs::canonicalize(all.join(name)).ok());
        Ok(places.any(|place| place.starts_with(folder)))
    }

    /// An id that nothing has.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn new_uuid(&self) -> io::Result<String> {
        let uuid = attribute(&self.root.join("proc/sys/kernel/random/uuid"))?;
        uuid.filter(|uuid| uuid.len() == UUID_BYTES).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn parents(&self) -> PathBuf {
        self.root.join("sys/class/mdev_bus")
    }
}

impl MediatedType {
    /// Whether this is what is asked for, by the profile's name or the type's.
    pub(super) fn is(&self, profile: &str) -> bool {
        self.profile.name == profile || self.id == profile
    }
}

/// Profiles by name, of all parents together.
pub(super) fn profiles(types: &[MediatedType]) -> Vec<Profile> {
    let mut profiles: BTreeMap<&str, Profile> = BTreeMap::new();
    for MediatedType { profile, .. } in types {
        match profiles.get_mut(profile.name.as_str()) {
            Some(same) => same.available = same.available.saturating_add(profile.available),
            None => drop(profiles.insert(&profile.name, profile.clone())),
        }
    }
    profiles.into_values().collect()
}

fn profile_name(name: Option<String>, id: &str) -> String {
    let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| id.to_owned());
    let bare = VENDOR_WORDS.iter().find_map(|word| name.strip_prefix(word)).map(str::to_owned);
    bare.unwrap_or(name)
}

/// `num_heads=4, framebuffer=1024M, max_resolution=...`.
fn framebuffer_mib(description: &str) -> u64 {
    let value = description.split_once(FRAMEBUFFER).map_or("", |(_, value)| value);
    let digits = value.find(|symbol: char| !symbol.is_ascii_digit()).unwrap_or(value.len());
    let (number, unit) = value.split_at(digits);
    let number: u64 = number.parse().unwrap_or_default();
    if unit.starts_with('G') { number.saturating_mul(1024) } else { number }
}

fn sorted(mut names: Vec<String>) -> Vec<String> {
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Tree;

    fn kind(tree: &Tree, parent: &str, id: &str, (name, description, available): (&str, &str, u8)) {
        let folder = format!("sys/class/mdev_bus/{parent}/mdev_supported_types/{id}");
        tree.file(&format!("{folder}/name"), &format!("{name}\n"));
        tree.file(&format!("{folder}/description"), description);
        tree.file(&format!("{folder}/available_instances"), &format!("{available}\n"));
        tree.file(&format!("{folder}/create"), "");
    }

    #[test]
    fn a_profile_has_the_slots_of_all_parents() {
        let tree = Tree::new();
        let small = ("GRID L40S-1Q", "num_heads=4, framebuffer=1024M, frl_config=60", 1);
        kind(&tree, "0000:01:00.4", "nvidia-1145", small);
        kind(&tree, "0000:01:00.5", "nvidia-1145", small);
        kind(&tree, "mtty", "mtty-2", ("Dual port serial", "", 12));

        let types = tree.sysfs().mediated_types().unwrap();

        assert_eq!(types.len(), 3);
        assert!(types[0].is("L40S-1Q") && types[0].is("nvidia-1145") && !types[0].is("L40S"));
        let profile = |name: &str, framebuffer_mib, available| Profile {
            name: name.to_owned(),
            framebuffer_mib,
            available,
        };
        assert_eq!(
            profiles(&types),
            [profile("Dual port serial", 0, 12), profile("L40S-1Q", 1024, 2)]
        );
    }

    #[test]
    fn a_device_is_made_of_its_type_and_one_that_is_gone_is_removed() {
        let tree = Tree::new();
        kind(&tree, "mtty", "mtty-1", ("Single port serial", "", 24));
        tree.file("proc/sys/kernel/random/uuid", "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001\n");
        let types = tree.sysfs().mediated_types().unwrap();
        let uuid = tree.sysfs().new_uuid().unwrap();

        tree.sysfs().make_mediated(&types[0], &uuid).unwrap();
        tree.sysfs().remove_mediated(&uuid).unwrap();

        let create = "sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create";
        assert_eq!(tree.text(create).trim(), uuid);
    }

    #[test]
    fn memory_is_read_if_the_description_has_it() {
        for (description, mib) in [
            ("framebuffer=48G, x", 49_152),
            ("framebuffer=512M", 512),
            ("framebuffer=", 0),
            ("framebuffer=99999999999999999999999999M", 0),
            ("", 0),
        ] {
            assert_eq!(framebuffer_mib(description), mib, "{description}");
        }
    }
}
