//! Console device: what the guest prints, appended to a log file (virtio 1.3, 5.3).
//!
//! One port and no input: the receive queue exists because the specification wants it, and is
//! never filled. The log is bounded by [`LOG_BYTES_MAX`]: beyond, its oldest part becomes a hole,
//! so that offsets in the file stay true while the disk it takes does not grow. Output that cannot
//! be written is dropped and counted, for a full disk is no reason to stop a guest.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate, tell};

use super::buffers::{Buffers, Span};
use super::ring::Answer;
use super::{Device, DeviceIo, DeviceState, Fault, Served, Watch};

/// Bytes of the log that are kept on disk, at most; up to 1 MiB more between two looks.
pub const LOG_BYTES_MAX: u64 = 64 << 20;

/// Bytes of the log that are left when it was over [`LOG_BYTES_MAX`].
const LOG_BYTES_LEFT: u64 = LOG_BYTES_MAX / 2;

/// The log's size is looked at each time so many bytes were written.
const LOG_CHECK_BYTES: u64 = 1 << 20;

/// Holes end at a multiple of this, a power of two and a multiple of any file system's block size.
const HOLE_STEP: u64 = 1 << 20;

/// Bytes taken from one buffer. Linux sends a page at most; who sends more loses the rest, because
/// the device thread must come back in time.
const BUFFER_BYTES_MAX: usize = 1 << 20;

/// Bytes gathered over buffers before they are written.
const BATCH_BYTES: usize = 64 << 10;

const KIND: u32 = 3;
const QUEUE_SIZES: [u16; 2] = [64, 256];
const TRANSMIT: u16 = 1;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The log file says nothing about itself.
    #[error("Failed to look at the console's log file")]
    Inspect {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A console that is only written to.
#[derive(Debug)]
pub struct Console {
    log: Log,
}

impl Console {
    /// A console that writes into `log`, from the file's present position on.
    ///
    /// What is no regular file (a terminal, /dev/null) is not kept bounded, and may block.
    ///
    /// # Errors
    ///
    /// [`ConsoleError::Inspect`] if `log` cannot be looked at.
    pub fn new(log: File) -> Result<Self, ConsoleError> {
        Ok(Self { log: Log::new(log).map_err(|source| ConsoleError::Inspect { source })? })
    }

    /// Bytes the guest sent that are not in the log.
    pub fn dropped_bytes(&self) -> u64 {
        self.log.dropped_bytes
    }
}

impl Device for Console {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(index)) else { return Ok(Served::NOTHING) };
        if index != TRANSMIT {
            return Ok(Served::NOTHING);
        }
        let log = &mut self.log;
        let mut batch = Span::default();
        let mut heads = Vec::new();
        let mut served = ring.serve(io.mem, |head, Buffers { mut readable, .. }| {
            let sent = readable.len();
            readable.truncate(BUFFER_BYTES_MAX);
            log.drop_bytes(sent.saturating_sub(readable.len()));
            batch.append(&readable);
            if batch.len() >= BATCH_BYTES {
                log.append(&mut batch);
            }
            heads.push(head);
            Ok(Answer::InFlight)
        })?;
        // Only now: the driver reuses a buffer as soon as it gets it back.
        log.append(&mut batch);
        for head in heads {
            ring.push(io.mem, head, 0)?;
            served = served.and(Served::used(index));
        }
        Ok(served)
    }

    fn reset(&mut self, _watch: &mut dyn Watch) {}

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }
}

/// The log file, and how much of it is still there.
#[derive(Debug)]
struct Log {
    file: File,
    /// A regular file grows and can have holes.
    regular: bool,
    /// Bytes written since the size was last looked at.
    unchecked_bytes: u64,
    /// Everything before this offset is a hole already.
    hole_end: u64,
    /// A hole could not be made: the log is full for good.
    full: bool,
    dropped_bytes: u64,
}

impl Log {
    fn new(file: File) -> io::Result<Self> {
        let regular = file.metadata()?.is_file();
        let mut log =
            Self { file, regular, unchecked_bytes: 0, hole_end: 0, full: false, dropped_bytes: 0 };
        log.bound();
        Ok(log)
    }

    fn drop_bytes(&mut self, count: usize) {
        self.dropped_bytes = self.dropped_bytes.saturating_add(count as u64);
    }

    /// Writes all of `text` or drops what does not fit, and leaves it empty.
    fn append(&mut self, text: &mut Span<'_>) {
        while !text.is_empty() && !self.full {
            match text.write_to(self.file.as_fd()) {
                Ok(0) => break,
                Ok(count) => {
                    self.unchecked_bytes = self.unchecked_bytes.saturating_add(count as u64)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
            if self.unchecked_bytes >= LOG_CHECK_BYTES {
                self.bound();
            }
        }
        self.drop_bytes(text.len());
        *text = Span::default();
    }

    /// Makes a hole of the oldest part if the log has grown too large.
    ///
    /// The file's own position counts, for others may write there too.
    fn bound(&mut self) {
        self.unchecked_bytes = 0;
        if !self.regular {
            return;
        }
        let Ok(position) = tell(&self.file) else { return };
        if position.saturating_sub(self.hole_end) <= LOG_BYTES_MAX {
            return;
        }
        let hole_end = position.saturating_sub(LOG_BYTES_LEFT) & !(HOLE_STEP - 1);
        let hole_bytes = hole_end.saturating_sub(self.hole_end);
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, mode, self.hole_end, hole_bytes) {
            Ok(()) => self.hole_end = hole_end,
            Err(_) => self.full = true,
        }
    }
}

#[cfg(test)]
mod tests;
