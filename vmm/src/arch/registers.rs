//! The registers with which the boot CPU enters the kernel, in long mode at its 64-bit entry.
//!
//! The state is that of "64-bit BOOT PROTOCOL" in Documentation/arch/x86/boot.rst: paging on with
//! one-to-one tables, flat segments, RSI at the boot parameters.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{GDT_START, PAGE_TABLES_START, ZERO_PAGE_START};
use crate::memory::Mem;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// RFLAGS has one bit that is always set.
const RFLAGS_RESERVED: u64 = 1 << 1;

/// Present, writable.
const TABLE_ENTRY: u64 = 3;
/// Present, writable, 2 MiB.
const PAGE_ENTRY: u64 = 0x83;
const PAGE_TABLE_BYTES: u64 = 4096;

/// Selectors of the boot protocol, and what lies behind them.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Of CPUID: the state that XSAVE keeps.
const STATE_LEAF: u32 = 0xd;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;

/// Writes GDT and page tables, which map the first GiB one to one.
///
/// # Errors
///
/// If they lie outside memory.
pub fn write_tables(mem: &Mem) -> Result<(), vm_memory::GuestMemoryError> {
    mem.write_obj(GDT, GuestAddress(GDT_START))?;
    let [top, middle, low] = [0, 1, 2].map(|n| PAGE_TABLES_START + n * PAGE_TABLE_BYTES);
    mem.write_obj(middle | TABLE_ENTRY, GuestAddress(top))?;
    mem.write_obj(low | TABLE_ENTRY, GuestAddress(middle))?;
    let pages: Vec<u8> =
        (0..512_u64).flat_map(|number| (number << 21 | PAGE_ENTRY).to_le_bytes()).collect();
    mem.write_slice(&pages, GuestAddress(low))
}

/// Points the boot CPU at `entry`.
///
/// # Errors
///
/// What KVM says.
pub fn enter_kernel(vcpu: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    let mut special = vcpu.get_sregs()?;
    set_long_mode(&mut special);
    vcpu.set_sregs(&special)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE_START,
        rflags: RFLAGS_RESERVED,
        ..kvm_regs::default()
    })
}

/// Sets the registers that firmware would have set on every CPU.
///
/// # Errors
///
/// What KVM says.
pub fn set_firmware_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let entry = |index, data| kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let entries = [entry(MSR_MISC_ENABLE, FAST_STRINGS)];
    let msrs = Msrs::from_entries(&entries).expect("one entry is below the limit");
    // A register that this host's KVM does not take is one that its guests do not need.
    vcpu.set_msrs(&msrs).map(|_taken| ())
}

/// Has a vCPU keep all state that `leaves` of CPUID tell of (XCR0; SDM volume 1, 13.3 "Enabling the
/// XSAVE Feature Set"), before its kernel says so. Where KVM does not hear of that (SVM as QEMU 7.2
/// emulates it) leaf 0xD would go on to tell the size of less, and the kernel would do without AVX,
/// after a page of warnings.
///
/// # Errors
///
/// What KVM says.
pub fn enable_state_components(vcpu: &VcpuFd, leaves: &CpuId) -> Result<(), kvm_ioctls::Error> {
    let leaf = leaves.as_slice().iter().find(|leaf| leaf.function == STATE_LEAF && leaf.index == 0);
    let components = leaf.map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax));
    if components == 0 {
        return Ok(());
    }
    let mut registers = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    registers.xcrs[0].value = components;
    vcpu.set_xcrs(&registers)
}

fn set_long_mode(special: &mut kvm_sregs) {
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..kvm_segment::default() };
    special.cs = kvm_segment { selector: CODE_SELECTOR, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: DATA_SELECTOR, type_: 0x3, db: 1, ..flat };
    special.ds = data;
    special.es = data;
    special.fs = data;
    special.gs = data;
    special.ss = data;
    special.gdt.base = GDT_START;
    special.gdt.limit = 4 * 8 - 1;
    special.idt.limit = 0;
    special.cr3 = PAGE_TABLES_START;
    special.cr4 |= CR4_PHYSICAL_ADDRESS_EXTENSION;
    special.cr0 |= CR0_PROTECTED | CR0_PAGING;
    special.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
}
