//! The initramfs of a guest: two small archives that the kernel unpacks one after the other.
//!
//! The base archive holds the agent and is the same for every guest; the configuration archive
//! holds what one guest shall become. Both are in the "newc" cpio format
//! (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel): a header of hex
//! digits, the name and the content of each file, all at multiples of 4 bytes. They are not
//! compressed: unpacking would cost more than the copy it saves.

use std::fs::File;
use std::io;
use std::io::Write;

use ovum_agent_proto::config::{CONFIG_BYTES_MAX, CONFIG_PATH, GuestConfig};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

/// Everything in an archive starts at a multiple of this many bytes, and so does an archive.
const ALIGN: usize = 4;

/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const SECRET: u32 = 0o100_600;
const TERMINAL: u32 = 0o020_600;

/// Device number of /dev/console (Documentation/admin-guide/devices.txt of the kernel).
const CONSOLE: (u32, u32) = (5, 1);

/// One archive, complete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    bytes: Vec<u8>,
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// An archive of this format gives a file 32 bits of length.
    #[error("File of {bytes} bytes is too long for an initramfs")]
    FileLength {
        /// Length of the file.
        bytes: usize,
    },
    /// The agent would refuse it.
    #[error("Guest configuration takes {bytes} bytes, {CONFIG_BYTES_MAX} are allowed")]
    ConfigLength {
        /// Length of the configuration.
        bytes: usize,
    },
    /// The configuration has no JSON form.
    #[error("Failed to encode the guest configuration")]
    ConfigEncode(#[source] serde_json::Error),
    /// The host gave no anonymous file.
    #[error("Failed to keep an initramfs of {bytes} bytes in memory")]
    Memory {
        /// Length of the archive.
        bytes: usize,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Archive {
    /// Makes the base archive, around the bytes of the agent's program.
    ///
    /// The kernel opens /dev/console for PID 1 before that has mounted anything.
    ///
    /// # Errors
    ///
    /// [`ArchiveError::FileLength`] if the program has 4 GiB or more.
    pub fn base(agent: &[u8]) -> Result<Self, ArchiveError> {
        let mut writer = Writer::default();
        writer.entry("dev", DIRECTORY, (0, 0), &[])?;
        writer.entry("dev/console", TERMINAL, CONSOLE, &[])?;
        writer.entry("init", PROGRAM, (0, 0), agent)?;
        writer.finish()
    }

    /// Makes the configuration archive of one guest. It may hold secrets: the environment.
    ///
    /// # Errors
    ///
    /// [`ArchiveError::ConfigLength`] if the agent would not read it.
    pub fn config(config: &GuestConfig) -> Result<Self, ArchiveError> {
        let json = serde_json::to_vec(config).map_err(ArchiveError::ConfigEncode)?;
        if json.len() > CONFIG_BYTES_MAX {
            return Err(ArchiveError::ConfigLength { bytes: json.len() });
        }
        let path = CONFIG_PATH.trim_start_matches('/');
        let mut writer = Writer::default();
        for (slash, _) in path.match_indices('/') {
            writer.entry(&path[..slash], DIRECTORY, (0, 0), &[])?;
        }
        writer.entry(path, SECRET, (0, 0), &json)?;
        writer.finish()
    }

    /// The archive. Another may follow it directly.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The archive as an anonymous file that nobody can change any more, to be handed to a worker.
    ///
    /// # Errors
    ///
    /// [`ArchiveError::Memory`].
    pub fn to_file(&self) -> Result<File, ArchiveError> {
        let sealed = || -> io::Result<File> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let mut file = File::from(memfd_create(c"initramfs", flags)?);
            file.write_all(&self.bytes)?;
            let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            fcntl_add_seals(&file, seals)?;
            Ok(file)
        };
        sealed().map_err(|source| ArchiveError::Memory { bytes: self.bytes.len(), source })
    }
}

/// An archive in the making.
#[derive(Debug, Default)]
struct Writer {
    bytes: Vec<u8>,
    entries: u32,
}

impl Writer {
    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Result<(), ArchiveError> {
        let length =
            |bytes: usize| u32::try_from(bytes).map_err(|_| ArchiveError::FileLength { bytes });
        self.entries += 1;
        #[rustfmt::skip]
        let fields = [
            self.entries, // inode: all different, or the kernel would link them
            mode,
            0, 0,         // owner: root
            1,            // links
            0,            // time of last change: 1970, so that equal inputs give equal archives
            length(content.len())?,
            0, 0,         // device on which the file was
            major, minor, // device that the file is
            length(name.len() + 1)?,
            0,            // checksum: none in this format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn finish(mut self) -> Result<Archive, ArchiveError> {
        self.entry(TRAILER, 0, (0, 0), &[])?;
        Ok(Archive { bytes: self.bytes })
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    /// One entry as the kernel reads it: mode, device, name, content.
    type Entry = (u32, (u32, u32), String, Vec<u8>);

    /// Reads an archive by the format's own rules: offsets from the header, nothing from `Writer`.
    fn unpack(archive: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701");
            let field = |index: usize| {
                let start = at + 6 + index * 8;
                let digits = str::from_utf8(&archive[start..start + 8]).unwrap();
                u32::from_str_radix(digits, 16).unwrap()
            };
            let name_start = at + 110;
            let name_end = name_start + field(11) as usize;
            let name = str::from_utf8(&archive[name_start..name_end]).unwrap();
            let content_start = name_end.div_ceil(4) * 4;
            let content_end = content_start + field(6) as usize;
            let content = archive[content_start..content_end].to_vec();
            let name = name.strip_suffix('\0').unwrap().to_owned();
            entries.push((field(1), (field(9), field(10)), name, content));
            at = content_end.div_ceil(4) * 4;
        }
        assert_eq!(at, archive.len());
        entries
    }

    fn config(hostname: &str) -> GuestConfig {
        GuestConfig {
            version: 1,
            hostname: hostname.to_owned(),
            root_device: "/dev/vda".to_owned(),
            overlay_device: None,
            network: None,
            argv: vec!["/bin/true".to_owned()],
            env: vec![("TOKEN".to_owned(), "secret".to_owned())],
            working_dir: "/".to_owned(),
            listen: true,
            realtime_ns: 0,
            volumes: Vec::new(),
            kernel_headers: false,
            memory_watch: None,
        }
    }

    #[test]
    fn the_base_archive_holds_the_agent_and_a_console() {
        let archive = Archive::base(b"\x7fELF!").unwrap();

        assert_eq!(
            unpack(archive.bytes()),
            [
                (0o040_755, (0, 0), "dev".to_owned(), vec![]),
                (0o020_600, (5, 1), "dev/console".to_owned(), vec![]),
                (0o100_755, (0, 0), "init".to_owned(), b"\x7fELF!".to_vec()),
                (0, (0, 0), "TRAILER!!!".to_owned(), vec![]),
            ]
        );
    }

    #[test]
    fn the_agent_finds_its_configuration_at_the_agreed_path() {
        let archive = Archive::config(&config("one")).unwrap();

        let entries = unpack(archive.bytes());

        let (mode, _, name, content) = &entries[1];
        assert_eq!((entries[0].0, entries[0].2.as_str()), (0o040_755, "ovum"));
        assert_eq!((*mode, format!("/{name}").as_str()), (0o100_600, CONFIG_PATH));
        assert_eq!(serde_json::from_slice::<GuestConfig>(content).unwrap(), config("one"));
    }

    /// The machine loads them one behind the other, which the kernel takes at multiples of 4 only.
    #[test]
    fn an_archive_ends_where_another_can_start() {
        for length in 0..8 {
            assert_eq!(Archive::base(&vec![7; length]).unwrap().bytes().len() % 4, 0);
        }
        let both = [Archive::base(b"agent").unwrap(), Archive::config(&config("two")).unwrap()]
            .map(|archive| archive.bytes().to_vec())
            .concat();
        assert_eq!(unpack(&both).len(), 4 + 3);
    }

    #[test]
    fn a_configuration_that_the_agent_would_refuse_is_refused_here() {
        let error = Archive::config(&config(&"x".repeat(1 << 20))).unwrap_err();

        assert!(
            matches!(error, ArchiveError::ConfigLength { bytes } if bytes > 1 << 20),
            "{error}"
        );
    }

    #[test]
    fn a_file_holds_the_archive_and_cannot_be_changed() {
        let archive = Archive::base(b"agent").unwrap();

        let mut file = archive.to_file().unwrap();

        let mut read = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, archive.bytes());
        assert_eq!(file.write(b"x").unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }
}
