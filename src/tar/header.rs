//! The 512 bytes in front of every entry.

use crate::tar::pax::Records;
use crate::tar::{BLOCK_BYTES, Entry, TarError};

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// Another name for an entry before it.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// A header block whose checksum is right.
#[derive(Debug)]
pub(super) struct RawHeader<'a> {
    block: &'a [u8; BLOCK_BYTES],
}

impl<'a> RawHeader<'a> {
    pub(super) fn parse(block: &'a [u8; BLOCK_BYTES]) -> Result<Self, &'static str> {
        // The checksum itself counts as eight spaces.
        const SPACES: i64 = 8 * b' ' as i64;
        let others = || block[..148].iter().chain(&block[156..]);
        let unsigned = others().fold(SPACES, |sum, &byte| sum + i64::from(byte));
        // Some old writers summed signed characters.
        let signed = others().fold(SPACES, |sum, &byte| sum + i64::from(byte.cast_signed()));
        let stored = octal(&block[148..156])?;
        if stored != unsigned && stored != signed {
            return Err("a header's checksum is wrong");
        }
        Ok(Self { block })
    }

    pub(super) fn type_flag(&self) -> u8 {
        self.block[156]
    }

    pub(super) fn size_bytes(&self) -> Result<u64, &'static str> {
        let size = number(&self.block[124..136])?;
        u64::try_from(size).map_err(|_| "a size is negative")
    }

    /// The entry this header and the PAX `records` before it describe.
    pub(super) fn entry(
        &self,
        records: Records,
        malformed: impl Fn(&'static str) -> TarError,
        offset: u64,
    ) -> Result<Entry, TarError> {
        let path = records.path.unwrap_or_else(|| self.path());
        let unsupported = |what| TarError::Unsupported {
            path: String::from_utf8_lossy(&path).into_owned(),
            what,
        };
        if records.sparse {
            return Err(unsupported("a sparse file"));
        }
        let kind = match self.type_flag() {
            b'0' | 0 | b'7' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::CharDevice,
            b'4' => EntryKind::BlockDevice,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            b'S' => return Err(unsupported("a sparse file")),
            b'M' | b'V' | b'N' => return Err(unsupported("part of a multi-volume archive")),
            _ => return Err(unsupported("of an unknown type")),
        };
        let id = |from_pax: Option<u64>, field: &[u8]| -> Result<u32, &'static str> {
            let id = from_pax.map_or_else(|| number(field), |id| Ok(id.cast_signed()))?;
            u32::try_from(id).map_err(|_| "an owner does not fit 32 bits")
        };
        let device = |field: &[u8]| -> Result<u32, &'static str> {
            u32::try_from(number(field)?).map_err(|_| "a device number does not fit 32 bits")
        };
        let fields = || -> Result<Entry, &'static str> {
            let (mtime_s, mtime_ns) = match records.mtime {
                Some(mtime) => mtime,
                None => (number(&self.block[136..148])?, 0),
            };
            let size_bytes = match records.size_bytes {
                Some(size_bytes) => size_bytes,
                None => self.size_bytes()?,
            };
            let has_numbers = matches!(kind, EntryKind::CharDevice | EntryKind::BlockDevice);
            let devices = if has_numbers {
                (device(&self.block[329..337])?, device(&self.block[337..345])?)
            } else {
                (0, 0)
            };
            // Twelve bits: what stat(2) has besides the type.
            let mode = number(&self.block[100..108])? & 0o7777;
            Ok(Entry {
                path: path.clone(),
                kind,
                link: records.link.unwrap_or_else(|| until_nul(&self.block[157..257])),
                mode: u16::try_from(mode).map_err(|_| "a mode is negative")?,
                uid: id(records.uid, &self.block[108..116])?,
                gid: id(records.gid, &self.block[116..124])?,
                mtime_s,
                mtime_ns,
                size_bytes: if kind == EntryKind::File { size_bytes } else { 0 },
                device: devices,
                xattrs: records.xattrs,
            })
        };
        let entry = fields().map_err(malformed)?;
        // The next header's offset must be a number.
        if entry.size_bytes > (i64::MAX as u64).saturating_sub(offset) {
            return Err(TarError::Malformed { what: "a size is beyond any file's", offset });
        }
        Ok(entry)
    }

    /// The name in the header: prefix and name for POSIX, the name alone for GNU and older.
    fn path(&self) -> Vec<u8> {
        const POSIX_MAGIC: &[u8] = b"ustar\0";
        let name = until_nul(&self.block[..100]);
        let prefix = until_nul(&self.block[345..500]);
        if &self.block[257..263] == POSIX_MAGIC && !prefix.is_empty() {
            [prefix, name].join(&b'/')
        } else {
            name
        }
    }
}

impl Entry {
    /// Before POSIX had a type for them, directories were files whose name ends in a slash.
    pub(super) fn settle_kind(&mut self) {
        if self.kind == EntryKind::File && self.path.ends_with(b"/") {
            self.kind = EntryKind::Directory;
        }
    }
}

fn until_nul(field: &[u8]) -> Vec<u8> {
    field.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
}

/// A numeric field: octal digits, or two's complement base-256 if its first bit is set (GNU).
fn number(field: &[u8]) -> Result<i64, &'static str> {
    let [first, rest @ ..] = field else { return Ok(0) };
    if first & 0x80 == 0 {
        return octal(field);
    }
    // Sign-extend from the seven bits the marker leaves.
    let start = i64::from(((first & 0x7f) << 1).cast_signed() >> 1);
    rest.iter().try_fold(start, |value, &byte| {
        value
            .checked_mul(256)
            .and_then(|value| value.checked_add(i64::from(byte)))
            .ok_or("a number is too big")
    })
}

/// Octal digits between optional spaces and NULs; nothing at all is 0.
fn octal(field: &[u8]) -> Result<i64, &'static str> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let digits = field.iter().skip_while(|byte| is_blank(byte));
    let mut value = 0_i64;
    let mut ended = false;
    for byte in digits {
        match byte {
            b'0'..=b'7' if !ended => {
                value = value
                    .checked_mul(8)
                    .and_then(|value| value.checked_add(i64::from(byte - b'0')))
                    .ok_or("a number is too big")?;
            }
            b' ' | 0 => ended = true,
            // Text after a NUL is an old writer's rubbish, text in the number is not.
            _ if ended => {}
            _ => return Err("a number has digits that are not octal"),
        }
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_base_256() {
        assert_eq!(number(b"0000644\0"), Ok(0o644));
        assert_eq!(number(b"   644 \0"), Ok(0o644));
        assert_eq!(number(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert_eq!(number(b"77777777777\0"), Ok(0o77_777_777_777));
        assert_eq!(number(&[0x80, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Ok(2 << 32));
        assert_eq!(number(&[0xff; 12]), Ok(-1));
        assert!(number(&[0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_err());
        assert!(number(b"0000648\0").is_err());
        assert!(number(b"-0000644").is_err());
    }
}
