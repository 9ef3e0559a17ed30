//! The guest's disks, known by their serial numbers: names depend on who came first.
//!
//! A disk that comes while the guest runs is behind a slot that was vacant when the kernel looked,
//! and nothing tells the kernel to look again. So the driver is bound to all slots that have none:
//! it leaves alone those that are still vacant (virtio 1.3, 4.2.2 "MMIO Device Register Layout").

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open};
use rustix::io::Errno;

/// Where the kernel shows its disks.
const DISKS: &str = "/sys/block";

/// Where it shows the slots, and what their names begin with: the id that ACPI gives them.
const SLOTS: &str = "/sys/bus/platform/devices";
const SLOT: &str = "LNRO0005:";

/// Their driver.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// A disk.
#[derive(Debug)]
pub(crate) struct Disk {
    /// As the kernel calls it.
    name: String,
}

impl Disk {
    /// The disk with this serial number.
    pub(crate) fn find(serial: &str) -> Option<Self> {
        Self::find_in(Path::new(DISKS), serial)
    }

    fn find_in(disks: &Path, serial: &str) -> Option<Self> {
        let mut disks = fs::read_dir(disks).ok()?.flatten();
        let disk = disks.find(|disk| {
            let found = fs::read_to_string(disk.path().join("serial"));
            found.is_ok_and(|found| found.trim_end() == serial)
        })?;
        Some(Self { name: disk.file_name().into_string().ok()? })
    }

    /// Its device.
    pub(crate) fn device(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// Its device number, as the kernel writes it: `MAJOR:MINOR`.
    pub(crate) fn number(&self) -> io::Result<String> {
        let text = fs::read_to_string(Path::new(DISKS).join(&self.name).join("dev"))?;
        Ok(text.trim_end().to_owned())
    }

    /// Whether no file system is on it, in any namespace, nor anything else that has it alone.
    pub(crate) fn is_free(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        !matches!(open(self.device(), flags, Mode::empty()), Err(Errno::BUSY))
    }

    /// Takes its driver from it.
    pub(crate) fn unbind(self) -> io::Result<()> {
        // The disk is its virtio device's, and that the slot's.
        let device = fs::canonicalize(Path::new(DISKS).join(&self.name).join("device"))?;
        let slot = device.parent().and_then(Path::file_name).ok_or(io::ErrorKind::NotFound)?;
        fs::write(Path::new(DRIVER).join("unbind"), slot.as_encoded_bytes())
    }
}

/// Finds the disks that have come.
pub(crate) fn look() -> io::Result<()> {
    for slot in fs::read_dir(SLOTS)? {
        let slot = slot?;
        let is_vacant = slot.file_name().as_encoded_bytes().starts_with(SLOT.as_bytes())
            && !slot.path().join("driver").exists();
        if is_vacant {
            // It fails if the slot is still vacant.
            let _ = fs::write(Path::new(DRIVER).join("bind"), slot.file_name().as_encoded_bytes());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_number() {
        let disks = tempfile::tempdir().unwrap();
        for (name, serial) in [("vda", Some("root")), ("loop0", None), ("vdz", Some("headers"))] {
            let disk = disks.path().join(name);
            fs::create_dir(&disk).unwrap();
            if let Some(serial) = serial {
                fs::write(disk.join("serial"), format!("{serial}\n")).unwrap();
            }
        }
        let find = || Disk::find_in(disks.path(), "headers").map(|disk| disk.device());

        assert_eq!(find(), Some(PathBuf::from("/dev/vdz")));
        fs::remove_dir_all(disks.path().join("vdz")).unwrap();
        assert_eq!(find(), None);
    }
}
