//! What of the host depends on a device: whoever took that away would harm the host.
//!
//! A disk counts if something on it is mounted, swapped to, or part of something larger; an
//! interface if it is up and traffic goes through it; a device with functions or mediated devices
//! of its own, as long as there are any. Before a device is given away the kernel is asked, too,
//! whether it lets anyone have the disk alone: some file system that is not looked for here may.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

use crate::devices::address::PciAddress;
use crate::devices::sysfs::{Sysfs, attribute, is_gone, names_in};

/// How many times a disk may be part of something that is part of something.
const HOLDERS_DEPTH_MAX: usize = 8;

/// Most bytes that are read of a table of the kernel.
const TABLE_BYTES_MAX: u64 = 16 << 20;

/// An interface is up (IFF_UP of netdevice(7)).
const FLAG_UP: u32 = 1;

/// The scope of IPv6 addresses that every interface has, as /proc/net/if_inet6 writes it.
const SCOPE_LINK: &str = "20";

/// What the host does with a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HostUse {
    /// Something of it is mounted.
    Mounted {
        /// The disk or partition.
        disk: String,
        /// Where.
        at: String,
    },
    /// It is swapped to.
    Swap {
        /// The disk or partition.
        disk: String,
    },
    /// Something larger is made of it.
    Part {
        /// The disk or partition.
        disk: String,
        /// What.
        of: String,
    },
    /// Something in the kernel has it for itself.
    Held {
        /// The disk.
        disk: String,
    },
    /// Traffic goes through it.
    Interface {
        /// Its name.
        name: String,
    },
    /// Others have parts of it.
    Shared {
        /// What they are called.
        parts: &'static str,
    },
}

impl fmt::Display for HostUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mounted { disk, at } => write!(f, "its disk {disk} is mounted at {at}"),
            Self::Swap { disk } => write!(f, "the host swaps to its disk {disk}"),
            Self::Part { disk, of } => write!(f, "its disk {disk} is part of {of}"),
            Self::Held { disk } => write!(f, "its disk {disk} is in use"),
            Self::Interface { name } => {
                write!(f, "its interface {name} is up, with addresses or routes")
            }
            Self::Shared { parts } => write!(f, "there are {parts} of it"),
        }
    }
}

impl Sysfs {
    /// What the host does with the function at `address`, if it does anything.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn use_of(&self, address: &PciAddress) -> io::Result<Option<HostUse>> {
        let folder = match fs::canonicalize(self.folder(address)) {
            Ok(folder) => folder,
            Err(error) if is_gone(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let functions = attribute(&folder.join("sriov_numvfs"))?;
        if functions.is_some_and(|count| count != "0") {
            return Ok(Some(HostUse::Shared { parts: "virtual functions" }));
        }
        if self.has_mediated(&folder)? {
            return Ok(Some(HostUse::Shared { parts: "mediated devices" }));
        }
        for disk in self.names_below(&folder, "block")? {
            if let Some(found) = self.use_of_block(&disk, &disk, HOLDERS_DEPTH_MAX)? {
                return Ok(Some(found));
            }
        }
        for name in self.names_below(&folder, "net")? {
            if self.has_traffic(&name)? {
                return Ok(Some(HostUse::Interface { name }));
            }
        }
        Ok(None)
    }

    /// Things of a class that belong to the device in `folder`, whatever lies between.
    fn names_below(&self, folder: &Path, class: &str) -> io::Result<Vec<String>> {
        let class = self.class(class);
        let mut names = Vec::new();
        for name in names_in(&class)? {
            match fs::canonicalize(class.join(&name)) {
                Ok(place) if place.starts_with(folder) => names.push(shown_disk(name)),
                Ok(_elsewhere) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether the kernel gives a disk of the device at `address` to nobody else, whoever has it.
    ///
    /// It is asked by having the disk for a moment, in which nobody else gets it either: for a
    /// device that is about to be given away, not for one that is only looked at.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub(super) fn holds(&self, address: &PciAddress) -> io::Result<Option<HostUse>> {
        let folder = fs::canonicalize(self.folder(address))?;
        for disk in self.names_below(&folder, "block")? {
            let device = self.root.join("dev").join(disk.replace('!', "/"));
            let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::NONBLOCK | OFlags::CLOEXEC;
            if open(device, flags, Mode::empty()).err() == Some(Errno::BUSY) {
                return Ok(Some(HostUse::Held { disk }));
            }
        }
        Ok(None)
    }

    /// What the host does with `block`, which is `disk` or made of it.
    fn use_of_block(&self, disk: &str, block: &str, depth: usize) -> io::Result<Option<HostUse>> {
        let folder = self.class("block").join(block);
        let disk = disk.to_owned();
        if let Some(number) = attribute(&folder.join("dev"))?
            && let Some(at) = self.mount_of(&number, block)?
        {
            return Ok(Some(HostUse::Mounted { disk, at }));
        }
        let device = format!("/dev/{}", block.replace('!', "/"));
        if self.table("proc/swaps")?.iter().any(|row| row.first() == Some(&device)) {
            return Ok(Some(HostUse::Swap { disk }));
        }
        let Some(holder) = names_in(&folder.join("holders"))?.pop() else { return Ok(None) };
        let found = match depth.checked_sub(1) {
            Some(depth) => self.use_of_block(&disk, &holder, depth)?,
            None => None,
        };
        Ok(Some(found.unwrap_or(HostUse::Part { disk, of: holder })))
    }

    /// Where the block device `number` is mounted (proc_pid_mountinfo(5)). Some file systems have
    /// numbers of their own, and only name the device.
    fn mount_of(&self, number: &str, block: &str) -> io::Result<Option<String>> {
        let device = format!("/dev/{}", block.replace('!', "/"));
        let mounts = self.table("proc/self/mountinfo")?;
        let found = mounts.iter().find(|row| {
            let source = row.iter().position(|word| word == "-").and_then(|dash| row.get(dash + 2));
            row.get(2).is_some_and(|at| at == number) || source == Some(&device)
        });
        Ok(found.and_then(|row| row.get(4).cloned()))
    }

    /// Whether an interface is up and has addresses, routes, or something above it.
    fn has_traffic(&self, name: &str) -> io::Result<bool> {
        let folder = self.class("net").join(name);
        let flags = attribute(&folder.join("flags"))?.unwrap_or_default();
        let flags = u32::from_str_radix(flags.trim_start_matches("0x"), 16).unwrap_or_default();
        if flags & FLAG_UP == 0 {
            return Ok(false);
        }
        if names_in(&folder)?.iter().any(|entry| entry.starts_with("upper_")) {
            return Ok(true);
        }
        let routes = self.table("proc/net/route")?;
        let addresses = self.table("proc/net/if_inet6")?;
        let is_global = |row: &Vec<String>| {
            row.last().is_some_and(|last| last == name)
                && row.get(3).is_some_and(|scope| scope != SCOPE_LINK)
        };
        Ok(routes.iter().any(|row| row.first().is_some_and(|first| first == name))
            || addresses.iter().any(is_global))
    }

    /// The words of a table of the kernel, line by line.
    fn table(&self, path: &str) -> io::Result<Vec<Vec<String>>> {
        let file = match File::open(self.root.join(path)) {
            Ok(file) => file,
            Err(error) if is_gone(&error) => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let lines = BufReader::new(file.take(TABLE_BYTES_MAX)).split(b'\n');
        let words = |line: Vec<u8>| {
            let line = String::from_utf8_lossy(&line).into_owned();
            line.split_whitespace().map(str::to_owned).collect()
        };
        lines.map(|line| line.map(words)).collect()
    }

    fn class(&self, name: &str) -> PathBuf {
        self.root.join("sys/class").join(name)
    }
}

/// The disk that stands for a path to an NVMe namespace, `nvme0n1` for `nvme0c1n1`: the path is
/// what belongs to the controller, the disk is what can be mounted.
fn shown_disk(name: String) -> String {
    let Some((subsystem, path)) = name.split_once('c') else { return name };
    let Some((controller, namespace)) = path.split_once('n') else { return name };
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let is_path = subsystem.strip_prefix("nvme").is_some_and(is_number) && is_number(controller);
    if is_path { format!("{subsystem}n{namespace}") } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::testing::Tree;

    const NVME: &str = "0000:01:00.0";

    /// A host with an NVMe disk of one partition.
    fn disk() -> Tree {
        let tree = Tree::new();
        tree.function(NVME, "1b36", "0010", "0x010802");
        let place = tree.place(NVME).join("nvme/nvme0/nvme0n1");
        for (path, number) in [("", "259:0"), ("/nvme0n1p1", "259:1")] {
            let folder = format!("sys/devices/pci0000:00/{NVME}/nvme/nvme0/nvme0n1{path}");
            tree.file(&format!("{folder}/dev"), number);
        }
        tree.link("sys/class/block/nvme0n1", &place);
        tree.link("sys/class/block/nvme0n1p1", &place.join("nvme0n1p1"));
        tree.file("proc/self/mountinfo", "22 1 0:20 / /sys rw - sysfs sysfs rw\n");
        tree
    }

    fn found(tree: &Tree) -> Option<String> {
        tree.sysfs().use_of(&NVME.parse().unwrap()).unwrap().map(|found| found.to_string())
    }

    #[test]
    fn a_disk_counts_if_it_is_mounted_or_swapped_to() {
        let tree = disk();
        assert_eq!(found(&tree), None);

        tree.file("proc/swaps", "Filename Type Size\n/dev/nvme0n1p1 partition 8\n");
        assert_eq!(found(&tree).unwrap(), "the host swaps to its disk nvme0n1p1");
        tree.file("proc/self/mountinfo", "30 1 259:1 / /home rw - ext4 /dev/nvme0n1p1 rw\n");
        assert_eq!(found(&tree).unwrap(), "its disk nvme0n1p1 is mounted at /home");
        tree.file("proc/self/mountinfo", "30 1 0:31 / / rw shared:1 - btrfs /dev/nvme0n1 rw\n");
        assert_eq!(found(&tree).unwrap(), "its disk nvme0n1 is mounted at /");
    }

    #[test]
    fn a_disk_counts_if_it_is_part_of_something() {
        let tree = disk();
        let mapped = tree.root().join("sys/devices/virtual/block/dm-0");
        tree.link("sys/class/block/dm-0", &mapped);
        tree.file("sys/devices/virtual/block/dm-0/dev", "254:0");
        let holders = format!("sys/devices/pci0000:00/{NVME}/nvme/nvme0/nvme0n1/holders");
        tree.link(&format!("{holders}/dm-0"), &mapped);

        assert_eq!(found(&tree).unwrap(), "its disk nvme0n1 is part of dm-0");
        tree.file("proc/self/mountinfo", "30 1 254:0 / / rw - ext4 /dev/mapper/root rw\n");
        assert_eq!(found(&tree).unwrap(), "its disk nvme0n1 is mounted at /");
    }

    #[test]
    fn a_path_to_a_namespace_stands_for_its_disk() {
        for (name, disk) in [
            ("nvme0c1n1", "nvme0n1"),
            ("nvme12c0n3p1", "nvme12n3p1"),
            ("nvme0n1", "nvme0n1"),
            ("sdc", "sdc"),
            ("cciss!c0d0", "cciss!c0d0"),
        ] {
            assert_eq!(shown_disk(name.to_owned()), disk);
        }
    }

    #[test]
    fn an_interface_counts_if_it_is_up_and_leads_somewhere() {
        let tree = Tree::new();
        tree.function(NVME, "8086", "10d3", "0x020000");
        let folder = format!("sys/devices/pci0000:00/{NVME}/virtio0/net/eth0");
        tree.file(&format!("{folder}/flags"), "0x1003\n");
        tree.link("sys/class/net/eth0", &tree.root().join(&folder));
        tree.file(
            "proc/net/if_inet6",
            "fe800000000000000000000000000001 02 40 20 80 eth0\n\
             00000000000000000000000000000001 01 80 10 80 lo\n",
        );
        tree.file("proc/net/route", "Iface Destination Gateway\neth1 00000000 0100000A\n");
        assert_eq!(found(&tree), None, "what every interface has does not count");

        tree.file("proc/net/route", "Iface Destination Gateway\neth0 00000000 0100000A\n");
        assert!(found(&tree).unwrap().contains("interface eth0 is up"));
        tree.file("proc/net/route", "");
        tree.file("proc/net/if_inet6", "20010000000000000000000000000001 02 40 00 80 eth0\n");
        assert!(found(&tree).is_some());
        tree.file("proc/net/if_inet6", "");
        tree.file(&format!("{folder}/upper_br0/flags"), "");
        assert!(found(&tree).is_some(), "a bridge is above it");
        tree.file(&format!("{folder}/flags"), "0x1002\n");
        assert_eq!(found(&tree), None, "it is down");
    }

    #[test]
    fn a_device_of_which_others_have_parts_counts() {
        let tree = Tree::new();
        tree.function(NVME, "10de", "27b8", "0x030200");
        let place = format!("sys/devices/pci0000:00/{NVME}");
        tree.file(&format!("{place}/sriov_numvfs"), "0\n");
        assert_eq!(found(&tree), None);

        tree.file(&format!("{place}/sriov_numvfs"), "2\n");
        assert_eq!(found(&tree).unwrap(), "there are virtual functions of it");
    }
}
