//! A PCI bus with devices of any kind, under a vCPU that reads and writes anything anywhere: BARs,
//! capabilities, the table of MSI-X. `witness.rs` looks at what comes of it.

#![no_main]

use std::sync::{Arc, Mutex, PoisonError};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_fuzz::witness::{Device, DevicePlan, Heard, MSI, MSIX, TABLE_BAR, TABLE_START, WitnessVm};
use ovum_vmm::kvm::Vm;
use ovum_vmm::kvm_slots::KvmSlots;
use ovum_vmm::layout::{ECAM_START, PCI_PORTS_START};
use ovum_vmm::pci::msi::Routes;
use ovum_vmm::pci::{PciBus, windows};
use ovum_vmm::vfio::passthrough::{Passthrough, Place};

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 256;

/// Widest access of a vCPU.
const WIDTH_MAX: usize = 8;

/// Where all memory of the machine ends.
const MEMORY_END: u64 = 6 << 30;

const DEVICE_BYTES: u64 = 32 << 10;
const COMMAND: usize = 0x04;
const BARS: usize = 0x10;

#[derive(Debug, Arbitrary)]
struct Plan {
    first: DevicePlan,
    second: Option<DevicePlan>,
    /// Whether the BARs answer from the start.
    awake: bool,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
struct Step {
    second: bool,
    place: Spot,
    width: u8,
    /// A write, if there is something to write.
    value: Option<u64>,
}

/// Where a vCPU reads or writes.
#[derive(Debug, Arbitrary)]
enum Spot {
    Config(u16),
    Command,
    BarRegister(u8),
    Msi(u8),
    Msix(u8),
    /// In a BAR, wherever that is now.
    Bar {
        index: u8,
        offset: u16,
    },
    /// In the first entries of the table, or just before.
    Table(u8),
    Anywhere(u64),
    Port(u16),
    /// No access: the device raises an interrupt.
    Raise(u8),
}

struct Machine {
    bus: PciBus,
    heard: Vec<Arc<Mutex<Heard>>>,
}

impl Machine {
    fn config(device: u64, offset: usize) -> u64 {
        ECAM_START + (device + 1) * DEVICE_BYTES + offset as u64
    }

    /// Where a BAR is, as far as its register says.
    fn bar(&self, device: u64, index: u8) -> u64 {
        let mut register = [0; 8];
        let offset = BARS + 4 * usize::from(index % 6);
        for (half, at) in register.chunks_mut(4).zip([offset, offset + 4]) {
            self.bus.read(Self::config(device, at), half);
        }
        let both = u64::from_le_bytes(register);
        match both & 7 {
            4 | 6 => both & !0xf,
            0 | 2 => both & 0xffff_fff0,
            _ => both & 0xffff_fffc,
        }
    }

    fn take(&self, step: &Step) {
        let device = u64::from(step.second);
        let address = match step.place {
            Spot::Config(offset) => Self::config(device, usize::from(offset % 4096)),
            Spot::Command => Self::config(device, COMMAND),
            Spot::BarRegister(index) => Self::config(device, BARS + 4 * usize::from(index % 6)),
            Spot::Msi(offset) => Self::config(device, MSI + usize::from(offset % 14)),
            Spot::Msix(offset) => Self::config(device, MSIX + usize::from(offset % 12)),
            Spot::Bar { index, offset } => {
                self.bar(device, index).saturating_add(u64::from(offset))
            }
            Spot::Table(offset) => {
                let start = self.bar(device, TABLE_BAR).saturating_add(TABLE_START);
                start.saturating_sub(8).saturating_add(u64::from(offset % 48))
            }
            Spot::Anywhere(address) => address,
            Spot::Port(port) => return self.port(PCI_PORTS_START | port, step),
            Spot::Raise(vector) => {
                let Some(heard) = self.heard.get(usize::from(step.second)) else { return };
                let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(event) = heard.events.get(usize::from(vector)) {
                    event.write(1).unwrap();
                }
                return;
            }
        };
        let mut data = step.value.unwrap_or(0).to_le_bytes();
        let data = &mut data[..1 + usize::from(step.width) % WIDTH_MAX];
        if step.value.is_some() {
            self.bus.write(address, data);
        } else {
            self.bus.read(address, data);
        }
        if let Ok(port) = u16::try_from(address) {
            self.port(port, step);
        }
    }

    fn port(&self, port: u16, step: &Step) {
        let mut data = step.value.unwrap_or(0).to_le_bytes();
        let data = &mut data[..1 + usize::from(step.width) % 4];
        if step.value.is_some() {
            self.bus.write_port(port, data);
        } else {
            self.bus.read_port(port, data);
        }
    }
}

fuzz_target!(|plan: Plan| {
    let windows = windows(MEMORY_END);
    let vm = WitnessVm::new(windows.clone());
    let slots = KvmSlots::new(Arc::clone(&vm) as Arc<dyn Vm>);
    let routes = Routes::new(Arc::clone(&vm) as Arc<dyn Vm>);
    let place = Place { slots, routes, windows: windows.clone() };
    let (mut functions, mut heard) = (Vec::new(), Vec::new());
    for plan in [Some(plan.first), plan.second].into_iter().flatten() {
        let (device, hears) = Device::new(plan);
        // What no guest can be shown is refused.
        let Ok(function) = Passthrough::new(Box::new(device), place.clone()) else { return };
        functions.push(function);
        heard.push(hears);
    }
    let Ok(bus) = PciBus::new(functions, windows) else { return };
    let machine = Machine { bus, heard };
    if plan.awake {
        (0..2).for_each(|device| {
            machine.bus.write(Machine::config(device, COMMAND), &[7, 0]);
        });
    }
    for step in plan.steps.iter().take(STEPS_MAX) {
        machine.take(step);
    }
    drop(machine);
    vm.finish();
});
