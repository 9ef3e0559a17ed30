//! What the events of a worker add up to: how far the guest is, and how it ended.
//!
//! Pure, and the same whether events arrive as they happen or are read from the events file after
//! the server was away. A guest can report anything; all it can spoil is what is said about itself.

use ovum_agent_proto::report::{Exit, Failure, Phase, Report};
use serde::{Deserialize, Serialize};

use crate::control::{Event, Happening, StopCause};
use crate::timeline::Timeline;

/// The events of one boot, folded.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// When each step was.
    pub timeline: Timeline,
    agent_ready: bool,
    workload_started: bool,
    exit: Option<Exit>,
    failure: Option<Failure>,
    stopped: Option<(StopCause, String)>,
    stopped_ns: Option<u64>,
    ran_out_of_memory: bool,
}

/// How an instance ended.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The workload's exit status, if the agent could report one.
    pub exit_code: Option<u8>,
    /// What the exit status means, for people.
    pub exit_message: Option<String>,
    /// What went wrong outside of the workload.
    pub error: Option<String>,
}

impl History {
    /// Begins with what happened before there was a worker.
    pub fn new(timeline: Timeline) -> Self {
        Self { timeline, ..Self::default() }
    }

    /// Takes one event more.
    pub fn add(&mut self, event: &Event) {
        self.timeline.add(event);
        match &event.what {
            Happening::Launched | Happening::Built | Happening::Booted => {}
            Happening::Reported { word } => match Report::decode(*word) {
                Some(Report::Phase(Phase::AgentReady)) => self.agent_ready = true,
                Some(Report::Phase(Phase::WorkloadStarted)) => self.workload_started = true,
                Some(Report::Exit(exit)) => self.exit = self.exit.or(Some(exit)),
                Some(Report::Failed(failure)) => self.failure = self.failure.or(Some(failure)),
                Some(
                    Report::Phase(Phase::AgentStarted | Phase::RootMounted | Phase::FirstOutput)
                    | Report::Memory(_),
                )
                | None => {}
            },
            Happening::Stopped { cause, detail } => {
                self.stopped.get_or_insert_with(|| (*cause, detail.clone()));
                self.stopped_ns = self.stopped_ns.or(Some(event.at_ns));
            }
        }
    }

    /// The host's kernel killed the worker for want of memory.
    pub fn ran_out_of_memory(&mut self) {
        self.ran_out_of_memory = true;
    }

    /// Whether the agent listens.
    pub fn agent_ready(&self) -> bool {
        self.agent_ready
    }

    /// Whether the workload runs and, if the guest has an agent that listens, that does too.
    pub fn is_ready(&self, with_agent: bool) -> bool {
        self.workload_started && (self.agent_ready || !with_agent)
    }

    /// When the machine ended, in nanoseconds of CLOCK_MONOTONIC, if the worker said so.
    pub fn stopped_ns(&self) -> Option<u64> {
        self.stopped_ns
    }

    /// How it ended, the worker being gone.
    pub fn ending(&self) -> Ending {
        let error = match (&self.stopped, self.failure) {
            (_, Some(failure)) => Some(failure_text(failure).to_owned()),
            (Some((StopCause::PowerOff | StopCause::Ordered, _)), None) => None,
            (Some((StopCause::Reboot, _)), None) => {
                Some("The guest asked for a reboot, which ends an instance".to_owned())
            }
            (Some((StopCause::Panic, detail)), None) => {
                Some(with_detail("The guest kernel ended in a panic; the log says more", detail))
            }
            (Some((StopCause::Fault, detail)), None) => {
                Some(with_detail("The machine failed", detail))
            }
            (None, None) if self.ran_out_of_memory => Some(
                "The worker process was killed: it took more of the host's memory than its guest's \
                 and what a worker needs beside"
                    .to_owned(),
            ),
            (None, None) => Some(
                "The worker process ended without a word: it was killed, or the host went down"
                    .to_owned(),
            ),
        };
        Ending {
            exit_code: self.exit.map(|exit| exit.code),
            exit_message: self.exit.map(exit_text),
            error,
        }
    }
}

fn with_detail(what: &str, detail: &str) -> String {
    if detail.is_empty() { what.to_owned() } else { format!("{what}: {detail}") }
}

fn failure_text(failure: Failure) -> &'static str {
    match failure {
        Failure::Config => "The agent found no valid configuration; the log says more",
        Failure::Mount => "The agent could not mount the root; the log says more",
        Failure::System => "The guest kernel refused something to the agent; the log says more",
    }
}

fn exit_text(exit: Exit) -> String {
    let Exit { code, oom } = exit;
    let oom = if oom { " - OOM" } else { "" };
    match code {
        0 => format!("success{oom}"),
        126 => format!("permission denied (command not executable){oom}"),
        127 => format!("command not found{oom}"),
        129..=192 => {
            let signal = code - 128;
            match signal_name(signal) {
                Some(name) => format!("killed by signal {signal} ({name}){oom}"),
                None => format!("killed by signal {signal}{oom}"),
            }
        }
        code => format!("exit code {code}{oom}"),
    }
}

/// Names of the signals that end programs, as the original prints them.
fn signal_name(signal: u8) -> Option<&'static str> {
    match signal {
        1 => Some("hangup"),
        2 => Some("interrupt"),
        3 => Some("quit"),
        4 => Some("illegal instruction"),
        6 => Some("aborted"),
        7 => Some("bus error"),
        8 => Some("floating point exception"),
        9 => Some("killed"),
        11 => Some("segmentation fault"),
        13 => Some("broken pipe"),
        14 => Some("alarm clock"),
        15 => Some("terminated"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use super::*;

    fn history(happenings: &[Happening]) -> History {
        let mut history = History::default();
        for (seq, what) in (0..).zip(happenings) {
            history.add(&Event { seq, at_ns: seq, what: what.clone() });
        }
        history
    }

    fn report(report: Report) -> Happening {
        Happening::Reported { word: report.encode() }
    }

    fn stopped(cause: StopCause) -> Happening {
        Happening::Stopped { cause, detail: String::new() }
    }

    fn exit(code: u8, oom: bool) -> String {
        let exit = report(Report::Exit(Exit { code, oom }));
        let ending = history(&[exit, stopped(StopCause::PowerOff)]).ending();
        assert_eq!((ending.exit_code, ending.error), (Some(code), None));
        ending.exit_message.unwrap()
    }

    #[test]
    fn a_guest_with_an_agent_is_ready_when_both_run() {
        let workload = report(Report::Phase(Phase::WorkloadStarted));
        let agent = report(Report::Phase(Phase::AgentReady));

        assert!(!history(slice::from_ref(&agent)).is_ready(true));
        assert!(!history(slice::from_ref(&workload)).is_ready(true));
        assert!(history(slice::from_ref(&workload)).is_ready(false));
        assert!(history(&[agent, workload]).is_ready(true));
    }

    #[test]
    fn exit_codes_have_meanings() {
        assert_eq!(exit(0, false), "success");
        assert_eq!(exit(7, false), "exit code 7");
        assert_eq!(exit(126, false), "permission denied (command not executable)");
        assert_eq!(exit(127, false), "command not found");
        assert_eq!(exit(128, false), "exit code 128");
        assert_eq!(exit(137, false), "killed by signal 9 (killed)");
        assert_eq!(exit(137, true), "killed by signal 9 (killed) - OOM");
        assert_eq!(exit(192, false), "killed by signal 64");
        assert_eq!(exit(255, false), "exit code 255");
    }

    #[test]
    fn an_end_that_is_not_the_workloads_says_whose_it_is() {
        let error =
            |happenings: &[Happening]| history(happenings).ending().error.unwrap_or_default();

        assert!(error(&[]).contains("without a word"));
        let mut hungry = history(&[]);
        hungry.ran_out_of_memory();
        assert!(hungry.ending().error.is_some_and(|error| error.contains("more of the host's")));
        assert!(error(&[stopped(StopCause::Panic)]).contains("panic"));
        assert!(error(&[stopped(StopCause::Reboot)]).contains("reboot"));
        assert_eq!(error(&[stopped(StopCause::Ordered)]), "");
        let fault = Happening::Stopped { cause: StopCause::Fault, detail: "vCPU 1".into() };
        assert_eq!(error(&[fault]), "The machine failed: vCPU 1");
        let failed = report(Report::Failed(Failure::Mount));
        assert!(error(&[failed, stopped(StopCause::PowerOff)]).contains("mount the root"));
    }

    #[test]
    fn the_first_word_counts() {
        let first = report(Report::Exit(Exit { code: 1, oom: false }));
        let second = report(Report::Exit(Exit { code: 2, oom: false }));

        assert_eq!(history(&[first, second]).ending().exit_code, Some(1));
    }
}
