//! Devices of the host, lent to a guest (Documentation/driver-api/vfio.rst of Linux 6.12).
//!
//! The host gives devices away in groups: those that its IOMMU cannot tell apart. A [`Container`]
//! is the address space that the devices of a machine see: guest memory, at the addresses that the
//! guest has it. All of it is mapped, and so pinned, for nobody knows where a device will write
//! next. [`Container::open`] opens a device, and its group with it.
//!
//! Kernels have one or both of two ways to do so: a file for each group, and `/dev/vfio/vfio` for
//! the address space; or a file for each device, and iommufd. Where both are, it is iommufd: the
//! other way is what the kernel keeps for programs that do not know it yet. All devices of a
//! machine go the same way, mediated ones too, for a kernel that has files has one for each device.
//!
//! The kernel is asked by `vfio-ioctls`, which opens all those files itself: this is the one place
//! of this crate that reaches files by their path.

pub mod device;
pub mod mapping;
pub mod passthrough;

use std::fmt::{self, Debug, Formatter};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::Arc;

use iommufd_ioctls::IommuFd;
use kvm_bindings::{kvm_create_device, kvm_device_type_KVM_DEV_TYPE_VFIO};
use kvm_ioctls::VmFd;
use vfio_ioctls::{VfioContainer, VfioDeviceFd, VfioError as Refusal, VfioIommufd, VfioOps};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{MemoryListener, MemoryRange};
use device::{HostDevice, Region};
use mapping::Mapping;

/// Longest name of a device: a PCI address or a UUID.
pub const NAME_BYTES_MAX: usize = 64;

/// Where sysfs lists the devices that can be lent.
const LISTS: [&str; 2] = ["/sys/bus/pci/devices", "/sys/bus/mdev/devices"];

/// Address spaces for groups of devices.
const GROUPS: &str = "/dev/vfio/vfio";

/// Address spaces for devices that have files of their own, and where those are.
const IOMMUFD: &str = "/dev/iommu";
const DEVICE_FILES: &str = "/dev/vfio/devices";

/// Why a device cannot be lent.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// KVM knows nothing of VFIO.
    #[error("KVM cannot be told of devices of the host")]
    Kvm(#[source] kvm_ioctls::Error),
    /// The kernel has no IOMMU that can be used this way, or the file is not there.
    #[error("{file} cannot map memory for devices")]
    Container {
        /// The file.
        file: &'static str,
        /// What is the matter.
        #[source]
        source: Refusal,
    },
    /// Someone else has a device of its group.
    #[error(
        "The IOMMU group of device {path} is not free: each device in it has to be bound to \
         vfio-pci or to no driver"
    )]
    NotViable {
        /// The device.
        path: PathBuf,
    },
    /// Another machine has it, or another process.
    #[error("Device {path} is in use, or another device of its IOMMU group is")]
    InUse {
        /// The device.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("Failed to open device {path}")]
    Open {
        /// The device.
        path: PathBuf,
        /// What it says.
        #[source]
        source: Refusal,
    },
    /// Its registers cannot be the guest's.
    #[error("Failed to map registers of device {name}")]
    Map {
        /// The device.
        name: String,
        /// What mmap(2) says.
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

/// What stands behind a device in a guest: one of the host, or whoever wants to see what a guest
/// can make it do.
pub trait Backend: Debug + Send {
    /// What the host calls it.
    fn name(&self) -> &str;

    /// What it has at `index`, a number of `linux/vfio.h`; nothing if it has nothing there.
    fn region(&self, index: u32) -> Region;

    /// How many interrupts of the kind `index` it has.
    fn interrupts(&self, index: u32) -> u32;

    /// Lets it raise `events`, the first interrupts of the kind `index` and no more than it has;
    /// none are none. One kind is the host's own: it wants the device back.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    fn raise(&self, index: u32, events: &[&EventFd]) -> io::Result<()>;

    /// Reads at `offset`; what cannot be read is ones, as on a bus where nothing answers.
    fn read(&self, region: &Region, offset: u64, data: &mut [u8]);

    /// Writes at `offset`; what cannot be written is dropped.
    fn write(&self, region: &Region, offset: u64, data: &[u8]);

    /// Maps `area` of a region, whole pages of it, into this process, which does not touch it.
    ///
    /// # Errors
    ///
    /// What mmap(2) says.
    fn map(&self, region: &Region, area: &Range<u64>) -> io::Result<Mapping>;
}

/// Whether a path is one that sysfs lists a device at. No link is followed that is not sysfs's.
pub fn is_device_path(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let has_name = (1..NAME_BYTES_MAX).contains(&name.len()) && !name.contains('\0');
    // Compared as a whole, so that it is not relative, and has no `..` or anything else in it.
    has_name && LISTS.iter().any(|list| path.as_os_str() == Path::new(list).join(name).as_os_str())
}

/// The memory that devices see. Its devices keep it.
#[derive(Clone)]
pub struct Container {
    ops: Arc<dyn VfioOps>,
    way: Way,
}

/// How the kernel gives devices away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A file for each group.
    Groups,
    /// A file for each device.
    Files,
}

impl Debug for Container {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container").field("way", &self.way).finish_non_exhaustive()
    }
}

impl Container {
    /// One for the devices at `paths` in sysfs, without any yet, of which KVM will know: it has to,
    /// whether a device looks into caches.
    ///
    /// # Errors
    ///
    /// [`VfioError`].
    pub fn new<'a>(
        vm: &VmFd,
        mut paths: impl Iterator<Item = &'a Path>,
    ) -> Result<Self, VfioError> {
        let mut create =
            kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
        let kvm = vm.create_device(&mut create).map_err(VfioError::Kvm)?;
        let kvm = Arc::new(VfioDeviceFd::new_from_kvm(kvm));
        if Path::new(IOMMUFD).exists() && paths.all(has_file) {
            Self::of_files(kvm)
        } else {
            Self::of_groups(Some(kvm))
        }
    }

    fn of_groups(kvm: Option<Arc<VfioDeviceFd>>) -> Result<Self, VfioError> {
        let container = VfioContainer::new(kvm);
        let container =
            container.map_err(|source| VfioError::Container { file: GROUPS, source })?;
        Ok(Self { ops: Arc::new(container), way: Way::Groups })
    }

    fn of_files(kvm: Arc<VfioDeviceFd>) -> Result<Self, VfioError> {
        let iommufd = IommuFd::new().map_err(Refusal::NewVfioIommufd);
        let container = iommufd.and_then(|fd| VfioIommufd::new(Arc::new(fd), None, Some(kvm)));
        let container =
            container.map_err(|source| VfioError::Container { file: IOMMUFD, source })?;
        Ok(Self { ops: Arc::new(container), way: Way::Files })
    }

    /// Opens the device at `path` in sysfs. Memory can be mapped once the first is open.
    ///
    /// # Errors
    ///
    /// [`VfioError`].
    pub fn open(&self, path: &Path) -> Result<HostDevice, VfioError> {
        HostDevice::open(path, self)
    }
}

/// Whether there is a file for the device at `path` (Documentation/driver-api/vfio.rst, "VFIO
/// Device cdev").
fn has_file(path: &Path) -> bool {
    let mut entries = fs::read_dir(path.join("vfio-dev")).into_iter().flatten().flatten();
    let is_there = |name| Path::new(DEVICE_FILES).join(name).exists();
    entries.next().is_some_and(|entry| is_there(entry.file_name()))
}

impl VfioError {
    /// Why the device at `path` could not be opened.
    fn open(path: &Path, source: Refusal) -> Self {
        let path = path.into();
        match source {
            Refusal::GroupViable => Self::NotViable { path },
            Refusal::OpenGroup(error, _) if error.kind() == io::ErrorKind::ResourceBusy => {
                Self::InUse { path }
            }
            // There is no file of a group in which vfio-pci has no device.
            Refusal::OpenGroup(error, _) if error.kind() == io::ErrorKind::NotFound => {
                Self::NotViable { path }
            }
            Refusal::VfioDeviceBindIommufd(_) => Self::refused(path, source),
            source => Self::Open { path, source },
        }
    }

    /// Why a device cannot be had by its file, of which the kernel says that it is not permitted or
    /// not valid, whatever the reason. To whoever asks by the group it says more.
    fn refused(path: PathBuf, source: Refusal) -> Self {
        match Container::of_groups(None).and_then(|groups| groups.open(&path)) {
            Err(known @ (Self::NotViable { .. } | Self::InUse { .. })) => known,
            _nothing_known => Self::Open { path, source },
        }
    }
}

/// A container as a listener: what is guest memory, the devices see.
#[derive(Debug)]
pub struct DmaMap(pub Container);

impl MemoryListener for DmaMap {
    fn added(&mut self, range: MemoryRange) -> io::Result<()> {
        let bytes = usize::try_from(range.bytes).map_err(io::Error::other)?;
        let start = usize::try_from(range.host_start).map_err(io::Error::other)?;
        let start = ptr::with_exposed_provenance_mut(start);
        // SAFETY: the range is one live mapping of guest memory, to which no Rust reference
        // points; the kernel keeps its pages until they are unmapped or the container is closed,
        // whatever this process does with its mapping.
        #[expect(unsafe_code, reason = "devices may write to this memory from now on")]
        let mapped = unsafe { self.0.ops.vfio_dma_map(range.guest_start, bytes, start) };
        mapped.map_err(io::Error::other)
    }

    fn removed(&mut self, range: MemoryRange) {
        // The kernel refuses only what is not mapped, or not any more.
        if let Ok(bytes) = usize::try_from(range.bytes) {
            let _ = self.0.ops.vfio_dma_unmap(range.guest_start, bytes);
        }
    }

    fn pins(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_named_by_where_sysfs_lists_it_and_by_nothing_else() {
        for path in [
            "/sys/bus/pci/devices/0000:03:00.0",
            "/sys/bus/mdev/devices/83b8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        ] {
            assert!(is_device_path(path.as_ref()), "{path}");
        }
        let long = format!("/sys/bus/pci/devices/{}", "x".repeat(NAME_BYTES_MAX));
        for path in [
            "",
            "0000:03:00.0",
            "/sys/bus/pci/devices",
            "/sys/bus/pci/devices/",
            "/sys/bus/pci/devices/..",
            "/sys/bus/pci/devices/../devices/0000:03:00.0",
            "/sys/bus/pci/devices/0000:03:00.0/",
            "/sys/bus/pci/devices/0000:03:00.0\0",
            "/sys/bus/pci/drivers/0000:03:00.0",
            "sys/bus/pci/devices/0000:03:00.0",
            &long,
        ] {
            assert!(!is_device_path(path.as_ref()), "{path}");
        }
    }
}
