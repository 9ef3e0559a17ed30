//! What runs for one connection of the server: each open stream has a job.

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use ovum_agent_proto::message::{ErrorCode, ToAgent, ToServer};
use rustix::process::Pid;

use crate::command::{Command, End, NotStarted};
use crate::get::Get;
use crate::outbox::Outbox;
use crate::put::Put;
use crate::session::{Closed, Session};
use crate::stat;

/// Most streams of one connection.
const JOBS_MAX: usize = 256;

/// The jobs of a connection, by stream.
#[derive(Debug, Default)]
pub(crate) struct Jobs {
    running: BTreeMap<u32, Job>,
}

/// What a stream was opened for.
#[derive(Debug)]
enum Job {
    Command(Command),
    Put(Put),
    Get(Get),
}

/// Whether there is more to come on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    GoesOn,
    Over,
}

impl Jobs {
    /// Takes what the server says on `stream`. `env` is the workload's.
    pub(crate) fn take(
        &mut self,
        stream: u32,
        message: ToAgent,
        env: &[(String, String)],
        session: &mut Session,
    ) -> Result<(), Closed> {
        let mut outbox = Outbox::new(session, stream);
        let opened = match message {
            ToAgent::Stat(spec) => {
                outbox.say(&stat::answer(&spec));
                return Ok(());
            }
            // Orders to the whole guest, which are served above.
            ToAgent::Shutdown { .. } | ToAgent::Attach(_) | ToAgent::Detach(_) => return Ok(()),
            ToAgent::Exec(_) | ToAgent::Put(_) | ToAgent::Get(_) => {
                self.check_place(stream).and_then(|()| open(message, env))
            }
            ToAgent::Data(_)
            | ToAgent::End
            | ToAgent::Credit(_)
            | ToAgent::Resize(_)
            | ToAgent::Cancel => return self.pass(stream, message, &mut outbox),
        };
        match opened {
            Ok(job) => {
                outbox.say(&ToServer::Ack);
                self.running.insert(stream, job);
            }
            Err(NotStarted { code, message }) => outbox.say(&ToServer::Error { code, message }),
        }
        Ok(())
    }

    fn check_place(&self, stream: u32) -> Result<(), NotStarted> {
        if self.running.contains_key(&stream) {
            let message = format!("stream {stream} is in use");
            return Err(NotStarted { code: ErrorCode::Malformed, message });
        }
        if self.running.len() >= JOBS_MAX {
            let message = format!("{JOBS_MAX} commands and copies are running: wait for one");
            return Err(NotStarted { code: ErrorCode::Busy, message });
        }
        Ok(())
    }

    /// Hands a message to the job of `stream`. What comes for one that is over is skipped.
    fn pass(
        &mut self,
        stream: u32,
        message: ToAgent,
        outbox: &mut Outbox<'_>,
    ) -> Result<(), Closed> {
        let Some(job) = self.running.get_mut(&stream) else { return Ok(()) };
        let mut progress = Progress::GoesOn;
        match (job, message) {
            (_, ToAgent::Cancel) => progress = Progress::Over,
            (Job::Command(command), ToAgent::Data(bytes)) => command.feed(&bytes, outbox)?,
            (Job::Command(command), ToAgent::End) => command.end_input(outbox),
            (Job::Command(command), ToAgent::Credit(bytes)) => command.add_credit(bytes),
            (Job::Command(command), ToAgent::Resize(size)) => command.resize(size),
            (Job::Put(put), ToAgent::Data(bytes)) => progress = put.write(&bytes, outbox),
            (Job::Put(put), ToAgent::End) => {
                put.finish(outbox);
                progress = Progress::Over;
            }
            (Job::Get(get), ToAgent::Credit(bytes)) => get.add_credit(bytes),
            // Not a word that this job knows: it is the server's to know better.
            (Job::Put(_) | Job::Get(_), _) | (Job::Command(_), _) => {}
        }
        if progress == Progress::Over {
            self.running.remove(&stream);
        }
        Ok(())
    }

    /// What to wait for, each with its stream and end.
    pub(crate) fn interests(
        &self,
        has_room: bool,
    ) -> impl Iterator<Item = (u32, End, BorrowedFd<'_>)> {
        self.running.iter().flat_map(move |(&stream, job)| {
            let command = match job {
                Job::Command(command) => Some(command),
                Job::Put(_) | Job::Get(_) => None,
            };
            command
                .into_iter()
                .flat_map(move |command| command.interests(has_room))
                .map(move |(end, fd)| (stream, end, fd))
        })
    }

    /// Whether there is something to do without waiting.
    pub(crate) fn are_restless(&self, has_room: bool) -> bool {
        has_room
            && self.running.values().any(|job| match job {
                Job::Command(command) => command.is_restless(),
                Job::Get(get) => get.is_restless(),
                Job::Put(_) => false,
            })
    }

    /// When the first of them has to be looked at again.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let deadlines = self.running.values().filter_map(|job| match job {
            Job::Command(command) => command.deadline(),
            Job::Put(_) | Job::Get(_) => None,
        });
        deadlines.min()
    }

    /// Does what can be done at `end` of the command on `stream`.
    pub(crate) fn serve(&mut self, stream: u32, end: End, session: &mut Session) {
        if let Some(Job::Command(command)) = self.running.get_mut(&stream) {
            command.serve(end, &mut Outbox::new(session, stream));
        }
    }

    /// Does what can be done without waiting.
    pub(crate) fn work(&mut self, session: &mut Session) {
        let now = self.deadline().map(|_| Instant::now());
        self.running.retain(|&stream, job| {
            let mut outbox = Outbox::new(session, stream);
            match job {
                Job::Command(command) => {
                    if let Some(now) = now {
                        command.check_time(now);
                    }
                    let code = command.finish(&mut outbox);
                    if let Some(code) = code {
                        outbox.say(&ToServer::Ended { code });
                    }
                    code.is_none()
                }
                Job::Get(get) => get.work(&mut outbox) == Progress::GoesOn,
                Job::Put(_) => true,
            }
        });
    }

    /// The process `pid` ended with `code`; whether it was one of ours.
    pub(crate) fn reaped(&mut self, pid: Pid, code: u8) -> bool {
        self.running.values_mut().any(|job| match job {
            Job::Command(command) => command.reaped(pid, code),
            Job::Put(_) | Job::Get(_) => false,
        })
    }
}

fn open(message: ToAgent, env: &[(String, String)]) -> Result<Job, NotStarted> {
    match message {
        ToAgent::Exec(spec) => Command::start(&spec, env).map(Job::Command),
        ToAgent::Put(spec) => Put::open(spec).map(Job::Put),
        ToAgent::Get(spec) => Get::open(&spec).map(Job::Get),
        _ => Err(NotStarted { code: ErrorCode::Malformed, message: "opens no stream".into() }),
    }
}

#[cfg(test)]
mod tests;
