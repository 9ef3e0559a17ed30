//! The workload's output, on its way from the pipe to the console.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use ovum_agent_proto::report::{Phase, Report};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::{event, io};

use crate::console;
use crate::port::Port;

/// Bytes moved at once: what a pipe holds.
const CHUNK_BYTES: usize = 64 << 10;

/// How long a process that was killed may take to let go of the pipe.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);

/// The reading end of the pipe.
#[derive(Debug)]
pub(crate) struct Output {
    port: Port,
    /// Nothing once every writer has closed its end.
    pipe: Option<OwnedFd>,
    chunk: Vec<u8>,
    reported: bool,
}

impl Output {
    pub(crate) fn new(pipe: OwnedFd, port: Port) -> Self {
        Self { port, pipe: Some(pipe), chunk: Vec::with_capacity(CHUNK_BYTES), reported: false }
    }

    /// What to wait for, while there is something.
    pub(crate) fn pipe(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Moves one chunk. To be called when the pipe is readable: it waits otherwise.
    pub(crate) fn pump(&mut self) {
        let Some(pipe) = &self.pipe else { return };
        self.chunk.clear();
        match io::read(pipe, spare_capacity(&mut self.chunk)) {
            Ok(0) => self.pipe = None,
            Ok(_) => {
                console::write(&self.chunk);
                if !self.reported {
                    self.port.report(Report::Phase(Phase::FirstOutput));
                    self.reported = true;
                }
            }
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => self.pipe = None,
        }
    }

    /// Moves what is left. Ends with the last writer, or some time after everyone was killed: a
    /// process that the kernel cannot end must not keep the guest alive.
    pub(crate) fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN_TIME_MAX;
        while let Some(pipe) = &self.pipe {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec::try_from(left).unwrap_or_default();
            match event::poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&left)) {
                Ok(0) => return,
                Ok(_) | Err(Errno::INTR) => self.pump(),
                Err(_) => return,
            }
        }
    }
}
