//! Guest userspace for the tests: busybox, a script as /init, and programs made by hand.

use std::env;
use std::fs::{self, File};
use std::io::{Seek, Write};
use std::path::PathBuf;

/// File type and permission bits, as in stat(2).
const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CONSOLE: u32 = 0o020_600;
const CONSOLE_NUMBER: (u32, u32) = (5, 1);

/// One archive in the "newc" form (Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An archive with what every test guest has: busybox, a console, and `script` as /init.
    ///
    /// The script runs in busybox' sh with all its applets and the kernel's file systems mounted.
    pub(crate) fn with_init(script: &str) -> Self {
        let head = "#!/bin/busybox sh\n\
            /bin/busybox mkdir -p /proc /sys /dev /tmp\n\
            /bin/busybox --install /bin\n\
            mount -t proc proc /proc\n\
            mount -t sysfs sysfs /sys\n\
            mount -t devtmpfs dev /dev\n";
        let mut archive = Self::default();
        archive.directory("bin");
        archive.directory("dev");
        archive.entry("dev/console", CONSOLE, CONSOLE_NUMBER, &[]);
        archive.program("bin/busybox", &busybox());
        archive.program("init", format!("{head}export PATH=/bin\n{script}\n").as_bytes());
        archive
    }

    /// Adds a directory.
    pub(crate) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, (0, 0), &[]);
    }

    /// Adds an executable file.
    pub(crate) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, EXECUTABLE, (0, 0), content);
    }

    /// The archive as a file, positioned at its start.
    pub(crate) fn into_file(mut self) -> File {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        let mut file = tempfile::tempfile().expect("there is room for an initramfs");
        file.write_all(&self.bytes).expect("there is room for an initramfs");
        file.rewind().expect("a file can be rewound");
        file
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let content_bytes = u32::try_from(content.len()).expect("test files are small");
        let path_bytes = u32::try_from(path.len() + 1).expect("test paths are short");
        let (major, minor) = device;
        let inode = self.entries;
        // Magic, then: ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor
        // namesize check.
        let fields = [inode, mode, 0, 0, 1, 0, content_bytes, 0, 0, major, minor, path_bytes, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// A static ELF that writes `word` to the 32-bit `port` and exits with 0.
///
/// No shell can: /dev/port writes single bytes, and a report is one write of four.
pub(crate) fn port_writer(port: u16, word: u32) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS_BYTES: u64 = 64 + 56;
    let mut code = Vec::new();
    code.extend([0xbf, 3, 0, 0, 0]); // mov edi, 3
    code.extend([0xb8, 172, 0, 0, 0]); // mov eax, SYS_iopl
    code.extend([0x0f, 0x05]); // syscall
    code.extend([0x66, 0xba]); // mov dx, port
    code.extend(port.to_le_bytes());
    code.push(0xb8); // mov eax, word
    code.extend(word.to_le_bytes());
    code.push(0xef); // out dx, eax
    code.extend([0x31, 0xff]); // xor edi, edi
    code.extend([0xb8, 60, 0, 0, 0]); // mov eax, SYS_exit
    code.extend([0x0f, 0x05]); // syscall
    let bytes = HEADERS_BYTES + code.len() as u64;

    let mut elf = Vec::new();
    elf.extend(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64, version
    elf.extend((BASE + HEADERS_BYTES).to_le_bytes()); // entry
    elf.extend(64_u64.to_le_bytes()); // program headers
    elf.extend(0_u64.to_le_bytes()); // no sections
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    for word in [0, BASE, BASE, bytes, bytes, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

fn busybox() -> Vec<u8> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&path)
        .chain([PathBuf::from("/bin")])
        .map(|directory| directory.join("busybox"))
        .find(|candidate| candidate.is_file())
        .expect("These tests need a static busybox in PATH (Debian: busybox-static)");
    fs::read(found).expect("busybox can be read")
}
