//! One virtqueue: the split ring of virtio-queue, with the rules that every device follows.
//!
//! A chain popped here is either pushed back as used, or kept in flight and pushed later in any
//! order. The ring counts nothing itself: what is in flight is the device's to know.
//! Virtio 1.3, 2.7 "Split Virtqueues".

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::buffers::Buffers;
use super::task::QueueState;
use super::{Fault, Served};
use crate::memory::Mem;

/// Descriptors of one request, in guest memory.
pub type Chain<'m> = DescriptorChain<&'m Mem>;

/// One virtqueue of a device.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
}

impl Ring {
    /// Queue `index` of a device, as the transport set it up.
    pub fn new(index: u16, queue: Queue) -> Self {
        Self { index, queue }
    }

    /// The queue below, for the transport.
    pub fn queue_mut(&mut self) -> &mut Queue {
        &mut self.queue
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
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Returns a request: `written` bytes of its device-writable part were filled.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the used ring is out of bounds.
    pub fn push(&mut self, mem: &Mem, head: u16, written: u32) -> Result<(), Fault> {
        self.queue.add_used(mem, head, written).map_err(|source| self.fault(source))
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

    /// Whether the driver wants an interrupt for what was pushed since the last answer.
    ///
    /// # Errors
    ///
    /// [`Fault::Queue`] if the available ring is out of bounds.
    pub fn wants_interrupt(&mut self, mem: &Mem) -> Result<bool, Fault> {
        self.queue.needs_notification(mem).map_err(|source| self.fault(source))
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
