//! Two witnesses of what a guest can make a PCI bus do: a device of the host, and KVM.
//!
//! Both are told what the real ones would be, and say so when that is nothing they should ever
//! hear: a register that is the host's, a page that is watched, an address outside the windows, an
//! interrupt that nothing stands for.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use ovum_vmm::kvm::{Access, Vm};
use ovum_vmm::layout::IOAPIC_LINES;
use ovum_vmm::memory::MemoryRange;
use ovum_vmm::pci::bars::{BarShape, Windows};
use ovum_vmm::vfio::Backend;
use ovum_vmm::vfio::device::Region;
use ovum_vmm::vfio::mapping::Mapping;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vmm_sys_util::eventfd::EventFd;

const PAGE_BYTES: u64 = 4096;

/// Where the capabilities are, if the plan changes none of them.
pub const MSI: usize = 0x50;
pub const MSIX: usize = 0x70;
/// The BAR with the MSI-X table, how large it is at least, and where in it the table is.
pub const TABLE_BAR: u8 = 2;
const TABLE_BAR_BYTES_LOG2: u8 = 16;
pub const TABLE_START: u64 = 0x2000;
const PENDING_START: u64 = 0x3000;

/// Most that is mapped of a BAR: nothing is read or written there.
const MAPPED_BYTES_MAX: u64 = 1 << 20;

/// What a device is like.
#[derive(Debug, Clone, Arbitrary)]
pub struct DevicePlan {
    /// The low bits of each BAR's register, and how many bytes it has, near a power of two.
    bars: [(u8, u8); 6],
    /// Areas of each BAR that can be mapped, in pages, if not all of it.
    areas: Option<Vec<(u8, u8)>>,
    vectors: u16,
    interrupts: u16,
    config: ConfigPlan,
    /// Bytes of configuration space that say something else, in one device of four.
    lies: (u8, Vec<(u16, u8)>),
    /// Whether the kernel refuses to hear of interrupts.
    refuses: bool,
}

#[derive(Debug, Clone, Copy, Arbitrary)]
enum ConfigPlan {
    Header,
    Conventional,
    Express,
}

/// A device of the host that is none.
#[derive(Debug)]
pub struct Device {
    plan: DevicePlan,
    config: Vec<u8>,
    heard: Arc<Mutex<Heard>>,
}

/// What a device may raise now: of which kind, and what for.
#[derive(Debug, Default)]
pub struct Heard {
    kind: Option<u32>,
    pub events: Vec<EventFd>,
}

impl Device {
    pub fn new(mut plan: DevicePlan) -> (Self, Arc<Mutex<Heard>>) {
        let (flags, log2) = &mut plan.bars[usize::from(TABLE_BAR)];
        (*flags, *log2) = (*flags & 0xe & !4, (*log2).clamp(TABLE_BAR_BYTES_LOG2, 20));
        plan.vectors %= 128;
        if plan.lies.0 % 4 < 3 {
            plan.lies.1.clear();
        }
        let config = configuration(&plan);
        let heard = Arc::new(Mutex::default());
        (Self { plan, config, heard: Arc::clone(&heard) }, heard)
    }

    fn bar_bytes(&self, index: usize) -> u64 {
        self.plan.bars.get(index).map_or(0, |(flags, log2)| match log2 % 32 {
            log2 if flags & 1 != 0 => 1 << (log2 % 8 + 2),
            0..4 => 0,
            log2 @ 4..24 => 1 << log2,
            // A device with one of these often has no place in a guest.
            24 => 24 << 10,
            log2 => 1 << (log2 + 7),
        })
    }

    fn is_honest(&self) -> bool {
        self.plan.lies.1.is_empty() && !matches!(self.plan.config, ConfigPlan::Header)
    }

    /// What of the BAR with the table nobody may reach but by way of the bus.
    fn table(&self) -> Range<u64> {
        TABLE_START..TABLE_START + 16 * (u64::from(self.plan.vectors) + 1)
    }
}

fn configuration(plan: &DevicePlan) -> Vec<u8> {
    let mut bytes = vec![
        0;
        match plan.config {
            ConfigPlan::Header => 0xff,
            ConfigPlan::Conventional => 256,
            ConfigPlan::Express => 4096,
        }
    ];
    bytes[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
    bytes[0x06] = 1 << 4;
    for (index, (flags, _)) in plan.bars.iter().enumerate() {
        bytes[0x10 + 4 * index] = *flags;
    }
    bytes[0x34] = 0x40;
    bytes[0x40..0x44].copy_from_slice(&[0x01, 0x50, 3, 0]);
    bytes[MSI..MSI + 4].copy_from_slice(&[0x05, 0x70, 0x86, 0x01]);
    let [low, high] = plan.vectors.to_le_bytes();
    bytes[MSIX..MSIX + 4].copy_from_slice(&[0x11, 0x80, low, high]);
    let place =
        |start: u64| (u32::try_from(start).unwrap_or(0) | u32::from(TABLE_BAR)).to_le_bytes();
    bytes[MSIX + 4..MSIX + 8].copy_from_slice(&place(TABLE_START));
    bytes[MSIX + 8..MSIX + 12].copy_from_slice(&place(PENDING_START));
    bytes[0x80..0x84].copy_from_slice(&[0x10, 0, 2, 0]);
    for (offset, byte) in &plan.lies.1 {
        let length = bytes.len();
        bytes[usize::from(*offset) % length] = *byte;
    }
    bytes
}

impl Backend for Device {
    fn name(&self) -> &str {
        "witness"
    }

    fn region(&self, index: u32) -> Region {
        let flags = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        if index == VFIO_PCI_CONFIG_REGION_INDEX {
            let bytes = self.config.len() as u64;
            return Region { bytes, index, start: 0, flags, areas: Vec::new() };
        }
        let bytes = self.bar_bytes(index as usize);
        let most = bytes.min(MAPPED_BYTES_MAX);
        let areas = match &self.plan.areas {
            None => vec![0..most],
            Some(areas) => {
                let area = |(first, count): &(u8, u8)| {
                    let start = u64::from(*first) * PAGE_BYTES;
                    start..start + u64::from(*count) * PAGE_BYTES
                };
                areas.iter().take(8).map(area).filter(|area| area.end <= most).collect()
            }
        };
        Region { bytes, index, start: 0, flags, areas }
    }

    fn interrupts(&self, index: u32) -> u32 {
        match index {
            VFIO_PCI_MSI_IRQ_INDEX => 8,
            VFIO_PCI_MSIX_IRQ_INDEX => 1 + u32::from(self.plan.interrupts % 128),
            _ => 0,
        }
    }

    fn raise(&self, index: u32, events: &[&EventFd]) -> io::Result<()> {
        assert!(events.len() <= self.interrupts(index) as usize, "more than there are");
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if events.is_empty() {
            *heard = Heard::default();
            return Ok(());
        }
        assert_eq!(heard.kind, None, "two kinds at once, or twice without an end");
        if self.plan.refuses {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let events: io::Result<Vec<_>> = events.iter().map(|event| event.try_clone()).collect();
        *heard = Heard { kind: Some(index), events: events? };
        Ok(())
    }

    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if region.index == VFIO_PCI_CONFIG_REGION_INDEX {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            let there = self.config.get(start..start.saturating_add(data.len()));
            data.copy_from_slice(there.expect("configuration space is read where it is"));
        }
    }

    fn write(&self, region: &Region, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let reaches = |range: Range<u64>| offset < range.end && range.start < end;
        if region.index == VFIO_PCI_CONFIG_REGION_INDEX {
            assert!((4..6).contains(&offset) && end <= 6 || offset >= 0x40, "a header is written");
            assert!(end <= 256, "an extended capability is written");
            let (msi, msix) = (MSI as u64, MSIX as u64);
            let is_ours = reaches(msi..msi + 14) || reaches(msix..msix + 12);
            assert!(!self.is_honest() || !is_ours, "where interrupts go is written");
        } else if region.index == u32::from(TABLE_BAR) {
            assert!(!self.is_honest() || !reaches(self.table()), "the table is written");
        }
    }

    fn map(&self, region: &Region, area: &Range<u64>) -> io::Result<Mapping> {
        assert!(area.start < area.end && area.end <= region.bytes);
        assert!(area.start % PAGE_BYTES == 0 && area.end % PAGE_BYTES == 0);
        if self.is_honest() && region.index == u32::from(TABLE_BAR) {
            let table = self.table();
            assert!(area.end <= table.start || table.end <= area.start, "the table is mapped");
        }
        let file: OwnedFd = memfd_create("bar", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, area.end)?;
        let bytes = usize::try_from(area.end - area.start).map_err(io::Error::other)?;
        Mapping::new(file.as_fd(), area.start, bytes)
    }
}

/// A KVM that is none.
#[derive(Debug)]
pub struct WitnessVm {
    windows: Windows,
    state: Mutex<VmState>,
}

#[derive(Debug, Default)]
struct VmState {
    slots: BTreeMap<u32, Range<u64>>,
    routed: Vec<u32>,
    connected: BTreeMap<RawFd, u32>,
}

impl WitnessVm {
    pub fn new(windows: Windows) -> Arc<Self> {
        Arc::new(Self { windows, state: Mutex::default() })
    }

    /// A bus that has gone left nothing behind.
    pub fn finish(&self) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(state.slots.is_empty() && state.connected.is_empty(), "{state:?}");
    }
}

impl Vm for WitnessVm {
    fn set_slot(&self, slot: u32, range: MemoryRange, access: Access) -> io::Result<()> {
        assert_eq!(access, Access::Write, "registers of a device are written to");
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if range.bytes == 0 {
            assert!(state.slots.remove(&slot).is_some(), "a slot goes that is not there");
            return Ok(());
        }
        let MemoryRange { guest_start, bytes, host_start } = range;
        assert!(self.windows.hold(guest_start, BarShape::new(0, bytes)), "{guest_start:#x}");
        for number in [guest_start, bytes, host_start] {
            // KVM would refuse it.
            if number % PAGE_BYTES != 0 {
                return Err(io::ErrorKind::InvalidInput.into());
            }
        }
        let wanted = guest_start..guest_start + bytes;
        let is_taken = |other: &Range<u64>| wanted.start < other.end && other.start < wanted.end;
        if state.slots.values().any(is_taken) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        assert!(state.slots.insert(slot, wanted).is_none(), "a slot is two things");
        Ok(())
    }

    fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let messages = routes.as_slice().iter().filter(|route| route.type_ == KVM_IRQ_ROUTING_MSI);
        state.routed = messages.map(|route| route.gsi).collect();
        assert!(state.routed.is_sorted_by(|a, b| a < b) && state.routed.len() <= 4096);
        assert!(state.routed.iter().all(|&number| number >= IOAPIC_LINES), "a line is a message");
        for line in 0..IOAPIC_LINES {
            let is_there = routes.as_slice().iter().any(|route| route.gsi == line);
            assert!(is_there, "line {line} goes nowhere");
        }
        Ok(())
    }

    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(state.routed.contains(&number), "{number} stands for nothing");
        let before = state.connected.insert(event.as_raw_fd(), number);
        assert_eq!(before, None, "connected twice");
        Ok(())
    }

    fn disconnect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        assert_eq!(state.connected.remove(&event.as_raw_fd()), Some(number), "not connected");
        Ok(())
    }
}
