//! A configuration space from the guest's side, made of what hostile devices could say, too.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// An endpoint with MSI, MSI-X, power management and Express, 64-bit BAR 0 and 32-bit BAR 2.
fn device() -> Vec<u8> {
    let mut bytes = vec![0; CONFIG_BYTES_MAX];
    bytes[..4].copy_from_slice(&[0x36, 0x1b, 0x10, 0x00]);
    bytes[STATUS] = STATUS_CAPABILITIES;
    bytes[HEADER_TYPE] = MULTIFUNCTION;
    bytes[BAR_0..BAR_0 + 12].copy_from_slice(&[0x04, 0, 0, 0xfe, 1, 0, 0, 0, 0, 0, 0xbf, 0xfe]);
    bytes[ROM] = 1;
    bytes[INTERRUPT_PIN] = 1;
    bytes[CAPABILITIES] = 0x40;
    bytes[0x40..0x44].copy_from_slice(&[CAP_POWER, 0x50, 3, 0]);
    // Eight vectors, 64-bit addresses, masks.
    bytes[0x50..0x54].copy_from_slice(&[CAP_MSI, 0x70, 0x86, 0x01]);
    bytes[0x70..0x74].copy_from_slice(&[CAP_MSIX, 0x80, 64, 0]);
    bytes[0x74..0x7c].copy_from_slice(&[2, 0x20, 0, 0, 2, 0x30, 0, 0]);
    bytes[0x80..0x84].copy_from_slice(&[CAP_EXPRESS, 0, 2, 0]);
    // AER, then SR-IOV at the end.
    bytes[0x100..0x104].copy_from_slice(&[0x01, 0x00, 0x01, 0x20]);
    bytes[0x200..0x204].copy_from_slice(&[0x10, 0x00, 0x01, 0x00]);
    bytes
}

fn bars() -> [Option<BarShape>; BARS_MAX] {
    let mut bars = [None; BARS_MAX];
    bars[0] = Some(BarShape::new(0x4, 16 << 10));
    bars[2] = Some(BarShape::new(0, 4 << 10));
    bars
}

fn config() -> ConfigSpace {
    ConfigSpace::new(&device(), &bars()).unwrap()
}

fn read<const N: usize>(config: &ConfigSpace, offset: usize) -> [u8; N] {
    let device = device();
    let mut data = [0; N];
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = device.get(offset + index).copied().unwrap_or(0);
    }
    config.read(offset, &mut data);
    data
}

fn flat(ranges: Vec<Range<usize>>) -> Vec<usize> {
    ranges.into_iter().flatten().collect()
}

fn double(config: &ConfigSpace, offset: usize) -> u32 {
    u32::from_le_bytes(read(config, offset))
}

#[test]
fn a_guest_finds_the_size_of_a_bar_and_puts_it_where_it_likes() {
    let mut config = config();
    assert_eq!(double(&config, BAR_0), 4, "nowhere, whatever the host has there");

    for offset in [BAR_0, BAR_0 + 4, BAR_0 + 8, BAR_0 + 12, ROM] {
        assert_eq!(config.write(offset, &[0xff; 4]), []);
    }
    let sizes = [0, 4, 8, 12].map(|offset| double(&config, BAR_0 + offset));
    assert_eq!(sizes, [0xffff_c004, 0xffff_ffff, 0xffff_f000, 0]);
    assert_eq!(double(&config, ROM), 0, "there is no ROM");

    config.place_bar(0, bars()[0].unwrap(), 0x80_0000_4000);
    config.place_bar(2, bars()[2].unwrap(), 0xd800_0000);
    assert_eq!(config.bar(0, bars()[0].unwrap()), 0x80_0000_4000);
    assert_eq!(config.bar(2, bars()[2].unwrap()), 0xd800_0000);
    assert_eq!(double(&config, BAR_0), 0x4004);
}

#[test]
fn identity_is_the_devices_and_what_concerns_the_host_is_not_seen() {
    let mut config = config();

    assert_eq!(double(&config, 0), 0x0010_1b36);
    assert_eq!(read(&config, HEADER_TYPE), [0], "a function that stands alone");
    assert_eq!(read(&config, INTERRUPT_PIN), [0]);
    assert_eq!(double(&config, 0x100), 0x2001_0001, "AER is seen");
    assert_eq!(double(&config, 0x200), 0x0001_0000, "SR-IOV is not");
    for offset in [0, 0x34, 0x40, 0x74, 0x100] {
        let before: [u8; 4] = read(&config, offset);
        assert_eq!(config.write(offset, &[0xff; 4]), [], "{offset:#x}");
        assert_eq!(read(&config, offset), before, "{offset:#x}");
    }
}

#[test]
fn ports_are_found_and_placed_like_memory() {
    let ports = BarShape::new(1, 8);
    let mut bars = bars();
    bars[4] = Some(ports);
    let mut config = ConfigSpace::new(&device(), &bars).unwrap();
    let offset = BAR_0 + 4 * 4;

    config.write(offset, &[0xff; 4]);
    assert_eq!(double(&config, offset), 0xffff_fff9);
    config.place_bar(4, ports, 0xc008);
    config.write(COMMAND, &[1, 0]);

    assert_eq!(double(&config, offset), 0xc009);
    assert_eq!(config.bar(4, ports), 0xc008);
    assert_eq!(config.command(), (COMMAND, 1));
    assert!(config.decodes(Space::Ports) && !config.decodes(Space::Memory));
}

#[test]
fn the_command_register_has_no_pin_and_ports_where_there_are_any() {
    let mut config = config();

    assert_eq!(config.write(COMMAND, &[0xff, 0xff]), []);

    assert_eq!(config.command(), (COMMAND, 0x146));
    assert!(config.decodes(Space::Memory) && !config.decodes(Space::Ports));
    assert_eq!(read(&config, COMMAND), [0x46, 0x01]);
}

#[test]
fn power_management_and_express_reach_the_device() {
    let mut config = config();

    assert_eq!(flat(config.write(0x44, &[0xb; 4])), [0, 1]);
    assert_eq!(flat(config.write(0x88, &[0xb; 2])), [0, 1]);
    assert_eq!(config.write(0x4f, &[0xb; 2]), [], "between two");
}

#[test]
fn msi_is_what_the_guest_wrote_and_no_more_than_the_device_has() {
    let mut config = config();
    assert_eq!(config.msi(), None);

    config.write(0x54, &0xfee0_1004_u32.to_le_bytes());
    config.write(0x5c, &0x41_u16.to_le_bytes());
    config.write(0x52, &(MSI_ENABLE | 7 << 4).to_le_bytes());

    let msi = Msi { address: 0xfee0_1004, data: 0x41, vectors: 8 };
    assert_eq!(config.msi(), Some(msi));
    assert_eq!(u16::from_le_bytes(read(&config, 0x52)) & MSI_MASKABLE, 0);
}

#[test]
fn msix_is_found_and_turned_on() {
    let mut config = config();
    let msix = config.msix().unwrap();
    assert_eq!((msix.vectors, msix.table, msix.pending), (65, (2, 0x2000), (2, 0x3000)));
    assert_eq!(config.msix_state(), (false, false));

    assert_eq!(config.write(0x72, &(MSIX_ENABLE | MSIX_MASK).to_le_bytes()), []);

    assert_eq!(config.msix_state(), (true, true));
    assert_eq!(u16::from_le_bytes(read(&config, 0x72)), MSIX_ENABLE | MSIX_MASK | 64);
}

#[test]
fn what_is_no_endpoint_is_refused() {
    let mut bridge = device();
    bridge[HEADER_TYPE] = 1;
    let refused = ConfigSpace::new(&bridge, &bars()).unwrap_err();
    assert_eq!(refused, ConfigError::Bridge { header_type: 1 });

    let refused = ConfigSpace::new(&[0; 64], &bars()).unwrap_err();
    assert_eq!(refused, ConfigError::Size { bytes: 64 });
}

proptest! {
    /// Lists that run in circles or out of the space, capabilities that overlap: whatever a device
    /// says, a guest writes neither header, nor BARs, nor interrupts of the device itself.
    #[test]
    fn nothing_that_is_ours_reaches_any_device(
        noise in vec(any::<u8>(), CONFIG_BYTES_MIN),
        is_express in any::<bool>(),
        writes in vec((0..CONFIG_BYTES_MAX + 8, vec(any::<u8>(), 1..9)), 1..64),
    ) {
        let mut bytes = noise;
        bytes[STATUS] |= STATUS_CAPABILITIES;
        bytes[HEADER_TYPE] &= MULTIFUNCTION;
        if is_express {
            bytes = bytes.repeat(CONFIG_BYTES_MAX / CONFIG_BYTES_MIN);
        }
        let mut config = ConfigSpace::new(&bytes, &bars()).unwrap();
        for (offset, data) in writes {
            let passed = config.write(offset, &data);
            for at in passed.into_iter().flatten().map(|index| offset + index) {
                prop_assert!((HEADER_BYTES..CONFIG_BYTES_MIN).contains(&at), "{at:#x}");
                prop_assert_eq!(config.ours[at], 0, "{:#x}", at);
            }
            let mut read = vec![0; data.len()];
            config.read(offset, &mut read);
            prop_assert!(config.msi().is_none_or(|msi| msi.vectors <= 32));
            prop_assert!(config.msix().is_none_or(|msix| msix.vectors <= 2048));
            let bar = bars()[0].unwrap();
            prop_assert!(config.bar(0, bar).is_multiple_of(bar.bytes));
        }
    }
}
