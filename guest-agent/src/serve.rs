//! The agent's loop: it waits for signals, output, and the server, all at once and with one thread.

use std::mem;
use std::time::{Duration, Instant};

use ovum_agent_proto::frame::{CONNECTION, ErrorCode, ToAgent, ToServer};
use ovum_agent_proto::report::Exit;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions};
use rustix::{event, process};

use crate::listener::Listener;
use crate::output::Output;
use crate::session::Session;
use crate::signals::{self, Signal, Signals};
use crate::workload;

/// What is reported of an init system that had to be killed.
const KILLED: Exit = Exit { code: 137, oom: false };

/// Most connections at once; further ones wait in the listener's backlog.
const SESSIONS_MAX: usize = 16;

/// How long processes that were killed may take to be gone. More than that is for the kernel to
/// explain; the disk is left to its journal then.
const BURIAL_TIME_MAX: Duration = Duration::from_secs(1);

/// Time that a workload gets to end if the guest itself asks to be stopped.
const OWN_GRACE: Duration = Duration::from_secs(10);

/// What the loop takes care of.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) signals: Signals,
    pub(crate) listener: Option<Listener>,
    pub(crate) charge: Charge,
}

/// For whom the guest exists.
#[derive(Debug)]
pub(crate) enum Charge {
    /// A workload, our child.
    Workload {
        /// Its process.
        pid: Pid,
        /// What it writes.
        output: Output,
    },
    /// An init system, our parent. It ends the guest itself.
    Init {
        /// The signal at which it does.
        stop_signal: u8,
    },
}

/// The loop's state.
#[derive(Debug)]
struct Loop {
    agent: Agent,
    sessions: Vec<Session>,
    /// When whatever still runs is killed.
    kill_at: Option<Instant>,
    ended: Option<Ending>,
}

/// How serving ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending {
    /// The charge is gone, and everyone else with it. The guest is to be ended.
    Over(Exit),
    /// The init system is ending the guest, and waits for us to leave.
    Dismissed(Exit),
}

/// What can be done without waiting.
struct Ready {
    signals: bool,
    output: bool,
    listener: bool,
    sessions: Vec<PollFlags>,
}

impl Agent {
    /// Serves until the charge has ended.
    pub(crate) fn serve(self) -> Ending {
        let mut serving = Loop { agent: self, sessions: Vec::new(), kill_at: None, ended: None };
        loop {
            if let Some(ending) = serving.ended {
                serving.finish(ending);
                return ending;
            }
            serving.turn();
        }
    }
}

impl Loop {
    /// Waits once, and does what there is to do.
    fn turn(&mut self) {
        let ready = self.wait();
        if ready.output
            && let Charge::Workload { output, .. } = &mut self.agent.charge
        {
            output.pump();
        }
        if ready.signals {
            self.take_signals();
        }
        self.serve_sessions(&ready.sessions);
        if ready.listener
            && let Some(stream) = self.agent.listener.as_ref().and_then(Listener::accept)
        {
            self.sessions.push(Session::open(stream));
        }
        if self.kill_at.is_some_and(|kill_at| Instant::now() >= kill_at) {
            self.kill();
        }
    }

    fn wait(&self) -> Ready {
        let output = match &self.agent.charge {
            Charge::Workload { output, .. } => output.pipe(),
            Charge::Init { .. } => None,
        };
        let listener = self.agent.listener.as_ref().filter(|_| self.sessions.len() < SESSIONS_MAX);

        let mut fds = Vec::with_capacity(3 + SESSIONS_MAX);
        fds.push(PollFd::new(&self.agent.signals, PollFlags::IN));
        fds.extend(output.as_ref().map(|output| PollFd::new(output, PollFlags::IN)));
        fds.extend(listener.map(|listener| PollFd::new(listener, PollFlags::IN)));
        fds.extend(self.sessions.iter().map(|session| PollFd::new(session, session.interest())));

        let left = self.kill_at.map(|at| at.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec::try_from(left).unwrap_or_default());
        // An error is EINTR, or a shortage of memory that the next turn may not meet; either way
        // no descriptor has reported anything.
        let _ = event::poll(&mut fds, left.as_ref());

        let mut events = fds.iter().map(PollFd::revents);
        let mut next =
            |is_there: bool| is_there && events.next().is_some_and(|events| !events.is_empty());
        let (signals, output, listener) =
            (next(true), next(output.is_some()), next(listener.is_some()));
        Ready { signals, output, listener, sessions: events.collect() }
    }

    fn take_signals(&mut self) {
        while let Some(signal) = self.agent.signals.next() {
            match (signal, &self.agent.charge) {
                (Signal::Child, _) => self.reap(),
                (Signal::Stop { .. }, Charge::Workload { .. }) => {
                    // It was asked; that it may have ended meanwhile is no failure.
                    let _ = self.stop(0, OWN_GRACE);
                }
                // An init system that ends the guest tells everyone to end, and waits for that. Of
                // how it went this is all that can be known.
                (Signal::Stop { by_init: true }, Charge::Init { .. }) => {
                    self.ended = Some(Ending::Dismissed(Exit { code: 0, oom: false }));
                }
                (Signal::Stop { by_init: false }, Charge::Init { .. }) => {}
            }
        }
    }

    /// Collects every child that ended: the charge, and orphans, which the kernel gives to PID 1.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = process::wait(WaitOptions::NOHANG) {
            let Charge::Workload { pid: charge, .. } = &self.agent.charge else { continue };
            if pid == *charge {
                self.ended = workload::exit(status).map(Ending::Over);
            }
        }
    }

    /// Answers sessions, given what was found of each. Those that are over are dropped.
    fn serve_sessions(&mut self, events: &[PollFlags]) {
        let mut events = events.iter();
        for mut session in mem::take(&mut self.sessions) {
            let found = events.next().copied().unwrap_or(PollFlags::empty());
            let requests = if found.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                session.receive()
            } else {
                Ok(Vec::new())
            };
            let Ok(requests) = requests else { continue };
            for (stream, request) in requests {
                let answer = self.answer(&request);
                session.say(stream, &answer);
            }
            if session.send().is_ok() {
                self.sessions.push(session);
            }
        }
    }

    fn answer(&mut self, request: &ToAgent) -> ToServer {
        match *request {
            ToAgent::Shutdown { signal, grace_ms } => {
                match self.stop(signal, Duration::from_millis(grace_ms.into())) {
                    Ok(()) => ToServer::Ack,
                    Err(errno) => {
                        ToServer::Error { code: ErrorCode::System, message: errno.to_string() }
                    }
                }
            }
        }
    }

    /// Asks the charge to end, and sees to it that it does. Asked twice, the shorter grace counts.
    fn stop(&mut self, signal: u8, grace: Duration) -> Result<(), Errno> {
        let (pid, stop_signal) = match self.agent.charge {
            Charge::Workload { pid, .. } => (pid, 15),
            Charge::Init { stop_signal } => (Pid::INIT, stop_signal),
        };
        let kill_at = Instant::now() + grace;
        self.kill_at = Some(self.kill_at.map_or(kill_at, |earlier| earlier.min(kill_at)));
        signals::send(pid, if signal == 0 { stop_signal } else { signal })
    }

    /// The grace is over.
    fn kill(&mut self) {
        self.kill_at = None;
        match self.agent.charge {
            // Its end arrives as a signal, like any other.
            Charge::Workload { pid, .. } => drop(process::kill_process(pid, process::Signal::KILL)),
            Charge::Init { .. } => self.ended = Some(Ending::Over(KILLED)),
        }
    }

    /// Says goodbye; before that, if the guest is ours to end, ends what is left in it, as the end
    /// of a container would.
    fn finish(&mut self, ending: Ending) {
        let exit = match ending {
            Ending::Dismissed(exit) => exit,
            Ending::Over(exit) => {
                // "Group 1" is everyone but PID 1 and, if that is another, ourselves (kill(2)). No
                // one there is an answer too.
                let _ = process::kill_process_group(Pid::INIT, process::Signal::KILL);
                if let Charge::Workload { output, .. } = &mut self.agent.charge {
                    output.drain();
                }
                self.bury();
                exit
            }
        };
        for session in &mut self.sessions {
            session.say(CONNECTION, &ToServer::Exited(exit));
            // Whoever does not take it now learns it from the report.
            let _ = session.send();
        }
    }

    /// Waits until whoever was killed is gone, files closed. Being PID 1 we are everyone's parent
    /// by now; if we are not, there is nobody to wait for.
    fn bury(&self) {
        let deadline = Instant::now() + BURIAL_TIME_MAX;
        loop {
            match process::wait(WaitOptions::NOHANG) {
                Ok(Some(_)) => {}
                Ok(None) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let left = Timespec::try_from(left).unwrap_or_default();
                    let mut child = [PollFd::new(&self.agent.signals, PollFlags::IN)];
                    if !event::poll(&mut child, Some(&left)).is_ok_and(|ready| ready > 0) {
                        return;
                    }
                    while self.agent.signals.next().is_some() {}
                }
                Err(_) => return,
            }
        }
    }
}
