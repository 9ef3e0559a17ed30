//! Starting an instance again by itself: whether, when, and what forbids it.
//!
//! The decision is pure and the owner keeps the time: after each end it asks
//! [`RestartPolicy::decide`], and once more when the answer was a time and that has come. What has
//! been tried is part of the record, so that a server that was away changes nothing.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};

use crate::instances::record::End;

/// Least time from an end to the next attempt, whatever was asked for: a workload that ends at once
/// would have its host boot guests without end. The original looks at its instances every 5 s, so
/// that nobody can count on less.
pub const BACKOFF_MIN: Duration = Duration::from_secs(1);

/// When an instance is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// After which ends.
    pub when: RestartWhen,
    /// From an end, or an attempt that failed, to the next attempt.
    pub backoff: Duration,
    /// Attempts without a stable run in between; 0 is without end.
    pub max_attempts: u32,
    /// A run of this length makes all attempts before it forgotten.
    pub stable_after: Duration,
}

/// After which ends an instance is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartWhen {
    /// All.
    Always,
    /// Those that are not a success as far as is known.
    OnFailure,
}

/// How restarting has gone so far. Part of the record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartStatus {
    /// Attempts since the instance last ran stably.
    pub attempts: u32,
    /// When the last of them began.
    pub last_attempt_at: Option<DateTime<Utc>>,
    /// Why that was, if not for an end.
    #[serde(default)]
    pub last_reason: Option<RestartReason>,
    /// Why there are no more.
    pub blocked: Option<Blocked>,
}

/// Why an instance that ran was started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RestartReason {
    /// It was unhealthy.
    HealthCheckFailed,
}

/// Why an instance is not started again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// Somebody stopped it.
    ManualStop,
    /// It was tried often enough.
    MaxAttemptsExceeded,
}

impl RestartReason {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::HealthCheckFailed => "health_check_failed",
        }
    }
}

impl Blocked {
    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::ManualStop => "manual_stop",
            Self::MaxAttemptsExceeded => "max_attempts_exceeded",
        }
    }
}

/// What is to be done about an instance that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Leave,
    /// Nothing any more, and that is to be said.
    GiveUp,
    /// It is to be started then.
    At(DateTime<Utc>),
}

impl RestartPolicy {
    /// What is to be done after `end`.
    pub fn decide(&self, status: &RestartStatus, end: &End) -> Decision {
        let is_due = match self.when {
            RestartWhen::Always => true,
            RestartWhen::OnFailure => end.unhealthy || end.how.exit_code != Some(0),
        };
        if status.blocked.is_some() || !is_due {
            return Decision::Leave;
        }
        if self.max_attempts > 0 && status.attempts >= self.max_attempts {
            return Decision::GiveUp;
        }
        let last = status.last_attempt_at.map_or(end.at, |attempt| attempt.max(end.at));
        Decision::At(later(last, self.backoff.max(BACKOFF_MIN)))
    }

    /// When a run that began at `started_at` is stable.
    pub fn stable_at(&self, started_at: DateTime<Utc>) -> DateTime<Utc> {
        later(started_at, self.stable_after)
    }
}

impl RestartStatus {
    /// One attempt more, begun at `at`.
    #[must_use]
    pub fn with_attempt(&self, at: DateTime<Utc>, reason: Option<RestartReason>) -> Self {
        Self {
            attempts: self.attempts.saturating_add(1),
            last_attempt_at: Some(at),
            last_reason: reason,
            blocked: None,
        }
    }

    /// As it is under another policy: begun anew, unless somebody stopped the instance.
    #[must_use]
    pub fn under_another_policy(&self) -> Self {
        match self.blocked {
            Some(Blocked::ManualStop) => self.clone(),
            Some(Blocked::MaxAttemptsExceeded) | None => Self::default(),
        }
    }
}

/// `at` and `after`, or the end of time.
pub(super) fn later(at: DateTime<Utc>, after: Duration) -> DateTime<Utc> {
    let after = TimeDelta::from_std(after).unwrap_or(TimeDelta::MAX);
    at.checked_add_signed(after).unwrap_or(DateTime::<Utc>::MAX_UTC)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instances::history::Ending;

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).unwrap()
    }

    fn policy(when: RestartWhen, max_attempts: u32) -> RestartPolicy {
        let (backoff, stable_after) = (Duration::from_secs(5), Duration::from_secs(600));
        RestartPolicy { when, backoff, max_attempts, stable_after }
    }

    fn end(exit_code: Option<u8>, unhealthy: bool) -> End {
        let how = Ending { exit_code, ..Ending::default() };
        End { at: at(100), started_at: Some(at(0)), how, unhealthy }
    }

    /// Whether it is started again, for each policy and each end.
    #[test]
    fn which_ends_are_followed_by_a_start_is_this_table() {
        let status = RestartStatus::default();
        let row = |(exit_code, unhealthy)| {
            [RestartWhen::Always, RestartWhen::OnFailure].map(|when| {
                let decision = policy(when, 0).decide(&status, &end(exit_code, unhealthy));
                matches!(decision, Decision::At(_))
            })
        };
        let ends = [
            (Some(0), false),
            (Some(1), false),
            (Some(137), false),
            (None, false),
            (Some(0), true),
        ];

        assert_eq!(
            ends.map(row),
            [
                // Always OnFailure
                [true, false], // success
                [true, true],  // exit code 1
                [true, true],  // killed
                [true, true],  // nobody knows
                [true, true],  // a success, but it was stopped for being unhealthy
            ]
        );
    }

    #[test]
    fn what_forbids_a_start_is_this_table() {
        let decide = |blocked, attempts, max_attempts| {
            let status = RestartStatus { attempts, blocked, ..RestartStatus::default() };
            policy(RestartWhen::Always, max_attempts).decide(&status, &end(Some(1), false))
        };

        assert_eq!(decide(None, 2, 3), Decision::At(at(105)));
        assert_eq!(decide(None, 3, 3), Decision::GiveUp);
        assert_eq!(decide(None, 4, 3), Decision::GiveUp, "after a policy with fewer");
        assert_eq!(decide(None, u32::MAX, 0), Decision::At(at(105)), "without end");
        assert_eq!(decide(Some(Blocked::ManualStop), 0, 0), Decision::Leave);
        assert_eq!(decide(Some(Blocked::MaxAttemptsExceeded), 3, 3), Decision::Leave);
    }

    /// An attempt that did not boot has no end of its own.
    #[test]
    fn the_backoff_begins_with_the_later_of_end_and_attempt() {
        let policy = policy(RestartWhen::Always, 0);
        let tried = |seconds| RestartStatus::default().with_attempt(at(seconds), None);

        assert_eq!(policy.decide(&tried(0), &end(None, false)), Decision::At(at(105)));
        assert_eq!(policy.decide(&tried(200), &end(None, false)), Decision::At(at(205)));
    }

    #[test]
    fn no_backoff_is_still_one_second() {
        let policy = |backoff| RestartPolicy { backoff, ..policy(RestartWhen::Always, 0) };
        let status = RestartStatus::default();

        let none = policy(Duration::ZERO).decide(&status, &end(Some(1), false));
        let more = policy(Duration::from_secs(2)).decide(&status, &end(Some(1), false));

        assert_eq!((none, more), (Decision::At(at(101)), Decision::At(at(102))));
    }

    #[test]
    fn another_policy_forgets_all_but_a_manual_stop() {
        let tried = RestartStatus::default().with_attempt(at(0), None);
        let given_up =
            RestartStatus { blocked: Some(Blocked::MaxAttemptsExceeded), ..tried.clone() };
        let stopped = RestartStatus { blocked: Some(Blocked::ManualStop), ..tried.clone() };

        assert_eq!(tried.under_another_policy(), RestartStatus::default());
        assert_eq!(given_up.under_another_policy(), RestartStatus::default());
        assert_eq!(stopped.under_another_policy(), stopped);
    }

    #[test]
    fn a_time_that_no_calendar_has_is_the_end_of_time() {
        assert_eq!(later(at(0), Duration::MAX), DateTime::<Utc>::MAX_UTC);
    }
}
