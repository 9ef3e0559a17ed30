//! Block device over a file (virtio 1.3, 5.2).
//!
//! A kick becomes a few system calls: requests are parsed one after the other
//! (`request.rs`), a read that the page cache answers is done on the spot, the rest goes to
//! io_uring in one submission, and what it finishes comes back in one wake-up and one interrupt. So
//! the device thread never waits for a disk. On hosts that refuse io_uring the same jobs run one by
//! one, and it does wait ([`EngineKind::Direct`]).
//!
//! What the host cannot do becomes the request's status. Only a driver that breaks the ring's rules
//! gets a [`Fault`]; leaving no byte for the status, or making one descriptor available twice, is
//! breaking them.

mod config;
#[expect(unsafe_code, reason = "reads and writes guest memory by address")]
mod job;
#[expect(unsafe_code, reason = "promises that guest memory outlives what is in flight")]
mod lane;
mod request;
#[expect(unsafe_code, reason = "io_uring is given addresses that must outlive the call")]
mod uring;

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::fs::{OFlags, fcntl_getfl};
use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::ring::Answer;
use super::{Device, DeviceIo, DeviceState, Fault, Interest, Served, Watch};
use crate::rate_limiter::{Gate, RateLimiter};
use crate::spec::DiskSpec;
use config::Config;
use lane::Lane;
use request::Disk;
use uring::Uring;

/// Bytes of a sector: the unit of every number the driver gives, whatever the disk's block size.
pub const SECTOR_BYTES: u64 = 512;

/// Most bytes of a disk's id (5.2.6, VIRTIO_BLK_T_GET_ID).
pub const ID_BYTES_MAX: usize = 20;

/// Descriptors of a queue, and requests in flight at most.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];

const KIND: u32 = 2;

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// The file that becomes readable when io_uring has finished something.
const TOKEN_COMPLETIONS: u32 = 0;
/// The timer that says when a request which is over the limit may go.
const TOKEN_LIMIT: u32 = 1;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum BlkError {
    /// The disk's id has no room in the answer to GET_ID.
    #[error("Disk id {id:?} is longer than {ID_BYTES_MAX} bytes")]
    Id {
        /// The id asked for.
        id: String,
    },
    /// A disk has whole sectors.
    #[error("Disk {id:?} has {size_bytes} bytes, no multiple of {SECTOR_BYTES}")]
    Size {
        /// The disk's id.
        id: String,
        /// The file's size.
        size_bytes: u64,
    },
    /// The disk shall be writable and the file was opened for reading.
    #[error("Disk {id:?} is to be written, but its file is open for reading only")]
    ReadOnlyFile {
        /// The disk's id.
        id: String,
    },
    /// The file says nothing about itself.
    #[error("Failed to look at the file of disk {id:?}")]
    Inspect {
        /// The disk's id.
        id: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// io_uring failed otherwise than by being refused.
    #[error("Failed to set up io_uring for disk {id:?}")]
    Uring {
        /// The disk's id.
        id: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// There is no timer for its rate limit.
    #[error("Failed to get a timer for disk {id:?}")]
    Timer {
        /// The disk's id.
        id: String,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// How a disk's file is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineKind {
    /// Through io_uring: many requests at a time, and nobody waits.
    Uring,
    /// By one system call after the other, on the device thread.
    Direct,
}

/// A disk.
#[derive(Debug)]
pub struct Blk {
    disk: Disk,
    config: Config,
    /// What one queue has of its own. A second queue would be a second lane.
    lane: Lane,
    gate: Gate,
    watching: bool,
}

/// What a disk needs to go on elsewhere: a file of the same shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkState {
    /// Size in sectors of [`SECTOR_BYTES`].
    pub sectors: u64,
    /// Whether the driver was told that it cannot write.
    pub read_only: bool,
}

impl Blk {
    /// A disk over `file`, through io_uring where the host allows it, as fast as `limiter` lets it.
    ///
    /// # Errors
    ///
    /// See [`BlkError`].
    pub fn new(file: File, spec: &DiskSpec, limiter: &RateLimiter) -> Result<Self, BlkError> {
        let uring = match Uring::new(&file, QUEUE_SIZE.into()) {
            Ok(uring) => Some(uring),
            Err(error) if refused(&error) => None,
            Err(source) => return Err(BlkError::Uring { id: spec.id.clone(), source }),
        };
        Self::over(file, spec, limiter, uring)
    }

    /// The same with the engine of choice.
    ///
    /// # Errors
    ///
    /// See [`BlkError`]; a refused io_uring is one, too.
    pub fn with_engine(
        file: File,
        spec: &DiskSpec,
        limiter: &RateLimiter,
        kind: EngineKind,
    ) -> Result<Self, BlkError> {
        let uring = match kind {
            EngineKind::Uring => Some(
                Uring::new(&file, QUEUE_SIZE.into())
                    .map_err(|source| BlkError::Uring { id: spec.id.clone(), source })?,
            ),
            EngineKind::Direct => None,
        };
        Self::over(file, spec, limiter, uring)
    }

    /// Which engine it runs on.
    pub fn engine(&self) -> EngineKind {
        if self.lane.uring().is_some() { EngineKind::Uring } else { EngineKind::Direct }
    }

    fn over(
        file: File,
        spec: &DiskSpec,
        limiter: &RateLimiter,
        uring: Option<Uring>,
    ) -> Result<Self, BlkError> {
        let disk = inspect(&file, spec)?;
        let gate =
            limiter.gate().map_err(|source| BlkError::Timer { id: spec.id.clone(), source })?;
        let config = Config::new(disk.sectors, disk.read_only, QUEUE_SIZE);
        Ok(Self { disk, config, lane: Lane::new(file, uring, QUEUE_SIZE), gate, watching: false })
    }
}

impl Device for Blk {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let always = F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY;
        let by_access =
            if self.disk.read_only { F_RO } else { F_FLUSH | F_DISCARD | F_WRITE_ZEROES };
        always | by_access
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn activate(&mut self, features: u64, io: &mut DeviceIo<'_>) -> Result<(), Fault> {
        // A driver that cannot flush takes every completed write for stable (5.2.5.2).
        self.disk.write_through = features & F_FLUSH == 0;
        let failed = |source| Fault::Host { what: "wait for a disk", source };
        if let Some(uring) = self.lane.uring() {
            io.watch.add(uring.completions(), TOKEN_COMPLETIONS, Interest::Read).map_err(failed)?;
        }
        self.watching = true;
        io.watch.add(self.gate.timer(), TOKEN_LIMIT, Interest::Read).map_err(failed)
    }

    /// A request over the limit stays in the queue, and all behind it, until the timer fires.
    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(index)) else { return Ok(Served::NOTHING) };
        let (disk, lane, gate) = (&self.disk, &mut self.lane, &mut self.gate);
        let now = Instant::now();
        let served = ring.serve(io.mem, |head, buffers| {
            let request = disk.parse(buffers, index)?;
            let admitted = gate.admits(request.cost(), now);
            if !admitted.map_err(|source| Fault::Host { what: "set a timer", source })? {
                return Ok(Answer::Blocked);
            }
            lane.start(head, request, io.mem, index)
        })?;
        Ok(served.and(lane.submit(index)?))
    }

    fn wake(&mut self, token: u32, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        if token == TOKEN_LIMIT {
            self.gate.acknowledge();
            return self.service(0, io);
        }
        let Some(ring) = io.rings.first_mut() else { return Ok(Served::NOTHING) };
        let served = self.lane.finish(0, |head, used_bytes| ring.push(io.mem, head, used_bytes))?;
        Ok(served.and(self.lane.submit(0)?))
    }

    fn reset(&mut self, watch: &mut dyn Watch) {
        if self.watching {
            // It fails if the file is not there, which is what is wanted.
            let _ = self.lane.uring().map(|uring| watch.remove(uring.completions()));
            let _ = watch.remove(self.gate.timer());
        }
        self.watching = false;
        self.gate.forget();
        self.lane.abandon();
    }

    fn drain(&mut self, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.first_mut() else { return Ok(Served::NOTHING) };
        self.lane.drain(0, |head, used_bytes| ring.push(io.mem, head, used_bytes))
    }

    fn save(&self) -> DeviceState {
        let Disk { sectors, read_only, .. } = self.disk;
        DeviceState::Blk(BlkState { sectors, read_only })
    }
}

/// What can be known of a disk from its file.
fn inspect(mut file: &File, spec: &DiskSpec) -> Result<Disk, BlkError> {
    let DiskSpec { id, read_only } = spec;
    let failed = |source| BlkError::Inspect { id: id.clone(), source };
    let mut id_bytes = [0; ID_BYTES_MAX];
    match id_bytes.get_mut(..id.len()) {
        Some(front) => front.copy_from_slice(id.as_bytes()),
        None => return Err(BlkError::Id { id: id.clone() }),
    }
    // Not the file's metadata: those know nothing of a block device's size.
    let size_bytes = file.seek(SeekFrom::End(0)).map_err(failed)?;
    if !size_bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(BlkError::Size { id: id.clone(), size_bytes });
    }
    let flags = fcntl_getfl(file.as_fd()).map_err(|errno| failed(errno.into()))?;
    if !read_only && flags & OFlags::ACCMODE == OFlags::RDONLY {
        return Err(BlkError::ReadOnlyFile { id: id.clone() });
    }
    let sectors = size_bytes / SECTOR_BYTES;
    Ok(Disk { sectors, read_only: *read_only, id: id_bytes, write_through: false })
}

/// Whether the host has no io_uring for us, by age, by policy or by a system call filter.
fn refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM | libc::EACCES))
}

#[cfg(test)]
mod tests;
