//! Which blocks of the region are plugged.

use std::ops::Range;

/// A flag for each block of a region.
#[derive(Debug)]
pub(super) struct Blocks {
    flags: Vec<bool>,
    plugged: usize,
}

/// What a range of blocks is, together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holding {
    /// All of it is there.
    Plugged,
    /// None of it is there.
    Unplugged,
    /// Some of each.
    Mixed,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    pub(super) fn new(count: usize) -> Self {
        Self { flags: vec![false; count], plugged: 0 }
    }

    /// Blocks there are.
    pub(super) fn count(&self) -> usize {
        self.flags.len()
    }

    /// Blocks that are plugged.
    pub(super) fn plugged(&self) -> usize {
        self.plugged
    }

    /// What `range` is. A range that is empty or not all there is mixed.
    pub(super) fn holding(&self, range: Range<usize>) -> Holding {
        let flags = self.flags.get(range).unwrap_or_default();
        match flags.iter().filter(|flag| **flag).count() {
            _ if flags.is_empty() => Holding::Mixed,
            0 => Holding::Unplugged,
            plugged if plugged == flags.len() => Holding::Plugged,
            _ => Holding::Mixed,
        }
    }

    /// Makes all of `range` plugged, or none of it.
    pub(super) fn set(&mut self, range: Range<usize>, plugged: bool) {
        for flag in self.flags.get_mut(range).unwrap_or_default() {
            if *flag != plugged {
                *flag = plugged;
                let one_less = self.plugged.saturating_sub(1);
                self.plugged = if plugged { self.plugged.saturating_add(1) } else { one_less };
            }
        }
    }

    /// The runs of plugged blocks.
    pub(super) fn runs(&self) -> Vec<Range<usize>> {
        let mut runs = Vec::new();
        let mut start = 0;
        for run in self.flags.chunk_by(|a, b| a == b) {
            let end = start + run.len();
            if run.first() == Some(&true) {
                runs.push(start..end);
            }
            start = end;
        }
        runs
    }
}
