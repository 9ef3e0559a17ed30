//! Devices of the host, lent to a guest (Documentation/driver-api/vfio.rst of Linux 6.12).
//!
//! The host gives devices away in groups: those that its IOMMU cannot tell apart. A [`Container`]
//! is the address space that the devices of some groups see: guest memory, at the addresses that
//! the guest has it. All of it is mapped, and so pinned, for nobody knows where a device will
//! write next. [`Container::open`] opens one device of its groups.
//!
//! The descriptors of container and groups are handed over: which devices these are is not for
//! this crate to choose.

pub mod device;
pub mod passthrough;

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE,
    VFIO_GROUP_FLAGS_VIABLE, VFIO_TYPE1v2_IOMMU, vfio_group_status, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap,
};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref, ioctl_with_val,
};

use crate::memory::{MemoryListener, MemoryRange};
use crate::spec::VfioFiles;
use device::HostDevice;

/// Longest name of a device: a PCI address or a UUID.
pub const NAME_BYTES_MAX: usize = 64;

const GET_API_VERSION: u64 = request(0);
const CHECK_EXTENSION: u64 = request(1);
const SET_IOMMU: u64 = request(2);
const GROUP_GET_STATUS: u64 = request(3);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_GET_DEVICE_FD: u64 = request(6);
const IOMMU_MAP_DMA: u64 = request(13);
const IOMMU_UNMAP_DMA: u64 = request(14);

/// The number of an ioctl of VFIO's.
const fn request(number: u64) -> u64 {
    ((b';' as u64) << 8) | (VFIO_BASE as u64 + number)
}

/// Why a device cannot be lent.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The kernel has no IOMMU that can be used this way, or it is none.
    #[error("The file given as /dev/vfio/vfio cannot map memory for devices (type 1 version 2)")]
    NoIommu,
    /// Someone else has a device of the group.
    #[error(
        "IOMMU group number {index} of the machine is not free: each device in it has to be \
         bound to vfio-pci or to no driver"
    )]
    NotViable {
        /// Which of the groups handed over.
        index: usize,
    },
    /// The kernel refused.
    #[error("VFIO failed to {what}")]
    Vfio {
        /// What was asked.
        what: &'static str,
        /// What it says.
        #[source]
        source: io::Error,
    },
    /// What the device says of itself is nothing that a guest can be shown.
    #[error("Device {name} cannot be passed on: {why}")]
    Device {
        /// Its name.
        name: String,
        /// What is the matter.
        why: String,
    },
}

impl VfioError {
    fn vfio(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Vfio { what, source }
    }
}

/// Groups of devices, and the memory they see.
#[derive(Debug)]
pub struct Container {
    // In the order in which they have to be closed.
    groups: Vec<OwnedFd>,
    container: OwnedFd,
    _kvm: DeviceFd,
}

impl Container {
    /// Takes the groups, tells KVM of them, and lets their devices see nothing yet.
    ///
    /// # Errors
    ///
    /// [`VfioError`].
    pub fn new(files: VfioFiles, vm: &VmFd) -> Result<Arc<Self>, VfioError> {
        let VfioFiles { container, groups } = files;
        // SAFETY: it takes nothing.
        #[expect(unsafe_code, reason = "an ioctl")]
        let version = unsafe { ioctl(&container, GET_API_VERSION) };
        let wanted = VFIO_TYPE1v2_IOMMU.into();
        // SAFETY: it takes a number.
        #[expect(unsafe_code, reason = "an ioctl")]
        let has_type1 = unsafe { ioctl_with_val(&container, CHECK_EXTENSION, wanted) };
        if version != VFIO_API_VERSION.cast_signed() || has_type1 != 1 {
            return Err(VfioError::NoIommu);
        }
        for (index, group) in groups.iter().enumerate() {
            join(group, &container, index)?;
        }
        // SAFETY: it takes a number.
        #[expect(unsafe_code, reason = "an ioctl")]
        let set = unsafe { ioctl_with_val(&container, SET_IOMMU, wanted) };
        checked(set).map_err(VfioError::vfio("use the IOMMU"))?;
        let kvm = tell_kvm(&groups, vm).map_err(VfioError::vfio("tell KVM of devices"))?;
        Ok(Arc::new(Self { groups, container, _kvm: kvm }))
    }

    /// Opens the device `name` of group `group`.
    ///
    /// # Errors
    ///
    /// [`VfioError`].
    pub fn open(&self, group: usize, name: &str) -> Result<HostDevice, VfioError> {
        let failed = |why: &str| VfioError::Device { name: name.into(), why: why.into() };
        let group = self.groups.get(group).ok_or_else(|| failed("no such group was given"))?;
        if name.len() >= NAME_BYTES_MAX || name.contains('\0') {
            return Err(failed("that is no name of a device"));
        }
        let mut bytes = [0_u8; NAME_BYTES_MAX];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the name ends with a zero, being shorter than the array.
        #[expect(unsafe_code, reason = "an ioctl")]
        let fd = unsafe { ioctl_with_ptr(group, GROUP_GET_DEVICE_FD, bytes.as_ptr().cast_mut()) };
        let fd = checked(fd).map_err(VfioError::vfio("open a device"))?;
        // SAFETY: the descriptor is new and nobody else's.
        #[expect(unsafe_code, reason = "the ioctl gives a descriptor as a number")]
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        HostDevice::new(fd, name)
    }
}

/// A container as a listener: what is guest memory, the devices see.
#[derive(Debug)]
pub struct DmaMap(pub Arc<Container>);

impl MemoryListener for DmaMap {
    fn added(&mut self, range: MemoryRange) -> io::Result<()> {
        let map = vfio_iommu_type1_dma_map {
            argsz: bytes_of::<vfio_iommu_type1_dma_map>(),
            flags: VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
            vaddr: range.host_start,
            iova: range.guest_start,
            size: range.bytes,
        };
        // SAFETY: the range is one live mapping of guest memory, to which no Rust reference
        // points; the kernel keeps its pages until they are unmapped or the container is closed,
        // whatever this process does with its mapping.
        #[expect(unsafe_code, reason = "an ioctl that lets devices write to memory")]
        let mapped = unsafe { ioctl_with_ref(&self.0.container, IOMMU_MAP_DMA, &map) };
        checked(mapped).map(drop)
    }

    fn removed(&mut self, range: MemoryRange) {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: bytes_of::<vfio_iommu_type1_dma_unmap>(),
            iova: range.guest_start,
            size: range.bytes,
            ..vfio_iommu_type1_dma_unmap::default()
        };
        // The kernel refuses only what was not mapped.
        // SAFETY: the structure says how long it is.
        #[expect(unsafe_code, reason = "an ioctl")]
        let _ = unsafe { ioctl_with_mut_ref(&self.0.container, IOMMU_UNMAP_DMA, &mut unmap) };
    }

    fn pins(&self) -> bool {
        true
    }
}

fn join(group: &OwnedFd, container: &OwnedFd, index: usize) -> Result<(), VfioError> {
    let mut status =
        vfio_group_status { argsz: bytes_of::<vfio_group_status>(), ..Default::default() };
    // SAFETY: the structure says how long it is.
    #[expect(unsafe_code, reason = "an ioctl")]
    let read = unsafe { ioctl_with_mut_ref(group, GROUP_GET_STATUS, &mut status) };
    checked(read).map_err(VfioError::vfio("look at a group"))?;
    if status.flags & VFIO_GROUP_FLAGS_VIABLE == 0 {
        return Err(VfioError::NotViable { index });
    }
    let fd = container.as_raw_fd();
    // SAFETY: the kernel reads one descriptor, which is there.
    #[expect(unsafe_code, reason = "an ioctl")]
    let joined = unsafe { ioctl_with_ref(group, GROUP_SET_CONTAINER, &fd) };
    checked(joined).map(drop).map_err(VfioError::vfio("put a group into a container"))
}

/// KVM has to know whether a device looks into caches.
fn tell_kvm(groups: &[OwnedFd], vm: &VmFd) -> io::Result<DeviceFd> {
    let errno = |error: kvm_ioctls::Error| io::Error::from_raw_os_error(error.errno());
    let mut create =
        kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
    let device = vm.create_device(&mut create).map_err(errno)?;
    for group in groups {
        let fd = group.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: KVM_DEV_VFIO_FILE_ADD.into(),
            addr: (&raw const fd).expose_provenance() as u64,
        };
        device.set_device_attr(&attribute).map_err(errno)?;
    }
    Ok(device)
}

fn bytes_of<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// What an ioctl returned, or why it failed.
fn checked(returned: i32) -> io::Result<i32> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(returned) }
}
