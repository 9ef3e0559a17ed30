//! KVM's memory slots: which guest addresses are memory of this process.
//!
//! Guest memory has slots, and so have registers of devices that the guest reaches without an
//! exit. They come and go on different threads, and share the numbers.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::kvm::{Access, Vm};
use crate::memory::{MemoryListener, MemoryRange};

/// All slots of a machine. Clones are the same.
#[derive(Debug, Clone)]
pub struct KvmSlots {
    vm: Arc<dyn Vm>,
    /// Where in this process each slot begins, by its number.
    starts: Arc<Mutex<Vec<Option<u64>>>>,
}

impl KvmSlots {
    /// None yet.
    pub fn new(vm: Arc<dyn Vm>) -> Self {
        Self { vm, starts: Arc::default() }
    }

    /// Lets a live mapping of this process be part of the guest.
    ///
    /// # Errors
    ///
    /// What KVM says, above all that the guest has something else there.
    pub fn add(&self, range: MemoryRange, access: Access) -> io::Result<()> {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = starts.iter().position(Option::is_none).unwrap_or(starts.len());
        self.set(slot, range, access)?;
        match starts.get_mut(slot) {
            Some(start) => *start = Some(range.host_start),
            None => starts.push(Some(range.host_start)),
        }
        Ok(())
    }

    /// Takes back the mapping that begins at `host_start`, if it is part of the guest.
    pub fn remove(&self, host_start: u64) {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = starts.iter().position(|&start| start == Some(host_start)) else { return };
        // KVM refuses only a slot that it does not have.
        let nothing = MemoryRange { guest_start: 0, bytes: 0, host_start };
        if self.set(slot, nothing, Access::Write).is_ok() {
            starts[slot] = None;
        }
    }

    /// Tells KVM of one slot; no bytes are no slot.
    fn set(&self, slot: usize, range: MemoryRange, access: Access) -> io::Result<()> {
        self.vm.set_slot(u32::try_from(slot).map_err(io::Error::other)?, range, access)
    }
}

impl MemoryListener for KvmSlots {
    fn added(&mut self, range: MemoryRange) -> io::Result<()> {
        self.add(range, Access::Write)
    }

    fn removed(&mut self, range: MemoryRange) {
        self.remove(range.host_start);
    }
}
