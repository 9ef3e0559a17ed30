//! One thing to do with a disk's file, in as many steps as the kernel makes of it.
//!
//! A step is one system call or one io_uring operation. Reads and writes may end early and go on
//! where they stopped; everything else is one step.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::squeue::Entry;
use io_uring::{opcode, types};
use rustix::fs::{FallocateFlags, fallocate, fdatasync};

use super::request::{Action, Status};
use crate::virtio::buffers::{Direction, IoVecs};

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

/// What to do, and what is left of it.
#[derive(Debug, Default)]
pub(super) struct Job {
    op: Op,
    /// Where in the file the rest begins.
    offset: u64,
    /// The rest of the guest's memory; empty for what moves no data.
    iovecs: IoVecs,
    /// Bytes of the file to erase.
    erase_bytes: u64,
    /// Bytes written to guest memory so far.
    filled_bytes: u64,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    WriteStable,
    #[default]
    Flush,
    Punch,
    Zero,
}

/// A job's end: its status, and how much of the guest's memory was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) status: Status,
    pub(super) written_bytes: u32,
}

impl Job {
    /// Becomes what `action` asks for, or says that it is done already.
    ///
    /// The job is given the addresses of the action's memory: until it is done its owner keeps the
    /// guest memory that they were taken from.
    pub(super) fn begin(&mut self, action: Action<'_>) -> Option<Done> {
        self.erase_bytes = 0;
        self.filled_bytes = 0;
        let (op, offset) = match action {
            Action::Answer { status, written_bytes } => {
                return Some(Done { status, written_bytes });
            }
            Action::Read { offset, target } => {
                self.iovecs.fill(&target, Direction::Filled);
                (Op::Read, offset)
            }
            Action::Write { offset, source, stable } => {
                self.iovecs.fill(&source, Direction::Emptied);
                (if stable { Op::WriteStable } else { Op::Write }, offset)
            }
            Action::Flush => (Op::Flush, 0),
            Action::Punch { offset, bytes } => {
                self.erase_bytes = bytes;
                (Op::Punch, offset)
            }
            Action::Zero { offset, bytes } => {
                self.erase_bytes = bytes;
                (Op::Zero, offset)
            }
        };
        self.op = op;
        self.offset = offset;
        (self.moves_data() && self.iovecs.bytes() == 0).then_some(self.done(Status::Ok))
    }

    /// Takes the next step at once if it is a read that the page cache answers.
    ///
    /// At boot reads come one by one, and this is a third of the time of a way through io_uring
    /// and the watch. A batch of 32 would be a quarter faster there, and matters less. A
    /// read that is not cached has started its read-ahead here.
    ///
    /// The result says whether the job is done; an error is left for the real step to meet.
    ///
    /// # Safety
    ///
    /// The guest memory that the job was begun with must still be mapped.
    pub(super) unsafe fn step_if_cached(&mut self, file: BorrowedFd<'_>) -> Option<Done> {
        if self.op != Op::Read {
            return None;
        }
        // SAFETY: as this function's.
        let read = unsafe { self.move_data(file, libc::RWF_NOWAIT) };
        match read {
            Ok(count) if count > 0 => self.moved(count),
            _ => None,
        }
    }

    /// Takes all steps, waiting for the disk.
    ///
    /// # Safety
    ///
    /// The guest memory that the job was begun with must still be mapped.
    pub(super) unsafe fn run(&mut self, file: BorrowedFd<'_>) -> Done {
        loop {
            let step = match self.op {
                // SAFETY: as this function's.
                Op::Read | Op::Write => unsafe { self.move_data(file, 0) },
                // SAFETY: as this function's.
                Op::WriteStable => unsafe { self.move_data(file, libc::RWF_DSYNC) },
                Op::Flush => fdatasync(file).map(|()| 0).map_err(io::Error::from),
                Op::Punch => self.erase(file, PUNCH),
                Op::Zero => self.erase(file, ZERO),
            };
            if let Some(done) = self.after(step) {
                return done;
            }
        }
    }

    /// The next step for io_uring, on registered file 0.
    pub(super) fn entry(&self) -> Entry {
        let file = types::Fixed(0);
        let (iovecs, count) = (self.iovecs.as_ptr(), self.iovecs.count());
        let erase = |mode: FallocateFlags| {
            let mode = mode.bits().cast_signed();
            opcode::Fallocate::new(file, self.erase_bytes).offset(self.offset).mode(mode).build()
        };
        match self.op {
            Op::Read => opcode::Readv::new(file, iovecs, count).offset(self.offset).build(),
            Op::Write => opcode::Writev::new(file, iovecs, count).offset(self.offset).build(),
            Op::WriteStable => opcode::Writev::new(file, iovecs, count)
                .offset(self.offset)
                .rw_flags(libc::RWF_DSYNC)
                .build(),
            Op::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Op::Punch => erase(PUNCH),
            Op::Zero => erase(ZERO),
        }
    }

    /// Takes note of a step's result; without a [`Done`] there is another step.
    pub(super) fn after(&mut self, step: io::Result<u64>) -> Option<Done> {
        match step {
            Ok(_) if !self.moves_data() => Some(self.done(Status::Ok)),
            // The file is shorter than the disk.
            Ok(0) => Some(self.done(Status::IoErr)),
            Ok(count) => self.moved(count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(error) => {
                let erases = matches!(self.op, Op::Punch | Op::Zero);
                let unknown = error.raw_os_error() == Some(libc::EOPNOTSUPP);
                // The driver has its own way to do it.
                let status = if erases && unknown { Status::Unsupported } else { Status::IoErr };
                Some(self.done(status))
            }
        }
    }

    fn moved(&mut self, count: u64) -> Option<Done> {
        self.iovecs.advance(count);
        self.offset = self.offset.saturating_add(count);
        if self.op == Op::Read {
            self.filled_bytes = self.filled_bytes.saturating_add(count);
        }
        (self.iovecs.bytes() == 0).then_some(self.done(Status::Ok))
    }

    fn done(&self, status: Status) -> Done {
        // Only a prefix that was written may be reported, and an error promises none.
        let filled_bytes = if status == Status::Ok { self.filled_bytes } else { 0 };
        Done { status, written_bytes: u32::try_from(filled_bytes).unwrap_or(u32::MAX) }
    }

    fn moves_data(&self) -> bool {
        matches!(self.op, Op::Read | Op::Write | Op::WriteStable)
    }

    fn erase(&self, file: BorrowedFd<'_>, mode: FallocateFlags) -> io::Result<u64> {
        fallocate(file, mode, self.offset, self.erase_bytes).map(|()| 0).map_err(io::Error::from)
    }

    /// # Safety
    ///
    /// The guest memory that the job was begun with must still be mapped.
    unsafe fn move_data(&self, file: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<u64> {
        let file = file.as_raw_fd();
        let iovecs = self.iovecs.as_ptr();
        let count = self.iovecs.count().cast_signed();
        let offset = self.offset.cast_signed();
        let result = if self.op == Op::Read {
            // SAFETY: the iovecs are alive with `self` and name guest memory, mapped as the caller
            // promises; memory that Rust holds no reference into.
            unsafe { libc::preadv2(file, iovecs, count, offset, flags) }
        } else {
            // SAFETY: as above, and the kernel only reads from them.
            unsafe { libc::pwritev2(file, iovecs, count, offset, flags) }
        };
        u64::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}
