//! Registers of a device as memory of this process, which is there for KVM to give to a guest.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// What of a region is mapped into this process; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is an address range that nobody in this process reads or writes.
#[expect(unsafe_code, reason = "a range of addresses is not tied to a thread")]
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `bytes` of `file` from `start` on, for reads and writes of others.
    ///
    /// # Errors
    ///
    /// What mmap(2) says.
    pub fn new(file: BorrowedFd<'_>, start: u64, bytes: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an unused range, so no existing reference points into it; it
        // is only ever given to KVM.
        #[expect(unsafe_code, reason = "a new mapping is a raw range")]
        let start = unsafe { mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, start) }?;
        Ok(Self { start: start.cast(), bytes })
    }

    /// Where it is in this process.
    pub fn host_start(&self) -> u64 {
        self.start.expose_provenance() as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is one mapping of ours, and whoever gave it to KVM has taken it back.
        #[expect(unsafe_code, reason = "munmap takes a raw range")]
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}
