//! The guest-physical map and the I/O ports: every fixed address of a machine.
//!
//! ```text
//! 0x0000_0500  GDT                 0xd000_0000  start of the 32-bit hole, virtio-mmio slots
//! 0x0000_7000  zero page           0xd001_3000  what their registers say, to be read
//! 0x0000_9000  page tables         0xd400_0000  PCI configuration space
//! 0x0002_0000  command line        0xd800_0000  low window for BARs
//! 0x000e_0000  ACPI tables         0xfec0_0000  IOAPIC
//! 0x0100_0000  kernel              0xfee0_0000  local APICs
//!                                  0xfffb_d000  KVM's TSS and identity map
//!                                  4 GiB        high RAM, room for memory added later,
//!                                               high window for BARs
//! ```
//!
//! The initramfs lies at the top of low RAM.

use std::ops::Range;

/// Where the GDT of the boot CPU is written.
pub const GDT_START: u64 = 0x500;
/// The boot parameters that the kernel is handed (Documentation/arch/x86/zero-page.rst).
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Page tables that map the first GiB one to one: three pages.
pub const PAGE_TABLES_START: u64 = 0x9000;
/// The kernel's command line, zero-terminated.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Most bytes of the command line, its terminator included: COMMAND_LINE_SIZE of x86 Linux.
pub const CMDLINE_BYTES_MAX: usize = 2048;
/// First byte of low memory that is not RAM to the guest: the EBDA of old.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables; the root pointer is their first bytes.
pub const ACPI_START: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_BYTES_MAX: u64 = 0x2_0000;
/// RAM goes on here after the legacy area.
pub const RAM_AFTER_LEGACY: u64 = 1 << 20;

/// Start of the 32-bit hole: RAM stops here and goes on at [`HIGH_RAM_START`].
pub const HOLE_START: u64 = HIGH_RAM_START - (768 << 20);
/// First virtio-mmio register block.
pub const MMIO_START: u64 = HOLE_START;
/// Bytes of a virtio-mmio slot: one page.
pub const MMIO_SLOT_BYTES: u64 = 4 << 10;
/// Most virtio devices: as many as there are interrupt lines for them.
pub const MMIO_SLOTS: u64 = 19;
/// Where a guest reads what the slots' registers say, without an exit.
pub const SHOWN_START: u64 = MMIO_START + MMIO_SLOTS * MMIO_SLOT_BYTES;
/// Bytes of that for each slot.
pub const SHOWN_BYTES: u64 = 512;
/// Configuration space of the PCI bus, if there is one.
pub const ECAM_START: u64 = 0xd400_0000;
/// Its bytes: one bus.
pub const ECAM_BYTES: u64 = 1 << 20;
/// Where BARs below 4 GiB can be.
pub const PCI_LOW_START: u64 = 0xd800_0000;
/// Bytes of that window.
pub const PCI_LOW_BYTES: u64 = 512 << 20;
/// Bytes of the window for BARs above 4 GiB: twice the largest BAR, and so is what it begins at.
pub const PCI_HIGH_BYTES: u64 = 256 << 30;
/// Where BARs of ports can be, if there is a PCI bus: above all fixed ports.
pub const PCI_PORTS_START: u16 = 0xc000;
/// Ports of that window.
pub const PCI_PORTS: u16 = 0x4000;
/// The IOAPIC that KVM emulates.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// The local APIC of each CPU.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Three pages that KVM needs on hosts without unrestricted guests, and one for its identity map.
pub const KVM_TSS_START: u64 = 0xfffb_d000;
/// RAM after the 32-bit hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Memory that is added later begins at a multiple of this: the largest piece that Linux adds to
/// its memory on x86.
pub const HOTPLUG_ALIGN: u64 = 2 << 30;

/// Interrupt line of virtio-mmio slot 0; the lines below are those of old devices.
pub const MMIO_GSI_FIRST: u32 = 5;
/// Lines that the IOAPIC has.
pub const IOAPIC_LINES: u32 = 24;

/// First port of the 16550, if there is one (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// Ports that the 16550 takes.
pub const SERIAL_PORTS: u16 = 8;
/// Interrupt line of the 16550.
pub const SERIAL_GSI: u32 = 4;
/// The guest's agent writes 32-bit reports here.
pub const REPORT_PORT: u16 = 0xb00;
/// The kernel tells here that it patches its text (`text.patch` of kernel-config).
pub const TEXT_PORT: u16 = 0xb04;
/// It is about to.
pub const TEXT_BEFORE: u8 = 1;
/// It has.
pub const TEXT_AFTER: u8 = 2;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7): powers the machine off.
pub const SLEEP_CONTROL_PORT: u16 = 0xb10;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0xb11;
/// ACPI reset register (ACPI 6.5, 4.8.3.6).
pub const RESET_PORT: u16 = 0xb12;
/// What is written there.
pub const RESET_VALUE: u8 = 1;
/// The kernel writes here when it panics (pvpanic; Documentation of QEMU, "pvpanic device").
pub const PANIC_PORT: u16 = 0xb13;
/// The only event that the pvpanic port knows: a panic.
pub const PANIC_EVENT: u8 = 1;

const _: () = assert!(HOLE_START.is_multiple_of(2 << 20), "RAM must end on a huge page");
const _: () = assert!(SHOWN_START + MMIO_SLOTS * SHOWN_BYTES <= ECAM_START);
const _: () = assert!(ECAM_START + ECAM_BYTES <= PCI_LOW_START);
const _: () = assert!(PCI_PORTS_START as u32 + PCI_PORTS as u32 <= 1 << 16);
const _: () = assert!(PCI_PORTS_START > PANIC_PORT && PCI_PORTS_START > SERIAL_PORT);
const _: () = assert!(PCI_LOW_START + PCI_LOW_BYTES <= IOAPIC_START);
const _: () = assert!(MMIO_GSI_FIRST as u64 + MMIO_SLOTS <= IOAPIC_LINES as u64);
const _: () = assert!(PAGE_TABLES_START + 3 * 4096 <= CMDLINE_START);
const _: () = assert!(CMDLINE_START + CMDLINE_BYTES_MAX as u64 <= LOW_RAM_END);
const _: () = assert!(ACPI_START >= LOW_RAM_END);
const _: () = assert!(ACPI_START + ACPI_BYTES_MAX <= RAM_AFTER_LEGACY);

/// The guest-physical address of virtio-mmio slot `slot`, if there is such a slot.
pub fn mmio_slot(slot: u64) -> Option<u64> {
    (slot < MMIO_SLOTS).then(|| MMIO_START + slot * MMIO_SLOT_BYTES)
}

/// Where the guest reads what the registers of slot `slot` say, if there is such a slot.
pub fn shown_slot(slot: u64) -> Option<u64> {
    (slot < MMIO_SLOTS).then(|| SHOWN_START + slot * SHOWN_BYTES)
}

/// The ranges of RAM, as (start, bytes), of a machine with `memory_bytes` in all.
pub fn ram_ranges(memory_bytes: u64) -> Vec<(u64, u64)> {
    if memory_bytes <= HOLE_START {
        vec![(0, memory_bytes)]
    } else {
        vec![(0, HOLE_START), (HIGH_RAM_START, memory_bytes - HOLE_START)]
    }
}

/// Where memory that is added later begins, in a machine with `memory_bytes` at the start.
pub fn hotplug_start(memory_bytes: u64) -> u64 {
    let end =
        memory_bytes + if memory_bytes <= HOLE_START { 0 } else { HIGH_RAM_START - HOLE_START };
    end.max(HIGH_RAM_START).next_multiple_of(HOTPLUG_ALIGN)
}

/// Where BARs above 4 GiB can be, in a machine whose memory, with all that can be added, ends at
/// `memory_end`.
pub fn pci_high(memory_end: u64) -> Range<u64> {
    let start = memory_end.next_multiple_of(PCI_HIGH_BYTES);
    start..start + PCI_HIGH_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_goes_on_at_4_gib() {
        assert_eq!(ram_ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ram_ranges(HOLE_START), [(0, HOLE_START)]);
        let high_bytes = (6 << 30) - HOLE_START;
        assert_eq!(ram_ranges(6 << 30), [(0, HOLE_START), (HIGH_RAM_START, high_bytes)]);
    }

    #[test]
    fn memory_added_later_lies_behind_all_other() {
        for (memory_bytes, start) in
            [(64 << 20, 4_u64 << 30), (HOLE_START, 4 << 30), (HOLE_START + (2 << 20), 6 << 30)]
        {
            assert_eq!(hotplug_start(memory_bytes), start);
        }
        let (high, bytes) = ram_ranges(1 << 40)[1];
        assert!(hotplug_start(1 << 40) >= high + bytes);
    }

    #[test]
    fn slots_end_where_the_interrupt_lines_do() {
        assert_eq!(mmio_slot(0), Some(0xd000_0000));
        assert_eq!(mmio_slot(MMIO_SLOTS - 1), Some(0xd001_2000));
        assert_eq!(mmio_slot(MMIO_SLOTS), None);
    }
}
