//! A device of the host as a function on the guest's bus.
//!
//! Registers that can be mapped are the guest's without an exit. What has to be watched is not
//! mapped: configuration space, and the pages in which the device keeps where its interrupts go.
//! A guest writes there, the picture of what it wants changes ([`ConfigSpace`], the table of
//! MSI-X), and [`Passthrough::follow`] brings device, KVM's slots and interrupts in line with it.
//! What KVM or the device then refuses the guest does without: it can break its own device only.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX,
    VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::Region;
use super::mapping::Mapping;
use super::{Backend, VfioError};
use crate::kvm::Access;
use crate::kvm_slots::KvmSlots;
use crate::memory::MemoryRange;
use crate::pci::bars::{BARS_MAX, BarKind, BarShape, Space, Windows};
use crate::pci::config::{CONFIG_BYTES_MAX, CONFIG_BYTES_MIN, ConfigSpace, MsixShape};
use crate::pci::msi::{Message, Routes, Vector};

const PAGE_BYTES: u64 = 4096;
/// First BAR in configuration space.
const BAR_REGISTERS: usize = 0x10;
/// Bytes of an entry of the MSI-X table: address, data, mask (PCI Local Bus 3.0, 6.8.2.6).
const ENTRY_BYTES: usize = 16;

/// Where it all is in the machine.
#[derive(Debug, Clone)]
pub struct Place {
    /// KVM's memory.
    pub slots: KvmSlots,
    /// KVM's interrupts.
    pub routes: Arc<Routes>,
    /// Where BARs can be.
    pub windows: Windows,
}

/// A device that was lent to the guest.
#[derive(Debug)]
pub struct Passthrough {
    // Nobody hears interrupts, and KVM has no mapping, when the device is closed.
    vectors: Vec<Vector>,
    mode: Mode,
    bars: Vec<Bar>,
    table: Table,
    config: ConfigSpace,
    config_region: Region,
    device: Box<dyn Backend>,
    place: Place,
}

/// A device that is asked for by its host, which wants to take it away.
#[derive(Debug)]
pub struct Recall {
    /// What the host calls it.
    pub name: String,
    /// Raised when it is asked for.
    pub event: EventFd,
}

/// How the guest hears of interrupts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    Msi,
    Msix,
}

#[derive(Debug)]
struct Bar {
    index: usize,
    shape: BarShape,
    region: Region,
    /// What the guest reaches without an exit: where in the BAR, and where in this process.
    mapped: Vec<(u64, u64, Mapping)>,
    /// Where it is in the guest, while it is.
    start: Option<u64>,
}

/// The table of MSI-X, which never is the device's own.
#[derive(Debug, Default)]
struct Table {
    shape: Option<MsixShape>,
    bytes: Vec<u8>,
}

impl Passthrough {
    /// Takes a device that was just opened. Its BARs are nowhere yet.
    ///
    /// # Errors
    ///
    /// [`VfioError`].
    pub fn new(device: Box<dyn Backend>, place: Place) -> Result<Self, VfioError> {
        let failed = |why: String| VfioError::Device { name: device.name().into(), why };
        let config_region = device.region(VFIO_PCI_CONFIG_REGION_INDEX);
        let length = usize::try_from(config_region.bytes).unwrap_or(0).min(CONFIG_BYTES_MAX);
        // A mediated device may leave out what it has nothing in.
        let mut bytes = vec![0; length.max(CONFIG_BYTES_MIN)];
        device.read(&config_region, 0, &mut bytes[..length]);
        let bars = (VFIO_PCI_BAR0_REGION_INDEX..).take(BARS_MAX);
        let regions: Vec<_> = bars.map(|index| device.region(index)).collect();
        let shapes = shapes(&regions, &bytes).map_err(failed)?;
        let config =
            ConfigSpace::new(&bytes, &shapes).map_err(|error| failed(error.to_string()))?;
        let table = Table::new(config.msix());
        let mut bars = Vec::new();
        for ((index, region), shape) in regions.into_iter().enumerate().zip(shapes) {
            let Some(shape) = shape else { continue };
            let watched = table.watched(index);
            let mut mapped = Vec::new();
            for area in region.areas.iter().flat_map(|area| whole_pages(area, &watched)) {
                let mapping = device.map(&region, &area);
                let map_failed = |source| VfioError::Map { name: device.name().into(), source };
                let mapping = mapping.map_err(map_failed)?;
                mapped.push((area.start, area.end.saturating_sub(area.start), mapping));
            }
            bars.push(Bar { index, shape, region, mapped, start: None });
        }
        Ok(Self {
            vectors: Vec::new(),
            mode: Mode::Off,
            bars,
            table,
            config,
            config_region,
            device,
            place,
        })
    }

    /// How its host asks for it back; None if that is nothing that its kernel asks for. It waits
    /// until the device is closed.
    ///
    /// # Errors
    ///
    /// If this process has no descriptor left.
    pub fn recall(&self) -> io::Result<Option<Recall>> {
        if self.device.interrupts(VFIO_PCI_REQ_IRQ_INDEX) == 0 {
            return Ok(None);
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let raised = self.device.raise(VFIO_PCI_REQ_IRQ_INDEX, &[&event]);
        let name = self.device.name().to_owned();
        // A driver of mediated devices may count it and not have it.
        Ok(raised.is_ok().then_some(Recall { name, event }))
    }

    /// Its BARs.
    pub fn shapes(&self) -> impl Iterator<Item = BarShape> {
        self.bars.iter().map(|bar| bar.shape)
    }

    /// Puts its BARs at `places`, as many as there are [`Self::shapes`], as firmware would.
    pub fn place_bars(&mut self, places: impl Iterator<Item = u64>) {
        for (bar, start) in self.bars.iter().zip(places) {
            self.config.place_bar(bar.index, bar.shape, start);
        }
    }

    /// The guest reads configuration space.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let there = self.config_region.bytes.saturating_sub(offset as u64);
        let there = usize::try_from(there).unwrap_or(usize::MAX).min(data.len());
        if there > 0 {
            self.device.read(&self.config_region, offset as u64, &mut data[..there]);
        }
        self.config.read(offset, data);
    }

    /// The guest writes configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        for passed in self.config.write(offset, data) {
            let at = offset.saturating_add(passed.start) as u64;
            self.device.write(&self.config_region, at, &data[passed]);
        }
        self.follow();
    }

    /// The guest reads at an address in one of the windows; false if none of the BARs is there.
    pub fn read(&self, space: Space, address: u64, data: &mut [u8]) -> bool {
        let Some((bar, offset)) = self.find(space, address) else { return false };
        match self.table.find(bar.index, offset) {
            Some(Found::Entry(offset)) => self.table.read(offset, data),
            Some(Found::Pending(offset)) => self.read_pending(offset, data),
            None => self.device.read(&bar.region, offset, data),
        }
        true
    }

    /// The guest writes at an address in one of the windows; false if none of the BARs is there.
    pub fn write(&mut self, space: Space, address: u64, data: &[u8]) -> bool {
        let Some((bar, offset)) = self.find(space, address) else { return false };
        match self.table.find(bar.index, offset) {
            Some(Found::Entry(offset)) => {
                self.table.write(offset, data);
                self.follow_interrupts();
            }
            Some(Found::Pending(_)) => {}
            // Wide, and only its end is there.
            None if self.table.reaches(bar.index, offset, data.len()) => {}
            None => self.device.write(&bar.region, offset, data),
        }
        true
    }

    /// Brings everything in line with what the guest has written.
    ///
    /// A device that stops to answer at its BARs does so when they are nowhere in the guest any
    /// more, and one that starts does so before they are.
    fn follow(&mut self) {
        let windows = &self.place.windows;
        let wanted: Vec<_> = self
            .bars
            .iter()
            .map(|bar| {
                let start = self.config.bar(bar.index, bar.shape);
                let decodes = self.config.decodes(bar.shape.space());
                (decodes && windows.hold(start, bar.shape)).then_some(start)
            })
            .collect();
        for (bar, wanted) in self.bars.iter_mut().zip(&wanted) {
            if bar.start != *wanted {
                bar.withdraw(&self.place.slots);
            }
        }
        let (offset, command) = self.config.command();
        self.device.write(&self.config_region, offset as u64, &command.to_le_bytes());
        for (bar, wanted) in self.bars.iter_mut().zip(wanted) {
            if let Some(start) = wanted.filter(|_| bar.start.is_none()) {
                bar.show(start, &self.place.slots);
            }
        }
        self.follow_interrupts();
    }

    fn follow_interrupts(&mut self) {
        let (wants_msix, holds_back) = self.config.msix_state();
        let msi = self.config.msi();
        let mode = match msi {
            _ if wants_msix => Mode::Msix,
            Some(_) => Mode::Msi,
            None => Mode::Off,
        };
        if mode != self.mode {
            self.drop_vectors();
            self.mode = mode;
        }
        match (mode, msi) {
            (Mode::Msi, Some(msi)) => {
                let most = self.device.interrupts(VFIO_PCI_MSI_IRQ_INDEX);
                let count = u32::from(msi.vectors).min(most);
                let message = |index: usize| {
                    // The low bits of the data say which.
                    let which = u16::try_from(index).unwrap_or(0);
                    Message { address: msi.address, data: u32::from(msi.data | which) }
                };
                self.hear(VFIO_PCI_MSI_IRQ_INDEX, count as usize, |index| Some(message(index)));
            }
            (Mode::Msix, _) => {
                let messages: Vec<_> =
                    self.table.messages().map(|m| m.filter(|_| !holds_back)).collect();
                let used = messages.iter().rposition(Option::is_some).map_or(1, |last| last + 1);
                let most = self.device.interrupts(VFIO_PCI_MSIX_IRQ_INDEX) as usize;
                let count = used.next_power_of_two().min(messages.len()).min(most);
                self.hear(VFIO_PCI_MSIX_IRQ_INDEX, count, |index| messages[index]);
            }
            (Mode::Off | Mode::Msi, _) => {}
        }
    }

    /// Has at least `count` vectors of a kind, and each heard as `message` says.
    ///
    /// A device is given vectors as they are needed: it may have 2048, and each is a descriptor.
    fn hear(&mut self, kind: u32, count: usize, message: impl Fn(usize) -> Option<Message>) {
        if self.vectors.len() < count && self.add_vectors(kind, count).is_err() {
            self.drop_vectors();
            return;
        }
        for (index, vector) in self.vectors.iter_mut().enumerate() {
            let message = if index < count { message(index) } else { None };
            // The guest does not hear what KVM cannot tell it.
            let _ = vector.hear(message);
        }
    }

    fn add_vectors(&mut self, kind: u32, count: usize) -> io::Result<()> {
        if !self.vectors.is_empty() {
            self.device.raise(kind, &[])?;
        }
        while self.vectors.len() < count {
            self.vectors.push(Vector::new(Arc::clone(&self.place.routes))?);
        }
        let events: Vec<_> = self.vectors.iter().map(Vector::event).collect();
        self.device.raise(kind, &events)
    }

    fn drop_vectors(&mut self) {
        let kind = match self.mode {
            Mode::Off => return,
            Mode::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Mode::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        };
        // It raises none any more, or those that nobody has.
        let _ = self.device.raise(kind, &[]);
        self.vectors.clear();
    }

    fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(index as u64).saturating_mul(8);
            let is_pending = |bit: &u64| {
                let vector = usize::try_from(first.saturating_add(*bit)).unwrap_or(usize::MAX);
                self.vectors.get(vector).is_some_and(Vector::is_pending)
            };
            *byte = (0..8).filter(is_pending).fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    fn find(&self, space: Space, address: u64) -> Option<(&Bar, u64)> {
        self.bars.iter().filter(|bar| bar.shape.space() == space).find_map(|bar| {
            let offset = address.checked_sub(bar.start?)?;
            (offset < bar.shape.bytes).then_some((bar, offset))
        })
    }
}

impl Drop for Passthrough {
    fn drop(&mut self) {
        self.drop_vectors();
        self.bars.iter_mut().for_each(|bar| bar.withdraw(&self.place.slots));
    }
}

impl Bar {
    /// Puts it at `start`. Where something else is already it answers by way of this process.
    fn show(&mut self, start: u64, slots: &KvmSlots) {
        for (offset, bytes, mapping) in &self.mapped {
            let guest_start = start.saturating_add(*offset);
            let host_start = mapping.host_start();
            let range = MemoryRange { guest_start, bytes: *bytes, host_start };
            let _ = slots.add(range, Access::Write);
        }
        self.start = Some(start);
    }

    fn withdraw(&mut self, slots: &KvmSlots) {
        for (_, _, mapping) in &self.mapped {
            slots.remove(mapping.host_start());
        }
        self.start = None;
    }
}

/// What of the watched pages an access is about.
enum Found {
    Entry(u64),
    Pending(u64),
}

impl Table {
    /// Each entry begins masked.
    fn new(shape: Option<MsixShape>) -> Self {
        let count = usize::from(shape.map_or(0, |shape| shape.vectors));
        let mut entry = [0; ENTRY_BYTES];
        entry[12] = 1;
        Self { shape, bytes: entry.repeat(count) }
    }

    /// What of BAR `index` is not the guest's without an exit.
    fn watched(&self, index: usize) -> Vec<Range<u64>> {
        let Some(shape) = self.shape else { return Vec::new() };
        let places =
            [(shape.table, self.bytes.len() as u64), (shape.pending, pending_bytes(shape))];
        let mut ranges: Vec<_> = places
            .into_iter()
            .filter(|((bar, _), _)| *bar == index)
            .map(|((_, start), bytes)| start..start.saturating_add(bytes))
            .collect();
        ranges.sort_by_key(|range| range.start);
        ranges
    }

    /// Whether some of `bytes` at `offset` of BAR `index` are to be watched.
    fn reaches(&self, index: usize, offset: u64, bytes: usize) -> bool {
        let end = offset.saturating_add(bytes as u64);
        self.watched(index).iter().any(|range| offset < range.end && range.start < end)
    }

    fn find(&self, index: usize, offset: u64) -> Option<Found> {
        let shape = self.shape?;
        let within = |(bar, start): (usize, u64), bytes: u64| {
            let relative = offset.checked_sub(start).filter(|relative| *relative < bytes)?;
            (bar == index).then_some(relative)
        };
        let entry = within(shape.table, self.bytes.len() as u64).map(Found::Entry);
        entry.or_else(|| within(shape.pending, pending_bytes(shape)).map(Found::Pending))
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(start.saturating_add(index)).copied().unwrap_or(0);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in self.bytes.iter_mut().skip(start).zip(data) {
            *place = *byte;
        }
    }

    /// What each vector is to be heard as; None if it is masked.
    fn messages(&self) -> impl Iterator<Item = Option<Message>> {
        let double = |bytes: &[u8]| bytes.iter().rev().fold(0, |sum, b| sum << 8 | u32::from(*b));
        self.bytes.chunks_exact(ENTRY_BYTES).map(move |entry| {
            let address = u64::from(double(&entry[4..8])) << 32 | u64::from(double(&entry[..4]));
            (entry[12] & 1 == 0).then(|| Message { address, data: double(&entry[8..12]) })
        })
    }
}

/// A bit for each vector, in words of 64.
fn pending_bytes(shape: MsixShape) -> u64 {
    u64::from(shape.vectors).div_ceil(64).saturating_mul(8)
}

/// The whole pages of `area` in which nothing is that is to be watched; `watched` is sorted.
fn whole_pages(area: &Range<u64>, watched: &[Range<u64>]) -> Vec<Range<u64>> {
    let down = |address: u64| address / PAGE_BYTES * PAGE_BYTES;
    let mut pages = Vec::new();
    let mut start = area.start.next_multiple_of(PAGE_BYTES);
    for range in watched {
        pages.push(start..down(range.start.min(area.end)));
        start = start.max(range.end.next_multiple_of(PAGE_BYTES));
    }
    pages.push(start..down(area.end));
    pages.retain(|range| range.start < range.end);
    pages
}

/// The BARs among `regions`; `config` has their registers. A guest does without ports of which
/// there are too many.
fn shapes(regions: &[Region], config: &[u8]) -> Result<[Option<BarShape>; BARS_MAX], String> {
    let mut shapes = [None; BARS_MAX];
    let mut is_upper_half = false;
    for (index, region) in regions.iter().enumerate().take(BARS_MAX) {
        let at = BAR_REGISTERS + 4 * index;
        let register = config.get(at..at + 4).map_or(0, |bytes| u32::from(bytes[0]));
        let shape = BarShape::new(register, region.bytes);
        if is_upper_half || region.bytes == 0 {
            is_upper_half = false;
            continue;
        }
        if shape.space() == Space::Ports && !shape.is_possible() {
            continue;
        }
        is_upper_half = shape.kind == BarKind::Memory64;
        if !shape.is_possible() || is_upper_half && index + 1 == BARS_MAX {
            return Err(format!("its BAR {index} has {} bytes", region.bytes));
        }
        shapes[index] = Some(shape);
    }
    Ok(shapes)
}

#[cfg(test)]
mod tests;
