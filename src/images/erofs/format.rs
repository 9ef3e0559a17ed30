//! The bytes of EROFS: superblock, inode, directory entry, extended attribute. Little-endian.

use crate::images::erofs::BLOCK_BYTES;
use crate::images::tree::{Kind, Node, Xattr};

/// Unit of inode numbers.
pub(super) const SLOT_BYTES: usize = 32;

/// Bytes of an inode that has 16-bit owners and links, a 32-bit size, and the image's time.
pub(super) const COMPACT_BYTES: usize = 32;

/// Bytes of any inode.
pub(super) const EXTENDED_BYTES: usize = 64;

/// Bytes of a directory entry, without its name.
pub(super) const DIRENT_BYTES: usize = 12;

/// Longest value of an extended attribute that an entry can state.
const XATTR_VALUE_BYTES_MAX: usize = u16::MAX as usize;

/// Bytes in front of a node's extended attributes.
const XATTR_HEADER_BYTES: usize = 12;

const SUPERBLOCK_OFFSET: usize = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;
/// The superblock has a checksum; times are modification times.
const FEATURES_COMPAT: u32 = 0x1 | 0x2;

/// Where an inode's data is: `i_format` bits 1 to 3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// All in blocks.
    Plain = 0,
    /// Full blocks in blocks, the rest behind the inode.
    Inline = 2,
}

/// File type in a directory entry (as the kernel's `FT_*`).
pub(super) fn file_type(kind: &Kind) -> u8 {
    match kind {
        Kind::File(_) => 1,
        Kind::Directory(_) => 2,
        Kind::CharDevice(..) => 3,
        Kind::BlockDevice(..) => 4,
        Kind::Fifo => 5,
        Kind::Symlink(_) => 7,
    }
}

/// `st_mode`: type and permissions.
fn mode(node: &Node) -> u16 {
    let kind = match node.kind {
        Kind::Fifo => 0o010_000,
        Kind::CharDevice(..) => 0o020_000,
        Kind::Directory(_) => 0o040_000,
        Kind::BlockDevice(..) => 0o060_000,
        Kind::File(_) => 0o100_000,
        Kind::Symlink(_) => 0o120_000,
    };
    kind | node.meta.mode
}

/// What the superblock says.
#[derive(Debug)]
pub(super) struct Superblock {
    pub(super) root_slot: u16,
    pub(super) inodes: u64,
    pub(super) time: (i64, u32),
    pub(super) blocks: u32,
    pub(super) meta_block: u32,
    pub(super) uuid: [u8; 16],
}

/// Block 0, with the superblock in it.
pub(super) fn superblock_block(superblock: &Superblock) -> Vec<u8> {
    let block_bits = u8::try_from(BLOCK_BYTES.ilog2()).expect("the exponent of a usize is small");
    let mut out = Vec::with_capacity(BLOCK_BYTES);
    out.resize(SUPERBLOCK_OFFSET, 0);
    out.extend(MAGIC.to_le_bytes());
    out.extend(0_u32.to_le_bytes()); // checksum, below
    out.extend(FEATURES_COMPAT.to_le_bytes());
    out.extend([block_bits, 0]); // and no superblock extensions
    out.extend(superblock.root_slot.to_le_bytes());
    out.extend(superblock.inodes.to_le_bytes());
    out.extend(superblock.time.0.to_le_bytes());
    out.extend(superblock.time.1.to_le_bytes());
    out.extend(superblock.blocks.to_le_bytes());
    out.extend(superblock.meta_block.to_le_bytes());
    out.extend(0_u32.to_le_bytes()); // no shared extended attributes
    out.extend(superblock.uuid);
    // No name, no incompatible features, no compression, no further devices.
    out.resize(SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES, 0);
    out.resize(BLOCK_BYTES, 0);
    let checksum = crc32c(&out[SUPERBLOCK_OFFSET..]);
    out[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// The numbers of an inode that its node does not know.
#[derive(Debug)]
pub(super) struct InodeSpec {
    pub(super) layout: DataLayout,
    pub(super) size_bytes: u64,
    pub(super) links: u32,
    /// First block, or the device number of a device.
    pub(super) block: u32,
    /// A number for 32-bit callers of stat(2).
    pub(super) number: u32,
    pub(super) compact: bool,
}

/// Whether a compact inode can say all there is to say.
pub(super) fn fits_compact(node: &Node, size_bytes: u64, links: u32, time: (i64, u32)) -> bool {
    let meta = &node.meta;
    u16::try_from(meta.uid).is_ok()
        && u16::try_from(meta.gid).is_ok()
        && u16::try_from(links).is_ok()
        && u32::try_from(size_bytes).is_ok()
        && (meta.mtime_s, meta.mtime_ns) == time
}

/// Bytes of an inode.
pub(super) fn inode_bytes(compact: bool) -> usize {
    if compact { COMPACT_BYTES } else { EXTENDED_BYTES }
}

/// Appends an inode with its extended attributes.
#[expect(clippy::cast_possible_truncation, reason = "`fits_compact` says what fits")]
pub(super) fn push_inode(out: &mut Vec<u8>, node: &Node, spec: &InodeSpec) {
    let extended = u16::from(!spec.compact);
    out.extend((extended | (spec.layout as u16) << 1).to_le_bytes());
    out.extend(xattr_count(&node.meta.xattrs).to_le_bytes());
    out.extend(mode(node).to_le_bytes());
    if spec.compact {
        out.extend((spec.links as u16).to_le_bytes());
        out.extend((spec.size_bytes as u32).to_le_bytes());
        out.extend([0; 4]);
        out.extend(spec.block.to_le_bytes());
        out.extend(spec.number.to_le_bytes());
        out.extend((node.meta.uid as u16).to_le_bytes());
        out.extend((node.meta.gid as u16).to_le_bytes());
        out.extend([0; 4]);
    } else {
        out.extend([0; 2]);
        out.extend(spec.size_bytes.to_le_bytes());
        out.extend(spec.block.to_le_bytes());
        out.extend(spec.number.to_le_bytes());
        out.extend(node.meta.uid.to_le_bytes());
        out.extend(node.meta.gid.to_le_bytes());
        out.extend(node.meta.mtime_s.to_le_bytes());
        out.extend(node.meta.mtime_ns.to_le_bytes());
        out.extend(spec.links.to_le_bytes());
        out.extend([0; 16]);
    }
    push_xattrs(out, &node.meta.xattrs);
}

/// A device number as the kernel stores it in 32 bits: 12 bits major, 20 bits minor.
///
/// `None` if the numbers are beyond that.
pub(super) fn device_number(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20)
        .then_some((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// Index and rest of an extended attribute's name. `None` if EROFS has no place for it.
pub(super) fn xattr_prefix(name: &[u8]) -> Option<(u8, &[u8])> {
    const PREFIXES: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        name => PREFIXES.iter().find_map(|&(index, prefix)| {
            let rest = name.strip_prefix(prefix)?;
            (!rest.is_empty() && u8::try_from(rest.len()).is_ok()).then_some((index, rest))
        }),
    }
}

/// Whether an extended attribute can be written.
///
/// # Errors
///
/// [`XattrError`] if not.
pub fn admit_xattr(name: &[u8], value: &[u8]) -> Result<(), XattrError> {
    if xattr_prefix(name).is_none() {
        return Err(XattrError::UnknownPrefix);
    }
    if value.len() > XATTR_VALUE_BYTES_MAX {
        return Err(XattrError::ValueTooLong);
    }
    Ok(())
}

/// Why an extended attribute cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// EROFS has no place for such a name.
    #[error("Unknown prefix or impossible length of an extended attribute's name")]
    UnknownPrefix,
    /// No file system would take it.
    #[error("Value of an extended attribute is longer than {XATTR_VALUE_BYTES_MAX} bytes")]
    ValueTooLong,
}

/// Bytes that a node's extended attributes take behind its inode.
pub fn xattr_bytes(xattrs: &[Xattr]) -> usize {
    if xattrs.is_empty() {
        return 0;
    }
    let entry = |xattr: &Xattr| {
        let name = xattr_prefix(&xattr.name).map_or(0, |(_, rest)| rest.len());
        (4 + name + xattr.value.len()).next_multiple_of(4)
    };
    XATTR_HEADER_BYTES + xattrs.iter().map(entry).sum::<usize>()
}

/// `i_xattr_icount`: 0 for none, else 1 and one for each four bytes behind the header.
fn xattr_count(xattrs: &[Xattr]) -> u16 {
    match xattr_bytes(xattrs) {
        0 => 0,
        bytes => u16::try_from((bytes - XATTR_HEADER_BYTES) / 4 + 1)
            .expect("XATTRS_BYTES_MAX is far below"),
    }
}

fn push_xattrs(out: &mut Vec<u8>, xattrs: &[Xattr]) {
    if xattrs.is_empty() {
        return;
    }
    out.extend([0; XATTR_HEADER_BYTES]); // no name filter, nothing shared
    for xattr in xattrs {
        let Some((index, rest)) = xattr_prefix(&xattr.name) else { continue };
        let start = out.len();
        out.push(u8::try_from(rest.len()).expect("xattr_prefix checked it"));
        out.push(index);
        let value_bytes = u16::try_from(xattr.value.len()).expect("`admit_xattr` checked it");
        out.extend(value_bytes.to_le_bytes());
        out.extend(rest);
        out.extend(&*xattr.value);
        out.resize(start + (out.len() - start).next_multiple_of(4), 0);
    }
}

/// An entry of a directory block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dirent<'a> {
    pub(super) name: &'a [u8],
    pub(super) slot: u64,
    pub(super) file_type: u8,
}

/// Appends one directory block: all entries, then all names.
pub(super) fn push_directory_block(out: &mut Vec<u8>, entries: &[Dirent<'_>]) {
    let mut name_offset = entries.len() * DIRENT_BYTES;
    for entry in entries {
        let offset = u16::try_from(name_offset).expect("a block is smaller than 64 KiB");
        out.extend(entry.slot.to_le_bytes());
        out.extend(offset.to_le_bytes());
        out.extend([entry.file_type, 0]);
        name_offset += entry.name.len();
    }
    for entry in entries {
        out.extend(entry.name);
    }
}

/// CRC-32C (Castagnoli) with the kernel's conventions: starts at all ones, is not inverted.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (if crc & 1 == 1 { POLYNOMIAL } else { 0 })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_castagnolis() {
        // RFC 3720, B.4: 32 bytes of zeros give 0xaa36918a after the final inversion.
        assert_eq!(!crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn device_numbers_are_the_kernels() {
        assert_eq!(device_number(1, 3), Some(0x103));
        assert_eq!(device_number(8, 0x12345), Some(0x1230_0845));
        assert_eq!(device_number(1 << 12, 0), None);
        assert_eq!(device_number(0, 1 << 20), None);
    }

    #[test]
    fn names_of_attributes_have_known_prefixes() {
        assert_eq!(xattr_prefix(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(xattr_prefix(b"security.capability"), Some((6, &b"capability"[..])));
        assert_eq!(xattr_prefix(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(xattr_prefix(b"user."), None);
        assert_eq!(xattr_prefix(b"system.nfs4_acl"), None);
        assert_eq!(xattr_prefix(b"com.apple.x"), None);
    }
}
