//! What vendors and their devices are called: the host's copy of the PCI ID list.
//!
//! ```text
//! 8086  Intel Corporation
//! <tab>100e  82540EM Gigabit Ethernet Controller
//! <tab><tab>1028 002e  a board with it
//! ```
//!
//! Classes follow, `C 00  ...`. A host without the list is one whose devices have no names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Where distributions have it, below the root.
const LISTS: [&str; 3] =
    ["usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids", "usr/share/pci.ids"];

/// Most bytes that are read of it; it has 1.6 MB these days.
const LIST_BYTES_MAX: u64 = 16 << 20;

/// Most bytes of a name that are shown.
const NAME_BYTES_MAX: usize = 256;

/// Names of some devices, by vendor and device id.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Names {
    vendors: BTreeMap<u16, String>,
    devices: BTreeMap<(u16, u16), String>,
}

impl Names {
    /// Reads the names of `wanted`. What the list does not have, or cannot be read, has none.
    pub(super) fn read(root: &Path, wanted: &BTreeSet<(u16, u16)>) -> Self {
        let list = LISTS.iter().find_map(|list| File::open(root.join(list)).ok());
        list.map_or_else(Self::default, |list| {
            Self::parse(BufReader::new(list.take(LIST_BYTES_MAX)), wanted)
        })
    }

    /// The vendor's name.
    pub(super) fn vendor(&self, vendor: u16) -> Option<String> {
        self.vendors.get(&vendor).cloned()
    }

    /// The device's name.
    pub(super) fn device(&self, id: (u16, u16)) -> Option<String> {
        self.devices.get(&id).cloned()
    }

    fn parse(list: impl BufRead, wanted: &BTreeSet<(u16, u16)>) -> Self {
        let mut names = Self::default();
        let mut vendor = None;
        for line in list.split(b'\n') {
            let Ok(line) = line else { break };
            match line.as_slice() {
                [b'C', b' ', ..] => break,
                [b'\t', b'\t', ..] | [b'#', ..] | [] => {}
                [b'\t', entry @ ..] => {
                    let entry = vendor.zip(id_and_name(entry));
                    if let Some((vendor, (device, name))) = entry
                        && wanted.contains(&(vendor, device))
                    {
                        names.devices.insert((vendor, device), name);
                    }
                }
                entry => {
                    let found = id_and_name(entry);
                    vendor = found.as_ref().map(|(id, _)| *id);
                    if let Some((id, name)) = found
                        && wanted.range((id, 0)..=(id, u16::MAX)).next().is_some()
                    {
                        names.vendors.insert(id, name);
                    }
                }
            }
        }
        names
    }
}

/// `8086  Intel Corporation`.
fn id_and_name(entry: &[u8]) -> Option<(u16, String)> {
    let (id, name) = entry.split_at_checked(4)?;
    let id = str::from_utf8(id).ok().filter(|id| id.bytes().all(|b| b.is_ascii_hexdigit()))?;
    let id = u16::from_str_radix(id, 16).ok()?;
    let name = name.get(..NAME_BYTES_MAX).unwrap_or(name).trim_ascii();
    let name: String =
        String::from_utf8_lossy(name).chars().filter(|symbol| !symbol.is_control()).collect();
    (!name.is_empty()).then_some((id, name))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const LIST: &str = "# comment\n\
        0e11  Compaq\n\
        \t0001  No one's\n\
        8086  Intel Corporation\n\
        \t100e  82540EM Gigabit Ethernet Controller\n\
        \t\t1028 002e  a board\n\
        \t10d3  82574L\n\
        8  not an id\n\
        \t1234  of nobody\n\
        C 01  Mass storage controller\n\
        8087  behind the classes\n";

    #[test]
    fn those_asked_for_have_names_and_no_line_is_taken_for_another() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("usr/share/misc")).unwrap();
        fs::write(dir.path().join(LISTS[0]), LIST).unwrap();
        let wanted = BTreeSet::from([(0x8086, 0x100e), (0x8086, 0x002e), (0x8087, 1)]);

        let names = Names::read(dir.path(), &wanted);

        assert_eq!(names.vendor(0x8086).as_deref(), Some("Intel Corporation"));
        let device = names.device((0x8086, 0x100e));
        assert_eq!(device.as_deref(), Some("82540EM Gigabit Ethernet Controller"));
        assert_eq!((names.vendors.len(), names.devices.len()), (1, 1), "{names:?}");
    }

    #[test]
    fn a_host_without_the_list_has_devices_without_names() {
        let dir = tempfile::tempdir().unwrap();

        assert_eq!(Names::read(dir.path(), &BTreeSet::from([(1, 1)])), Names::default());
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let list = [b"8086  ".to_vec(), vec![b'x'; 1 << 20]].concat();

        let names = Names::parse(list.as_slice(), &BTreeSet::from([(0x8086, 1)]));

        assert!(names.vendor(0x8086).unwrap().len() <= NAME_BYTES_MAX);
    }
}
