//! A brake for a workload that takes memory faster than the machine can add some.
//!
//! The workload's control group has a high mark (Documentation/admin-guide/cgroup-v2.rst, "Memory
//! Interface Files"): who takes more than that has to wait, the longer the further beyond. Waiting
//! is pressure, of which the watch hears; once there is more memory the mark is raised. If none
//! comes in time the brake is let go, and the workload ends as it would have without.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use crate::memory::MemoryInfo;
use crate::workload::CGROUP;

/// What is kept from the workload until there is more: a part of all memory. The machine has to
/// call more than that a shortage.
const RESERVE_PART: u64 = 10;

/// What has to be available before a brake that was let go is of use again: a part of all memory.
const EASE_PART: u64 = 5;

/// How long a workload is held up for memory that does not come.
const PATIENCE: Duration = Duration::from_secs(5);

/// How soon it is looked at again while it is.
const INTERVAL: Duration = Duration::from_millis(50);

/// The brake of the workload.
#[derive(Debug)]
pub(crate) struct Brake {
    /// Since when it is held up.
    tight_since: Option<Instant>,
}

/// What is to be done about the mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// So far beyond what is used.
    Ahead { kib: u64 },
    /// It stays where it is.
    Stay,
    /// There is none.
    Off,
}

impl Brake {
    /// Has the kernel count what the workload takes.
    pub(crate) fn open() -> io::Result<Self> {
        fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
        Ok(Self { tight_since: None })
    }

    /// Moves the mark to where it belongs; returns when to look again, if the workload is held up.
    pub(crate) fn adjust(&mut self, info: MemoryInfo, now: Instant) -> Option<Instant> {
        // The group goes with the guest. What cannot be written now is written next time.
        let high = format!("{CGROUP}/memory.high");
        match self.decide(info, now) {
            Mark::Ahead { kib } => {
                if let Some(used) = used_bytes() {
                    let _ = fs::write(high, used.saturating_add(kib << 10).to_string());
                }
                None
            }
            Mark::Stay => self.tight_since.map(|_| now + INTERVAL),
            Mark::Off => {
                let _ = fs::write(high, "max");
                None
            }
        }
    }

    fn decide(&mut self, info: MemoryInfo, now: Instant) -> Mark {
        let MemoryInfo { total_kib, available_kib } = info;
        let is_late = self.tight_since.is_some_and(|since| now >= since + PATIENCE);
        let needed_kib = total_kib / if is_late { EASE_PART } else { RESERVE_PART };
        if available_kib > needed_kib {
            self.tight_since = None;
            return Mark::Ahead { kib: available_kib - total_kib / RESERVE_PART };
        }
        self.tight_since.get_or_insert(now);
        if is_late { Mark::Off } else { Mark::Stay }
    }
}

/// What the workload has, its files in memory included.
fn used_bytes() -> Option<u64> {
    fs::read_to_string(format!("{CGROUP}/memory.current")).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_is_held_up_near_the_end_and_not_for_ever() {
        let start = Instant::now();
        let mut brake = Brake { tight_since: None };
        let mut mark = |total_kib, available_kib, at_ms| {
            let info = MemoryInfo { total_kib, available_kib };
            brake.decide(info, start + Duration::from_millis(at_ms))
        };

        assert_eq!(mark(1000, 600, 0), Mark::Ahead { kib: 500 });
        assert_eq!(mark(1000, 100, 10), Mark::Stay);
        assert_eq!(mark(1000, 90, 5000), Mark::Stay);
        assert_eq!(mark(2000, 1090, 5005), Mark::Ahead { kib: 890 });
        assert_eq!(mark(2000, 150, 9000), Mark::Stay);
        assert_eq!(mark(2000, 150, 14_000), Mark::Off);
        assert_eq!(mark(2000, 390, 14_100), Mark::Off, "it would be held up again at once");
        assert_eq!(mark(2000, 410, 14_200), Mark::Ahead { kib: 210 });
    }
}
