//! The virtio-mmio slots: from a guest address to the registers behind it.
//!
//! A guest learns of all slots when it boots and of no other ever. So some may be vacant, for what
//! comes while it runs, and one whose device is gone is vacant again.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::layout::{MMIO_SLOT_BYTES, MMIO_START};
use crate::virtio::mmio::{self, Registers};
use crate::virtio::shown::ShownSlots;

/// All slots that the guest knows of, in order. Each has a lock of its own; no two are ever held
/// together.
#[derive(Debug)]
pub struct Slots {
    registers: Vec<Mutex<Option<Registers>>>,
    /// Lives as long as a guest can look there.
    shown: ShownSlots,
}

impl Slots {
    /// Slots 0 and on with `registers` in them, and behind them so many that are vacant. The guest
    /// is `shown` what they say.
    pub fn new(registers: Vec<Registers>, vacant: usize, shown: ShownSlots) -> Self {
        registers.iter().for_each(Registers::appear);
        let taken = registers.into_iter().map(Some);
        let registers = taken.chain((0..vacant).map(|_| None)).map(Mutex::new).collect();
        Self { registers, shown }
    }

    /// What the guest sees of all of them.
    pub fn shown(&self) -> &ShownSlots {
        &self.shown
    }

    /// A vCPU reads guest address `address`. What is not there reads as ones.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let Some((slot, offset)) = self.find(address) else { return data.fill(0xff) };
        match &*slot {
            Some(registers) => registers.read(offset, data),
            None => mmio::read_vacant(offset, data),
        }
    }

    /// A vCPU writes. What is not there is ignored.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((mut slot, offset)) = self.find(address)
            && let Some(registers) = &mut *slot
        {
            registers.write(offset, data);
        }
    }

    /// What `look` makes of each slot's registers, by slot; vacant ones are left out.
    pub fn each<T>(&self, mut look: impl FnMut(&Registers) -> T) -> Vec<(u8, T)> {
        let looked = (0..)
            .zip(&self.registers)
            .map(|(slot, found)| (slot, lock(found).as_ref().map(&mut look)));
        looked.filter_map(|(slot, found)| Some((slot, found?))).collect()
    }

    /// How many are vacant.
    pub fn vacant(&self) -> usize {
        self.registers.iter().filter(|slot| lock(slot).is_none()).count()
    }

    /// The first that is vacant.
    pub fn first_vacant(&self) -> Option<u8> {
        let found = (0..).zip(&self.registers).find(|(_, slot)| lock(slot).is_none());
        found.map(|(slot, _)| slot)
    }

    /// Puts `registers` into a slot, which the guest finds there the next time it looks.
    pub fn fill(&self, slot: u8, registers: Registers) {
        if let Some(found) = self.registers.get(usize::from(slot)) {
            let mut found = lock(found);
            registers.appear();
            *found = Some(registers);
        }
    }

    /// Takes the registers out of a slot. A vCPU that is at them finishes first.
    pub fn vacate(&self, slot: u8) -> Option<Registers> {
        let mut found = lock(self.registers.get(usize::from(slot))?);
        let registers = found.take();
        registers.inspect(Registers::vanish)
    }

    fn find(&self, address: u64) -> Option<(MutexGuard<'_, Option<Registers>>, u64)> {
        let offset = address.checked_sub(MMIO_START)?;
        let slot = usize::try_from(offset / MMIO_SLOT_BYTES).ok()?;
        Some((lock(self.registers.get(slot)?), offset % MMIO_SLOT_BYTES))
    }
}

/// A vCPU that panicked while it held a lock took the machine with it; the registers themselves
/// are never half written.
fn lock(registers: &Mutex<Option<Registers>>) -> MutexGuard<'_, Option<Registers>> {
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
        let all = ShownSlots::new().unwrap();
        let registers = devices.into_iter().zip(0..).map(|(device, slot)| {
            let shown = all.slot(slot.into()).unwrap();
            let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
            let line = Line::new(irq, shown.clone());
            let config = ConfigSpace::new(device.config(), shown);
            Registers::new(slot, Identity::of(&*device, config), orders.clone(), line)
        });
        Slots::new(registers.collect(), 1, all)
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
            MMIO_START + 3 * MMIO_SLOT_BYTES + DEVICE_ID,
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

        let selected = slots.each(|registers| registers.state().queue_select);
        assert_eq!(selected, [(0, 0), (1, 7)]);
    }

    /// Virtio 1.3, 4.2.2: a driver finds a device that is none, and looks no further.
    #[test]
    fn a_vacant_slot_is_a_placeholder_whatever_is_written_there() {
        let slots = slots(vec![Box::new(Entropy::new())]);
        let start = MMIO_START + MMIO_SLOT_BYTES;

        for offset in (0..0x100).step_by(4) {
            slots.write(start + offset, &u32::MAX.to_le_bytes());
        }

        let found = [0, 4, 8, 0x70, 0x100].map(|offset| read(&slots, start + offset));
        assert_eq!(found, [0x7472_6976, 2, 0, u32::MAX, u32::MAX]);
        let mut byte = [0];
        slots.read(start + DEVICE_ID, &mut byte);
        assert_eq!(byte, [0xff], "registers are 32 bits wide");
    }

    #[test]
    fn a_slot_is_filled_and_vacated_and_the_first_vacant_one_comes_next() {
        let slots = slots(vec![Box::new(Entropy::new())]);
        let registers = slots.vacate(0).unwrap();

        assert_eq!((slots.first_vacant(), slots.vacant()), (Some(0), 2));
        assert!(slots.vacate(0).is_none() && slots.vacate(99).is_none());
        slots.fill(0, registers);
        assert_eq!((slots.first_vacant(), slots.vacant()), (Some(1), 1));
        assert_eq!(read(&slots, MMIO_START + DEVICE_ID), 4);
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
