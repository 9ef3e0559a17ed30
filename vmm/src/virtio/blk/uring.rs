//! An io_uring that can do nothing but work on one disk's file.
//!
//! It is made before the machine runs and restricted to the five operations of a disk on its one
//! registered file, so that no later mistake turns it into a way around a system call filter.

use std::fmt::{self, Debug, Formatter};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::read;

/// The ring, and the file that becomes readable when it has finished something.
pub(super) struct Uring {
    ring: IoUring,
    completions: OwnedFd,
}

impl Debug for Uring {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Uring")
            .field("completions", &self.completions)
            .finish_non_exhaustive()
    }
}

impl Uring {
    /// A ring for `entries` requests in flight on `file`.
    ///
    /// # Errors
    ///
    /// What io_uring_setup, io_uring_register or eventfd say.
    pub(super) fn new(file: &File, entries: u32) -> io::Result<Self> {
        let ring = IoUring::builder().dontfork().setup_r_disabled().build(entries)?;
        let completions = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let submitter = ring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_eventfd(completions.as_raw_fd())?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Self { ring, completions })
    }

    /// Readable while something was finished that [`Uring::finished`] did not yet tell.
    pub(super) fn completions(&self) -> BorrowedFd<'_> {
        self.completions.as_fd()
    }

    /// Adds an operation to the next submission.
    ///
    /// # Errors
    ///
    /// As for [`Uring::submit`]; there is always room for as many as the ring has entries.
    ///
    /// # Safety
    ///
    /// Everything that `entry` points at must stay where it is until the operation is finished.
    pub(super) unsafe fn push(&mut self, entry: &Entry, id: u16) -> io::Result<()> {
        let entry = entry.clone().user_data(id.into());
        // SAFETY: as this function's.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit(false)?;
        }
        Ok(())
    }

    /// Operations that were pushed and not submitted.
    pub(super) fn unsubmitted(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Hands the kernel what was pushed, and with `wait` waits until something is finished.
    ///
    /// # Errors
    ///
    /// What io_uring_enter says. What it did not take stays pushed.
    pub(super) fn submit(&self, wait: bool) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(usize::from(wait)) {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// The next finished operation: its id, and what it returned.
    pub(super) fn finished(&mut self) -> Option<(u16, io::Result<u64>)> {
        let entry = self.ring.completion().next()?;
        let id = u16::try_from(entry.user_data()).ok()?;
        let result = u64::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(entry.result().saturating_neg()));
        Some((id, result))
    }

    /// Makes [`Uring::completions`] unreadable until something else is finished. To be called
    /// before what is finished is taken.
    pub(super) fn acknowledge(&self) {
        let mut count = [0; 8];
        // It fails if nothing was finished, and then there is nothing to do.
        let _ = read(&self.completions, &mut count);
    }
}
