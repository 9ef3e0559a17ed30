//! Guest memory: the one place that knows where it is, and tells those who have to follow.
//!
//! RAM is anonymous memory, mapped in as many ranges as the layout has: only there does Linux give
//! huge pages without being told to by the host's administrator (docs/decisions, "Guest memory").
//! Everyone who keeps a picture of it (KVM's slots, DMA maps; a dirty log, snapshots) is a
//! [`MemoryListener`] and hears of each range before the guest can reach it.
//!
//! What devices work with is a [`Mem`] that never changes: when a range is added or removed there
//! is a new one. A range is unmapped when the last that has it is gone, so whoever is at it still,
//! such as a disk with a request in flight, has nothing pulled from under it.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion, VolatileSlice,
};

use crate::layout;

/// Guest memory as devices see it.
pub type Mem = GuestMemoryMmap<()>;

/// A page of the host, the least that it gives and takes.
const PAGE_BYTES: usize = 4096;

/// Someone who keeps a picture of guest memory.
pub trait MemoryListener: Debug + Send {
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

    /// Whether it reaches pages by an address of its own, so that a page that is given back to the
    /// host and taken again would be two: one for the guest, one for the listener.
    fn pins(&self) -> bool {
        false
    }
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
    mem: Arc<Mem>,
    listeners: Vec<Box<dyn MemoryListener>>,
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
    /// There is memory already, or what was to be removed is not there.
    #[error("Guest memory at {guest_start:#x}, {bytes} bytes, is not what it was taken for")]
    Range {
        /// Where in the guest.
        guest_start: u64,
        /// How long.
        bytes: u64,
        /// What vm-memory says.
        #[source]
        source: GuestRegionCollectionError,
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
    /// Reserves `bytes` of memory and tells `listeners` of each range. The host gives pages when
    /// the guest first touches them.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]; nothing stays reserved.
    pub fn new(bytes: u64, listeners: Vec<Box<dyn MemoryListener>>) -> Result<Self, MemoryError> {
        let mut memory = Self { mem: Arc::new(Mem::new()), listeners };
        let mut added = Vec::new();
        for (guest_start, bytes) in layout::ram_ranges(bytes) {
            if let Err(error) = memory.add(guest_start, bytes) {
                for (guest_start, bytes) in added.into_iter().rev() {
                    memory.remove(guest_start, bytes)?;
                }
                return Err(error);
            }
            added.push((guest_start, bytes));
        }
        Ok(memory)
    }

    /// Adds a range.
    ///
    /// # Errors
    ///
    /// [`MemoryError`]; nothing has changed.
    pub fn add(&mut self, guest_start: u64, bytes: u64) -> Result<(), MemoryError> {
        let region = Arc::new(map(guest_start, bytes)?);
        let range = range(&region);
        let mem = self.mem.insert_region(region);
        let mem = mem.map_err(|source| MemoryError::Range { guest_start, bytes, source })?;
        for index in 0..self.listeners.len() {
            if let Err(source) = self.listeners[index].added(range) {
                self.listeners[..index].iter_mut().rev().for_each(|l| l.removed(range));
                return Err(MemoryError::Listener { guest_start, bytes, source });
            }
        }
        self.mem = Arc::new(mem);
        Ok(())
    }

    /// Removes a range that was added as such. Its pages are the host's again when no device is
    /// at them any more.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Range`] if it is not there; nothing has changed.
    pub fn remove(&mut self, guest_start: u64, bytes: u64) -> Result<(), MemoryError> {
        let removed = self.mem.remove_region(GuestAddress(guest_start), bytes);
        let (mem, region) =
            removed.map_err(|source| MemoryError::Range { guest_start, bytes, source })?;
        let range = range(&region);
        self.listeners.iter_mut().rev().for_each(|listener| listener.removed(range));
        self.mem = Arc::new(mem);
        Ok(())
    }

    /// Gives pages back, as [`give_back`], unless a listener needs them where they are.
    pub fn give_back(&self, guest_start: GuestAddress, bytes: usize) -> usize {
        let is_pinned = self.listeners.iter().any(|listener| listener.pins());
        if is_pinned { 0 } else { give_back(&self.mem, guest_start, bytes) }
    }

    /// What devices and loaders work with.
    pub fn mem(&self) -> &Arc<Mem> {
        &self.mem
    }
}

fn range(region: &GuestRegionMmap<()>) -> MemoryRange {
    MemoryRange {
        guest_start: region.start_addr().raw_value(),
        bytes: region.len(),
        host_start: region.as_ptr() as u64,
    }
}

/// Gives the pages of a range of the guest back to the host; the guest reads them as zeroes, or
/// as text where its kernel's is mapped (`kernel_text.rs`). What is not guest memory is left alone,
/// as in [`give_back_slice`]. Returns the bytes given back.
pub fn give_back(mem: &Mem, guest_start: GuestAddress, bytes: usize) -> usize {
    let slices = GuestMemoryBackend::get_slices(mem, guest_start, bytes);
    slices.map_while(Result::ok).map(|slice| give_back_slice(&slice)).sum()
}

/// Gives the whole pages in a piece of guest memory back to the host; parts of pages at either end
/// stay. Returns the bytes given back, whether or not the host had given pages for them.
pub fn give_back_slice<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> usize {
    let start = slice.ptr_guard_mut().as_ptr();
    let skipped = start.addr().wrapping_neg() % PAGE_BYTES;
    let length = slice.len().saturating_sub(skipped) / PAGE_BYTES * PAGE_BYTES;
    if length == 0 {
        return 0;
    }
    let pages = start.wrapping_add(skipped).cast();
    // SAFETY: the pages lie in mappings that the slice borrows, private, and anonymous or of a
    // sealed file: what is read there next is zeroes, or what the file has. No Rust reference
    // points into guest memory, whose content can change at any time.
    #[expect(unsafe_code, reason = "madvise takes a raw range")]
    let done = unsafe { madvise(pages, length, Advice::LinuxDontNeed) };
    if done.is_ok() { length } else { 0 }
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
    use std::sync::Mutex;

    use vm_memory::Bytes;

    use super::*;

    /// What a listener has heard of and not lost again, and how much it takes.
    #[derive(Debug, Clone)]
    struct Seen {
        ranges: Arc<Mutex<Vec<(u64, u64)>>>,
        ranges_max: usize,
    }

    impl Seen {
        fn new(ranges_max: usize) -> Self {
            Self { ranges: Arc::default(), ranges_max }
        }

        fn ranges(&self) -> Vec<(u64, u64)> {
            self.ranges.lock().unwrap().clone()
        }

        fn listening(&self) -> Vec<Box<dyn MemoryListener>> {
            vec![Box::new(self.clone())]
        }
    }

    impl MemoryListener for Seen {
        fn added(&mut self, range: MemoryRange) -> io::Result<()> {
            let mut ranges = self.ranges.lock().unwrap();
            if ranges.len() == self.ranges_max {
                return Err(io::Error::other("no more"));
            }
            ranges.push((range.guest_start, range.bytes));
            Ok(())
        }

        fn removed(&mut self, range: MemoryRange) {
            let last = self.ranges.lock().unwrap().pop();
            assert_eq!(last, Some((range.guest_start, range.bytes)));
        }
    }

    #[test]
    fn six_gib_lie_around_the_hole_and_are_told_to_listeners() {
        let seen = Seen::new(2);
        let memory = Memory::new(6 << 30, seen.listening()).unwrap();

        assert_eq!(seen.ranges(), layout::ram_ranges(6 << 30));
        let mem = memory.mem();
        mem.write_obj(7_u64, GuestAddress(layout::HOLE_START - 8)).unwrap();
        mem.write_obj(8_u64, GuestAddress(layout::HIGH_RAM_START)).unwrap();
        assert!(mem.write_obj(9_u64, GuestAddress(layout::HOLE_START)).is_err());
        assert_eq!(mem.read_obj::<u64>(GuestAddress(layout::HOLE_START - 8)).unwrap(), 7);
    }

    #[test]
    fn a_listener_that_does_not_follow_keeps_nothing() {
        for ranges_max in [0, 1] {
            let seen = Seen::new(ranges_max);
            let first = Seen::new(9);
            let listeners = [first.listening(), seen.listening()].into_iter().flatten();

            let error = Memory::new(6 << 30, listeners.collect()).unwrap_err();

            let (start, bytes) = layout::ram_ranges(6 << 30)[ranges_max];
            assert!(
                matches!(error, MemoryError::Listener { guest_start, bytes: b, .. }
                    if (guest_start, b) == (start, bytes)),
                "{error:?}"
            );
            assert_eq!((seen.ranges(), first.ranges()), (vec![], vec![]));
        }
    }

    const LATER: u64 = 8 << 30;

    #[test]
    fn a_range_comes_and_goes_and_those_at_it_keep_it() {
        let seen = Seen::new(2);
        let mut memory = Memory::new(64 << 20, seen.listening()).unwrap();
        let before = Arc::clone(memory.mem());

        memory.add(LATER, 2 << 20).unwrap();
        let with = Arc::clone(memory.mem());
        with.write_obj(7_u64, GuestAddress(LATER)).unwrap();
        assert_eq!(seen.ranges(), [(0, 64 << 20), (LATER, 2 << 20)]);
        assert!(before.write_obj(7_u64, GuestAddress(LATER)).is_err());

        memory.remove(LATER, 2 << 20).unwrap();
        assert_eq!(seen.ranges(), [(0, 64 << 20)]);
        assert!(memory.mem().read_obj::<u64>(GuestAddress(LATER)).is_err());
        assert_eq!(with.read_obj::<u64>(GuestAddress(LATER)).unwrap(), 7);

        memory.add(LATER, 2 << 20).unwrap();
        assert_eq!(memory.mem().read_obj::<u64>(GuestAddress(LATER)).unwrap(), 0, "a new one");
    }

    #[test]
    fn a_range_is_added_once_and_removed_as_it_was() {
        let mut memory = Memory::new(64 << 20, Vec::new()).unwrap();
        memory.add(LATER, 4 << 20).unwrap();

        for (start, bytes) in [(LATER, 4 << 20), (LATER + (2 << 20), 4 << 20), (0, 2 << 20)] {
            let refused = memory.add(start, bytes);
            assert!(matches!(refused, Err(MemoryError::Range { .. })), "{refused:?}");
        }
        for (start, bytes) in [(LATER, 2 << 20), (LATER + (2 << 20), 2 << 20), (1 << 40, 4 << 20)] {
            let refused = memory.remove(start, bytes);
            assert!(matches!(refused, Err(MemoryError::Range { .. })), "{refused:?}");
        }
        memory.remove(LATER, 4 << 20).unwrap();
    }

    #[test]
    fn pages_that_are_given_back_read_as_zeroes_and_their_neighbours_stay() {
        let memory = Memory::new(64 << 20, Vec::new()).unwrap();
        let mem = memory.mem();
        let page = |index: u64| GuestAddress(0x10_0000 + index * 4096);
        for index in 0..4 {
            mem.write_obj(index + 1, page(index)).unwrap();
        }

        // The end of page 0, pages 1 and 2, the beginning of page 3.
        let given = give_back(mem, GuestAddress(page(0).0 + 8), 3 * 4096);

        assert_eq!(given, 2 * 4096);
        let left = [0, 1, 2, 3].map(|index| mem.read_obj::<u64>(page(index)).unwrap());
        assert_eq!(left, [1, 0, 0, 4]);
        for (start, bytes) in [(64 << 20, 4096), (u64::MAX, 4096), (0, 0), (8, 4096)] {
            assert_eq!(give_back(mem, GuestAddress(start), bytes), 0, "{start:#x}");
        }
        assert_eq!(give_back(mem, GuestAddress(0), usize::MAX), 64 << 20);
    }
}
