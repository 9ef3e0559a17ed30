//! When instances get the memory that they may have beyond what they boot with.

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::duration::GoDuration;

/// How long nobody waits for memory before a guest gives some up, unless told otherwise.
const QUIET_DEFAULT: Duration = Duration::from_secs(60);

/// What that can be.
const QUIET: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(3600);

/// When instances get the rest of their memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HotplugConfig {
    /// All of it, once the workload runs.
    #[default]
    Boot,
    /// When they are short of memory. It goes again when they do not need it.
    Demand {
        /// How long nobody has to wait for memory before some goes.
        quiet: Duration,
    },
}

/// The same, as it is typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    Boot,
    Demand,
}

/// A time without need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Quiet(Duration);

/// What was typed is none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum HotplugError {
    /// No such policy.
    #[error("it has to be boot or demand")]
    Policy,
    /// No such time.
    #[error("it has to be 1s to 1h")]
    Quiet,
}

impl HotplugConfig {
    pub(super) fn new(policy: Option<Policy>, quiet: Option<Quiet>) -> Self {
        match policy.unwrap_or(Policy::Boot) {
            Policy::Boot => Self::Boot,
            Policy::Demand => {
                Self::Demand { quiet: quiet.map_or(QUIET_DEFAULT, |Quiet(quiet)| quiet) }
            }
        }
    }
}

impl FromStr for Policy {
    type Err = HotplugError;

    fn from_str(text: &str) -> Result<Self, HotplugError> {
        match text {
            "boot" => Ok(Self::Boot),
            "demand" => Ok(Self::Demand),
            _ => Err(HotplugError::Policy),
        }
    }
}

impl FromStr for Quiet {
    type Err = HotplugError;

    fn from_str(text: &str) -> Result<Self, HotplugError> {
        let quiet = text.parse().ok().and_then(GoDuration::positive);
        quiet.filter(|quiet| QUIET.contains(quiet)).map(Self).ok_or(HotplugError::Quiet)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_time_is_a_second_to_an_hour() {
        let quiet = |text: &str| text.parse::<Quiet>().map(|Quiet(quiet)| quiet.as_millis());

        assert_eq!(quiet("1s"), Ok(1_000));
        assert_eq!(quiet("1m30s"), Ok(90_000));
        assert_eq!(quiet("1h"), Ok(3_600_000));
        for text in ["999ms", "1h1ns", "0", "-5s", "60", "soon", ""] {
            assert_eq!(quiet(text), Err(HotplugError::Quiet), "{text}");
        }
    }
}
