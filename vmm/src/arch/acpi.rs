//! ACPI tables: the little that a hardware-reduced machine has to say.
//!
//! CPUs and the IOAPIC (MADT), how to power off and reset (FADT), where the virtio-mmio slots and
//! the panic port are (DSDT), and, if there is a PCI bus, where that is (MCFG, DSDT). ACPI 6.5, 5.2
//! "ACPI System Description Tables".

use acpi_tables::aml::AddressSpaceCacheable;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{
    ACPI_BYTES_MAX, ACPI_START, ECAM_BYTES, ECAM_START, IOAPIC_START, LAPIC_START, MMIO_GSI_FIRST,
    MMIO_SLOT_BYTES, PANIC_PORT, RESET_PORT, RESET_VALUE, SERIAL_GSI, SERIAL_PORT, SERIAL_PORTS,
    SHOWN_BYTES, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT, mmio_slot, shown_slot,
};
use crate::memory::Mem;
use crate::pci::bars::Windows;

const OEM_ID: [u8; 6] = *b"OVUM  ";
const OEM_TABLE_ID: [u8; 8] = *b"OVUMVMM ";
const OEM_REVISION: u32 = 1;
/// IA-PC boot architecture flags (ACPI 6.5, 5.2.9.3): there is no VGA and no CMOS clock.
const NO_VGA_NO_CMOS: u16 = 1 << 2 | 1 << 5;
/// Bytes before the first structure of a table.
const HEADER_BYTES: u32 = 36;
/// SLP_TYP of S5, the only sleep state there is.
const SLEEP_TYPE_OFF: u8 = 5;

/// The tables did not fit, or not where they have to be.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More than the layout has room for.
    #[error("ACPI tables take {bytes} bytes, {ACPI_BYTES_MAX} are reserved")]
    TooLarge {
        /// What they take.
        bytes: usize,
    },
    /// Memory ends before them.
    #[error("Failed to write ACPI tables")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// Writes the tables of a machine with `vcpus` CPUs, virtio devices in slots 0 to `devices` and,
/// if asked for, a 16550, and of the PCI bus with `windows`, if there is one. The root pointer is
/// at [`ACPI_START`].
///
/// # Errors
///
/// [`AcpiError`].
pub fn write_tables(
    mem: &Mem,
    vcpus: u8,
    devices: u64,
    serial: bool,
    windows: Option<&Windows>,
) -> Result<(), AcpiError> {
    let bytes = tables(vcpus, devices, serial, windows);
    if bytes.len() as u64 > ACPI_BYTES_MAX {
        return Err(AcpiError::TooLarge { bytes: bytes.len() });
    }
    mem.write_slice(&bytes, GuestAddress(ACPI_START)).map_err(AcpiError::Write)
}

fn tables(vcpus: u8, devices: u64, serial: bool, windows: Option<&Windows>) -> Vec<u8> {
    let mut bytes = vec![0; Rsdp::len()];
    let dsdt_start = append(&mut bytes, &dsdt(devices, serial, windows));
    let fadt_start = append(&mut bytes, &serialized(&fadt(dsdt_start)));
    let madt_start = append(&mut bytes, &serialized(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt_start);
    xsdt.add_entry(madt_start);
    if windows.is_some() {
        xsdt.add_entry(append(&mut bytes, &serialized(&mcfg())));
    }
    let xsdt_start = append(&mut bytes, &serialized(&xsdt));
    let root = serialized(&Rsdp::new(OEM_ID, xsdt_start));
    for (byte, root_byte) in bytes.iter_mut().zip(root) {
        *byte = root_byte;
    }
    bytes
}

/// Appends a table at the next 16-byte boundary and returns its guest address.
fn append(bytes: &mut Vec<u8>, table: &[u8]) -> u64 {
    bytes.resize(bytes.len().next_multiple_of(16), 0);
    let start = ACPI_START + bytes.len() as u64;
    bytes.extend_from_slice(table);
    start
}

fn serialized(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt_start: u64) -> impl Aml {
    let port = |number: u16| {
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(number))
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt_start)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA_NO_CMOS.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let lapic = u32::try_from(LAPIC_START).expect("the layout puts it below 4 GiB");
    let ioapic = u32::try_from(IOAPIC_START).expect("the layout puts it below 4 GiB");
    let controller = LocalInterruptController::Address(lapic);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, controller);
    for index in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(index, index, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, ioapic, 0));
    madt
}

/// One bus of segment 0.
fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(ECAM_START, 0, 0, 0);
    mcfg
}

fn dsdt(devices: u64, serial: bool, windows: Option<&Windows>) -> Vec<u8> {
    let mut body = Vec::new();
    let off = aml::Package::new(vec![&SLEEP_TYPE_OFF]);
    aml::Name::new("_S5_".into(), &off).to_aml_bytes(&mut body);
    let mut children: Vec<Box<dyn Aml>> = vec![Box::new(PanicPort)];
    for slot in 0..devices {
        children.push(Box::new(Slot(slot)));
    }
    if serial {
        children.push(Box::new(Com1));
    }
    if let Some(windows) = windows {
        children.push(Box::new(ConfigurationSpace));
        children.push(Box::new(HostBridge(windows.clone())));
    }
    let children = children.iter().map(|child| &**child).collect();
    aml::Scope::new("_SB_".into(), children).to_aml_bytes(&mut body);

    let mut table = Sdt::new(*b"DSDT", HEADER_BYTES, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&body);
    table.as_slice().to_vec()
}

/// A virtio-mmio device (virtio 1.3, 4.2.1 "MMIO Device Discovery" leaves it to us; Linux knows
/// the id LNRO0005).
struct Slot(u64);

impl Aml for Slot {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let Self(slot) = *self;
        let number = |address: u64| u32::try_from(address).unwrap_or(0);
        let piece = |is_writable, start: Option<u64>, bytes| {
            aml::Memory32Fixed::new(is_writable, number(start.unwrap_or(0)), number(bytes))
        };
        let registers = piece(true, mmio_slot(slot), MMIO_SLOT_BYTES);
        let shown = piece(false, shown_slot(slot), SHOWN_BYTES);
        let line = MMIO_GSI_FIRST + u32::try_from(slot).unwrap_or(0);
        let name = format!("V{slot:03}");
        aml::Device::new(
            name.as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &slot),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &registers,
                        &shown,
                        &aml::Interrupt::new(true, true, false, false, line),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// Where the kernel says that it panicked; Linux knows the id QEMU0001.
struct PanicPort;

impl Aml for PanicPort {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        aml::Device::new(
            "PEVT".into(),
            vec![
                &aml::Name::new("_HID".into(), &"QEMU0001"),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::IO::new(PANIC_PORT, PANIC_PORT, 1, 1)]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The 16550. Without this a kernel writes its own messages there all the same, but programs
/// cannot: on a hardware-reduced machine only interrupts that a table names can be had.
struct Com1;

impl Aml for Com1 {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let ports = u8::try_from(SERIAL_PORTS).unwrap_or(u8::MAX);
        aml::Device::new(
            "COM1".into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
                &aml::Name::new("_UID".into(), &0_u8),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::IO::new(SERIAL_PORT, SERIAL_PORT, 1, ports),
                        &aml::Interrupt::new(true, true, false, false, SERIAL_GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The memory that the MCFG names, as one that is nothing else: Linux believes it only then
/// (PCI Firmware 3.3, 4.1.2 "MCFG Table Description").
struct ConfigurationSpace;

impl Aml for ConfigurationSpace {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let start = u32::try_from(ECAM_START).unwrap_or(0);
        let length = u32::try_from(ECAM_BYTES).unwrap_or(0);
        aml::Device::new(
            "ECAM".into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![&aml::Memory32Fixed::new(
                        true, start, length,
                    )]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The PCI bus. There is no _PRT: interrupts are messages.
struct HostBridge(Windows);

impl Aml for HostBridge {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        let Self(Windows { low, high, ports }) = self;
        let port = |number: u64| u16::try_from(number).unwrap_or(0);
        let double = |address: u64| u32::try_from(address).unwrap_or(0);
        let no_cache = AddressSpaceCacheable::NotCacheable;
        aml::Device::new(
            "PCI0".into(),
            vec![
                &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
                &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
                &aml::Name::new("_UID".into(), &0_u8),
                &aml::Name::new("_SEG".into(), &0_u8),
                &aml::Name::new("_BBN".into(), &0_u8),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::AddressSpace::new_bus_number(0_u16, 0_u16),
                        &aml::AddressSpace::new_io(port(ports.start), port(ports.end - 1), None),
                        &aml::AddressSpace::new_memory(
                            no_cache,
                            true,
                            double(low.start),
                            double(low.end - 1),
                            None,
                        ),
                        &aml::AddressSpace::new_memory(
                            no_cache,
                            true,
                            high.start,
                            high.end - 1,
                            None,
                        ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::windows;

    /// Every table whose signature is in `bytes`, with its length from the header.
    fn table<'b>(bytes: &'b [u8], signature: &[u8; 4]) -> &'b [u8] {
        let start = bytes.windows(4).position(|window| window == signature).unwrap();
        let length = u32::from_le_bytes(bytes[start + 4..start + 8].try_into().unwrap());
        &bytes[start..start + length as usize]
    }

    #[test]
    fn every_table_sums_to_zero() {
        let windows = windows(5 << 40);
        let bytes = tables(32, 19, true, Some(&windows));

        for signature in [b"DSDT", b"FACP", b"APIC", b"XSDT", b"MCFG"] {
            let sum = table(&bytes, signature).iter().fold(0_u8, |sum, &b| sum.wrapping_add(b));
            assert_eq!(sum, 0, "{}", String::from_utf8_lossy(signature));
        }
        let root = &bytes[..Rsdp::len()];
        assert_eq!(root.iter().fold(0_u8, |sum, &b| sum.wrapping_add(b)), 0);
        assert_eq!(&root[..8], b"RSD PTR ");
        assert!(bytes.len() as u64 <= ACPI_BYTES_MAX);
    }

    #[test]
    fn the_madt_lists_every_cpu() {
        let bytes = tables(6, 1, false, None);

        let madt = table(&bytes, b"APIC");
        assert_eq!(madt.len(), 44 + 6 * 8 + 12);
    }
}
