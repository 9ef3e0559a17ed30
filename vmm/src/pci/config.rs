//! Configuration space of one device, as a guest sees it (PCI Local Bus 3.0, chapter 6).
//!
//! Most of what is read is the device's own. Over it lies an image: bits that are ours to answer,
//! because what they say about the host is nothing to a guest (where BARs are, where interrupts
//! go), or because a guest must not have them at all. Two more masks say what a write does: bits
//! of the image that change, and bytes that reach the device. Whatever neither names stays as it
//! is, so a new kind of register is read-only until someone has thought about it.
//!
//! Nothing here touches a device: [`ConfigSpace::write`] says which bytes are to be passed on.

use std::ops::Range;

use super::bars::{BARS_MAX, BarKind, BarShape, Space};

/// Bytes of the configuration space of PCI.
pub const CONFIG_BYTES_MIN: usize = 256;
/// Bytes of that of PCI Express.
pub const CONFIG_BYTES_MAX: usize = 4096;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const BAR_0: usize = 0x10;
const CARDBUS: usize = 0x28;
const ROM: usize = 0x30;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
/// First byte behind the header.
pub const HEADER_BYTES: usize = 0x40;
/// First byte of the extended capabilities.
const EXTENDED: usize = 0x100;

const COMMAND_PORTS: u16 = 1;
const COMMAND_MEMORY: u16 = 1 << 1;
/// Memory decoding, bus mastering, parity, SERR; no interrupt pin to turn off. Ports are decoded
/// where there are any.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const MULTIFUNCTION: u8 = 1 << 7;

const CAP_POWER: u8 = 0x01;
const CAP_VPD: u8 = 0x03;
const CAP_MSI: u8 = 0x05;
const CAP_VENDOR: u8 = 0x09;
const CAP_EXPRESS: u8 = 0x10;
const CAP_MSIX: u8 = 0x11;
const CAP_ADVANCED: u8 = 0x13;

/// Extended capabilities that change what other functions there are, or what a BAR's size is.
const EXTENDED_HIDDEN: [u16; 3] = [0x0e, 0x10, 0x15];

/// As many capabilities as have room: each starts at a multiple of 4.
const CAPABILITIES_MAX: usize = (CONFIG_BYTES_MIN - HEADER_BYTES) / 4;
const EXTENDED_MAX: usize = (CONFIG_BYTES_MAX - EXTENDED) / 4;

const MSI_ENABLE: u16 = 1;
const MSI_WIDE: u16 = 1 << 7;
const MSI_MASKABLE: u16 = 1 << 8;
const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASK: u16 = 1 << 14;

/// Why a device's configuration space cannot be shown to a guest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Neither PCI's nor PCI Express's.
    #[error("its configuration space has {bytes} bytes, {CONFIG_BYTES_MIN} or more are needed")]
    Size {
        /// What it has.
        bytes: usize,
    },
    /// A bridge, which has devices behind it.
    #[error("it is a bridge (header type {header_type:#04x}): only endpoints can be passed on")]
    Bridge {
        /// What it says it is.
        header_type: u8,
    },
}

/// The MSI-X capability of a device (PCI Local Bus 3.0, 6.8.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsixShape {
    /// Where the capability is.
    offset: usize,
    /// Vectors that the table has, 1 to 2048.
    pub vectors: u16,
    /// BAR that the table is in, and its offset there.
    pub table: (usize, u64),
    /// BAR that the pending bits are in, and their offset there.
    pub pending: (usize, u64),
}

/// What the guest has asked MSI to be (PCI Local Bus 3.0, 6.8.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Msi {
    /// Where a vector's message goes.
    pub address: u64,
    /// What the first vector's message says.
    pub data: u16,
    /// Vectors, a power of two up to 32.
    pub vectors: u16,
}

/// The configuration space of one device.
#[derive(Debug)]
pub struct ConfigSpace {
    image: Vec<u8>,
    /// Bits that are read from the image, not from the device.
    ours: Vec<u8>,
    /// Bits of the image that the guest writes.
    writable: Vec<u8>,
    /// Bytes that reach the device when they are written.
    passed: Vec<bool>,
    msi: Option<usize>,
    msix: Option<MsixShape>,
}

impl ConfigSpace {
    /// What a guest sees of a device that now has `bytes` and the BARs `bars`.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn new(bytes: &[u8], bars: &[Option<BarShape>; BARS_MAX]) -> Result<Self, ConfigError> {
        let length = if bytes.len() >= CONFIG_BYTES_MAX { CONFIG_BYTES_MAX } else { bytes.len() };
        if length < CONFIG_BYTES_MIN {
            return Err(ConfigError::Size { bytes: length });
        }
        let header_type = bytes[HEADER_TYPE];
        if header_type & !MULTIFUNCTION != 0 {
            return Err(ConfigError::Bridge { header_type });
        }
        let mut config = Self {
            image: bytes[..length].to_vec(),
            ours: vec![0; length],
            writable: vec![0; length],
            passed: vec![false; length],
            msi: None,
            msix: None,
        };
        config.shape_header(bars);
        config.shape_capabilities();
        config.hide_extended();
        Ok(config)
    }

    /// Fills in what a guest reads at `offset`, where the device itself has `data`.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(index);
            *byte = match (self.image.get(at), self.ours.get(at)) {
                (Some(image), Some(ours)) => *byte & !ours | image & ours,
                _ => 0xff,
            };
        }
    }

    /// The guest writes `data` at `offset`. Returns what of that is for the device, as ranges of
    /// `data`.
    pub fn write(&mut self, offset: usize, data: &[u8]) -> Vec<Range<usize>> {
        let mut passed: Vec<Range<usize>> = Vec::new();
        for (index, byte) in data.iter().enumerate() {
            let at = offset.saturating_add(index);
            let (Some(image), Some(&writable)) = (self.image.get_mut(at), self.writable.get(at))
            else {
                break;
            };
            *image = *image & !writable | byte & writable;
            if self.passed[at] {
                match passed.last_mut() {
                    Some(last) if last.end == index => last.end = index.saturating_add(1),
                    _ => passed.push(index..index.saturating_add(1)),
                }
            }
        }
        passed
    }

    /// Bytes there are.
    pub fn bytes(&self) -> usize {
        self.image.len()
    }

    /// The command register, as it has to be in the device, and where.
    pub fn command(&self) -> (usize, u16) {
        (COMMAND, self.word(COMMAND) & (COMMAND_WRITABLE | COMMAND_PORTS))
    }

    /// Whether the device answers at its BARs of a kind.
    pub fn decodes(&self, space: Space) -> bool {
        let bit = match space {
            Space::Memory => COMMAND_MEMORY,
            Space::Ports => COMMAND_PORTS,
        };
        self.word(COMMAND) & bit != 0
    }

    /// Where the guest has put a BAR.
    pub fn bar(&self, index: usize, shape: BarShape) -> u64 {
        let offset = BAR_0.saturating_add(index.saturating_mul(4));
        let high = match shape.kind {
            BarKind::Memory32 | BarKind::Ports => 0,
            BarKind::Memory64 => self.double(offset.saturating_add(4)),
        };
        (u64::from(high) << 32 | u64::from(self.double(offset))) & shape.address_bits()
    }

    /// Puts a BAR at `address`, as firmware would.
    pub fn place_bar(&mut self, index: usize, shape: BarShape, address: u64) {
        let offset = BAR_0.saturating_add(index.saturating_mul(4));
        let bytes = address.to_le_bytes();
        let length = if shape.kind == BarKind::Memory64 { 8 } else { 4 };
        // Only address bits change, as if the guest had written them.
        self.write(offset, &bytes[..length]);
    }

    /// The MSI-X capability, if there is one.
    pub fn msix(&self) -> Option<MsixShape> {
        self.msix
    }

    /// Whether the guest wants MSI-X, and whether it holds all vectors back.
    pub fn msix_state(&self) -> (bool, bool) {
        let control = self.msix.map_or(0, |msix| self.word(msix.offset.saturating_add(2)));
        (control & MSIX_ENABLE != 0, control & MSIX_MASK != 0)
    }

    /// What the guest wants MSI to be, if it wants it.
    pub fn msi(&self) -> Option<Msi> {
        let offset = self.msi?;
        let at = |relative: usize| offset.saturating_add(relative);
        let control = self.word(at(2));
        let wide = control & MSI_WIDE != 0;
        let high = if wide { u64::from(self.double(at(8))) << 32 } else { 0 };
        // Neither more than the device has nor more than there can be.
        let log2 = (control >> 4 & 7).min(control >> 1 & 7).min(5);
        (control & MSI_ENABLE != 0).then(|| Msi {
            address: high | u64::from(self.double(at(4))),
            data: self.word(at(if wide { 12 } else { 8 })),
            vectors: 1 << log2,
        })
    }

    /// A pin would need an interrupt that is held until the guest has answered it: no device of
    /// today needs one.
    fn shape_header(&mut self, bars: &[Option<BarShape>; BARS_MAX]) {
        let has_ports = bars.iter().flatten().any(|bar| bar.space() == Space::Ports);
        let command = COMMAND_WRITABLE | if has_ports { COMMAND_PORTS } else { 0 };
        self.take(COMMAND, &command.to_le_bytes(), &[0; 2]);
        self.take(HEADER_TYPE, &[0], &[0]);
        self.take(BAR_0, &[0; 4 * BARS_MAX], &[0; 4 * BARS_MAX]);
        self.take(CARDBUS, &[0; 4], &[0; 4]);
        self.take(ROM, &[0; 4], &[0; 4]);
        self.take(INTERRUPT_LINE, &[0xff], &[0]);
        self.take(INTERRUPT_PIN, &[0], &[0]);
        for (index, shape) in bars.iter().enumerate() {
            let Some(shape) = shape else { continue };
            let offset = BAR_0.saturating_add(index.saturating_mul(4));
            // Address bits below the size read as zeroes: so a guest finds out how large it is.
            let writable = (!shape.bytes.saturating_sub(1) & shape.address_bits()).to_le_bytes();
            let length = if shape.kind == BarKind::Memory64 { 8 } else { 4 };
            let mut image = [0; 8];
            image[0] = shape.flags;
            self.take(offset, &writable[..length], &image[..length]);
        }
    }

    /// Walks the capabilities; the list is the device's, and so are its mistakes.
    fn shape_capabilities(&mut self) {
        let has_list = self.image[STATUS] & STATUS_CAPABILITIES != 0;
        let mut offset = usize::from(self.image[CAPABILITIES] & !3);
        for _ in 0..if has_list { CAPABILITIES_MAX } else { 0 } {
            if offset < HEADER_BYTES {
                return;
            }
            let next = usize::from(self.image[offset.saturating_add(1)] & !3);
            match self.image[offset] {
                CAP_MSI => self.shape_msi(offset),
                CAP_MSIX => self.shape_msix(offset),
                CAP_POWER => self.pass(offset, 4..6),
                CAP_VPD => self.pass(offset, 2..8),
                CAP_EXPRESS => self.pass(offset, 8..0x3c),
                CAP_ADVANCED => self.pass(offset, 4..5),
                CAP_VENDOR => {
                    let length = usize::from(self.image[offset.saturating_add(2).min(0xff)]);
                    self.pass(offset, 3..length);
                }
                _ => {}
            }
            offset = next;
        }
    }

    /// Vectors have no masks of their own: nothing needs them, and MSI-X has them.
    fn shape_msi(&mut self, offset: usize) {
        if offset.saturating_add(14) > CONFIG_BYTES_MIN || self.msi.is_some() {
            return;
        }
        let control = self.word(offset.saturating_add(2)) & !(MSI_MASKABLE | MSI_ENABLE | 7 << 4);
        let writable = MSI_ENABLE | 7 << 4;
        self.take(offset.saturating_add(2), &writable.to_le_bytes(), &control.to_le_bytes());
        let (address, data): (&[u8], usize) = if control & MSI_WIDE == 0 {
            (&[0xfc, 0xff, 0xff, 0xff], 8)
        } else {
            (&[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], 12)
        };
        self.take(offset.saturating_add(4), address, &[0; 8][..address.len()]);
        self.take(offset.saturating_add(data), &[0xff; 2], &[0; 2]);
        self.msi = Some(offset);
    }

    fn shape_msix(&mut self, offset: usize) {
        if offset.saturating_add(12) > CONFIG_BYTES_MIN || self.msix.is_some() {
            return;
        }
        let control = self.word(offset.saturating_add(2)) & 0x7ff;
        let writable = MSIX_ENABLE | MSIX_MASK;
        self.take(offset.saturating_add(2), &writable.to_le_bytes(), &control.to_le_bytes());
        let place = |value: u32| ((value & 7) as usize, u64::from(value & !7));
        self.msix = Some(MsixShape {
            offset,
            vectors: control.saturating_add(1),
            table: place(self.double(offset.saturating_add(4))),
            pending: place(self.double(offset.saturating_add(8))),
        });
    }

    /// What is hidden stays in the list, with an identity that means nothing.
    fn hide_extended(&mut self) {
        let mut offset = EXTENDED;
        for _ in 0..EXTENDED_MAX {
            if offset < EXTENDED || offset.saturating_add(4) > self.bytes() {
                return;
            }
            if EXTENDED_HIDDEN.contains(&self.word(offset)) {
                self.take(offset, &[0; 2], &[0; 2]);
            }
            offset = usize::from(self.word(offset.saturating_add(2)) >> 4 & !3);
        }
    }

    /// Makes bytes ours: `image` is read, and of that the bits `writable` can be written.
    fn take(&mut self, offset: usize, writable: &[u8], image: &[u8]) {
        for (index, (writable, image)) in writable.iter().zip(image).enumerate() {
            let at = offset.saturating_add(index);
            self.ours[at] = 0xff;
            self.writable[at] = *writable;
            self.image[at] = *image;
            self.passed[at] = false;
        }
    }

    /// Lets writes of bytes of a capability reach the device.
    fn pass(&mut self, offset: usize, bytes: Range<usize>) {
        let end = offset.saturating_add(bytes.end).min(CONFIG_BYTES_MIN);
        let start = offset.saturating_add(bytes.start).min(end);
        for at in start..end {
            // A list that runs into itself gives away nothing that is ours.
            self.passed[at] = self.ours[at] == 0 && at >= HEADER_BYTES;
        }
    }

    fn word(&self, offset: usize) -> u16 {
        let byte = |at: usize| self.image.get(at).copied().unwrap_or(0);
        u16::from_le_bytes([byte(offset), byte(offset.saturating_add(1))])
    }

    fn double(&self, offset: usize) -> u32 {
        u32::from(self.word(offset.saturating_add(2))) << 16 | u32::from(self.word(offset))
    }
}

#[cfg(test)]
mod tests;
