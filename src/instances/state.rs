//! The life of an instance as one pure table.
//!
//! ```text
//!            Launched               Ready
//!  Created ───────────> Initializing ────> Running
//!     ^                      │  Stop          │ Stop
//!     │ Start                └───> Shutdown <─┘
//!     │                               │ Ended            Ended from any of these
//!     └─────────── Stopped <──────────┴──────────────────────────────────────
//! ```
//!
//! The owner of an instance asks here first and acts second. What a client may ask for in which
//! state is the second table, [`State::verdict`]. States that no event of this version leads to are
//! part of the wire: clients may ask for them, and wait in vain.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Where an instance is in its life. Spelled as on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    /// It has a name; its worker is not there yet.
    Created,
    /// The guest boots.
    Initializing,
    /// The workload runs and, unless the guest goes without, the agent answers.
    Running,
    /// vCPUs stand still while a snapshot is made or loaded.
    Paused,
    /// It was told to end and has not yet.
    Shutdown,
    /// There is no worker. Disk, log and exit status stay.
    Stopped,
    /// There is no worker, but memory on disk.
    Standby,
    /// What the worker does could not be told.
    Unknown,
}

/// What happens to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A machine is about to be started for it, once more.
    Start,
    /// The worker says that the vCPUs run.
    Launched,
    /// The workload runs, and the agent answers if there is one.
    Ready,
    /// It was told to end.
    Stop,
    /// The machine ended, in whatever way, or did not come to be.
    Ended,
}

/// What a client may ask of an instance, if its state allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// End it; its disk stays.
    Stop,
    /// Start it again.
    Start,
    /// Start it again with another command.
    StartChanged,
}

/// What a request comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is to be done.
    Act,
    /// It is done already.
    Done,
    /// Not in this state.
    Refuse,
}

/// An event that this state has no place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} does not follow on {state}")]
pub struct Refused {
    /// The state, unchanged.
    pub state: State,
    /// The event.
    pub event: Event,
}

impl State {
    /// All states, in the order of a life.
    pub const ALL: [Self; 8] = [
        Self::Created,
        Self::Initializing,
        Self::Running,
        Self::Paused,
        Self::Shutdown,
        Self::Stopped,
        Self::Standby,
        Self::Unknown,
    ];

    /// The lifecycle, whole.
    ///
    /// # Errors
    ///
    /// [`Refused`] if the event does not follow on this state; nothing happens then.
    pub fn after(self, event: Event) -> Result<Self, Refused> {
        use Event::{Ended, Launched, Ready, Start, Stop};
        match (self, event) {
            (Self::Stopped, Start) => Ok(Self::Created),
            (Self::Created, Launched) => Ok(Self::Initializing),
            (Self::Initializing, Ready) => Ok(Self::Running),
            (Self::Initializing | Self::Running | Self::Paused | Self::Unknown, Stop) => {
                Ok(Self::Shutdown)
            }
            (
                Self::Created
                | Self::Initializing
                | Self::Running
                | Self::Paused
                | Self::Shutdown
                | Self::Unknown,
                Ended,
            ) => Ok(Self::Stopped),
            (state, event) => Err(Refused { state, event }),
        }
    }

    /// What `request` comes to in this state, the second table.
    pub fn verdict(self, request: Request) -> Verdict {
        use Request::{Start, StartChanged, Stop};
        match (self, request) {
            (Self::Initializing | Self::Running, Stop) | (Self::Stopped, Start | StartChanged) => {
                Verdict::Act
            }
            (Self::Stopped, Stop) | (Self::Initializing | Self::Running, Start) => Verdict::Done,
            (
                Self::Created | Self::Paused | Self::Shutdown | Self::Standby | Self::Unknown,
                Stop | Start | StartChanged,
            )
            | (Self::Initializing | Self::Running, StartChanged) => Verdict::Refuse,
        }
    }

    /// Whether one who waits for `target` waits in vain from here on, unless somebody acts.
    pub fn is_dead_end_for(self, target: Self) -> bool {
        match self {
            Self::Stopped | Self::Standby | Self::Paused | Self::Unknown => target != self,
            Self::Shutdown => !matches!(target, Self::Shutdown | Self::Stopped),
            Self::Created | Self::Initializing | Self::Running => false,
        }
    }

    /// As a phase of a life, beside those of a boot.
    pub fn phase(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Initializing => "initializing",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutdown => "shutdown",
            Self::Stopped => "stopped",
            Self::Standby => "standby",
            Self::Unknown => "unknown",
        }
    }

    /// As on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "Created",
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Paused => "Paused",
            Self::Shutdown => "Shutdown",
            Self::Stopped => "Stopped",
            Self::Standby => "Standby",
            Self::Unknown => "Unknown",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The text names no state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "State must be one of Created, Initializing, Running, Paused, Shutdown, Stopped, Standby, \
     Unknown"
)]
pub struct StateNameError;

impl FromStr for State {
    type Err = StateNameError;

    fn from_str(name: &str) -> Result<Self, StateNameError> {
        Self::ALL.into_iter().find(|state| state.name() == name).ok_or(StateNameError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 5] =
        [Event::Start, Event::Launched, Event::Ready, Event::Stop, Event::Ended];
    const REQUESTS: [Request; 3] = [Request::Stop, Request::Start, Request::StartChanged];

    fn squeezed(line: &str) -> String {
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_lifecycle_is_this_table() {
        let cell = |state: State, event| match state.after(event) {
            Ok(next) => next.name(),
            Err(refused) => {
                assert_eq!(refused, Refused { state, event });
                "-"
            }
        };
        let row = |state| EVENTS.map(|event| cell(state, event)).join(" ");

        assert_eq!(
            State::ALL.map(row),
            [
                // Start   Launched     Ready   Stop     Ended
                "-       Initializing -       -        Stopped", // Created
                "-       -            Running Shutdown Stopped", // Initializing
                "-       -            -       Shutdown Stopped", // Running
                "-       -            -       Shutdown Stopped", // Paused
                "-       -            -       -        Stopped", // Shutdown
                "Created -            -       -        -",       // Stopped
                "-       -            -       -        -",       // Standby
                "-       -            -       Shutdown Stopped", // Unknown
            ]
            .map(squeezed)
        );
    }

    #[test]
    fn what_clients_may_ask_for_is_this_table() {
        let row = |state: State| REQUESTS.map(|r| format!("{:?}", state.verdict(r))).join(" ");

        assert_eq!(
            State::ALL.map(row),
            [
                // Stop  Start  StartChanged
                "Refuse Refuse Refuse", // Created
                "Act    Done   Refuse", // Initializing
                "Act    Done   Refuse", // Running
                "Refuse Refuse Refuse", // Paused
                "Refuse Refuse Refuse", // Shutdown
                "Done   Act    Act",    // Stopped
                "Refuse Refuse Refuse", // Standby
                "Refuse Refuse Refuse", // Unknown
            ]
            .map(squeezed)
        );
    }

    #[test]
    fn who_waits_in_vain_is_this_table() {
        let row = |state: State| {
            State::ALL.map(|target| if state.is_dead_end_for(target) { 'x' } else { '.' })
        };

        assert_eq!(
            State::ALL.map(row).map(String::from_iter),
            [
                // C I R P S S S U
                "........", // Created
                "........", // Initializing
                "........", // Running
                "xxx.xxxx", // Paused
                "xxxx..xx", // Shutdown
                "xxxxx.xx", // Stopped
                "xxxxxx.x", // Standby
                "xxxxxxx.", // Unknown
            ]
        );
    }

    #[test]
    fn a_state_reads_as_it_is_written() {
        for state in State::ALL {
            assert_eq!(state.to_string().parse(), Ok(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
        assert_eq!("running".parse::<State>(), Err(StateNameError));
    }
}
