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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::layout::MMIO_SLOTS;
    use crate::reactor;
    use crate::virtio::Device;
    use crate::virtio::config_space::ConfigSpace;
    use crate::virtio::console::Console;
    use crate::virtio::entropy::Entropy;
    use crate::virtio::mmio::Identity;
    use crate::virtio::task::Line;

    const DEVICE_ID: u64 = 8;
    const QUEUE_SEL: u64 = 0x30;

    /// Slots with these devices in them, and no thread behind.
    fn slots(devices: Vec<Box<dyn Device>>) -> Slots {
        let (orders, _) = reactor::orders().unwrap();
        let registers = devices.into_iter().zip(0..).map(|(device, slot)| {
            let line = Line::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
            let config = ConfigSpace::new(device.config());
            Registers::new(slot, Identity::of(&*device, config), orders.clone(), line)
        });
        Slots::new(registers.collect())
    }

    fn read(slots: &Slots, address: u64) -> u32 {
        let mut data = [0; 4];
        slots.read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn each_device_answers_at_its_own_page_and_nothing_beside() {
        let console = Console::new(tempfile::tempfile().unwrap()).unwrap();
        let slots = slots(vec![Box::new(Entropy::new()), Box::new(console)]);

        assert_eq!(read(&slots, MMIO_START + DEVICE_ID), 4);
        assert_eq!(read(&slots, MMIO_START + MMIO_SLOT_BYTES + DEVICE_ID), 3);
        let nowhere = [
            0,
            MMIO_START - 4,
            MMIO_START + 2 * MMIO_SLOT_BYTES + DEVICE_ID,
            MMIO_START + MMIO_SLOTS * MMIO_SLOT_BYTES,
            u64::MAX,
        ];
        for address in nowhere {
            slots.write(address, &[0; 4]);
            assert_eq!(read(&slots, address), u32::MAX, "{address:#x}");
        }
    }

    #[test]
    fn a_write_reaches_one_device() {
        let slots = slots(vec![Box::new(Entropy::new()), Box::new(Entropy::new())]);

        slots.write(MMIO_START + MMIO_SLOT_BYTES + QUEUE_SEL, &7_u32.to_le_bytes());

        let selected: Vec<u32> = slots.each().map(|slot| slot.state().queue_select).collect();
        assert_eq!(selected, [0, 7]);
    }

    /// A device thread that died leaves nobody waiting.
    #[test]
    fn a_device_without_a_thread_answers_at_once() {
        let slots = slots(vec![Box::new(Entropy::new())]);

        for status in [1_u32, 3, 0xb, 0xf, 0] {
            slots.write(MMIO_START + 0x24, &1_u32.to_le_bytes());
            slots.write(MMIO_START + 0x20, &1_u32.to_le_bytes());
            slots.write(MMIO_START + 0x70, &status.to_le_bytes());
            assert_eq!(read(&slots, MMIO_START + 0x70), status);
        }
    }
}
