//! Volumes given to a guest that runs, and taken from it.

use crate::body::{Reader, Writer};

/// Longest serial number of a disk (virtio 1.3, 5.2.6).
pub const SERIAL_BYTES_MAX: usize = 20;

/// Longest path to mount at: Linux PATH_MAX less its NUL.
const PATH_BYTES_MAX: usize = 4095;

/// A volume to be mounted: its disk has come just now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachSpec {
    /// The serial number of its disk, an ext4.
    pub serial: String,
    /// Where, absolute; made if it is missing.
    pub path: String,
    /// Others may be reading it, too.
    pub read_only: bool,
}

/// A volume to be unmounted: its disk is about to go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachSpec {
    /// The serial number of its disk.
    pub serial: String,
}

impl AttachSpec {
    pub(crate) fn write(&self) -> Vec<u8> {
        let Self { serial, path, read_only } = self;
        Writer::default().text(serial).text(path).flag(*read_only).finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let serial = serial(&mut reader)?;
        let path = reader.text().filter(|path| {
            path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\0')
        })?;
        let read_only = reader.flag()?;
        reader.end()?;
        Some(Self { serial, path, read_only })
    }
}

impl DetachSpec {
    pub(crate) fn write(&self) -> Vec<u8> {
        Writer::default().text(&self.serial).finish()
    }

    pub(crate) fn read(body: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(body);
        let serial = serial(&mut reader)?;
        reader.end()?;
        Some(Self { serial })
    }
}

fn serial(reader: &mut Reader<'_>) -> Option<String> {
    reader.text().filter(|serial| (1..=SERIAL_BYTES_MAX).contains(&serial.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_disk_and_a_place_can_be_asked_for() {
        let spec = |serial: &str, path: &str| AttachSpec {
            serial: serial.into(),
            path: path.into(),
            read_only: true,
        };
        let read = |spec: AttachSpec| AttachSpec::read(&spec.write());

        assert_eq!(read(spec("v", "/a")), Some(spec("v", "/a")));
        for (serial, path) in [("", "/a"), ("v", ""), ("v", "a"), ("v", "/a\0")] {
            assert_eq!(read(spec(serial, path)), None, "{serial:?} {path:?}");
        }
        assert_eq!(read(spec(&"v".repeat(21), "/a")), None);
        assert_eq!(read(spec("v", &"/".repeat(4096))), None);
        assert_eq!(DetachSpec::read(&DetachSpec { serial: String::new() }.write()), None);
    }
}
