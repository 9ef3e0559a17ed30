//! Registers and configuration spaces under a vCPU that reads and writes anything anywhere.
//!
//! There is no device thread: whoever tells it something finds that it has ended.

#![no_main]

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_vmm::layout::{MMIO_SLOT_BYTES, MMIO_START};
use ovum_vmm::memory::Memory;
use ovum_vmm::rate_limiter::{RateLimitSpec, RateLimiter};
use ovum_vmm::reactor;
use ovum_vmm::slots::Slots;
use ovum_vmm::spec::DiskSpec;
use ovum_vmm::virtio::Device;
use ovum_vmm::virtio::balloon::Balloon;
use ovum_vmm::virtio::blk::{Blk, EngineKind};
use ovum_vmm::virtio::config_space::ConfigSpace;
use ovum_vmm::virtio::mem::MemDevice;
use ovum_vmm::virtio::mmio::{CONFIG, Identity, Registers};
use ovum_vmm::virtio::shown::ShownSlots;
use ovum_vmm::virtio::task::Line;
use rustix::fs::{MemfdFlags, memfd_create};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 256;

/// Widest access of a vCPU.
const WIDTH_MAX: usize = 8;

#[derive(Debug, Arbitrary)]
enum Step {
    Read {
        slot: u8,
        offset: u16,
        width: u8,
    },
    Write {
        slot: u8,
        offset: u16,
        width: u8,
        value: u64,
    },
    /// Far away from any slot, or nearly.
    ReadAt {
        address: u64,
        width: u8,
    },
    WriteAt {
        address: u64,
        value: u64,
        width: u8,
    },
    /// The device changes its configuration.
    Publish {
        slot: u8,
        bytes: Vec<u8>,
    },
}

fuzz_target!(|steps: Vec<Step>| {
    let (orders, _nobody) = reactor::orders().unwrap();
    drop(_nobody);
    let devices = devices();
    let all = ShownSlots::new().unwrap();
    let shown = |slot: u8| all.slot(slot.into()).unwrap();
    let configs = devices.iter().zip(0..);
    let configs = configs.map(|(device, slot)| ConfigSpace::new(device.config(), shown(slot)));
    let configs: Vec<_> = configs.collect();
    let registers = devices.iter().zip(&configs).zip(0..).map(|((device, config), slot)| {
        let line = Line::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), shown(slot));
        Registers::new(slot, Identity::of(&**device, config.clone()), orders.clone(), line)
    });
    let slots = Slots::new(registers.collect(), 1, all.clone());
    let at = |slot: u8, offset: u16| {
        // The last but one is vacant, and there is no last.
        let slot = u64::from(slot) % (configs.len() as u64 + 2);
        MMIO_START + slot * MMIO_SLOT_BYTES + u64::from(offset) % MMIO_SLOT_BYTES
    };
    let mut data = [0; WIDTH_MAX];
    for step in steps.into_iter().take(STEPS_MAX) {
        match step {
            Step::Read { slot, offset, width } => {
                slots.read(at(slot, offset), &mut data[..usize::from(width) % (WIDTH_MAX + 1)]);
                // What a guest is shown is what it would read.
                let slot = u64::from(slot) % (configs.len() as u64 + 1);
                let offset = u64::from(offset) % CONFIG / 4 * 4;
                let mut word = [0; 4];
                slots.read(MMIO_START + slot * MMIO_SLOT_BYTES + offset, &mut word);
                assert_eq!(all.slot(slot).unwrap().says(offset), u32::from_le_bytes(word));
            }
            Step::Write { slot, offset, width, value } => {
                let value = &value.to_le_bytes()[..usize::from(width) % (WIDTH_MAX + 1)];
                slots.write(at(slot, offset), value);
            }
            Step::ReadAt { address, width } => {
                slots.read(address, &mut data[..usize::from(width) % (WIDTH_MAX + 1)]);
            }
            Step::WriteAt { address, value, width } => {
                slots.write(address, &value.to_le_bytes()[..usize::from(width) % (WIDTH_MAX + 1)]);
            }
            Step::Publish { slot, bytes } => {
                let config = &configs[usize::from(slot) % configs.len()];
                config.publish(&bytes[..bytes.len().min(256)]);
            }
        }
    }
});

fn devices() -> Vec<Box<dyn Device>> {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(4096).unwrap();
    let disk = DiskSpec { id: "disk".to_owned(), read_only: false };
    let limiter = RateLimiter::new(RateLimitSpec::default(), Instant::now());
    let memory = Memory::new(1 << 20, Vec::new()).unwrap();
    vec![
        Box::new(Blk::with_engine(file, &disk, &limiter, EngineKind::Direct).unwrap()),
        Box::new(MemDevice::new(memory, 4 << 30, 128 << 20).unwrap()),
        Box::new(Balloon::new().unwrap()),
    ]
}
