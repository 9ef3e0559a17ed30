//! One device of the host: its registers, its interrupts, its reset.

use std::io;
use std::iter;
use std::mem::{offset_of, size_of};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr;

use rustix::io::{pread, pwrite};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vfio_bindings::bindings::vfio::{
    VFIO_DEVICE_FLAGS_PCI, VFIO_DEVICE_FLAGS_RESET, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_REGION_INFO_CAP_SPARSE_MMAP,
    VFIO_REGION_INFO_FLAG_CAPS, VFIO_REGION_INFO_FLAG_MMAP, vfio_device_info, vfio_irq_info,
    vfio_region_info,
};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ptr};

use super::{VfioError, bytes_of, checked, request};

const GET_INFO: u64 = request(7);
const GET_REGION_INFO: u64 = request(8);
const GET_IRQ_INFO: u64 = request(9);
const SET_IRQS: u64 = request(10);
const RESET: u64 = request(11);

/// What the kernel says of a region, with all its capabilities, is shorter.
const REGION_INFO_BYTES_MAX: usize = 4096;
/// Most areas of a region that can be mapped one by one.
const AREAS_MAX: usize = 64;

/// An open device.
#[derive(Debug)]
pub struct HostDevice {
    fd: OwnedFd,
    name: String,
    can_reset: bool,
}

/// A piece of a device that is read and written: a BAR, or its configuration space.
#[derive(Debug, Clone, Default)]
pub struct Region {
    /// Its length; without any there is none.
    pub bytes: u64,
    /// Where it is in the device's file.
    start: u64,
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

/// The kernel's answer about a region, with room for what follows.
#[repr(C)]
struct RegionInfo {
    info: vfio_region_info,
    rest: [u8; REGION_INFO_BYTES_MAX - size_of::<vfio_region_info>()],
}

impl HostDevice {
    /// Takes a device as it is, and puts it into the state that it has after power-on.
    pub(super) fn new(fd: OwnedFd, name: &str) -> Result<Self, VfioError> {
        let mut info =
            vfio_device_info { argsz: bytes_of::<vfio_device_info>(), ..Default::default() };
        // SAFETY: the structure says how long it is.
        #[expect(unsafe_code, reason = "an ioctl")]
        let read = unsafe { ioctl_with_mut_ref(&fd, GET_INFO, &mut info) };
        checked(read).map_err(VfioError::vfio("look at a device"))?;
        if info.flags & VFIO_DEVICE_FLAGS_PCI == 0 {
            let why = String::from("it is no PCI device");
            return Err(VfioError::Device { name: name.into(), why });
        }
        let can_reset = info.flags & VFIO_DEVICE_FLAGS_RESET != 0;
        let device = Self { fd, name: name.into(), can_reset };
        device.reset().map_err(VfioError::vfio("reset a device"))?;
        Ok(device)
    }

    /// What the host calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the device has at `index`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn region(&self, index: u32) -> io::Result<Region> {
        let argsz = bytes_of::<RegionInfo>();
        let mut answer = RegionInfo {
            info: vfio_region_info { argsz, index, ..Default::default() },
            rest: [0; REGION_INFO_BYTES_MAX - size_of::<vfio_region_info>()],
        };
        // SAFETY: the structure says how long it is, with the room that follows.
        #[expect(unsafe_code, reason = "an ioctl")]
        let read = unsafe { ioctl_with_mut_ref(&self.fd, GET_REGION_INFO, &mut answer) };
        checked(read)?;
        let RegionInfo { info, rest } = &answer;
        let areas = match info.flags & (VFIO_REGION_INFO_FLAG_MMAP | VFIO_REGION_INFO_FLAG_CAPS) {
            VFIO_REGION_INFO_FLAG_MMAP => whole(info.size),
            0 | VFIO_REGION_INFO_FLAG_CAPS => Vec::new(),
            _ => sparse_areas(info.cap_offset, rest).unwrap_or_else(|| whole(info.size)),
        };
        Ok(Region { bytes: info.size, start: info.offset, areas })
    }

    /// How many interrupts of the kind `index` it has.
    pub fn interrupts(&self, index: u32) -> u32 {
        let argsz = bytes_of::<vfio_irq_info>();
        let mut info = vfio_irq_info { argsz, index, ..Default::default() };
        // SAFETY: the structure says how long it is.
        #[expect(unsafe_code, reason = "an ioctl")]
        let read = unsafe { ioctl_with_mut_ref(&self.fd, GET_IRQ_INFO, &mut info) };
        if checked(read).is_ok() { info.count } else { 0 }
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
        let events: Vec<u32> = events.map(|event| event.as_raw_fd().cast_unsigned()).collect();
        let kind =
            if events.is_empty() { VFIO_IRQ_SET_DATA_NONE } else { VFIO_IRQ_SET_DATA_EVENTFD };
        let count = u32::try_from(events.len()).map_err(io::Error::other)?;
        // As vfio_irq_set has it: length, flags, index, start, count, descriptors.
        let argsz = count.saturating_add(5).saturating_mul(4);
        let mut set = vec![argsz, kind | VFIO_IRQ_SET_ACTION_TRIGGER, index, 0, count];
        set.extend(events);
        // SAFETY: the structure says how long it is; the kernel keeps events it was given.
        #[expect(unsafe_code, reason = "an ioctl")]
        let done = unsafe { ioctl_with_ptr(&self.fd, SET_IRQS, set.as_mut_ptr()) };
        checked(done).map(drop)
    }

    /// Puts it into the state that it has after power-on, if it can do that.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn reset(&self) -> io::Result<()> {
        if !self.can_reset {
            return Ok(());
        }
        // SAFETY: it takes nothing.
        #[expect(unsafe_code, reason = "an ioctl")]
        let done = unsafe { ioctl(&self.fd, RESET) };
        checked(done).map(drop)
    }

    /// Reads at `offset`; what cannot be read is ones, as on a bus where nothing answers.
    pub fn read(&self, region: &Region, offset: u64, data: &mut [u8]) {
        let inside = offset.saturating_add(data.len() as u64) <= region.bytes;
        let read = inside.then(|| pread(&self.fd, &mut *data, region.start.saturating_add(offset)));
        if !matches!(read, Some(Ok(count)) if count == data.len()) {
            data.fill(0xff);
        }
    }

    /// Writes at `offset`; what cannot be written is dropped.
    pub fn write(&self, region: &Region, offset: u64, data: &[u8]) {
        if offset.saturating_add(data.len() as u64) <= region.bytes {
            let _ = pwrite(&self.fd, data, region.start.saturating_add(offset));
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
        // SAFETY: the kernel chooses an unused range, so no existing reference points into it; it
        // is only ever given to KVM.
        #[expect(unsafe_code, reason = "a new mapping is a raw range")]
        let start =
            unsafe { mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, &self.fd, start) }?;
        Ok(Mapping { start: start.cast(), bytes })
    }
}

impl Drop for HostDevice {
    fn drop(&mut self) {
        // The next who has it resets it, too, and the kernel does when it is closed.
        let _ = self.reset();
    }
}

/// One area that is all there is.
fn whole(bytes: u64) -> Vec<Range<u64>> {
    iter::once(0..bytes).collect()
}

/// The areas that the kernel names, if it does; `rest` is what follows the region's description.
fn sparse_areas(cap_offset: u32, rest: &[u8]) -> Option<Vec<Range<u64>>> {
    let at = |offset: usize, bytes: usize| {
        let start = offset.checked_sub(size_of::<vfio_region_info>())?;
        rest.get(start..start.checked_add(bytes)?)
    };
    let double = |offset: usize| Some(u32::from_le_bytes(at(offset, 4)?.try_into().ok()?));
    let long = |offset: usize| Some(u64::from_le_bytes(at(offset, 8)?.try_into().ok()?));
    let mut offset = cap_offset as usize;
    for _ in 0..AREAS_MAX {
        if offset == 0 {
            return None;
        }
        // Identity and version, the next capability, then the number of areas.
        if double(offset)? & 0xffff == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = (double(offset.checked_add(8)?)? as usize).min(AREAS_MAX);
            let first = offset.checked_add(16)?;
            let area = |index: usize| {
                let start = long(first.checked_add(index.checked_mul(16)?)?)?;
                let bytes = long(first.checked_add(index.checked_mul(16)?.checked_add(8)?)?)?;
                Some(start..start.checked_add(bytes)?)
            };
            return (0..count).map(area).collect();
        }
        offset = double(offset.checked_add(4)?)? as usize;
    }
    None
}

const _: () = assert!(offset_of!(RegionInfo, rest) == size_of::<vfio_region_info>());
