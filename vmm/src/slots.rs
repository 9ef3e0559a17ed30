//! The virtio-mmio slots: from a guest address to the registers behind it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layout::{MMIO_SLOT_BYTES, MMIO_START};
use crate::virtio::mmio::Registers;

/// All slots in use, in order. Each has a lock of its own; no two are ever held together.
#[derive(Debug)]
pub struct Slots(Vec<Mutex<Registers>>);

impl Slots {
    /// Slots 0 and on.
    pub fn new(registers: Vec<Registers>) -> Self {
        Self(registers.into_iter().map(Mutex::new).collect())
    }

    /// A vCPU reads guest address `address`. What is not there reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address) {
            Some((registers, offset)) => registers.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// A vCPU writes. What is not there is ignored.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((mut registers, offset)) = self.find(address) {
            registers.write(offset, data);
        }
    }

    /// Each slot's registers, one after the other.
    pub fn each(&self) -> impl Iterator<Item = MutexGuard<'_, Registers>> {
        self.0.iter().map(lock)
    }

    fn find(&self, address: u64) -> Option<(MutexGuard<'_, Registers>, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let slot = usize::try_from(offset / MMIO_SLOT_BYTES).ok()?;
        Some((lock(self.0.get(slot)?), offset % MMIO_SLOT_BYTES))
    }
}

/// A vCPU that panicked while it held a lock took the machine with it; the registers themselves
/// are never half written.
fn lock(registers: &Mutex<Registers>) -> MutexGuard<'_, Registers> {
    registers.lock().unwrap_or_else(PoisonError::into_inner)
}
