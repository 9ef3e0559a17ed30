//! Writes a tree as an EROFS image: Linux's read-only file system, uncompressed.
//!
//! File bodies arrive first, one after the other, while layers are still being read; only what
//! describes them is kept in memory. When the tree is complete its metadata goes behind them:
//!
//! ```text
//! block 0      superblock (at byte 1024)
//! block 1..    file bodies, each from a block of its own      DataArea::append
//!              directory blocks                               Plan::directories
//! meta_block.. inodes, each with its extended attributes      Plan::inodes
//!              and, if short, its tail: the bytes after the
//!              last full block of a file or directory
//! ```
//!
//! An inode's number is its distance from `meta_block` in 32-byte slots. The same tree over the
//! same bodies gives the same bytes. Layout: Linux Documentation/filesystems/erofs.rst and
//! fs/erofs/erofs_fs.h, as of 6.12.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};

use crate::images::erofs::plan::Plan;
use crate::images::tree::Tree;

mod data;
mod format;
mod plan;
mod write;

pub use data::{DataArea, DataError};
pub use format::{XattrError, admit_xattr, xattr_bytes};

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;

/// [`BLOCK_BYTES`], for sizes of files.
const BLOCK: u64 = BLOCK_BYTES as u64;

/// Longest target of a symbolic link together with its extended attributes: they share a block
/// with the inode.
pub const SYMLINK_BYTES_MAX: usize = BLOCK_BYTES - format::EXTENDED_BYTES;

/// Most bytes of one file's extended attributes: twice the longest value.
pub const XATTRS_BYTES_MAX: usize = 128 << 10;

/// Bytes of metadata buffered before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// Writes the metadata of `tree` behind the bodies in `data` and brings it all to the disk.
///
/// `uuid` becomes the file system's. Returns the file.
///
/// # Errors
///
/// Those of writing, and [`io::ErrorKind::FileTooLarge`] beyond 2^32 blocks.
pub fn finish(data: DataArea, tree: &Tree, uuid: [u8; 16]) -> io::Result<File> {
    let (file, data_end) = data.finish()?;
    let plan = Plan::new(tree, data_end)?;
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, &file);
    out.seek(SeekFrom::Start(u64::from(data_end) * BLOCK))?;
    write::directories(&mut out, tree, &plan)?;
    write::inodes(&mut out, tree, &plan)?;
    out.seek(SeekFrom::Start(0))?;
    out.write_all(&format::superblock_block(&plan.superblock(uuid)))?;
    out.flush()?;
    drop(out);
    file.sync_all()?;
    Ok(file)
}

/// Whether a device number fits an inode.
pub fn device_fits(major: u32, minor: u32) -> bool {
    format::device_number(major, minor).is_some()
}

#[cfg(test)]
mod tests;
