//! How much memory a guest has beyond what it booted with, if it gets that on demand.
//!
//! Pure: the worker passes on what the guest says, how much is plugged and what time it is, and has
//! the guest resized to what comes out. The guest may lie: it then has more or less than would be
//! good for it, never more than it was promised, and the worker does no more than
//! [`INTERVAL_MIN`] allows.
//!
//! ```text
//! pressed, less than 1/8 available    as much again as there is
//! quiet for long enough               half as much again as is in use, the rest goes
//! ```
//!
//! A guest that was shrunk has a third of its memory available, far from an eighth: so nothing goes
//! to and fro.

use std::time::Duration;

use ovum_agent_proto::report::MemoryReport;

use crate::control::MEMORY_BYTES_STEP;

/// From one change to the next, at least.
const INTERVAL_MIN: Duration = Duration::from_millis(100);

/// A guest is short if less than this part of its memory is available.
const SHORT_PART: u64 = 8;

/// Least that is added at a time.
const GROWTH_BYTES_MIN: u64 = 64 << 20;

/// What is left at least beside what is in use.
const SPARE_BYTES_MIN: u64 = 64 << 20;

/// Less than this is not worth being kept, and no more is it worth being taken alone.
const WORTH_BYTES_MIN: u64 = 32 << 20;

/// How often in a row the time to the next attempt is doubled, if the guest does not do what it is
/// asked to: some of its memory may be such as the kernel cannot move.
const DOUBLINGS_MAX: u32 = 6;

/// What a guest may have on demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DemandSpec {
    /// What it booted with.
    pub(super) boot_bytes: u64,
    /// What may be added.
    pub(super) hotplug_bytes: u64,
    /// How long it has to be quiet before some is taken.
    pub(super) quiet: Duration,
}

/// What a guest was asked to have on demand.
#[derive(Debug)]
pub(super) struct Demand {
    spec: DemandSpec,
    asked_bytes: u64,
    /// When it was last asked, on the clock of events.
    asked_ns: u64,
    /// What it had when it was last asked to give some up.
    shrunk_from_bytes: u64,
    /// Attempts in a row to take memory of which it gave nothing.
    failures: u32,
}

impl Demand {
    /// Of a guest that boots.
    pub(super) fn new(spec: DemandSpec) -> Self {
        Self { spec, asked_bytes: 0, asked_ns: 0, shrunk_from_bytes: 0, failures: 0 }
    }

    /// What a guest that says `report` and has `plugged_bytes` is to be asked for, if anything.
    pub(super) fn answer(
        &mut self,
        report: MemoryReport,
        plugged_bytes: u64,
        now_ns: u64,
    ) -> Option<u64> {
        let since = Duration::from_nanos(now_ns.saturating_sub(self.asked_ns));
        if since < INTERVAL_MIN {
            return None;
        }
        let asked_bytes = if report.pressed {
            let asked_bytes = self.spec.grown(report, plugged_bytes, self.asked_bytes)?;
            self.failures = 0;
            asked_bytes
        } else {
            self.shrink(report, plugged_bytes, since)?
        };
        self.asked_bytes = asked_bytes;
        self.asked_ns = now_ns;
        Some(asked_bytes)
    }

    /// What is to be left of `plugged_bytes`. What the guest has not given up in time is not asked
    /// for any more: its driver would go on trying.
    fn shrink(&mut self, report: MemoryReport, plugged_bytes: u64, since: Duration) -> Option<u64> {
        let has_given = plugged_bytes < self.shrunk_from_bytes;
        if self.asked_bytes < plugged_bytes {
            let is_late = since >= self.spec.quiet;
            if is_late {
                self.failures = if has_given { 0 } else { (self.failures + 1).min(DOUBLINGS_MAX) };
            }
            return is_late.then_some(plugged_bytes);
        }
        if has_given {
            self.failures = 0;
        }
        let kept = self.spec.shrunk(report, plugged_bytes)?;
        if since < self.spec.quiet.saturating_mul(1 << self.failures) {
            return None;
        }
        self.shrunk_from_bytes = plugged_bytes;
        Some(kept)
    }
}

impl DemandSpec {
    /// What a guest that is pressed is to have, if it is short. What it has not yet taken is asked
    /// for again: its driver may have given up for the moment.
    fn grown(&self, report: MemoryReport, plugged_bytes: u64, asked_bytes: u64) -> Option<u64> {
        let total = self.total(plugged_bytes);
        if available(report, total) >= total / SHORT_PART {
            return None;
        }
        if plugged_bytes < asked_bytes {
            return Some(asked_bytes);
        }
        let grown = plugged_bytes.saturating_add(total.max(GROWTH_BYTES_MIN));
        let grown = grown.next_multiple_of(MEMORY_BYTES_STEP).min(self.hotplug_bytes);
        (grown > plugged_bytes).then_some(grown)
    }

    /// What a guest that is quiet is to keep, if it has more than it needs.
    fn shrunk(&self, report: MemoryReport, plugged_bytes: u64) -> Option<u64> {
        let total = self.total(plugged_bytes);
        let used = total - available(report, total);
        let kept = used.saturating_add((used / 2).max(SPARE_BYTES_MIN));
        let kept = kept.saturating_sub(self.boot_bytes).next_multiple_of(MEMORY_BYTES_STEP);
        let kept = if kept < WORTH_BYTES_MIN { 0 } else { kept };
        let taken = plugged_bytes.saturating_sub(kept);
        (taken > 0 && (kept == 0 || taken >= WORTH_BYTES_MIN)).then_some(kept)
    }

    fn total(&self, plugged_bytes: u64) -> u64 {
        self.boot_bytes.saturating_add(plugged_bytes)
    }
}

/// What is available of `total` bytes, as the guest says.
fn available(report: MemoryReport, total: u64) -> u64 {
    (u64::from(report.available_mib) << 20).min(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SECOND_NS: u64 = 1_000_000_000;

    fn spec(boot_mib: u64, hotplug_mib: u64) -> DemandSpec {
        DemandSpec {
            boot_bytes: boot_mib * MIB,
            hotplug_bytes: hotplug_mib * MIB,
            quiet: Duration::from_secs(60),
        }
    }

    /// Asks in MiB and seconds.
    fn answer(demand: &mut Demand, pressed: bool, mib: (u32, u64), at_s: u64) -> Option<u64> {
        let (available_mib, plugged_mib) = mib;
        let report = MemoryReport { pressed, available_mib };
        demand.answer(report, plugged_mib * MIB, at_s * SECOND_NS).map(|bytes| bytes / MIB)
    }

    #[test]
    fn a_guest_that_is_short_gets_as_much_again_as_it_has_up_to_its_limit() {
        let pressed = |boot, hotplug, available, plugged| {
            answer(&mut Demand::new(spec(boot, hotplug)), true, (available, plugged), 100)
        };
        for (boot, hotplug, available, plugged, expected) in [
            (128, 256, 0, 0, Some(128)),
            (128, 256, 15, 0, Some(128)),
            (128, 256, 16, 0, None),
            (128, 256, 0, 128, Some(256)),
            (128, 256, 0, 256, None),
            (32, 256, 0, 0, Some(64)),
            (1024, 8192, 100, 1024, Some(3072)),
            (1024, 8192, 256, 1024, None),
            (128, 2, 0, 0, Some(2)),
            (128, 0, 0, 0, None),
        ] {
            let case = (boot, hotplug, available, plugged);
            assert_eq!(pressed(boot, hotplug, available, plugged), expected, "{case:?}");
        }
    }

    #[test]
    fn what_the_driver_did_not_take_is_asked_for_again_and_no_more() {
        let mut demand = Demand::new(spec(128, 1024));

        assert_eq!(answer(&mut demand, true, (0, 0), 1), Some(128));
        assert_eq!(answer(&mut demand, true, (0, 20), 2), Some(128));
        assert_eq!(answer(&mut demand, true, (0, 128), 3), Some(384));
    }

    #[test]
    fn a_quiet_guest_keeps_what_it_uses_and_some_and_gives_up_the_rest_in_turns() {
        let mut demand = Demand::new(spec(128, 256));
        assert_eq!(answer(&mut demand, true, (0, 0), 1), Some(128));
        assert_eq!(answer(&mut demand, true, (0, 128), 2), Some(256));

        assert_eq!(answer(&mut demand, false, (260, 256), 61), None, "too early");
        assert_eq!(answer(&mut demand, false, (60, 256), 62), None, "it needs it");
        assert_eq!(answer(&mut demand, false, (260, 256), 130), Some(60));
        assert_eq!(answer(&mut demand, false, (100, 60), 180), None, "too early");
        assert_eq!(answer(&mut demand, false, (100, 60), 190), Some(0));
        assert_eq!(answer(&mut demand, false, (60, 0), 250), None);
    }

    #[test]
    fn what_a_guest_cannot_give_up_is_asked_for_less_and_less_often() {
        let mut demand = Demand::new(spec(128, 256));
        answer(&mut demand, true, (0, 0), 1);
        answer(&mut demand, true, (0, 128), 2);
        let mut asked = Vec::new();
        for minute in 1..=40 {
            let answer = answer(&mut demand, false, (300, 256), minute * 61);
            asked.extend(answer.map(|mib| (minute, mib)));
        }

        // Asked for, and left alone a minute later.
        let asked: Vec<_> = asked.into_iter().filter(|(minute, _)| *minute < 30).collect();
        let expected = [(2, 0), (3, 256), (5, 0), (6, 256), (10, 0), (11, 256), (19, 0), (20, 256)];
        assert_eq!(asked, expected);

        assert_eq!(answer(&mut demand, true, (0, 256), 4000), None, "it has all");
        let partly = answer(&mut demand, false, (300, 250), 9000);
        assert!(partly.is_some(), "it has given something: {demand:?}");
    }

    /// Whoever grows and shrinks by these rules ends where it stays.
    #[test]
    fn nothing_goes_to_and_fro() {
        for used_mib in (0..1024_u64).step_by(7) {
            let spec = spec(128, 4096);
            let mut demand = Demand::new(spec);
            let (mut plugged, mut changes) = (4096_u64, Vec::new());
            for minute in 1..=60 {
                let available = u32::try_from((128 + plugged).saturating_sub(used_mib)).unwrap();
                for pressed in [true, false] {
                    let at_s = minute * 100 + u64::from(pressed);
                    if let Some(mib) = answer(&mut demand, pressed, (available, plugged), at_s) {
                        plugged = mib;
                        changes.push((minute, pressed, mib));
                    }
                }
            }
            assert!(
                changes.len() <= 3 && changes.iter().all(|c| c.0 < 20),
                "{used_mib}: {changes:?}"
            );
        }
    }

    #[test]
    fn a_guest_that_lies_gets_no_more_than_its_own_and_not_at_once() {
        let mut demand = Demand::new(spec(128, 512));
        let mut asked = Vec::new();
        let mut plugged = 0;
        for step in 0..100_000_u32 {
            let available_mib = step.wrapping_mul(0x9e37_79b9) >> 8;
            let report = MemoryReport { pressed: step % 3 > 0, available_mib };
            let now_ns = 1_000_000_000 + u64::from(step) * 10_000;
            if let Some(bytes) = demand.answer(report, plugged, now_ns) {
                assert!(bytes <= 512 * MIB && bytes.is_multiple_of(MEMORY_BYTES_STEP));
                plugged = bytes;
                asked.push(now_ns);
            }
        }
        assert!(asked.len() <= 11, "once in a tenth of a second: {}", asked.len());
    }
}
