//! The memory a request points at, as two spans of bytes: what the device may read, what it may
//! write.
//!
//! A driver is free to cut a request into descriptors wherever it likes (virtio 1.3, 2.7.4
//! "Message Framing"), so no device looks at descriptors: it takes bytes from the front of a
//! [`Span`], whatever they are made of. This is also the one place where guest memory is handed to
//! the kernel: a span turns into [`IoVecs`], and those into reads and writes without a copy.
//!
//! Nothing here allocates by what a descriptor says: a span has as many slices as the chain has
//! descriptors, and a chain has at most as many as its queue (2.7.5.3.1).

use std::io;
use std::iter;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use vm_memory::bitmap::{Bitmap, MS};
use vm_memory::{Address, GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::Fault;
use super::ring::Chain;
use crate::memory::{Mem, give_back_slice};

/// Slices handed to the kernel in one call, where the rest can follow in the next.
const IOVECS_PER_CALL: usize = 64;

/// A piece of guest memory that is contiguous in this process.
type Slice<'m> = VolatileSlice<'m, MS<'m, Mem>>;

/// The memory of one request.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// What the driver filled, to be read.
    pub readable: Span<'m>,
    /// What the device fills.
    pub writable: Span<'m>,
    /// Where the last byte of `writable` lies in guest memory.
    pub writable_end: Option<GuestAddress>,
}

impl<'m> Buffers<'m> {
    /// Walks `chain`, taken from queue `index` of `size` descriptors.
    ///
    /// # Errors
    ///
    /// A [`Fault`] if the chain does not end, is longer than the queue, has a readable descriptor
    /// behind a writable one, or leaves guest memory.
    pub fn walk(chain: Chain<'_>, mem: &'m Mem, index: u16, size: u16) -> Result<Self, Fault> {
        let broken = |what| Fault::Protocol { index, what };
        let mut buffers = Self::default();
        let mut writing = false;
        let mut ended = false;
        for (position, descriptor) in chain.enumerate() {
            if position >= usize::from(size) {
                return Err(broken("a chain is longer than the queue"));
            }
            ended = !descriptor.has_next();
            writing |= descriptor.is_write_only();
            let (span, access) = match (descriptor.is_write_only(), writing) {
                (true, _) => (&mut buffers.writable, Permissions::Write),
                (false, false) => (&mut buffers.readable, Permissions::Read),
                (false, true) => return Err(broken("a readable descriptor is behind a writable")),
            };
            let Some(last) = descriptor.len().checked_sub(1) else { continue };
            let outside = |error| Fault::Queue {
                index,
                source: virtio_queue::Error::GuestMemoryError(error),
            };
            let length = descriptor.len() as usize;
            let slices = GuestMemory::get_slices(mem, descriptor.addr(), length, access);
            for slice in slices.map_err(outside)? {
                span.add(slice.map_err(outside)?);
            }
            if writing {
                buffers.writable_end = descriptor.addr().checked_add(last.into());
            }
        }
        // The chain's iterator says nothing when it meets a descriptor it cannot follow.
        if ended { Ok(buffers) } else { Err(broken("a chain does not end")) }
    }
}

/// Bytes of guest memory in the order in which the driver laid them out.
#[derive(Debug, Default)]
pub struct Span<'m> {
    /// None is empty; those before `first` are used up.
    slices: Vec<Slice<'m>>,
    first: usize,
    /// Bytes left.
    bytes: usize,
}

impl<'m> Span<'m> {
    /// Bytes left.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Fills `target` from the front of the span; `false`, with nothing taken, if it is shorter.
    #[must_use]
    pub fn read(&mut self, target: &mut [u8]) -> bool {
        if self.bytes < target.len() {
            return false;
        }
        let taken = target.len();
        let mut rest = target;
        for slice in self.live() {
            let copied = slice.copy_to(rest);
            rest = rest.split_at_mut(copied).1;
            if rest.is_empty() {
                break;
            }
        }
        self.advance(taken);
        true
    }

    /// Copies `source` to the front of the span; `false`, with nothing written, if it is shorter.
    #[must_use]
    pub fn write(&mut self, source: &[u8]) -> bool {
        if self.bytes < source.len() {
            return false;
        }
        let mut rest = source;
        for slice in self.live() {
            let count = rest.len().min(slice.len());
            let (now, later) = rest.split_at(count);
            slice.copy_from(now);
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.advance(source.len());
        true
    }

    /// Drops up to `count` bytes from the front.
    pub fn advance(&mut self, count: usize) {
        let mut rest = count.min(self.bytes);
        self.bytes = self.bytes.saturating_sub(rest);
        while let Some(slice) = self.slices.get_mut(self.first) {
            if let Ok(shorter) = slice.offset(rest)
                && !shorter.is_empty()
            {
                *slice = shorter;
                return;
            }
            rest = rest.saturating_sub(slice.len());
            self.first = self.first.saturating_add(1);
        }
    }

    /// Takes the first `count` bytes as a span of their own; fewer if there are not as many.
    pub fn take_front(&mut self, count: usize) -> Span<'m> {
        let mut front = Span::default();
        for slice in self.live() {
            let missing = count.saturating_sub(front.bytes);
            let Ok(piece) = slice.subslice(0, slice.len().min(missing)) else { break };
            if piece.is_empty() {
                break;
            }
            front.add(piece);
        }
        self.advance(front.bytes);
        front
    }

    /// Gives the pages of the first `count` bytes back to the host, and drops those bytes; returns
    /// how many were given back.
    pub fn give_back(&mut self, count: usize) -> usize {
        self.take_front(count).live().iter().map(give_back_slice).sum()
    }

    /// Keeps the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        while self.bytes > count {
            let Some(slice) = self.slices.pop() else { return };
            let without = self.bytes.saturating_sub(slice.len());
            self.bytes = without;
            let keep = count.saturating_sub(without);
            if keep > 0
                && let Ok(shorter) = slice.subslice(0, keep)
            {
                self.add(shorter);
            }
        }
    }

    /// Adds the bytes of `other` at the end.
    pub fn append(&mut self, other: &Span<'m>) {
        for slice in other.live() {
            self.add(*slice);
        }
    }

    /// Reads from `file` into the span and drops what was filled from it; one system call, which
    /// may fill less than there is room. Zero is the end of the file.
    ///
    /// # Errors
    ///
    /// What readv says.
    pub fn fill_from(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iovecs = [NO_IOVEC; IOVECS_PER_CALL];
        let count = self.list(&mut iovecs, Direction::Filled);
        // SAFETY: the kernel writes only into the `count` iovecs, which lie in guest memory that
        // `'m` keeps mapped. Guest memory is volatile to Rust: no reference points into it.
        let result = unsafe { libc::readv(file.as_raw_fd(), iovecs.as_ptr(), count) };
        self.moved(result)
    }

    /// Writes the span to `file` and drops what was written from it; one system call, which may
    /// write less than there is.
    ///
    /// # Errors
    ///
    /// What writev says.
    pub fn write_to(&mut self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iovecs = [NO_IOVEC; IOVECS_PER_CALL];
        let count = self.list(&mut iovecs, Direction::Emptied);
        // SAFETY: the kernel reads only from the `count` iovecs, which lie in guest memory that
        // `'m` keeps mapped.
        let result = unsafe { libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count) };
        self.moved(result)
    }

    /// As [`Span::write_to`] for a socket: a closed peer is EPIPE, never a signal, and a full one
    /// EAGAIN, whatever the socket's flags.
    ///
    /// # Errors
    ///
    /// What sendmsg says.
    pub fn send_to(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut iovecs = [NO_IOVEC; IOVECS_PER_CALL];
        let count = self.list(&mut iovecs, Direction::Emptied);
        let message = libc::msghdr {
            msg_name: ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: iovecs.as_mut_ptr(),
            msg_iovlen: usize::try_from(count).unwrap_or(0),
            msg_control: ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        };
        let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        // SAFETY: `message` points at `iovecs`, alive until the call returns, and those at guest
        // memory that `'m` keeps mapped; the kernel only reads.
        let result = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
        self.moved(result)
    }

    fn add(&mut self, slice: Slice<'m>) {
        self.bytes = self.bytes.saturating_add(slice.len());
        self.slices.push(slice);
    }

    fn live(&self) -> &[Slice<'m>] {
        self.slices.get(self.first..).unwrap_or_default()
    }

    /// Writes the front of the span into `iovecs` and returns how many it took.
    fn list(&self, iovecs: &mut [libc::iovec], direction: Direction) -> libc::c_int {
        let mut count: libc::c_int = 0;
        for (iovec, slice) in iter::zip(iovecs, self.live()) {
            *iovec = direction.iovec(slice);
            count = count.saturating_add(1);
        }
        count
    }

    fn moved(&mut self, result: isize) -> io::Result<usize> {
        let bytes = usize::try_from(result).map_err(|_| io::Error::last_os_error())?;
        self.advance(bytes);
        Ok(bytes)
    }
}

/// What the kernel does with guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Reads it.
    Emptied,
    /// Writes it.
    Filled,
}

impl Direction {
    fn iovec(self, slice: &Slice<'_>) -> libc::iovec {
        if self == Self::Filled {
            // The kernel's writes are seen by no dirty log, so they count as done from here on.
            slice.bitmap().mark_dirty(0, slice.len());
        }
        libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }
    }
}

const NO_IOVEC: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };

/// A span as the kernel wants it, for calls that outlive the borrow of guest memory.
///
/// Whoever hands [`IoVecs::as_ptr`] to the kernel keeps the [`Mem`] it was filled from alive until
/// the kernel is done.
#[derive(Debug, Default)]
pub struct IoVecs {
    list: Vec<libc::iovec>,
    first: usize,
    bytes: u64,
}

// SAFETY: the addresses are of guest memory, which is shared by all threads of the machine; the
// type itself reads nothing through them.
unsafe impl Send for IoVecs {}

impl IoVecs {
    /// Becomes the list of `span`, in the storage it already has.
    pub fn fill(&mut self, span: &Span<'_>, direction: Direction) {
        self.list.clear();
        self.list.extend(span.live().iter().map(|slice| direction.iovec(slice)));
        self.first = 0;
        self.bytes = span.bytes as u64;
    }

    /// Drops up to `count` bytes from the front: they are done.
    pub fn advance(&mut self, count: u64) {
        let mut rest = count.min(self.bytes);
        self.bytes = self.bytes.saturating_sub(rest);
        while let Some(iovec) = self.list.get_mut(self.first) {
            let length = iovec.iov_len as u64;
            if rest < length {
                let step = usize::try_from(rest).unwrap_or(iovec.iov_len);
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
                iovec.iov_len = iovec.iov_len.saturating_sub(step);
                return;
            }
            rest = rest.saturating_sub(length);
            self.first = self.first.saturating_add(1);
        }
    }

    /// Bytes left.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The first iovec of those left.
    pub fn as_ptr(&self) -> *const libc::iovec {
        self.list.get(self.first..).unwrap_or_default().as_ptr()
    }

    /// How many are left, but no more than one call takes.
    pub fn count(&self) -> u32 {
        let left = self.list.len().saturating_sub(self.first);
        u32::try_from(left).unwrap_or(u32::MAX).min(libc::UIO_MAXIOV.unsigned_abs())
    }
}

const _: () = assert!(size_of::<usize>() >= size_of::<u32>(), "descriptor lengths fit usize");

#[cfg(test)]
mod tests;
