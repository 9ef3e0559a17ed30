//! What a process has mapped, as /proc/PID/smaps tells of it.

use std::fs;
use std::ops::Range;

/// What the file is called that a kernel's text is mapped from.
const KERNEL_TEXT: &str = "/memfd:kernel-text";

/// A range of addresses of a process.
#[derive(Debug, Default)]
pub struct Mapping {
    /// Which.
    pub range: Range<u64>,
    /// Whether it is text of a guest's kernel that guests share.
    pub is_kernel_text: bool,
    /// How much of it is in memory.
    pub resident_kib: f64,
    /// How much of that no other process has as well.
    pub own_kib: f64,
    /// How much of a file of memory is there in huge pages.
    pub huge_kib: f64,
}

impl Mapping {
    /// All of the process `pid`, in their order.
    pub fn all_of(pid: u32) -> Vec<Self> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("root reads smaps");
        let mut mappings: Vec<Self> = Vec::new();
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let Some(first) = words.next() else { continue };
            if first.contains('-') {
                let is_kernel_text = line.contains(KERNEL_TEXT);
                mappings.push(Self { range: range(first), is_kernel_text, ..Self::default() });
                continue;
            }
            let kib = words.next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
            let Some(mapping) = mappings.last_mut() else { continue };
            match first {
                "Rss:" => mapping.resident_kib += kib,
                "ShmemPmdMapped:" => mapping.huge_kib += kib,
                "Private_Clean:" | "Private_Dirty:" => mapping.own_kib += kib,
                _ => {}
            }
        }
        mappings
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

/// A range that is written as in /proc/PID/smaps: `start-end`.
fn range(text: &str) -> Range<u64> {
    let ends = text.split('-').map(|end| u64::from_str_radix(end, 16));
    let [Ok(start), Ok(end)] = ends.collect::<Vec<_>>()[..] else { return 0..0 };
    start..end
}
