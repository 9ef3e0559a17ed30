//! What a driver reads of its slot without leaving the guest.
//!
//! A read of a register is an exit. So each slot has, in memory that the guest can read and not
//! write (Documentation/virt/kvm/api.rst, `KVM_MEM_READONLY`), what reads of its registers would
//! give: the vCPU that writes one brings this up to date before it goes on, the device thread
//! before it raises its interrupt. The guest's kernel looks there
//! (`kernel-config/patches/mmio.patch`); one that knows nothing of it reads registers as ever.
//!
//! Of what is shown only InterruptStatus is read here again: it lives nowhere else.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET;
use vm_memory::{MmapRegion, VolatileMemory};

use super::mmio::{self, CONFIG, CONFIG_GENERATION, INTERRUPT_STATUS, STATUS};
use crate::layout::{MMIO_SLOTS, SHOWN_BYTES, SHOWN_START};
use crate::memory::{MemoryError, MemoryRange};

/// That of all slots.
#[derive(Debug, Clone)]
pub struct ShownSlots(Arc<MmapRegion<()>>);

/// That of one slot. Clones are the same.
#[derive(Debug, Clone)]
pub struct Shown {
    all: Arc<MmapRegion<()>>,
    start: usize,
}

impl ShownSlots {
    /// All vacant.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Map`].
    pub fn new() -> Result<Self, MemoryError> {
        const PAGE_BYTES: u64 = 4096;
        let bytes = (MMIO_SLOTS * SHOWN_BYTES).next_multiple_of(PAGE_BYTES);
        let region = MmapRegion::new(index(bytes)).map_err(|source| MemoryError::Map {
            guest_start: SHOWN_START,
            bytes,
            source,
        })?;
        let all = Self(Arc::new(region));
        (0..MMIO_SLOTS).filter_map(|slot| all.slot(slot)).for_each(|shown| shown.blank());
        Ok(all)
    }

    /// Where the guest has it, and this process.
    pub fn range(&self) -> MemoryRange {
        MemoryRange {
            guest_start: SHOWN_START,
            bytes: self.0.size() as u64,
            host_start: self.0.as_ptr() as u64,
        }
    }

    /// That of slot `slot`, if there is such a slot.
    pub fn slot(&self, slot: u64) -> Option<Shown> {
        let start = (slot < MMIO_SLOTS).then(|| index(slot * SHOWN_BYTES))?;
        Some(Shown { all: Arc::clone(&self.0), start })
    }
}

impl Shown {
    /// Nothing is there: a placeholder, and ones.
    pub fn blank(&self) {
        for offset in (0..SHOWN_BYTES).step_by(size_of::<u32>()) {
            let mut data = [0; size_of::<u32>()];
            mmio::read_vacant(offset, &mut data);
            self.set(offset, u32::from_le_bytes(data));
        }
    }

    /// A register has this value.
    pub fn set(&self, offset: u64, value: u32) {
        self.word(offset).store(value, Ordering::SeqCst);
    }

    /// InterruptStatus itself.
    pub fn interrupt_status(&self) -> &AtomicU32 {
        self.word(INTERRUPT_STATUS)
    }

    /// The device needs a reset, beside what else its status is.
    pub fn need_reset(&self) {
        self.word(STATUS).fetch_or(NEEDS_RESET, Ordering::SeqCst);
    }

    /// The configuration is `bytes`, as `generation` has it, which is even. While it changes the
    /// generation is odd: then a driver asks the register for it, and so waits for the end. What is
    /// longer than the room for it, as none is, is cut off.
    pub fn set_config(&self, bytes: &[u8], generation: u32) {
        self.set(CONFIG_GENERATION, generation.wrapping_sub(1));
        let places = (CONFIG..SHOWN_BYTES).step_by(size_of::<u32>());
        for (offset, word) in places.zip(bytes.chunks(size_of::<u32>())) {
            let mut whole = [u8::MAX; size_of::<u32>()];
            whole[..word.len()].copy_from_slice(word);
            self.set(offset, u32::from_le_bytes(whole));
        }
        self.set(CONFIG_GENERATION, generation);
    }

    /// What a guest finds at `offset`.
    pub fn says(&self, offset: u64) -> u32 {
        self.word(offset).load(Ordering::SeqCst)
    }

    fn word(&self, offset: u64) -> &AtomicU32 {
        debug_assert!(offset < SHOWN_BYTES);
        let word = self.all.get_atomic_ref(self.start + index(offset));
        word.expect("a slot lies in the mapping")
    }
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("usize is 64 bits wide")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::mmio::DEVICE_ID;

    #[test]
    fn a_vacant_slot_shows_what_its_registers_say() {
        let shown = ShownSlots::new().unwrap().slot(MMIO_SLOTS - 1).unwrap();

        for offset in (0..SHOWN_BYTES).step_by(4) {
            let mut data = [0; 4];
            mmio::read_vacant(offset, &mut data);
            assert_eq!(shown.says(offset), u32::from_le_bytes(data), "{offset:#x}");
        }
    }

    #[test]
    fn a_slot_shows_nothing_of_another() {
        let all = ShownSlots::new().unwrap();
        let (first, second) = (all.slot(0).unwrap(), all.slot(1).unwrap());

        first.set(DEVICE_ID, 4);
        first.set_config(&[0; 512], 2);
        first.interrupt_status().store(1, Ordering::SeqCst);

        assert_eq!(first.says(SHOWN_BYTES - 4), 0);
        assert_eq!(second.says(DEVICE_ID), 0);
        assert_eq!(second.says(INTERRUPT_STATUS), u32::MAX);
        assert!(all.slot(MMIO_SLOTS).is_none());
    }

    #[test]
    fn a_configuration_has_its_generation_and_another_while_it_changes() {
        let shown = ShownSlots::new().unwrap().slot(0).unwrap();

        shown.set_config(&[1, 2, 3, 4, 5], 2);

        assert_eq!(shown.says(CONFIG), 0x0403_0201);
        assert_eq!(shown.says(CONFIG + 4), 0xffff_ff05);
        assert_eq!(shown.says(CONFIG_GENERATION), 2);
    }
}
