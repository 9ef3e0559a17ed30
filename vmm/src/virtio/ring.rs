//! One virtqueue: the split ring of virtio-queue, with the rules that every device follows.
//!
//! A chain popped here is either pushed back as used, or kept in flight and pushed later in any
//! order. The ring counts nothing itself: what is in flight is the device's to know.
//! Virtio 1.3, 2.7 "Split Virtqueues".

use std::mem::take;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Error, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::buffers::Buffers;
use super::task::QueueState;
use super::{Fault, Served};
use crate::memory::Mem;

/// Descriptors of one request, in guest memory.
pub type Chain<'m> = DescriptorChain<&'m Mem>;

/// Where the entries of a used ring begin, and their size (2.7.8 "The Virtqueue Used Ring").
const USED_ENTRIES_AT: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;

/// Where the index of a used ring is.
const USED_INDEX_AT: u64 = 2;

/// Where the entries of an available ring begin, and their size (2.7.6); `used_event` is behind.
const AVAIL_ENTRIES_AT: u64 = 4;
const AVAIL_ENTRY_BYTES: u64 = 2;

/// One virtqueue of a device.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    /// Requests returned since the driver was last asked whether it wants an interrupt.
    returned: u16,
}

impl Ring {
    /// Queue `index` of a device, as the transport set it up.
    pub fn new(index: u16, queue: Queue) -> Self {
        Self { index, queue, returned: 0 }
    }

    /// Where it stands.
    pub fn state(&self) -> QueueState {
        QueueState { next_avail: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Its number within the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether the driver uses it.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// Its size in descriptors, which also bounds one turn of service.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Serves what is available, at most one queue's worth: `each` is given the head and the memory
    /// of one request after the other. The driver's kicks are off while this runs, and on again
    /// once nothing is left; after [`Answer::Blocked`] they stay off, for the device knows best
    /// when to go on.
    ///
    /// # Errors
    ///
    /// What `each` says, or a fault of the rings themselves.
    pub fn serve<'m>(
        &mut self,
        mem: &'m Mem,
        mut each: impl FnMut(u16, Buffers<'m>) -> Result<Answer, Fault>,
    ) -> Result<Served, Fault> {
        let mut served = Served::NOTHING;
        if !self.ready() {
            return Ok(served);
        }
        self.disarm(mem)?;
        for _ in 0..self.size() {
            let Some((head, buffers)) = self.take(mem)? else {
                if self.arm(mem)? {
                    self.disarm(mem)?;
                    continue;
                }
                return Ok(served);
            };
            match each(head, buffers)? {
                Answer::Used { written_bytes } => {
                    self.push(mem, head, written_bytes)?;
                    served = served.and(Served::used(self.index));
                }
                Answer::InFlight => {}
                Answer::Blocked => {
                    self.unpop();
                    return Ok(served);
                }
            }
        }
        Ok(served.and(Served::again(self.index)))
    }

    /// Takes the next request, if there is one: its head and its memory.
    ///
    /// # Errors
    ///
    /// As for [`Ring::pop`] and [`Buffers::walk`].
    pub fn take<'m>(&mut self, mem: &'m Mem) -> Result<Option<(u16, Buffers<'m>)>, Fault> {
        let Some(chain) = self.pop(mem)? else { return Ok(None) };
        let head = chain.head_index();
        let buffers = Buffers::walk(chain, mem, self.index, self.size())?;
        Ok(Some((head, buffers)))
    }

    /// Takes the next request, if there is one.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the available ring is out of bounds.
    pub fn pop<'m>(&mut self, mem: &'m Mem) -> Result<Option<Chain<'m>>, Fault> {
        if !self.queue.ready() {
            return Ok(None);
        }
        match self.queue.iter(mem) {
            Ok(mut chains) => Ok(chains.next()),
            Err(source) => Err(self.fault(source)),
        }
    }

    /// Gives the last popped request back as if it had not been taken.
    pub fn unpop(&mut self) {
        self.unpop_last(1);
    }

    /// Gives the last `count` popped requests back.
    pub fn unpop_last(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Returns a request: `written` bytes of its device-writable part were filled.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the used ring is out of bounds.
    pub fn push(&mut self, mem: &Mem, head: u16, written: u32) -> Result<(), Fault> {
        self.push_together(mem, &[(head, written)])
    }

    /// Returns several requests, each as [`Ring::push`] does, of which the driver sees all or none.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the used ring is out of bounds.
    pub fn push_together(&mut self, mem: &Mem, used: &[(u16, u32)]) -> Result<(), Fault> {
        let mut next = self.queue.next_used();
        for &(head, written) in used {
            let slot = next.checked_rem(self.size()).filter(|_| head < self.size());
            let slot = slot.ok_or_else(|| self.fault(Error::InvalidDescriptorIndex))?;
            let entry = u64::from(written) << 32 | u64::from(head);
            let at =
                USED_ENTRIES_AT.saturating_add(u64::from(slot).saturating_mul(USED_ENTRY_BYTES));
            let at = self.queue.used_ring().saturating_add(at);
            mem.write_obj(entry.to_le(), GuestAddress(at)).map_err(|error| self.outside(error))?;
            next = next.wrapping_add(1);
            self.returned = self.returned.saturating_add(1);
        }
        self.queue.set_next_used(next);
        let at = GuestAddress(self.queue.used_ring().saturating_add(USED_INDEX_AT));
        // The entries are there before the index says so.
        mem.store(next.to_le(), at, Ordering::Release).map_err(|error| self.outside(error))
    }

    /// Asks the driver not to kick while the queue is being served.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the used ring is out of bounds.
    pub fn disarm(&mut self, mem: &Mem) -> Result<(), Fault> {
        self.queue.disable_notification(mem).map_err(|source| self.fault(source))
    }

    /// Asks for kicks again; `true` if a request slipped in meanwhile and must be looked at.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the rings are out of bounds.
    pub fn arm(&mut self, mem: &Mem) -> Result<bool, Fault> {
        self.queue.enable_notification(mem).map_err(|source| self.fault(source))
    }

    /// Whether the driver wants an interrupt for what was returned since the last answer: one that
    /// wrote into `used_event` which return it waits for, if that is among them (2.7.7.2 "Device
    /// Requirements: Used Buffer Notification Suppression").
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the available ring is out of bounds.
    pub fn wants_interrupt(&mut self, mem: &Mem) -> Result<bool, Fault> {
        let returned = take(&mut self.returned);
        if !self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // The driver either sees what was returned or has its word seen here.
        fence(Ordering::SeqCst);
        let entries = u64::from(self.size()).saturating_mul(AVAIL_ENTRY_BYTES);
        let at = self.queue.avail_ring().saturating_add(AVAIL_ENTRIES_AT).saturating_add(entries);
        let event: u16 =
            mem.load(GuestAddress(at), Ordering::Relaxed).map_err(|error| self.outside(error))?;
        let since = self.queue.next_used().wrapping_sub(u16::from_le(event)).wrapping_sub(1);
        Ok(since < returned)
    }

    fn outside(&self, error: GuestMemoryError) -> Fault {
        self.fault(Error::GuestMemory(error))
    }

    fn fault(&self, source: virtio_queue::Error) -> Fault {
        Fault::Queue { index: self.index, source }
    }
}

/// What became of a request that [`Ring::serve`] handed out.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// Done, with so many bytes written to its device-writable part.
    Used {
        /// Counted from the front of the writable part.
        written_bytes: u32,
    },
    /// Kept by the device, which pushes it later.
    InFlight,
    /// Not now: the request is still the next one. The device serves the queue again by itself.
    Blocked,
}
