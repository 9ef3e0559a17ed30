//! An initramfs: the `newc` format of Documentation/driver-api/early-userspace/buffer-format.rst.

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
/// Names and contents start at multiples of this.
const ALIGN_BYTES: usize = 4;

/// An archive under construction.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(crate) fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, (0, 0), &[]);
    }

    pub(crate) fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, PROGRAM, (0, 0), content);
    }

    pub(crate) fn character_device(&mut self, name: &str, major_minor: (u32, u32)) {
        self.entry(name, CHARACTER_DEVICE, major_minor, &[]);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (size, name_bytes) = (u32::try_from(content.len()).unwrap(), name.len() + 1);
        self.bytes.extend(b"070701");
        // Number, mode, owner, group, links, time, size, device of the file system.
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, major, minor] {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        // The last is a check sum that this format does not have.
        self.bytes.extend(format!("{name_bytes:08x}{:08x}{name}\0", 0).bytes());
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN_BYTES), 0);
    }
}
