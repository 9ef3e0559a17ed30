//! Guest memory: the one place that knows where it is, and tells those who have to follow.
//!
//! RAM is anonymous memory, mapped in as many ranges as the layout has: only there does Linux give
//! huge pages without being told to by the host's administrator (docs/decisions, "Guest memory").
//! Everyone who keeps a picture of it (KVM's slots today; DMA maps, a dirty log, snapshots) is a
//! [`MemoryListener`] and hears of each range before the guest can reach it.

use std::io;

use rustix::mm::{Advice, madvise};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

use crate::layout;

/// Guest memory as devices see it.
pub type Mem = GuestMemoryMmap<()>;

/// Someone who keeps a picture of guest memory.
pub trait MemoryListener {
    /// A range is about to become part of the guest.
    ///
    /// # Errors
    ///
    /// What kept the listener from following; the range is then not added.
    fn added(&mut self, range: MemoryRange) -> io::Result<()>;

    /// A range that was added is about to be no part of the guest any more. It is still mapped.
    ///
    /// No answer: whoever cannot let go of a range must see to it that the guest runs no more.
    fn removed(&mut self, range: MemoryRange);
}

/// One range of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    /// Where the guest has it.
    pub guest_start: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Where this process has it.
    pub host_start: u64,
}

/// The memory of one machine.
#[derive(Debug)]
pub struct Memory {
    mem: Mem,
}

/// Why there is no memory for a guest.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A range could not be mapped.
    #[error("Failed to map guest memory at {guest_start:#x}, {bytes} bytes")]
    Map {
        /// Where in the guest.
        guest_start: u64,
        /// How long.
        bytes: u64,
        /// What vm-memory says.
        #[source]
        source: MmapRegionError,
    },
    /// A listener did not follow.
    #[error("Failed to add guest memory at {guest_start:#x}, {bytes} bytes")]
    Listener {
        /// Where in the guest.
        guest_start: u64,
        /// How long.
        bytes: u64,
        /// What the listener says.
        #[source]
        source: io::Error,
    },
}

impl Memory {
    /// Reserves `bytes` of memory and tells `listener` of each range. The host gives pages when
    /// the guest first touches them.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]; nothing stays reserved.
    pub fn new(bytes: u64, listener: &mut dyn MemoryListener) -> Result<Self, MemoryError> {
        let ranges = layout::ram_ranges(bytes).into_iter();
        let regions = ranges.map(|(guest_start, bytes)| map(guest_start, bytes));
        let regions = regions.collect::<Result<_, _>>()?;
        let mem = Mem::from_regions(regions).expect("the layout's ranges are sorted and apart");
        let memory = Self { mem };
        for (index, range) in memory.ranges().enumerate() {
            if let Err(source) = listener.added(range) {
                for range in memory.ranges().take(index).collect::<Vec<_>>().into_iter().rev() {
                    listener.removed(range);
                }
                let MemoryRange { guest_start, bytes, .. } = range;
                return Err(MemoryError::Listener { guest_start, bytes, source });
            }
        }
        Ok(memory)
    }

    /// All of it, in the guest's order.
    fn ranges(&self) -> impl Iterator<Item = MemoryRange> {
        self.mem.iter().map(|region| MemoryRange {
            guest_start: region.start_addr().raw_value(),
            bytes: region.len(),
            host_start: region.as_ptr() as u64,
        })
    }

    /// What devices and loaders work with.
    pub fn mem(&self) -> &Mem {
        &self.mem
    }
}

fn map(guest_start: u64, bytes: u64) -> Result<GuestRegionMmap<()>, MemoryError> {
    let length = usize::try_from(bytes).expect("usize is 64 bits wide");
    let mapping = MmapRegion::new(length).map_err(|source| MemoryError::Map {
        guest_start,
        bytes,
        source,
    })?;
    advise(&mapping);
    Ok(GuestRegionMmap::new(mapping, GuestAddress(guest_start))
        .expect("the layout's ranges end below 2^64"))
}

/// Huge pages where the host allows them, and no guest memory in a core dump.
///
/// Advice only: a kernel that was built without either is no reason not to run.
fn advise(mapping: &MmapRegion<()>) {
    for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
        let start = mapping.as_ptr().cast();
        // SAFETY: the range is exactly that of a live mapping, and neither advice changes what
        // the memory holds or whether it may be accessed.
        #[expect(unsafe_code, reason = "madvise takes a raw range")]
        let _ = unsafe { madvise(start, mapping.size(), advice) };
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// What a listener has heard of and not lost again, and how much it takes.
    struct Seen {
        ranges: Vec<(u64, u64)>,
        ranges_max: usize,
    }

    impl MemoryListener for Seen {
        fn added(&mut self, range: MemoryRange) -> io::Result<()> {
            if self.ranges.len() == self.ranges_max {
                return Err(io::Error::other("no more"));
            }
            self.ranges.push((range.guest_start, range.bytes));
            Ok(())
        }

        fn removed(&mut self, range: MemoryRange) {
            assert_eq!(self.ranges.pop(), Some((range.guest_start, range.bytes)));
        }
    }

    #[test]
    fn six_gib_lie_around_the_hole_and_are_told_to_listeners() {
        let mut seen = Seen { ranges: Vec::new(), ranges_max: 2 };
        let memory = Memory::new(6 << 30, &mut seen).unwrap();

        assert_eq!(seen.ranges, layout::ram_ranges(6 << 30));
        let mem = memory.mem();
        mem.write_obj(7_u64, GuestAddress(layout::HOLE_START - 8)).unwrap();
        mem.write_obj(8_u64, GuestAddress(layout::HIGH_RAM_START)).unwrap();
        assert!(mem.write_obj(9_u64, GuestAddress(layout::HOLE_START)).is_err());
        assert_eq!(mem.read_obj::<u64>(GuestAddress(layout::HOLE_START - 8)).unwrap(), 7);
    }

    #[test]
    fn a_listener_that_does_not_follow_keeps_nothing() {
        for ranges_max in [0, 1] {
            let mut seen = Seen { ranges: Vec::new(), ranges_max };

            let error = Memory::new(6 << 30, &mut seen).unwrap_err();

            let (start, bytes) = layout::ram_ranges(6 << 30)[ranges_max];
            assert!(
                matches!(error, MemoryError::Listener { guest_start, bytes: b, .. }
                    if (guest_start, b) == (start, bytes)),
                "{error:?}"
            );
            assert_eq!(seen.ranges, []);
        }
    }
}
