//! One device of the host: its registers, its interrupts, its reset.
//!
//! `vfio-ioctls` keeps some things to itself, and is held to less than it takes:
//! - It logs a register that cannot be read or written. So reads begin as ones, and an access that
//!   a region has no place for does not get that far: a guest cannot fill the log with those.
//! - A reset has no outcome. The kernel resets a device as it is opened, and refuses to open one
//!   whose reset is under way elsewhere; ours comes on top.
//! - A region that the kernel cannot describe is left out, and those after it move up. So
//!   configuration space is asked whether it has the size of one.
//! - A device that is dropped looks for its group in sysfs once more, and panics if it is gone.

use std::fmt::{self, Debug, Formatter};
use std::fs;
use std::io;
use std::iter;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::ptr;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE,
};
use vfio_ioctls::{VfioDevice, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::VfioError;
use crate::pci::config::CONFIG_BYTES_MAX;

/// Most areas of a region that are mapped one by one.
const AREAS_MAX: usize = 64;

/// The link to a device's group, in its directory.
const GROUP: &str = "iommu_group";

/// An open device.
pub struct HostDevice {
    device: ManuallyDrop<VfioDevice>,
    path: PathBuf,
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
    index: u32,
    /// Where it is in the device's file.
    start: u64,
    /// Whether it is read and written at all.
    flags: u32,
    /// What of it can be mapped.
    pub areas: Vec<Range<u64>>,
}

/// What of a region is mapped into this process; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is an address range that nobody in this process reads or writes.
#[expect(unsafe_code, reason = "a range of addresses is not tied to a thread")]
unsafe impl Send for Mapping {}

impl Mapping {
    /// Where it is in this process.
    pub fn host_start(&self) -> u64 {
        self.start.expose_provenance() as u64
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is one mapping of ours, and whoever gave it to KVM has taken it back.
        #[expect(unsafe_code, reason = "munmap takes a raw range")]
        let _ = unsafe { munmap(self.start.cast(), self.bytes) };
    }
}

impl HostDevice {
    /// Takes a device as it is, and puts it into the state that it has after power-on.
    pub(super) fn new(device: VfioDevice, path: &Path) -> Result<Self, VfioError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let device = Self { device: ManuallyDrop::new(device), path: path.into(), name };
        let bytes = device.region(VFIO_PCI_CONFIG_REGION_INDEX).bytes;
        let has_config = (1..=CONFIG_BYTES_MAX as u64).contains(&bytes);
        if !has_config || device.device.get_irq_info(VFIO_PCI_MSIX_IRQ_INDEX).is_none() {
            let why = String::from("it is no PCI device");
            return Err(VfioError::Device { name: device.name.clone(), why });
        }
        device.device.reset();
        Ok(device)
    }

    /// What the host calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the device has at `index`; nothing if it has nothing there.
    pub fn region(&self, index: u32) -> Region {
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

    /// How many interrupts of the kind `index` it has.
    pub fn interrupts(&self, index: u32) -> u32 {
        self.device.get_irq_info(index).map_or(0, |irq| irq.count)
    }

    /// Lets the device raise `events`, the first interrupts of the kind `index`; none are none.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn raise<'e>(
        &self,
        index: u32,
        events: impl Iterator<Item = &'e EventFd>,
    ) -> io::Result<()> {
        let events: Vec<_> = events.collect();
        let done = if events.is_empty() {
            self.device.disable_irq(index)
        } else {
            self.device.enable_irq(index, events)
        };
        done.map_err(io::Error::other)
    }

    /// Reads at `offset`; what cannot be read is ones, as on a bus where nothing answers.
    pub fn read(&self, region: &Region, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if region.has(offset, data.len(), VFIO_REGION_INFO_FLAG_READ) {
            self.device.region_read(region.index, data, offset);
        }
    }

    /// Writes at `offset`; what cannot be written is dropped.
    pub fn write(&self, region: &Region, offset: u64, data: &[u8]) {
        if region.has(offset, data.len(), VFIO_REGION_INFO_FLAG_WRITE) {
            self.device.region_write(region.index, data, offset);
        }
    }

    /// Maps `area` of a region, whole pages of it, into this process, which does not touch it.
    ///
    /// # Errors
    ///
    /// What mmap(2) says.
    pub fn map(&self, region: &Region, area: &Range<u64>) -> io::Result<Mapping> {
        let bytes = area.end.saturating_sub(area.start);
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        let start = region.start.saturating_add(area.start);
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the device is open for as long as it is borrowed here.
        #[expect(unsafe_code, reason = "the crate tells of its descriptor as a number")]
        let file = unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) };
        // SAFETY: the kernel chooses an unused range, so no existing reference points into it; it
        // is only ever given to KVM.
        #[expect(unsafe_code, reason = "a new mapping is a raw range")]
        let start = unsafe { mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, start) }?;
        Ok(Mapping { start: start.cast(), bytes })
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        // The next who has it resets it, too, and the kernel does when it is closed.
        self.device.reset();
        // Without the link it would panic; so it is the kernel's to close, when this process ends.
        if fs::read_link(self.path.join(GROUP)).is_ok() {
            // SAFETY: nothing uses it after this.
            #[expect(unsafe_code, reason = "it is dropped only if it can be")]
            unsafe {
                ManuallyDrop::drop(&mut self.device);
            }
        }
    }
}

impl Region {
    /// Whether `bytes` at `offset` are in it, and can be read or written as `flag` says.
    fn has(&self, offset: u64, bytes: usize, flag: u32) -> bool {
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
