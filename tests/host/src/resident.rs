//! What a worker has in memory beside its guest's.

use std::ops::Range;

use ovum_vmm::layout::ram_ranges;

use crate::mappings::Mapping;

/// Guest memory is told by its size: so much in one piece, or two if it does not fit below the
/// devices' addresses, of the first of which parts can be mapped from the kernel's text. The worker
/// itself has no such piece.
#[derive(Debug, Clone, Copy)]
pub struct Resident {
    /// All that is mapped, the program and its libraries included.
    pub mib: f64,
    /// What no other process has as well.
    pub own_mib: f64,
}

impl Resident {
    /// Of the worker `pid`, whose guest has booted with `guest_mib`.
    pub fn of(pid: u32, guest_mib: u32) -> Self {
        let ranges = ram_ranges(u64::from(guest_mib) << 20);
        let low_bytes = ranges[0].1;
        let least_bytes = ranges.iter().map(|(_, bytes)| *bytes).fold(low_bytes, u64::min);
        let mappings = Mapping::all_of(pid);
        let is_guest = |mapping: &Mapping| {
            mapping.bytes() >= least_bytes || in_pieces(&mappings, low_bytes, &mapping.range)
        };
        let own = || mappings.iter().filter(|mapping| !is_guest(mapping));
        let mib = |kib: f64| kib / 1024.0;
        Self {
            mib: mib(own().map(|mapping| mapping.resident_kib).sum()),
            own_mib: mib(own().map(|mapping| mapping.own_kib).sum()),
        }
    }
}

/// Whether `range` is part of `bytes` of guest memory into which a kernel's text is mapped: ranges
/// that follow one another without a gap and are so long together.
fn in_pieces(mappings: &[Mapping], bytes: u64, range: &Range<u64>) -> bool {
    mappings.iter().enumerate().any(|(first, mapping)| {
        let whole = mapping.range.start..mapping.range.start + bytes;
        let mut end = whole.start;
        let pieces = mappings[first..].iter().take_while(|next| {
            let follows = next.range.start == end && next.range.end <= whole.end;
            end = next.range.end;
            follows
        });
        let pieces: Vec<_> = pieces.collect();
        let is_whole = pieces.last().is_some_and(|last| last.range.end == whole.end);
        let has_text = pieces.iter().any(|piece| piece.is_kernel_text);
        is_whole && has_text && whole.contains(&range.start)
    })
}
