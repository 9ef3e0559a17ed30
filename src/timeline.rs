//! The timeline of a boot: where the time went between the request and the workload.
//!
//! Every stamp is CLOCK_MONOTONIC, taken by the process in which the thing happened and comparable
//! in all processes of a host. Phases follow each other without gaps:
//!
//! | phase | from | to |
//! |---|---|---|
//! | `image` | the request was understood | the root disk is open; waiting for a pull is in here |
//! | `queue` | | the record is kept, and it may boot: not too many others do |
//! | `disks` | | the writable layer and the way to the network exist |
//! | `worker` | | a process runs and has its launch message |
//! | `vmm` | | the machine is built and its vCPUs run |
//! | `kernel` | | the guest's first user instruction, the agent's |
//! | `agent` | | root mounted and, unless the guest goes without, the agent listens |
//! | `workload` | | the workload's process exists |
//! | `first_output` | | it wrote something; missing as long as it has not |

use std::collections::BTreeMap;
use std::time::Duration;

use ovum_agent_proto::report::{Phase, Report};
use serde::{Deserialize, Serialize};

use crate::control::{Event, Happening, now_ns};

/// A moment that a phase begins or ends with, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The request was understood.
    Asked,
    /// The root disk is open.
    ImageReady,
    /// It may boot: not too many others do.
    Admitted,
    /// Writable layer and way to the network exist.
    DisksReady,
    /// The worker has its launch message.
    Launched,
    /// The vCPUs run.
    Booted,
    /// The agent runs.
    AgentStarted,
    /// The agent mounted the root.
    RootMounted,
    /// The agent listens.
    AgentReady,
    /// The workload's process exists.
    WorkloadStarted,
    /// The workload wrote its first output.
    FirstOutput,
}

/// Each phase with the moments that can end it.
const PHASES: [(&str, &[Moment]); 9] = [
    ("image", &[Moment::ImageReady]),
    ("queue", &[Moment::Admitted]),
    ("disks", &[Moment::DisksReady]),
    ("worker", &[Moment::Launched]),
    ("vmm", &[Moment::Booted]),
    ("kernel", &[Moment::AgentStarted]),
    ("agent", &[Moment::RootMounted, Moment::AgentReady]),
    ("workload", &[Moment::WorkloadStarted]),
    ("first_output", &[Moment::FirstOutput]),
];

/// When each moment was, in nanoseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Timeline(BTreeMap<Moment, u64>);

/// What all phases are called, in their order.
pub fn phase_names() -> impl Iterator<Item = &'static str> {
    PHASES.iter().map(|(name, _)| *name)
}

impl Timeline {
    /// Begins now.
    pub fn begin() -> Self {
        let mut timeline = Self::default();
        timeline.mark(Moment::Asked);
        timeline
    }

    /// `moment` is now.
    pub fn mark(&mut self, moment: Moment) {
        self.0.insert(moment, now_ns());
    }

    /// Takes the moment of a worker's event, if it is one. What a guest says twice counts once.
    pub fn add(&mut self, event: &Event) {
        let moment = match event.what {
            Happening::Launched => Some(Moment::Launched),
            Happening::Booted => Some(Moment::Booted),
            Happening::Reported { word } => match Report::decode(word) {
                Some(Report::Phase(phase)) => Some(match phase {
                    Phase::AgentStarted => Moment::AgentStarted,
                    Phase::RootMounted => Moment::RootMounted,
                    Phase::AgentReady => Moment::AgentReady,
                    Phase::WorkloadStarted => Moment::WorkloadStarted,
                    Phase::FirstOutput => Moment::FirstOutput,
                }),
                Some(Report::Exit(_) | Report::Failed(_) | Report::Memory(_)) | None => None,
            },
            Happening::Built | Happening::Stopped { .. } => None,
        };
        if let Some(moment) = moment {
            self.0.entry(moment).or_insert(event.at_ns);
        }
    }

    /// When `moment` was.
    pub fn at_ns(&self, moment: Moment) -> Option<u64> {
        self.0.get(&moment).copied()
    }

    /// The phase that has begun and not ended, with its beginning in nanoseconds.
    pub fn open_phase(&self) -> Option<(&'static str, u64)> {
        let mut since_ns = self.at_ns(Moment::Asked)?;
        let ended = |ends: &[Moment]| ends.iter().filter_map(|&end| self.at_ns(end)).max();
        let last = PHASES.iter().rposition(|(_, ends)| ended(ends).is_some());
        for (_, ends) in &PHASES[..last.map_or(0, |last| last + 1)] {
            since_ns = ended(ends).map_or(since_ns, |end_ns| end_ns.max(since_ns));
        }
        PHASES.get(last.map_or(0, |last| last + 1)).map(|(name, _)| (*name, since_ns))
    }

    /// From the request to the last moment there is.
    pub fn total(&self) -> Duration {
        let ends = [self.0.values().min(), self.0.values().max()];
        let [Some(first_ns), Some(last_ns)] = ends else { return Duration::ZERO };
        Duration::from_nanos(last_ns - first_ns)
    }

    /// Every phase that is over, in order, with its length.
    ///
    /// A guest can report its phases in any order; one that ends before it began has no length.
    pub fn phases(&self) -> Vec<(&'static str, Duration)> {
        let Some(mut previous_ns) = self.at_ns(Moment::Asked) else { return Vec::new() };
        let mut phases = Vec::new();
        for (name, ends) in PHASES {
            let Some(end_ns) = ends.iter().filter_map(|&end| self.at_ns(end)).max() else {
                continue;
            };
            phases.push((name, Duration::from_nanos(end_ns.saturating_sub(previous_ns))));
            previous_ns = previous_ns.max(end_ns);
        }
        phases
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reported(phase: Phase, at_ns: u64) -> Event {
        let word = Report::Phase(phase).encode();
        Event { seq: 0, at_ns, what: Happening::Reported { word } }
    }

    #[test]
    fn phases_follow_each_other_without_gaps() {
        let mut timeline = Timeline(BTreeMap::from([
            (Moment::Asked, 1_000_000),
            (Moment::ImageReady, 2_000_000),
            (Moment::DisksReady, 4_500_000),
        ]));
        for event in [
            Event { seq: 0, at_ns: 5_000_000, what: Happening::Launched },
            Event { seq: 1, at_ns: 6_000_000, what: Happening::Built },
            Event { seq: 2, at_ns: 7_000_000, what: Happening::Booted },
            reported(Phase::AgentStarted, 50_000_000),
            reported(Phase::RootMounted, 55_000_000),
            reported(Phase::AgentReady, 56_000_000),
            reported(Phase::WorkloadStarted, 57_000_000),
            reported(Phase::WorkloadStarted, 99_000_000),
        ] {
            timeline.add(&event);
        }

        assert_eq!(
            timeline.phases().iter().map(|(n, took)| (*n, took.as_micros())).collect::<Vec<_>>(),
            [
                ("image", 1_000),
                ("disks", 2_500),
                ("worker", 500),
                ("vmm", 2_000),
                ("kernel", 43_000),
                ("agent", 6_000),
                ("workload", 1_000),
            ]
        );
    }

    #[test]
    fn the_open_phase_follows_on_the_last_that_has_ended() {
        let mut timeline = Timeline::default();
        assert_eq!(timeline.open_phase(), None);
        timeline.0.insert(Moment::Asked, 7);
        assert_eq!(timeline.open_phase(), Some(("image", 7)));
        timeline.0.insert(Moment::Booted, 9);
        assert_eq!(timeline.open_phase(), Some(("kernel", 9)));
        timeline.0.insert(Moment::FirstOutput, 11);
        assert_eq!(timeline.open_phase(), None);
    }

    /// A guest can write any report at any time; all it can spoil is what is said about itself.
    #[test]
    fn reports_in_the_wrong_order_give_no_negative_phase() {
        let mut timeline = Timeline(BTreeMap::from([(Moment::Asked, 10)]));
        timeline.add(&reported(Phase::FirstOutput, 5_000_010));
        timeline.add(&reported(Phase::AgentStarted, 9_000_010));

        assert_eq!(
            timeline.phases(),
            [("kernel", Duration::from_millis(9)), ("first_output", Duration::ZERO)]
        );
    }
}
