//! A device without registers that has MSI with eight vectors, which no device of the emulated host
//! has, and a KVM that keeps what it is told.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting};
use vfio_bindings::bindings::vfio::VFIO_REGION_INFO_FLAG_READ;

use super::*;
use crate::kvm::{Access, Vm};
use crate::pci;

/// Where its capability is.
const MSI: usize = 0x50;
const VECTORS: u32 = 8;

#[derive(Debug)]
struct Device;

impl Backend for Device {
    fn name(&self) -> &str {
        "eight"
    }

    fn region(&self, index: u32) -> Region {
        let is_config = index == VFIO_PCI_CONFIG_REGION_INDEX;
        let bytes = if is_config { CONFIG_BYTES_MIN as u64 } else { 0 };
        Region { bytes, index, flags: VFIO_REGION_INFO_FLAG_READ, ..Region::default() }
    }

    fn interrupts(&self, index: u32) -> u32 {
        if index == VFIO_PCI_MSI_IRQ_INDEX { VECTORS } else { 0 }
    }

    fn raise(&self, index: u32, events: &[&EventFd]) -> io::Result<()> {
        assert!(index == VFIO_PCI_MSI_IRQ_INDEX && events.len() <= VECTORS as usize);
        Ok(())
    }

    fn read(&self, _: &Region, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; CONFIG_BYTES_MIN];
        bytes[0x06] = 1 << 4;
        bytes[0x34] = 0x50;
        // 64-bit addresses, eight vectors.
        bytes[MSI..MSI + 4].copy_from_slice(&[0x05, 0, 0x86, 0]);
        let start = usize::try_from(offset).unwrap();
        data.copy_from_slice(&bytes[start..start + data.len()]);
    }

    fn write(&self, _: &Region, _: u64, _: &[u8]) {}

    fn map(&self, _: &Region, _: &Range<u64>) -> io::Result<Mapping> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The messages that events stand for, by the events' numbers.
#[derive(Debug, Default)]
struct Kvm(Mutex<(BTreeMap<u32, Message>, BTreeMap<RawFd, u32>)>);

impl Kvm {
    /// What the guest would hear, were all events raised.
    fn heard(&self) -> Vec<Message> {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut heard: Vec<_> = state.1.values().map(|number| state.0[number]).collect();
        heard.sort_by_key(|message| message.data);
        heard
    }
}

impl Vm for Kvm {
    fn set_slot(&self, _: u32, _: MemoryRange, _: Access) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()> {
        let messages = routes.as_slice().iter().filter(|route| route.type_ == KVM_IRQ_ROUTING_MSI);
        let messages = messages.map(|route| {
            // SAFETY: the kind of the route says what the union holds.
            #[expect(unsafe_code, reason = "a union of the kernel's")]
            let msi = unsafe { route.u.msi };
            let address = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
            (route.gsi, Message { address, data: msi.data })
        });
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0 = messages.collect();
        Ok(())
    }

    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.1.insert(event.as_raw_fd(), number);
        Ok(())
    }

    fn disconnect(&self, event: &EventFd, _: u32) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.remove(&event.as_raw_fd());
        Ok(())
    }
}

/// Each is the first with its number in the low bits of the data (PCI Local Bus 3.0, 6.8.1.6).
#[test]
fn msi_has_as_many_vectors_as_the_guest_turns_on() {
    let kvm = Arc::new(Kvm::default());
    let vm = Arc::clone(&kvm) as Arc<dyn Vm>;
    let slots = KvmSlots::new(Arc::clone(&vm));
    let place = Place { slots, routes: Routes::new(vm), windows: pci::windows(1 << 30) };
    let mut device = Passthrough::new(Box::new(Device), place).unwrap();
    let turn_on = |device: &mut Passthrough, log2: u16| {
        device.write_config(MSI + 2, &(log2 << 4 | 1).to_le_bytes());
    };
    device.write_config(MSI + 4, &0xfee0_2000_u64.to_le_bytes());
    device.write_config(MSI + 12, &0x48_u16.to_le_bytes());
    let messages = |count: u32| -> Vec<_> {
        (0..count).map(|index| Message { address: 0xfee0_2000, data: 0x48 | index }).collect()
    };

    assert_eq!(kvm.heard(), []);
    // The last is more than it has.
    for (log2, count) in [(0, 1), (2, 4), (3, 8), (1, 2), (5, 8)] {
        turn_on(&mut device, log2);
        assert_eq!(kvm.heard(), messages(count), "2^{log2}");
    }
    device.write_config(MSI + 12, &0x80_u16.to_le_bytes());
    assert_eq!(kvm.heard()[7].data, 0x87, "they follow what the guest writes next");
    device.write_config(MSI + 2, &[0, 0]);
    assert_eq!(kvm.heard(), []);
}
