//! Whether the workload is well: what is asked, and what the answers add up to.
//!
//! ```text
//!              success_threshold            failure_threshold
//!  Starting ───────────────────> Healthy <──────────────────> Unhealthy
//!      └──────────────── failure_threshold ───────────────────────^
//! ```
//!
//! Pure: the owner asks, keeps the time, and tells what came of it. Failures within the start
//! period do not count, unless there was a success before. All of it begins anew with each boot.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

use crate::instances::state::State;

pub use crate::network::HttpProbe;

/// Longest text of an error that is kept, in characters.
const ERROR_CHARS_MAX: usize = 512;

/// How a workload is asked whether it is well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthCheck {
    /// What is done.
    pub probe: Probe,
    /// From the end of one check to the next.
    pub interval: Duration,
    /// How long one may take.
    pub timeout: Duration,
    /// How long after the boot failures do not count.
    pub start_period: Duration,
    /// So many failures in a row are bad health.
    pub failure_threshold: u32,
    /// So many successes in a row are good health.
    pub success_threshold: u32,
}

/// What a health check does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// Runs a program in the guest; exit status 0 is good.
    Exec {
        /// Program and arguments.
        command: Vec<String>,
        /// Where it runs.
        working_dir: Option<String>,
    },
    /// Sends a request from the host; one status is good.
    Http(HttpProbe),
    /// Connects from the host.
    Tcp {
        /// To which port.
        port: u16,
    },
}

/// What health checks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HealthState {
    /// There are none.
    Disabled,
    /// Not yet enough.
    Starting,
    /// The workload is well.
    Healthy,
    /// It is not.
    Unhealthy,
    /// It does not run.
    Unknown,
}

/// The answers so far, of one boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// What they add up to.
    pub state: HealthState,
    /// Failures since the last success.
    pub failures: u32,
    /// Successes since the last failure.
    pub successes: u32,
    /// When the last answer came.
    pub last_checked_at: Option<DateTime<Utc>>,
    /// When the last good one came.
    pub last_success_at: Option<DateTime<Utc>>,
    /// When the last bad one came.
    pub last_failure_at: Option<DateTime<Utc>>,
    /// What it was.
    pub last_error: Option<String>,
}

impl HealthState {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
            Self::Unknown => "unknown",
        }
    }
}

impl Default for Health {
    fn default() -> Self {
        Self {
            state: HealthState::Starting,
            failures: 0,
            successes: 0,
            last_checked_at: None,
            last_success_at: None,
            last_failure_at: None,
            last_error: None,
        }
    }
}

impl Health {
    /// As those see it who ask about an instance in `state` that has `check`.
    #[must_use]
    pub fn seen(&self, check: Option<&HealthCheck>, state: State) -> Self {
        match (check, state) {
            (None, _) => Self { state: HealthState::Disabled, ..Self::default() },
            (Some(_), State::Running) => self.clone(),
            (Some(_), _) => Self { state: HealthState::Unknown, ..self.clone() },
        }
    }

    /// Takes an answer that came at `at`, to a workload that runs since `since`.
    pub fn take(
        &mut self,
        check: &HealthCheck,
        answer: Result<(), String>,
        at: DateTime<Utc>,
        since: DateTime<Utc>,
    ) {
        self.last_checked_at = Some(at);
        match answer {
            Ok(()) => {
                self.failures = 0;
                self.successes = self.successes.saturating_add(1);
                self.last_success_at = Some(at);
                if self.successes >= check.success_threshold {
                    self.state = HealthState::Healthy;
                }
            }
            Err(error) => {
                self.last_failure_at = Some(at);
                self.last_error = Some(error.chars().take(ERROR_CHARS_MAX).collect());
                let age = (at - since).to_std().unwrap_or_default();
                if self.last_success_at.is_none() && age < check.start_period {
                    return;
                }
                self.successes = 0;
                self.failures = self.failures.saturating_add(1);
                if self.failures >= check.failure_threshold {
                    self.state = HealthState::Unhealthy;
                }
            }
        }
    }
}

#[cfg(test)]
impl HealthCheck {
    /// One with the defaults of the contract.
    pub(crate) fn sample() -> Self {
        Self {
            probe: Probe::Exec { command: vec!["true".to_owned()], working_dir: None },
            interval: Duration::from_secs(10),
            timeout: Duration::from_secs(2),
            start_period: Duration::from_secs(30),
            failure_threshold: 3,
            success_threshold: 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SINCE: DateTime<Utc> = DateTime::from_timestamp_nanos(0);

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(seconds, 0).unwrap()
    }

    /// What answers every 10 s (`+` good, `-` bad) add up to, after each of them.
    fn states(answers: &str, start_period_s: u64, thresholds: (u32, u32)) -> String {
        let (failure_threshold, success_threshold) = thresholds;
        let start_period = Duration::from_secs(start_period_s);
        let check = HealthCheck {
            start_period,
            failure_threshold,
            success_threshold,
            ..HealthCheck::sample()
        };
        let mut health = Health::default();
        let mut after = |(number, answer): (i64, char)| {
            let answer = if answer == '+' { Ok(()) } else { Err("bad".to_owned()) };
            health.take(&check, answer, at(number * 10), SINCE);
            match health.state {
                HealthState::Starting => '.',
                HealthState::Healthy => 'H',
                HealthState::Unhealthy => 'U',
                HealthState::Disabled | HealthState::Unknown => '?',
            }
        };
        (1..).zip(answers.chars()).map(&mut after).collect()
    }

    #[test]
    fn what_answers_add_up_to_is_this_table() {
        for (answers, start_period_s, thresholds, expected) in [
            ("++", 0, (3, 1), "HH"),
            ("+++", 0, (3, 2), ".HH"),
            ("---", 0, (3, 1), "..U"),
            ("-----", 25, (3, 1), "....U"),
            ("-+---", 60, (3, 1), ".HHHU"),
            ("+-+--+---", 0, (3, 1), "HHHHHHHHU"),
            ("---+-", 0, (3, 1), "..UHH"),
            ("---+-++", 0, (3, 2), "..UUUUH"),
            ("-", 0, (1, 1), "U"),
        ] {
            assert_eq!(
                states(answers, start_period_s, thresholds),
                expected,
                "{answers} {start_period_s} {thresholds:?}"
            );
        }
    }

    #[test]
    fn a_failure_leaves_its_words_and_time() {
        let mut health = Health::default();

        health.take(&HealthCheck::sample(), Err("x".repeat(600)), at(1), SINCE);
        health.take(&HealthCheck::sample(), Ok(()), at(2), SINCE);

        assert_eq!(health.last_error.unwrap().len(), 512);
        assert_eq!(health.last_failure_at, Some(at(1)));
        assert_eq!((health.last_success_at, health.last_checked_at), (Some(at(2)), Some(at(2))));
    }

    #[test]
    fn only_a_running_instance_with_a_check_has_health() {
        let check = HealthCheck::sample();
        let health = Health { state: HealthState::Healthy, ..Health::default() };

        assert_eq!(health.seen(None, State::Running).state, HealthState::Disabled);
        for state in State::ALL {
            let expected = match state {
                State::Running => HealthState::Healthy,
                _ => HealthState::Unknown,
            };
            assert_eq!(health.seen(Some(&check), state).state, expected, "{state}");
        }
    }
}
