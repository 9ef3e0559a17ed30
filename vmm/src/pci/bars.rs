//! BARs: the pieces of guest address space that devices answer at.
//!
//! They are placed here once, as firmware would do it; a guest may place them anew, and anywhere
//! within the windows that it was told of.

use std::cmp::Reverse;
use std::ops::Range;

/// BARs that a device has at most.
pub const BARS_MAX: usize = 6;

/// The largest BAR that has room: 128 GiB.
pub const BAR_BYTES_MAX: u64 = 128 << 30;

/// The most ports that one BAR has (PCI Local Bus 3.0, 6.2.5.1 "Address Maps").
const PORTS_MAX: u64 = 256;

/// What of the flags of a BAR of memory a guest is shown: its width and whether it may be
/// prefetched.
const MEMORY_FLAGS: u8 = 0xe;
/// The only flag of one of ports.
const PORTS_FLAG: u8 = 1;

/// How wide a BAR's address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Below 4 GiB.
    Memory32,
    /// Anywhere. It takes the place of two.
    Memory64,
    /// Among the ports.
    Ports,
}

/// What a BAR's address is an address of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// Memory, and what stands in its place.
    Memory,
    /// I/O ports.
    Ports,
}

/// What there is to know of a BAR beside its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarShape {
    /// Its length: a power of two, at least 16, or 4 if it is one of ports.
    pub bytes: u64,
    /// How wide its address is.
    pub kind: BarKind,
    /// The low bits of its register.
    pub flags: u8,
}

impl BarShape {
    /// A BAR of `bytes` whose register has the low bits of `register`.
    pub fn new(register: u32, bytes: u64) -> Self {
        let [low, ..] = register.to_le_bytes();
        let (kind, flags) = match low {
            _ if low & PORTS_FLAG != 0 => (BarKind::Ports, PORTS_FLAG),
            _ if low & 4 == 0 => (BarKind::Memory32, low & MEMORY_FLAGS),
            _ => (BarKind::Memory64, low & MEMORY_FLAGS),
        };
        Self { bytes, kind, flags }
    }

    /// Whether it can be put into a machine.
    pub fn is_possible(&self) -> bool {
        let lengths = match self.kind {
            BarKind::Memory32 => 16..=1 << 31,
            BarKind::Memory64 => 16..=BAR_BYTES_MAX,
            BarKind::Ports => 4..=PORTS_MAX,
        };
        self.bytes.is_power_of_two() && lengths.contains(&self.bytes)
    }

    /// What its address is one of.
    pub fn space(&self) -> Space {
        match self.kind {
            BarKind::Memory32 | BarKind::Memory64 => Space::Memory,
            BarKind::Ports => Space::Ports,
        }
    }

    /// The bits of its register that are the address.
    pub fn address_bits(&self) -> u64 {
        match self.kind {
            BarKind::Memory32 => 0xffff_fff0,
            BarKind::Memory64 => !0xf,
            BarKind::Ports => 0xffff_fffc,
        }
    }
}

/// The guest addresses that BARs can have.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above all memory.
    pub high: Range<u64>,
    /// Among the ports.
    pub ports: Range<u64>,
}

impl Windows {
    /// Whether a BAR at `start` is wholly in one of them.
    pub fn hold(&self, start: u64, shape: BarShape) -> bool {
        let end = start.saturating_add(shape.bytes);
        self.of(shape.space()).any(|window| window.start <= start && end <= window.end)
    }

    /// Whether an address is in one of them.
    pub fn contain(&self, space: Space, address: u64) -> bool {
        self.of(space).any(|window| window.contains(&address))
    }

    fn of(&self, space: Space) -> impl Iterator<Item = &Range<u64>> {
        match space {
            Space::Memory => [Some(&self.low), Some(&self.high)],
            Space::Ports => [Some(&self.ports), None],
        }
        .into_iter()
        .flatten()
    }

    /// A place for each of `shapes`, or None if they do not all fit.
    ///
    /// The large ones come first, each at a multiple of its size, so that nothing is lost between.
    pub fn place(&self, shapes: &[BarShape]) -> Option<Vec<u64>> {
        let mut order: Vec<usize> = (0..shapes.len()).collect();
        order.sort_by_key(|&index| Reverse(shapes[index].bytes));
        let Self { mut low, mut high, mut ports } = self.clone();
        let mut places = vec![0; shapes.len()];
        for index in order {
            let shape = shapes[index];
            let window = match shape.kind {
                BarKind::Memory32 => &mut low,
                BarKind::Memory64 => &mut high,
                BarKind::Ports => &mut ports,
            };
            let start = window.start.checked_next_multiple_of(shape.bytes)?;
            let end = start.checked_add(shape.bytes).filter(|&end| end <= window.end)?;
            places[index] = start;
            window.start = end;
        }
        Some(places)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOWS: Windows = Windows {
        low: 0xd800_0000..0xf800_0000,
        high: 256 << 30..512 << 30,
        ports: 0xc000..0x1_0000,
    };

    fn bar(register: u32, bytes: u64) -> BarShape {
        BarShape::new(register, bytes)
    }

    #[test]
    fn bars_lie_at_multiples_of_their_size_and_apart() {
        let shapes = [
            bar(0, 4096),
            bar(0xc, 128 << 30),
            bar(0, 1 << 20),
            bar(4, 16 << 10),
            bar(4, 32),
            bar(1, 8),
            bar(1, 32),
        ];

        let places = WINDOWS.place(&shapes).unwrap();

        assert_eq!(
            places,
            [
                0xd810_0000,
                256 << 30,
                0xd800_0000,
                384 << 30,
                (384 << 30) + (16 << 10),
                0xc020,
                0xc000
            ]
        );
        for (shape, &place) in shapes.iter().zip(&places) {
            assert!(place.is_multiple_of(shape.bytes));
            assert!(WINDOWS.hold(place, *shape));
        }
    }

    #[test]
    fn what_has_no_room_is_not_placed() {
        for shapes in [vec![bar(0, 1 << 30)], vec![bar(4, 128 << 30); 3]] {
            assert_eq!(WINDOWS.place(&shapes), None);
        }
    }

    #[test]
    fn sizes_are_powers_of_two_and_ports_are_few() {
        for (register, bytes, is_possible) in [
            (0, 16, true),
            (0, 8, false),
            (0, 0, false),
            (0, 4096 + 16, false),
            (0, 1 << 32, false),
            (4, 1 << 32, true),
            (4, BAR_BYTES_MAX * 2, false),
            (1, 2, false),
            (1, 8, true),
            (1, 256, true),
            (1, 512, false),
        ] {
            assert_eq!(bar(register, bytes).is_possible(), is_possible, "{bytes}");
        }
    }

    #[test]
    fn a_bar_in_no_window_is_not_held() {
        for (start, bytes) in [
            (0, 4096),
            (0xd7ff_f000, 4096),
            (0xf7ff_f000, 8192),
            (512 << 30, 4096),
            (u64::MAX - 4095, 4096),
        ] {
            assert!(!WINDOWS.hold(start, bar(0, bytes)), "{start:#x}");
        }
        assert!(!WINDOWS.hold(0xd800_0000, bar(1, 8)), "that is memory");
        assert!(!WINDOWS.hold(0xc000, bar(0, 16)), "those are ports");
    }
}
