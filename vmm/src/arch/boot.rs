//! Puts kernel, initramfs, command line and boot parameters into guest memory.
//!
//! The kernel is an uncompressed ELF, read straight into place: what the host has in its page
//! cache is copied once, and its text not at all where it is kept ([`Image`]).
//! Documentation/arch/x86/{boot,zero-page}.rst of Linux 6.12.

use std::fs::File;
use std::io::{self, Seek};

use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams, Error as ConfiguratorError};
use linux_loader::loader::{Elf, Error as LoaderError, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::kernel_text::Image;
use crate::layout::{
    ACPI_START, CMDLINE_BYTES_MAX, CMDLINE_START, LOW_RAM_END, RAM_AFTER_LEGACY, ZERO_PAGE_START,
};
use crate::memory::Mem;

/// E820 type of RAM.
const E820_RAM: u32 = 1;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;
/// Archives of an initramfs start at multiples of this (Documentation/driver-api/early-userspace).
const ARCHIVE_ALIGNMENT: u64 = 4;
const PAGE_BYTES: u64 = 4096;

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// No ELF, or one that does not fit.
    #[error("Failed to load the kernel: it has to be an uncompressed x86-64 ELF (vmlinux)")]
    Kernel(#[source] LoaderError),
    /// It could not be read, or memory is too small for it.
    #[error("Failed to read initramfs archive {index}, {bytes} bytes")]
    Initramfs {
        /// Which one.
        index: usize,
        /// How long.
        bytes: u64,
        /// What failed.
        #[source]
        source: io::Error,
    },
    /// Kernel and initramfs do not both fit.
    #[error("Initramfs of {bytes} bytes does not fit between the kernel and {ram_end:#x}")]
    InitramfsTooLarge {
        /// All archives together.
        bytes: u64,
        /// Where low RAM ends.
        ram_end: u64,
    },
    /// More words than the kernel takes.
    #[error("Kernel command line of {bytes} bytes, at most {} fit", CMDLINE_BYTES_MAX - 1)]
    CmdlineTooLong {
        /// How long it is.
        bytes: usize,
    },
    /// A byte that would end it, or that is no text.
    #[error("Kernel command line has a character that is not printable ASCII")]
    CmdlineNotAscii,
    /// Guest memory is smaller than the layout assumes.
    #[error("Failed to write boot parameters")]
    Parameters(#[source] vm_memory::GuestMemoryError),
    /// The same, as linux-loader says it.
    #[error("Failed to write the zero page")]
    ZeroPage(#[source] ConfiguratorError),
}

/// Loads everything and returns the address at which the boot CPU enters the kernel.
///
/// # Errors
///
/// [`BootError`].
pub fn load(
    mem: &Mem,
    kernel: &mut Image<'_>,
    initramfs: &mut [File],
    cmdline: &str,
) -> Result<u64, BootError> {
    let start = Some(GuestAddress(RAM_AFTER_LEGACY));
    let loaded = Elf::load(mem, None, kernel, start).map_err(BootError::Kernel)?;
    let (ramdisk, ramdisk_bytes) = load_initramfs(mem, loaded.kernel_end, initramfs)?;
    write_cmdline(mem, cmdline)?;

    let mut parameters = boot_params {
        hdr: setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            type_of_loader: LOADER_UNDEFINED,
            kernel_alignment: KERNEL_ALIGNMENT,
            cmd_line_ptr: below_4_gib(CMDLINE_START),
            cmdline_size: u32::try_from(cmdline.len()).unwrap_or(0),
            ramdisk_image: below_4_gib(ramdisk),
            ramdisk_size: below_4_gib(ramdisk_bytes),
            ..setup_header::default()
        },
        acpi_rsdp_addr: ACPI_START,
        ..boot_params::default()
    };
    for (slot, (start, end)) in parameters.e820_table.iter_mut().zip(usable_ram(mem)) {
        *slot = boot_e820_entry { addr: start, size: end - start, r#type: E820_RAM };
        parameters.e820_entries += 1;
    }
    let parameters = BootParams::new(&parameters, GuestAddress(ZERO_PAGE_START));
    LinuxBootConfigurator::write_bootparams(&parameters, mem).map_err(BootError::ZeroPage)?;
    Ok(loaded.kernel_load.raw_value())
}

/// Everything but the legacy area, where the ACPI tables are.
fn usable_ram(mem: &Mem) -> impl Iterator<Item = (u64, u64)> {
    let regions = mem.iter().map(|region| {
        let start = region.start_addr().raw_value();
        (start, start + region.len())
    });
    let above = regions.map(|(start, end)| (start.max(RAM_AFTER_LEGACY), end));
    [(0, LOW_RAM_END)].into_iter().chain(above.collect::<Vec<_>>())
}

/// Reads the archives to the top of low RAM; returns where they start and how long they are.
fn load_initramfs(
    mem: &Mem,
    kernel_end: u64,
    archives: &mut [File],
) -> Result<(u64, u64), BootError> {
    let mut lengths = Vec::with_capacity(archives.len());
    for (index, archive) in archives.iter_mut().enumerate() {
        let measure = archive.rewind().and_then(|()| Ok(archive.metadata()?.len()));
        let bytes = measure.map_err(|source| BootError::Initramfs { index, bytes: 0, source })?;
        lengths.push(bytes);
    }
    let bytes = lengths
        .iter()
        .try_fold(0_u64, |sum, length| {
            sum.checked_next_multiple_of(ARCHIVE_ALIGNMENT)?.checked_add(*length)
        })
        .unwrap_or(u64::MAX);
    let ram_end = mem.iter().next().map_or(0, GuestMemoryRegion::len);
    let start = ram_end.checked_sub(bytes).map(|start| start / PAGE_BYTES * PAGE_BYTES);
    let start = start
        .filter(|&start| start >= kernel_end)
        .ok_or(BootError::InitramfsTooLarge { bytes, ram_end })?;
    let mut place = start;
    for (index, (archive, bytes)) in archives.iter_mut().zip(lengths).enumerate() {
        place = place.next_multiple_of(ARCHIVE_ALIGNMENT);
        let length = usize::try_from(bytes).expect("usize is 64 bits wide");
        mem.read_exact_volatile_from(GuestAddress(place), archive, length).map_err(|error| {
            BootError::Initramfs { index, bytes, source: io::Error::other(error) }
        })?;
        place += bytes;
    }
    Ok((start, bytes))
}

fn write_cmdline(mem: &Mem, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= CMDLINE_BYTES_MAX {
        return Err(BootError::CmdlineTooLong { bytes: cmdline.len() });
    }
    if !cmdline.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic()) {
        return Err(BootError::CmdlineNotAscii);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    mem.write_slice(&bytes, GuestAddress(CMDLINE_START)).map_err(BootError::Parameters)
}

fn below_4_gib(value: u64) -> u32 {
    u32::try_from(value).expect("low RAM ends below 4 GiB")
}

#[cfg(test)]
mod tests;
