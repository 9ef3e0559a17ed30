//! One device of the host: its registers, its interrupts, its reset.
//!
//! `vfio-ioctls` keeps some things to itself, and is held to less than it takes:
//! - It logs a register that cannot be read or written. So reads begin as ones, and an access that
//!   a region has no place for does not get that far: a guest cannot fill the log with those.
//! - A reset has no outcome. The kernel resets a device as it is opened, and refuses to open one
//!   whose reset is under way elsewhere; ours comes on top.
//! - A region that the kernel cannot describe is left out, and those after it move up. So
//!   configuration space is asked whether it has the size of one.
//! - Its destructor looks for the group in sysfs once more, and panics if the device was pulled out
//!   meanwhile; and it panics if the kernel refuses to detach a device. So it never runs.

use std::fmt::{self, Debug, Formatter};
use std::io;
use std::iter;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_INTX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::mapping::Mapping;
use super::{Backend, Container, VfioError, Way};
use crate::pci::config::{CONFIG_BYTES_MAX, HEADER_BYTES};

/// Most areas of a region that are mapped one by one.
const AREAS_MAX: usize = 64;

/// An open device.
///
/// Invariant: `device` has a share in `container`, beside that of this field.
pub struct HostDevice {
    device: ManuallyDrop<VfioDevice>,
    container: Container,
    name: String,
}

impl Debug for HostDevice {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostDevice").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A piece of a device that is read and written: a BAR, or its configuration space.
#[derive(Debug, Clone, Default)]
pub struct Region {
    /// Its length; without any there is none.
    pub bytes: u64,
    /// Which of the device's.
    pub index: u32,
    /// Where it is in the device's file.
    pub start: u64,
    /// Whether it is read and written at all, as `linux/vfio.h` says it.
    pub flags: u32,
    /// What of it can be mapped.
    pub areas: Vec<Range<u64>>,
}

impl HostDevice {
    /// Opens a device as it is, and puts it into the state that it has after power-on.
    pub(super) fn open(path: &Path, container: &Container) -> Result<Self, VfioError> {
        let device = VfioDevice::new(path, Arc::clone(&container.ops), true);
        let device = device.map_err(|source| VfioError::open(path, source))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let container = container.clone();
        let device = Self { device: ManuallyDrop::new(device), container, name };
        let bytes = device.region(VFIO_PCI_CONFIG_REGION_INDEX).bytes;
        let has_config = (HEADER_BYTES as u64..=CONFIG_BYTES_MAX as u64).contains(&bytes);
        if !has_config || device.device.get_irq_info(VFIO_PCI_INTX_IRQ_INDEX).is_none() {
            let why = String::from("it is no PCI device");
            return Err(VfioError::Device { name: device.name.clone(), why });
        }
        device.device.reset();
        Ok(device)
    }
}

impl Backend for HostDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn region(&self, index: u32) -> Region {
        let bytes = self.device.get_region_size(index);
        let flags = self.device.get_region_flags(index);
        let areas = if flags & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            Vec::new()
        } else {
            let caps = self.device.get_region_caps(index);
            let mut sparse = caps.iter().filter_map(areas);
            sparse.next().unwrap_or_else(|| iter::once(0..bytes).collect())
        };
        // None beyond the end, whatever the kernel says.
        let areas = areas.into_iter().filter(|area| area.end <= bytes).take(AREAS_MAX).collect();
        Region { bytes, index, start: self.device.get_region_offset(index), flags, areas }
    }

    fn interrupts(&self, index: u32) -> u32 {
        self.device.get_irq_info(index).map_or(0, |irq| irq.count)
    }

    fn raise(&self, index: u32, events: &[&EventFd]) -> io::Result<()> {
        let done = if events.is_empty() {
            self.device.disable_irq(index)
        } else {
            self.device.enable_irq(index, events.to_vec())
        };
        done.map_err(io::Error::other)
    }

    fn read(&self, region: &Region, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if region.has(offset, data.len(), VFIO_REGION_INFO_FLAG_READ) {
            self.device.region_read(region.index, data, offset);
        }
    }

    fn write(&self, region: &Region, offset: u64, data: &[u8]) {
        if region.has(offset, data.len(), VFIO_REGION_INFO_FLAG_WRITE) {
            self.device.region_write(region.index, data, offset);
        }
    }

    fn map(&self, region: &Region, area: &Range<u64>) -> io::Result<Mapping> {
        let bytes = area.end.saturating_sub(area.start);
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let start = region.start.saturating_add(area.start);
        // SAFETY: the device is open for as long as it is borrowed here.
        #[expect(unsafe_code, reason = "the crate tells of its descriptor as a number")]
        let file = unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) };
        Mapping::new(file, start, bytes)
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        // The next who has it resets it, too, and the kernel does when it is closed.
        self.device.reset();
        if self.container.way == Way::Files {
            // Now, for KVM has its file, too, and so keeps it open until the container goes, which
            // could not give back an address space that a device has. The kernel refuses only one
            // that is not attached.
            let _ = self.device.detach_hwpt();
        }
        // SAFETY: the descriptor is the device's own, and whoever would close it never runs.
        #[expect(unsafe_code, reason = "the crate gives its descriptor away only as a number")]
        drop(unsafe { OwnedFd::from_raw_fd(self.device.as_raw_fd()) });
        // SAFETY: by the invariant there is a share beside ours, which nobody would give back. With
        // the last, what KVM has of devices is closed and so are they, as are groups and what maps
        // memory; a group that is closed leaves its container.
        #[expect(unsafe_code, reason = "a destructor that does not run gives nothing back")]
        unsafe {
            Arc::decrement_strong_count(Arc::as_ptr(&self.container.ops));
        }
    }
}

impl Region {
    /// Whether `bytes` at `offset` are in it, and can be read or written as `flag` says.
    pub fn has(&self, offset: u64, bytes: usize, flag: u32) -> bool {
        let end = offset.checked_add(bytes as u64);
        self.flags & flag != 0 && end.is_some_and(|end| end <= self.bytes)
    }
}

/// The areas that can be mapped, if that is what is said.
fn areas(cap: &VfioRegionInfoCap) -> Option<Vec<Range<u64>>> {
    let VfioRegionInfoCap::SparseMmap(sparse) = cap else { return None };
    let area = |offset: u64, bytes: u64| Some(offset..offset.checked_add(bytes)?);
    sparse.areas.iter().take(AREAS_MAX).map(|found| area(found.offset, found.size)).collect()
}
