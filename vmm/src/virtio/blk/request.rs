//! What the driver asks of a disk, checked against the disk (virtio 1.3, 5.2.6).
//!
//! The header is the first 16 bytes of the readable part and the status is the last byte of the
//! writable part, wherever descriptors are cut.

use vm_memory::GuestAddress;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes, KnownLayout};

use super::{Fault, ID_BYTES_MAX, SECTOR_BYTES};
use crate::rate_limiter::Cost;
use crate::virtio::buffers::{Buffers, Span};

/// Most sectors in one range of DISCARD or WRITE_ZEROES: 1 GiB.
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// Ranges in one request: one range is one fallocate.
pub(super) const RANGES_MAX: u32 = 1;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// The one flag of a range: the sectors may be deallocated.
const RANGE_UNMAP: u32 = 1;

/// How a request ended, as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

/// A disk as far as requests are concerned.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) sectors: u64,
    pub(super) read_only: bool,
    pub(super) id: [u8; ID_BYTES_MAX],
    /// A write is stable when it is done: the driver did not learn to flush.
    pub(super) write_through: bool,
}

/// One request that can be carried out, or one that was answered already.
#[derive(Debug)]
pub(super) struct Request<'m> {
    pub(super) action: Action<'m>,
    /// Where the status goes.
    pub(super) status: GuestAddress,
}

/// What to do. Offsets and lengths are in bytes and inside of the disk.
#[derive(Debug)]
pub(super) enum Action<'m> {
    Read { offset: u64, target: Span<'m> },
    Write { offset: u64, source: Span<'m>, stable: bool },
    Flush,
    Punch { offset: u64, bytes: u64 },
    Zero { offset: u64, bytes: u64 },
    Answer { status: Status, written_bytes: u32 },
}

impl Request<'_> {
    /// What it costs: what moves no data is one operation and no bytes.
    pub(super) fn cost(&self) -> Cost {
        let bytes = match &self.action {
            Action::Read { target: span, .. } | Action::Write { source: span, .. } => span.len(),
            Action::Flush | Action::Punch { .. } | Action::Zero { .. } | Action::Answer { .. } => 0,
        };
        Cost { bytes: bytes as u64, operations: 1 }
    }
}

#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
struct Range {
    sector: U64,
    sectors: U32,
    flags: U32,
}

impl Disk {
    /// Reads a request from queue `index`.
    ///
    /// # Errors
    ///
    /// [`Fault::Protocol`] if there is no byte for the status: nothing could be answered.
    pub(super) fn parse<'m>(&self, buffers: Buffers<'m>, index: u16) -> Result<Request<'m>, Fault> {
        let Buffers { readable, mut writable, writable_end } = buffers;
        let Some(status) = writable_end else {
            return Err(Fault::Protocol { index, what: "a request has no byte for its status" });
        };
        writable.truncate(writable.len().saturating_sub(1));
        let action = self
            .action(readable, writable)
            .unwrap_or_else(|status| Action::Answer { status, written_bytes: 0 });
        Ok(Request { action, status })
    }

    fn action<'m>(
        &self,
        mut readable: Span<'m>,
        mut writable: Span<'m>,
    ) -> Result<Action<'m>, Status> {
        let mut header = Header::new_zeroed();
        if !readable.read(header.as_mut_bytes()) {
            return Err(Status::IoErr);
        }
        let sector = header.sector.get();
        match header.kind.get() {
            T_IN => {
                let offset = self.offset(sector, writable.len() as u64)?;
                Ok(Action::Read { offset, target: writable })
            }
            T_OUT => {
                self.writable(Status::IoErr)?;
                let offset = self.offset(sector, readable.len() as u64)?;
                Ok(Action::Write { offset, source: readable, stable: self.write_through })
            }
            T_FLUSH => {
                self.writable(Status::Unsupported)?;
                Ok(Action::Flush)
            }
            T_GET_ID => {
                let id = self.id.get(..writable.len().min(ID_BYTES_MAX)).unwrap_or_default();
                if !writable.write(id) {
                    return Err(Status::IoErr);
                }
                let written_bytes = u32::try_from(id.len()).unwrap_or(0);
                Ok(Action::Answer { status: Status::Ok, written_bytes })
            }
            kind @ (T_DISCARD | T_WRITE_ZEROES) => {
                self.writable(Status::Unsupported)?;
                self.erase(kind, readable)
            }
            _ => Err(Status::Unsupported),
        }
    }

    /// DISCARD or WRITE_ZEROES of the range in `readable`.
    fn erase<'m>(&self, kind: u32, mut readable: Span<'m>) -> Result<Action<'m>, Status> {
        let mut range = Range::new_zeroed();
        if !readable.read(range.as_mut_bytes()) || !readable.is_empty() {
            return Err(Status::IoErr);
        }
        let flags = range.flags.get();
        let known = if kind == T_WRITE_ZEROES { RANGE_UNMAP } else { 0 };
        // Zeroes cannot be made stable in one call; without it the driver writes them itself.
        let unstable = kind == T_WRITE_ZEROES && self.write_through;
        if flags & !known != 0 || unstable {
            return Err(Status::Unsupported);
        }
        if range.sectors.get() > RANGE_SECTORS_MAX {
            return Err(Status::IoErr);
        }
        let bytes = u64::from(range.sectors.get()).saturating_mul(SECTOR_BYTES);
        let offset = self.offset(range.sector.get(), bytes)?;
        if bytes == 0 {
            return Ok(Action::Answer { status: Status::Ok, written_bytes: 0 });
        }
        if kind == T_DISCARD || flags & RANGE_UNMAP != 0 {
            Ok(Action::Punch { offset, bytes })
        } else {
            Ok(Action::Zero { offset, bytes })
        }
    }

    /// Where in the file `bytes` at `sector` begin, if they are whole sectors of this disk.
    fn offset(&self, sector: u64, bytes: u64) -> Result<u64, Status> {
        let inside = sector
            .checked_add(bytes / SECTOR_BYTES)
            .is_some_and(|end| end <= self.sectors && bytes.is_multiple_of(SECTOR_BYTES));
        let offset = sector.checked_mul(SECTOR_BYTES).filter(|_| inside);
        offset.ok_or(Status::IoErr)
    }

    fn writable(&self, otherwise: Status) -> Result<(), Status> {
        if self.read_only { Err(otherwise) } else { Ok(()) }
    }
}
