//! How the guest is off for memory, told to a machine that adds some and takes it away again.
//!
//! The kernel wakes us when somebody has to wait for memory (Documentation/accounting/psi.rst,
//! "Monitoring for pressure thresholds"), at most once per window. While the guest has more than it
//! booted with there is one look each time it was quiet for long enough. Otherwise nothing is done:
//! a guest that is well costs nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use ovum_agent_proto::config::MemoryWatchSpec;
use ovum_agent_proto::report::{MemoryReport, Report};

use crate::brake::Brake;
use crate::port::Port;

const PRESSURE: &str = "/proc/pressure/memory";

/// One millisecond that anybody waited, within half a second, the shortest window there is: the
/// kernel looks ten times in each, and a program can write a lot meanwhile.
const TRIGGER: &[u8] = b"some 1000 500000\0";

const WATERMARKS: &str = "/proc/sys/vm/watermark_scale_factor";

/// In 1/10000 of the memory: how much is free yet when the kernel begins to look for more, and by
/// that the pressure of which we hear. Usually it is 10, which a program that writes has used up
/// before anybody can be asked for more.
const WATERMARK_SCALE: &str = "1000";

/// Watches, and tells.
#[derive(Debug)]
pub(crate) struct MemoryWatch {
    port: Port,
    trigger: File,
    spec: MemoryWatchSpec,
    /// Holds the workload up while memory is on its way, if there is a workload of ours.
    brake: Option<Brake>,
    /// When to look whether the workload can go on.
    strained_at: Option<Instant>,
    /// When to look whether it is quiet.
    look_at: Option<Instant>,
}

/// What the kernel says of memory, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MemoryInfo {
    pub(crate) total_kib: u64,
    pub(crate) available_kib: u64,
}

impl MemoryWatch {
    /// Begins to watch.
    pub(crate) fn open(
        spec: MemoryWatchSpec,
        brake: Option<Brake>,
        port: Port,
    ) -> io::Result<Self> {
        fs::write(WATERMARKS, WATERMARK_SCALE)?;
        let mut trigger = File::options().read(true).write(true).open(PRESSURE)?;
        trigger.write_all(TRIGGER)?;
        let now = Instant::now();
        // What an agent before us was given may be there still.
        let look_at = Some(now + spec.quiet());
        let mut watch = Self { port, trigger, spec, brake, strained_at: None, look_at };
        if let Some(info) = MemoryInfo::read() {
            watch.adjust_brake(info, now);
        }
        Ok(watch)
    }

    /// When to look next, if nobody has to wait before.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.look_at.into_iter().chain(self.strained_at).min()
    }

    /// Somebody had to wait for memory.
    pub(crate) fn note_pressure(&mut self) {
        let now = Instant::now();
        self.look_at = Some(now + self.spec.quiet());
        if let Some(info) = MemoryInfo::read() {
            self.report(true, info);
            self.adjust_brake(info, now);
        }
    }

    /// Does what is due: lets the workload go on if it can, and tells that it was quiet if there is
    /// something to give back.
    pub(crate) fn check_time(&mut self, now: Instant) {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| now >= at);
        if !is_due(self.strained_at) && !is_due(self.look_at) {
            return;
        }
        let info = MemoryInfo::read();
        if is_due(self.look_at) {
            let extended = info.filter(|info| info.is_beyond(self.spec.boot_bytes));
            self.look_at = extended.map(|_| now + self.spec.quiet());
            if let Some(info) = extended {
                self.report(false, info);
            }
        }
        match info {
            Some(info) => self.adjust_brake(info, now),
            None => self.strained_at = None,
        }
    }

    fn adjust_brake(&mut self, info: MemoryInfo, now: Instant) {
        self.strained_at = self.brake.as_mut().and_then(|brake| brake.adjust(info, now));
    }

    fn report(&self, pressed: bool, info: MemoryInfo) {
        let available_mib = u32::try_from(info.available_kib >> 10).unwrap_or(u32::MAX);
        self.port.report(Report::Memory(MemoryReport { pressed, available_mib }));
    }
}

/// Its priority data is pressure.
impl AsFd for MemoryWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.trigger.as_fd()
    }
}

impl MemoryInfo {
    fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix("kB")?.trim().parse().ok()
        };
        Some(Self { total_kib: value("MemTotal:")?, available_kib: value("MemAvailable:")? })
    }

    /// Whether there is more than the guest booted with. Of that the kernel keeps some for itself,
    /// and does not count it.
    fn is_beyond(self, boot_bytes: u64) -> bool {
        self.total_kib > boot_bytes >> 10
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_understood_and_nothing_else() {
        let text = "MemTotal:         110692 kB\nMemFree:           89588 kB\n\
                    MemAvailable:      81712 kB\nBuffers:               0 kB\n";
        let info = MemoryInfo { total_kib: 110_692, available_kib: 81_712 };

        assert_eq!(MemoryInfo::parse(text), Some(info));
        assert!(MemoryInfo::read().is_some(), "of the kernel we run on");
        for text in ["", "MemTotal: 1 kB", "MemTotal: 1\nMemAvailable: 1 kB", "MemTotal: -1 kB"] {
            assert_eq!(MemoryInfo::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_guest_has_more_than_it_booted_with_when_more_is_counted() {
        let info = |total_kib| MemoryInfo { total_kib, available_kib: 0 };

        assert!(!info(110_692).is_beyond(128 << 20));
        assert!(!info(131_072).is_beyond(128 << 20));
        assert!(info(131_073).is_beyond(128 << 20));
    }
}
