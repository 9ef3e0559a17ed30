//! The `newc` archive format that the kernel unpacks as its initramfs.
//!
//! Archives may follow one another: a run appends its own small one to the cached one. Format:
//! `Documentation/driver-api/early-userspace/buffer-format.rst` in Linux 6.12.

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// Archives and the data in them start at multiples of this many bytes.
const ALIGN_BYTES: usize = 4;
/// The kernel wants each following archive at a multiple of this many bytes.
const END_ALIGN_BYTES: usize = 512;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, &[]);
    }

    /// Adds a file that root can read, write and run.
    pub fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, PROGRAM, content);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.pad(END_ALIGN_BYTES);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let (ino, links, name_bytes) = (self.entries, 1, name.len() + 1);
        let header = format!(
            "070701{ino:08x}{mode:08x}{uid:08x}{gid:08x}{links:08x}{mtime:08x}{size:08x}\
             {major:08x}{minor:08x}{major:08x}{minor:08x}{name_bytes:08x}{check:08x}",
            uid = 0,
            gid = 0,
            mtime = 0,
            size = content.len(),
            major = 0,
            minor = 0,
            check = 0,
        );
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad(ALIGN_BYTES);
        self.bytes.extend_from_slice(content);
        self.pad(ALIGN_BYTES);
    }

    fn pad(&mut self, align_bytes: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(align_bytes), 0);
    }
}
