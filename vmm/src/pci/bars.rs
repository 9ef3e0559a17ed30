//! BARs: the pieces of guest address space that devices answer at.
//!
//! They are placed here once, as firmware would do it; a guest may place them anew, and anywhere
//! within the two windows that it was told of.

use std::cmp::Reverse;
use std::ops::Range;

/// BARs that a device has at most.
pub const BARS_MAX: usize = 6;

/// The largest BAR that has room: 128 GiB.
pub const BAR_BYTES_MAX: u64 = 128 << 30;

/// What of the flags of a BAR a guest is shown: its width and whether it may be prefetched.
const FLAGS: u8 = 0xe;

/// How wide a BAR's address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Below 4 GiB.
    Memory32,
    /// Anywhere. It takes the place of two.
    Memory64,
}

/// What there is to know of a BAR beside its address. Ports are not passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarShape {
    /// Its length: a power of two, at least 16.
    pub bytes: u64,
    /// How wide its address is.
    pub kind: BarKind,
    /// The low bits of its register.
    pub flags: u8,
}

impl BarShape {
    /// A BAR of `bytes` whose register has the low bits of `register`; None if it is one of ports.
    pub fn new(register: u32, bytes: u64) -> Option<Self> {
        let [low, ..] = register.to_le_bytes();
        let kind = if low & 4 == 0 { BarKind::Memory32 } else { BarKind::Memory64 };
        (low & 1 == 0).then_some(Self { bytes, kind, flags: low & FLAGS })
    }

    /// Whether it can be put into a machine.
    pub fn is_possible(&self) -> bool {
        let max = match self.kind {
            BarKind::Memory32 => 1 << 31,
            BarKind::Memory64 => BAR_BYTES_MAX,
        };
        self.bytes.is_power_of_two() && (16..=max).contains(&self.bytes)
    }
}

/// The guest addresses that BARs can have.
#[derive(Debug, Clone)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above all memory.
    pub high: Range<u64>,
}

impl Windows {
    /// Whether a BAR of `bytes` at `start` is wholly in one of them.
    pub fn hold(&self, start: u64, bytes: u64) -> bool {
        let end = start.saturating_add(bytes);
        [&self.low, &self.high].iter().any(|window| window.start <= start && end <= window.end)
    }

    /// Whether an address is in one of them.
    pub fn contain(&self, address: u64) -> bool {
        self.low.contains(&address) || self.high.contains(&address)
    }

    /// A place for each of `shapes`, or None if they do not all fit.
    ///
    /// The large ones come first, each at a multiple of its size, so that nothing is lost between.
    pub fn place(&self, shapes: &[BarShape]) -> Option<Vec<u64>> {
        let mut order: Vec<usize> = (0..shapes.len()).collect();
        order.sort_by_key(|&index| Reverse(shapes[index].bytes));
        let (mut low, mut high) = (self.low.clone(), self.high.clone());
        let mut places = vec![0; shapes.len()];
        for index in order {
            let shape = shapes[index];
            let window = match shape.kind {
                BarKind::Memory32 => &mut low,
                BarKind::Memory64 => &mut high,
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

    const WINDOWS: Windows = Windows { low: 0xd800_0000..0xf800_0000, high: 256 << 30..512 << 30 };

    fn bar(register: u32, bytes: u64) -> BarShape {
        BarShape::new(register, bytes).unwrap()
    }

    #[test]
    fn bars_lie_at_multiples_of_their_size_and_apart() {
        let shapes =
            [bar(0, 4096), bar(0xc, 128 << 30), bar(0, 1 << 20), bar(4, 16 << 10), bar(4, 32)];

        let places = WINDOWS.place(&shapes).unwrap();

        assert_eq!(
            places,
            [0xd810_0000, 256 << 30, 0xd800_0000, 384 << 30, (384 << 30) + (16 << 10)]
        );
        for (shape, &place) in shapes.iter().zip(&places) {
            assert!(place.is_multiple_of(shape.bytes));
            assert!(WINDOWS.hold(place, shape.bytes));
        }
    }

    #[test]
    fn what_has_no_room_is_not_placed() {
        for shapes in [vec![bar(0, 1 << 30)], vec![bar(4, 128 << 30); 3]] {
            assert_eq!(WINDOWS.place(&shapes), None);
        }
    }

    #[test]
    fn ports_are_no_bar_and_sizes_are_powers_of_two() {
        assert_eq!(BarShape::new(0x1001, 32), None);
        for (register, bytes, is_possible) in [
            (0, 16, true),
            (0, 8, false),
            (0, 0, false),
            (0, 4096 + 16, false),
            (0, 1 << 32, false),
            (4, 1 << 32, true),
            (4, BAR_BYTES_MAX * 2, false),
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
            assert!(!WINDOWS.hold(start, bytes), "{start:#x}");
        }
    }
}
