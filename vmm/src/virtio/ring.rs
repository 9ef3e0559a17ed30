//! One virtqueue: the split ring of virtio-queue, with the rules that every device follows.
//!
//! A chain popped here is either pushed back as used, or kept in flight and pushed later in any
//! order. The ring counts nothing itself: what is in flight is the device's to know.
//! Virtio 1.3, 2.7 "Split Virtqueues".

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::Fault;
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
