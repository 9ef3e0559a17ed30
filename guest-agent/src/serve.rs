//! The agent's loop: it waits for signals, output, and the server, all at once and with one thread.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use ovum_agent_proto::frame::CONNECTION;
use ovum_agent_proto::message::{ErrorCode, ToAgent, ToServer};
use ovum_agent_proto::report::Exit;
use ovum_agent_proto::volumes::{AttachSpec, DetachSpec};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions};
use rustix::{event, process};

use crate::command::End;
use crate::jobs::Jobs;
use crate::listener::Listener;
use crate::memory::MemoryWatch;
use crate::output::Output;
use crate::session::{Closed, Session};
use crate::signals::{self, Signal, Signals};
use crate::volumes::Volumes;
use crate::{chain, init, systemd, workload};

/// What is reported of an init system that ended the guest by itself.
const SUCCESS: Exit = Exit { code: 0, oom: false };

/// What is reported of an init system that had to be killed.
const KILLED: Exit = Exit { code: 137, oom: false };

/// Most connections at once; further ones wait in the listener's backlog.
const CLIENTS_MAX: usize = 16;

/// How long processes that were killed may take to be gone. More than that is for the kernel to
/// explain; the disk is left to its journal then.
const BURIAL_TIME_MAX: Duration = Duration::from_secs(1);

/// Time that a workload gets to end if the guest itself asks to be stopped.
const OWN_GRACE: Duration = Duration::from_secs(10);

/// What the loop takes care of.
#[derive(Debug)]
pub(crate) struct Agent<'v> {
    pub(crate) signals: Signals,
    pub(crate) listener: Option<Listener>,
    pub(crate) charge: Charge,
    /// The workload's environment, which commands get too.
    pub(crate) env: Vec<(String, String)>,
    /// What the guest has of them.
    pub(crate) volumes: &'v mut Volumes,
    /// Who tells the machine how the guest is off for memory, if it wants to know.
    pub(crate) memory: Option<MemoryWatch>,
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
    Init,
    /// systemd, of which we are a unit. It ends the guest itself.
    Systemd,
}

/// The loop's state.
#[derive(Debug)]
struct Loop<'v> {
    agent: Agent<'v>,
    clients: Vec<Client>,
    /// When whatever still runs is killed.
    kill_at: Option<Instant>,
    ended: Option<Ending>,
}

/// A connection and what runs for it.
#[derive(Debug)]
struct Client {
    session: Session,
    jobs: Jobs,
    is_over: bool,
}

/// How serving ended.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Ending {
    /// The charge is gone, and everyone else with it. The guest is to be ended.
    Over(Exit),
    /// The init system is ending the guest, and waits for us to leave.
    Dismissed(Exit),
    /// The guest goes on without us, or with another of us.
    Relieved,
}

/// What was found to be ready. Clients are known by their place, which stays during a turn.
#[derive(Debug, Clone, Copy)]
enum Ready {
    Signals,
    Output,
    Listener,
    Memory { is_lost: bool },
    Session { client: usize, hears: bool },
    Job { client: usize, stream: u32, end: End },
}

impl Agent<'_> {
    /// Serves until the charge has ended.
    pub(crate) fn serve(self) -> Ending {
        let mut serving = Loop { agent: self, clients: Vec::new(), kill_at: None, ended: None };
        loop {
            if let Some(ending) = serving.ended {
                serving.finish(ending);
                return ending;
            }
            serving.turn();
        }
    }
}

impl Loop<'_> {
    /// Waits once, and does what there is to do.
    fn turn(&mut self) {
        let mut orders = Vec::new();
        for ready in self.wait() {
            match ready {
                Ready::Signals => self.take_signals(),
                Ready::Output => {
                    if let Charge::Workload { output, .. } = &mut self.agent.charge {
                        output.pump();
                    }
                }
                Ready::Listener => {
                    let accepted = self.agent.listener.as_ref().and_then(Listener::accept);
                    self.clients.extend(accepted.map(Client::new));
                }
                Ready::Memory { is_lost: true } => self.agent.memory = None,
                Ready::Memory { is_lost: false } => {
                    if let Some(memory) = &mut self.agent.memory {
                        memory.note_pressure();
                    }
                }
                Ready::Session { hears: false, .. } => {}
                Ready::Session { client, hears: true } => {
                    let received = self.clients[client].receive(&self.agent.env);
                    orders.extend(received.into_iter().map(|order| (client, order)));
                }
                Ready::Job { client, stream, end } => {
                    let Client { session, jobs, .. } = &mut self.clients[client];
                    jobs.serve(stream, end, session);
                }
            }
        }
        for (client, (stream, order)) in orders {
            let answer = self.obey(&order);
            self.clients[client].session.say(stream, &answer);
        }
        self.clients.retain_mut(Client::work);
        if let Some(memory) = &mut self.agent.memory {
            memory.check_time(Instant::now());
        }
        if self.kill_at.is_some_and(|kill_at| Instant::now() >= kill_at) {
            self.kill();
        }
    }

    fn wait(&self) -> Vec<Ready> {
        let output = match &self.agent.charge {
            Charge::Workload { output, .. } => output.pipe(),
            Charge::Init | Charge::Systemd => None,
        };
        let listener = self.agent.listener.as_ref().filter(|_| self.clients.len() < CLIENTS_MAX);

        let mut watched = vec![(PollFd::new(&self.agent.signals, PollFlags::IN), Ready::Signals)];
        let output = output.as_ref().map(|output| PollFd::new(output, PollFlags::IN));
        watched.extend(output.map(|output| (output, Ready::Output)));
        let listener = listener.map(|listener| PollFd::new(listener, PollFlags::IN));
        watched.extend(listener.map(|listener| (listener, Ready::Listener)));
        let memory = self.agent.memory.as_ref().map(|memory| PollFd::new(memory, PollFlags::PRI));
        watched.extend(memory.map(|memory| (memory, Ready::Memory { is_lost: false })));
        for (client, Client { session, jobs, .. }) in self.clients.iter().enumerate() {
            let fd = PollFd::new(session, session.interest());
            watched.push((fd, Ready::Session { client, hears: false }));
            for (stream, end, fd) in jobs.interests(session.has_room()) {
                let flags = if end == End::Input { PollFlags::OUT } else { PollFlags::IN };
                let fd = PollFd::from_borrowed_fd(fd, flags);
                watched.push((fd, Ready::Job { client, stream, end }));
            }
        }
        let (mut fds, ready): (Vec<_>, Vec<_>) = watched.into_iter().unzip();

        // An error is EINTR, or a shortage of memory that the next turn may not meet; either way
        // no descriptor has reported anything.
        let _ = event::poll(&mut fds, self.time_to_wait().as_ref());

        let found = fds.iter().map(PollFd::revents).zip(ready);
        let found =
            found.filter(|(events, _)| !events.is_empty()).map(|(events, what)| match what {
                Ready::Session { client, .. } => {
                    let heard = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
                    Ready::Session { client, hears: events.intersects(heard) }
                }
                Ready::Memory { .. } => Ready::Memory { is_lost: events.contains(PollFlags::ERR) },
                other => other,
            });
        found.collect()
    }

    /// How long nothing has to be done unless something happens; nothing for as long as it takes.
    fn time_to_wait(&self) -> Option<Timespec> {
        if self.clients.iter().any(Client::is_restless) {
            return Some(Timespec::default());
        }
        let deadlines = self.clients.iter().filter_map(|client| client.jobs.deadline());
        let memory = self.agent.memory.as_ref().and_then(MemoryWatch::deadline);
        let first = deadlines.chain(self.kill_at).chain(memory).min()?;
        let left = first.saturating_duration_since(Instant::now());
        Some(Timespec::try_from(left).unwrap_or_default())
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
                (Signal::Stop { by_init: true }, Charge::Init) => {
                    self.ended = Some(Ending::Dismissed(SUCCESS));
                }
                (Signal::Stop { by_init: true }, Charge::Systemd) => {
                    let is_ending = systemd::is_ending();
                    let dismissed = Ending::Dismissed(SUCCESS);
                    self.ended = Some(if is_ending { dismissed } else { Ending::Relieved });
                }
                (Signal::Stop { by_init: false }, Charge::Init | Charge::Systemd) => {}
            }
        }
    }

    /// Collects every child that ended: the charge, commands, and orphans, which the kernel gives
    /// to PID 1.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = process::wait(WaitOptions::NOHANG) {
            let (exited, killed) = (status.exit_status(), status.terminating_signal());
            let Some(code) = workload::exit_code(exited, killed) else { continue };
            if self.clients.iter_mut().any(|client| client.jobs.reaped(pid, code)) {
                continue;
            }
            let Charge::Workload { pid: charge, .. } = &self.agent.charge else { continue };
            if pid == *charge {
                self.ended = workload::exit(status).map(Ending::Over);
            }
        }
    }

    /// Does what was ordered, waiting for disks if it has to.
    fn obey(&mut self, order: &Order) -> ToServer {
        let refused = match order {
            Order::Shutdown { signal, grace } => {
                self.stop(*signal, *grace).map_err(|errno| (ErrorCode::System, errno.to_string()))
            }
            Order::Attach(spec) => {
                self.agent.volumes.attach(spec).map_err(|error| (error.code(), chain(&error)))
            }
            Order::Detach(spec) => {
                self.agent.volumes.detach(spec).map_err(|error| (error.code(), chain(&error)))
            }
        };
        match refused {
            Ok(()) => ToServer::Ack,
            Err((code, message)) => ToServer::Error { code, message },
        }
    }

    /// Asks the charge to end, and sees to it that it does. Asked twice, the shorter grace counts.
    fn stop(&mut self, signal: u8, grace: Duration) -> Result<(), Errno> {
        let (pid, stop_signal) = match self.agent.charge {
            Charge::Workload { pid, .. } => (pid, 15),
            Charge::Init => (Pid::INIT, init::POWER_OFF),
            Charge::Systemd => (Pid::INIT, systemd::POWER_OFF),
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
            Charge::Init | Charge::Systemd => self.ended = Some(Ending::Over(KILLED)),
        }
    }

    /// Says goodbye; before that, if the guest is ours to end, ends what is left in it, as the end
    /// of a container would.
    fn finish(&mut self, ending: Ending) {
        let exit = match ending {
            // Whoever is connected finds out, and the next of us.
            Ending::Relieved => return,
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
        for Client { session, .. } in &mut self.clients {
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

/// An order to the whole guest.
#[derive(Debug, Clone)]
enum Order {
    /// End it.
    Shutdown { signal: u8, grace: Duration },
    /// Give it a volume.
    Attach(AttachSpec),
    /// Take a volume from it.
    Detach(DetachSpec),
}

impl Client {
    fn new(stream: OwnedFd) -> Self {
        Self { session: Session::open(stream), jobs: Jobs::default(), is_over: false }
    }

    fn is_restless(&self) -> bool {
        self.jobs.are_restless(self.session.has_room())
    }

    /// Takes what the server says; returns what is for the whole guest, each with its stream.
    fn receive(&mut self, env: &[(String, String)]) -> Vec<(u32, Order)> {
        let mut orders = Vec::new();
        match self.session.receive() {
            Ok(requests) => {
                for (stream, request) in requests {
                    match request {
                        ToAgent::Shutdown { signal, grace_ms } => {
                            let grace = Duration::from_millis(grace_ms.into());
                            orders.push((stream, Order::Shutdown { signal, grace }));
                        }
                        ToAgent::Attach(spec) => orders.push((stream, Order::Attach(spec))),
                        ToAgent::Detach(spec) => orders.push((stream, Order::Detach(spec))),
                        request => {
                            let taken = self.jobs.take(stream, request, env, &mut self.session);
                            self.is_over |= taken.is_err();
                        }
                    }
                }
            }
            Err(Closed) => self.is_over = true,
        }
        orders
    }

    /// Does what can be done without waiting; whether the connection goes on.
    fn work(&mut self) -> bool {
        self.jobs.work(&mut self.session);
        !self.is_over && self.session.send().is_ok()
    }
}
