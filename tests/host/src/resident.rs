//! What a worker has in memory beside its guest's.

use std::fs;

/// Guest memory is told by its size: that is what is mapped in the largest ranges, of which the
/// worker itself has none that it touches.
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
        // What does not fit below the devices' addresses is a range of its own.
        let guest_bytes = (u64::from(guest_mib) << 20).min(1 << 30);
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("root reads smaps");
        let (mut is_guest, mut resident_kib, mut own_kib) = (false, 0.0, 0.0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let Some(first) = words.next() else { continue };
            let kib = words.next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
            match first {
                "Rss:" if !is_guest => resident_kib += kib,
                "Private_Clean:" | "Private_Dirty:" if !is_guest => own_kib += kib,
                _ if first.contains('-') => is_guest = bytes(first) >= guest_bytes,
                _ => {}
            }
        }
        Self { mib: resident_kib / 1024.0, own_mib: own_kib / 1024.0 }
    }
}

/// The length of a range that is written as in /proc/PID/smaps: `start-end`.
fn bytes(range: &str) -> u64 {
    let ends = range.split('-').map(|end| u64::from_str_radix(end, 16));
    let [Ok(start), Ok(end)] = ends.collect::<Vec<_>>()[..] else { return 0 };
    end - start
}
