//! The requests of one queue on their way through the kernel.
//!
//! A request in flight is known by its head, which its driver cannot use again before it gets it
//! back; one that tries is a fault. Each keeps the guest memory that the kernel was given addresses
//! of, so nothing the machine does can unmap it too early. A lane is not dropped before the kernel
//! is done with it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::job::{Done, Job};
use super::request::Request;
use super::uring::Uring;
use crate::memory::Mem;
use crate::virtio::ring::Answer;
use crate::virtio::{Fault, Served};

/// One queue's share of a disk.
#[derive(Debug)]
pub(super) struct Lane {
    file: File,
    uring: Option<Uring>,
    /// By head.
    slots: Vec<Slot>,
    in_flight: u32,
}

/// A request, or the storage of the last one.
#[derive(Debug, Default)]
struct Slot {
    job: Job,
    status: GuestAddress,
    /// The memory of a request in flight.
    mem: Option<Arc<Mem>>,
}

impl Lane {
    /// A lane for a queue of `queue_size` descriptors.
    pub(super) fn new(file: File, uring: Option<Uring>, queue_size: u16) -> Self {
        let slots = (0..queue_size).map(|_| Slot::default()).collect();
        Self { file, uring, slots, in_flight: 0 }
    }

    pub(super) fn uring(&self) -> Option<&Uring> {
        self.uring.as_ref()
    }

    /// Carries out `request`, or takes it on until [`Lane::submit`].
    ///
    /// # Errors
    ///
    /// [`Fault::Protocol`] if a request with this head is in flight.
    pub(super) fn start(
        &mut self,
        head: u16,
        request: Request<'_>,
        mem: &Arc<Mem>,
        index: u16,
    ) -> Result<Answer, Fault> {
        let Some(slot) = self.slots.get_mut(usize::from(head)).filter(|slot| slot.mem.is_none())
        else {
            return Err(Fault::Protocol { index, what: "a request in flight is available again" });
        };
        slot.status = request.status;
        let file = self.file.as_fd();
        let done = slot.job.begin(request.action).or_else(|| match &self.uring {
            // SAFETY: the job was begun just now with memory of `mem`, which is borrowed.
            Some(_) => unsafe { slot.job.step_if_cached(file) },
            // SAFETY: as above.
            None => Some(unsafe { slot.job.run(file) }),
        });
        if let Some(done) = done {
            return Ok(Answer::Used { written_bytes: slot.answer(done, mem)? });
        }
        slot.mem = Some(Arc::clone(mem));
        self.in_flight = self.in_flight.saturating_add(1);
        self.push(head)?;
        Ok(Answer::InFlight)
    }

    /// Gives the kernel everything that [`Lane::start`] and [`Lane::finish`] took on.
    ///
    /// # Errors
    ///
    /// [`Fault::Host`] if io_uring fails for another reason than being busy.
    pub(super) fn submit(&mut self, index: u16) -> Result<Served, Fault> {
        let Some(uring) = &mut self.uring else { return Ok(Served::NOTHING) };
        if !uring.unsubmitted() {
            return Ok(Served::NOTHING);
        }
        match uring.submit(false) {
            Ok(()) => Ok(Served::NOTHING),
            Err(error) if busy(&error) => Ok(Served::again(index)),
            Err(source) => Err(Fault::Host { what: "submit to io_uring", source }),
        }
    }

    /// Answers what the kernel finished: `used` is told head and bytes written of each.
    ///
    /// # Errors
    ///
    /// What `used` says.
    pub(super) fn finish(
        &mut self,
        index: u16,
        mut used: impl FnMut(u16, u32) -> Result<(), Fault>,
    ) -> Result<Served, Fault> {
        let mut served = Served::NOTHING;
        if let Some(uring) = &self.uring {
            uring.acknowledge();
        }
        while let Some((head, result)) = self.uring.as_mut().and_then(Uring::finished) {
            let Some(slot) = self.slots.get_mut(usize::from(head)) else { continue };
            let Some(done) = slot.job.after(result) else {
                self.push(head)?;
                continue;
            };
            let Some(mem) = slot.mem.take() else { continue };
            self.in_flight = self.in_flight.saturating_sub(1);
            used(head, slot.answer(done, &mem)?)?;
            served = served.and(Served::used(index));
        }
        Ok(served)
    }

    /// Waits for everything in flight and answers it.
    ///
    /// # Errors
    ///
    /// As for [`Lane::submit`] and [`Lane::finish`].
    pub(super) fn drain(
        &mut self,
        index: u16,
        mut used: impl FnMut(u16, u32) -> Result<(), Fault>,
    ) -> Result<Served, Fault> {
        let mut served = Served::NOTHING;
        while self.in_flight > 0 {
            match self.uring.as_ref().map(|uring| uring.submit(true)) {
                Some(Err(error)) if !busy(&error) => {
                    return Err(Fault::Host { what: "wait for io_uring", source: error });
                }
                _ => served = served.and(self.finish(index, &mut used)?),
            }
        }
        Ok(served)
    }

    /// Waits for everything in flight and forgets it.
    pub(super) fn abandon(&mut self) {
        while let Some(uring) = self.uring.as_mut().filter(|_| self.in_flight > 0) {
            // There is no way on but to try again: the kernel has addresses of guest memory. It
            // fails while the kernel is short of memory or of room for what is finished.
            let _ = uring.submit(true);
            while let Some((head, _)) = uring.finished() {
                let slot = self.slots.get_mut(usize::from(head));
                if slot.is_some_and(|slot| slot.mem.take().is_some()) {
                    self.in_flight = self.in_flight.saturating_sub(1);
                }
            }
        }
        if let Some(uring) = &self.uring {
            uring.acknowledge();
        }
    }

    /// Queues the next step of the job at `head`.
    fn push(&mut self, head: u16) -> Result<(), Fault> {
        let (Some(uring), Some(slot)) = (&mut self.uring, self.slots.get(usize::from(head))) else {
            return Ok(());
        };
        // SAFETY: the entry points at the slot's iovecs, which no one touches before the job's
        // step is finished, and those at memory that the slot keeps mapped; a slot is not dropped
        // in flight (see `drop`).
        unsafe { uring.push(&slot.job.entry(), head) }
            .map_err(|source| Fault::Host { what: "queue to io_uring", source })
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.abandon();
    }
}

impl Slot {
    /// Writes the status where the driver looks for it; returns the bytes written in all.
    fn answer(&self, done: Done, mem: &Mem) -> Result<u32, Fault> {
        match mem.write_obj(done.status as u8, self.status) {
            Ok(()) => Ok(done.written_bytes.saturating_add(1)),
            Err(error) => Err(Fault::Host {
                what: "write a request's status",
                source: io::Error::other(error),
            }),
        }
    }
}

/// Whether io_uring may take the same later.
fn busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}
