//! The data area: file bodies, appended as they come.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use crate::images::erofs::format::EXTENDED_BYTES;
use crate::images::erofs::{BLOCK, BLOCK_BYTES};
use crate::images::room::{Room, RoomError};
use crate::images::tree::Body;

/// Bytes collected before they are written: few system calls, and small bodies share one.
const BUFFER_BYTES: usize = 1 << 20;

/// Longest tail kept for behind the inode. Of a minimal Debian (205 MB of bodies) no tails at all
/// make 212.7 MB, up to 2048 bytes 202.2, up to 3072 201.0, all that fit 200.9.
const TAIL_BYTES_MAX: usize = 3072;

/// Most bytes of tails held in memory for one image; from there on tails get their own blocks.
const TAILS_BYTES_MAX: usize = 64 << 20;

/// Buffers written between two looks at the free space.
const WRITES_PER_LOOK: u32 = 16;

/// The part of an image file that holds bodies.
#[derive(Debug)]
pub struct DataArea {
    file: File,
    room: Room,
    buffer: Vec<u8>,
    /// Where the buffer goes.
    buffer_block: u32,
    tails_bytes: usize,
    writes: u32,
}

impl DataArea {
    /// The data area of an image in the empty `file`, which may grow while `room` allows.
    pub fn new(file: File, room: Room) -> Self {
        let buffer = Vec::with_capacity(BUFFER_BYTES);
        // Block 0 is the superblock's.
        Self { file, room, buffer, buffer_block: 1, tails_bytes: 0, writes: 0 }
    }

    /// Appends a body of `size_bytes` from `source`, for an inode with `xattr_bytes` of extended
    /// attributes.
    ///
    /// # Errors
    ///
    /// [`DataError`]; the area is not usable further.
    pub fn append(
        &mut self,
        source: &mut impl Read,
        size_bytes: u64,
        xattr_bytes: usize,
    ) -> Result<Body, DataError> {
        let block = self.next_block()?;
        let tail_bytes = usize::try_from(size_bytes % BLOCK).expect("less than a block");
        let inline = tail_bytes > 0
            && tail_bytes <= TAIL_BYTES_MAX
            && EXTENDED_BYTES + xattr_bytes + tail_bytes <= BLOCK_BYTES
            && self.tails_bytes + tail_bytes <= TAILS_BYTES_MAX;
        if !inline {
            self.copy(source, size_bytes)?;
            self.pad()?;
            return Ok(Body { size_bytes, block, tail: None });
        }
        self.copy(source, size_bytes - tail_bytes as u64)?;
        let mut tail = vec![0; tail_bytes].into_boxed_slice();
        source.read_exact(&mut tail).map_err(DataError::Read)?;
        self.tails_bytes += tail_bytes;
        Ok(Body { size_bytes, block, tail: Some(tail) })
    }

    /// Gives the blocks of bodies that no file has any more back to the file system.
    ///
    /// # Errors
    ///
    /// [`DataError::Write`].
    pub fn discard(&mut self, dead: &[Body]) -> Result<(), DataError> {
        self.flush()?;
        let mut extents: Vec<(u64, u64)> = Vec::new();
        for body in dead {
            let tail_bytes = body.tail.as_ref().map_or(0, |tail| tail.len());
            self.tails_bytes -= tail_bytes;
            let bytes = (body.size_bytes - tail_bytes as u64).next_multiple_of(BLOCK);
            if bytes > 0 {
                extents.push((u64::from(body.block) * BLOCK, bytes));
            }
        }
        extents.sort_unstable();
        // Neighbours are punched in one call.
        extents.dedup_by(|next, last| {
            let touches = last.0 + last.1 == next.0;
            if touches {
                last.1 += next.1;
            }
            touches
        });
        for (offset, bytes) in extents {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.file, flags, offset, bytes)
                .map_err(|errno| DataError::Write(errno.into()))?;
        }
        Ok(())
    }

    /// Writes what is left. Returns the file and the first block behind the area.
    pub(super) fn finish(mut self) -> io::Result<(File, u32)> {
        self.flush().map_err(io::Error::other)?;
        Ok((self.file, self.buffer_block))
    }

    /// The block where the next body starts.
    fn next_block(&self) -> Result<u32, DataError> {
        let buffered = self.buffer.len() / BLOCK_BYTES;
        let block = u64::from(self.buffer_block) + buffered as u64;
        u32::try_from(block).map_err(|_| DataError::Write(io::ErrorKind::FileTooLarge.into()))
    }

    fn copy(&mut self, source: &mut impl Read, bytes: u64) -> Result<(), DataError> {
        let mut left = bytes;
        while left > 0 {
            if self.buffer.len() == BUFFER_BYTES {
                self.flush()?;
            }
            let start = self.buffer.len();
            let room = BUFFER_BYTES - start;
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(room);
            // The capacity is there: this only sets the bytes.
            self.buffer.resize(start + wanted, 0);
            source.read_exact(&mut self.buffer[start..]).map_err(DataError::Read)?;
            left -= wanted as u64;
        }
        Ok(())
    }

    /// Zeros up to the next block.
    fn pad(&mut self) -> Result<(), DataError> {
        self.buffer.resize(self.buffer.len().next_multiple_of(BLOCK_BYTES), 0);
        if self.buffer.len() == BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Writes the buffer, which is whole blocks unless the body in it goes on.
    fn flush(&mut self) -> Result<(), DataError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        if self.writes.is_multiple_of(WRITES_PER_LOOK) {
            self.room.claim(u64::from(WRITES_PER_LOOK) * BUFFER_BYTES as u64)?;
        }
        self.writes = self.writes.wrapping_add(1);
        let offset = u64::from(self.buffer_block) * BLOCK;
        self.file.write_all_at(&self.buffer, offset).map_err(DataError::Write)?;
        self.buffer_block = self.next_block()?;
        self.buffer.clear();
        Ok(())
    }
}

const _: () = assert!(BUFFER_BYTES.is_multiple_of(BLOCK_BYTES), "a full buffer is whole blocks");

/// Why a body could not be appended.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// Its source failed or ended early.
    #[error("Failed to read a file of the layer")]
    Read(#[source] io::Error),
    /// The image file.
    #[error("Failed to write the image file")]
    Write(#[source] io::Error),
    /// The disk is too full.
    #[error(transparent)]
    Room(#[from] RoomError),
}
