//! What happens in a machine, in order, for whoever runs it.
//!
//! Bounded, because the guest causes it: when the reader falls behind, reports are dropped. The
//! end of the machine never is, and it comes once.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};
use rustix::time::{ClockId, clock_gettime};
use std::os::fd::OwnedFd;

/// Most events that wait to be read.
const WAITING_MAX: usize = 256;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineEvent {
    /// CLOCK_MONOTONIC in nanoseconds, taken where it happened.
    pub at_ns: u64,
    /// What.
    pub kind: MachineEventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineEventKind {
    /// The vCPUs run for the first time.
    Started,
    /// The guest wrote a word to the report port.
    Reported {
        /// As written.
        word: u32,
    },
    /// The machine has ended; no event follows.
    Stopped {
        /// Why.
        reason: StopReason,
    },
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// The guest kernel panicked.
    Panic,
    /// [`crate::machine::Machine::stop`] was called.
    Ordered,
    /// A vCPU could not go on, for this reason.
    Fault(String),
}

/// The queue of events.
#[derive(Debug)]
pub struct Events {
    waiting: Mutex<Waiting>,
    signal: OwnedFd,
}

#[derive(Debug, Default)]
struct Waiting {
    events: VecDeque<MachineEvent>,
    stopped: bool,
}

impl Events {
    /// An empty queue.
    ///
    /// # Errors
    ///
    /// What eventfd(2) says.
    pub fn new() -> io::Result<Self> {
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { waiting: Mutex::default(), signal })
    }

    /// Adds an event that happens now.
    pub fn push(&self, kind: MachineEventKind) {
        let event = MachineEvent { at_ns: monotonic_ns(), kind };
        let mut waiting = self.lock();
        let last = matches!(event.kind, MachineEventKind::Stopped { .. });
        if waiting.stopped || (waiting.events.len() >= WAITING_MAX && !last) {
            return;
        }
        waiting.stopped = last;
        waiting.events.push_back(event);
        drop(waiting);
        // A full counter is readable already.
        let _ = write(&self.signal, &1_u64.to_ne_bytes());
    }

    /// Takes the oldest event, if there is one.
    pub fn next(&self) -> Option<MachineEvent> {
        let mut waiting = self.lock();
        if waiting.events.is_empty() {
            let _ = read(&self.signal, &mut [0_u8; 8]);
        }
        waiting.events.pop_front()
    }

    /// Nobody panics while holding the queue, and half a push cannot be seen.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Readable while events wait.
impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use std::iter;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn readable(events: &Events) -> bool {
        let mut file = [PollFd::new(events, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut file, Some(&at_once)).unwrap() == 1
    }

    #[test]
    fn the_file_is_readable_while_events_wait() {
        let events = Events::new().unwrap();
        assert!(!readable(&events));

        events.push(MachineEventKind::Started);
        assert!(readable(&events));

        assert_eq!(events.next().unwrap().kind, MachineEventKind::Started);
        assert_eq!(events.next(), None);
        assert!(!readable(&events));
    }

    #[test]
    fn a_flood_of_reports_does_not_push_out_the_end() {
        let events = Events::new().unwrap();
        for word in 0..10_000 {
            events.push(MachineEventKind::Reported { word });
        }
        events.push(MachineEventKind::Stopped { reason: StopReason::PowerOff });
        events.push(MachineEventKind::Stopped { reason: StopReason::Ordered });

        let seen: Vec<_> = iter::from_fn(|| events.next()).collect();
        assert_eq!(seen.len(), WAITING_MAX + 1);
        let end = MachineEventKind::Stopped { reason: StopReason::PowerOff };
        assert_eq!(seen.last().unwrap().kind, end);
    }
}
