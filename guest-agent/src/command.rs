//! A command that the server asked for, beside the workload.
//!
//! It leads a session and process group of its own. Its output leaves as fast as the server has
//! room for it: without credit we do not read, and the command waits in its own write. It is over
//! when its first process has ended and what that had written has left; what it started in the
//! background may run on. If the server goes away first, or the time is over, the whole group is
//! killed.

use std::collections::VecDeque;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use ovum_agent_proto::exec::{ExecSpec, WindowSize};
use ovum_agent_proto::frame::WINDOW_BYTES;
use ovum_agent_proto::message::{ErrorCode, ToServer};
use rustix::buffer::spare_capacity;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal};
use rustix::{fs, io, pipe, process};

use crate::outbox::{Credit, Outbox, Taken};
use crate::program::{self, Program, ProgramError, Refusal};
use crate::session::Closed;
use crate::spawn::{self, Place, SpawnError};
use crate::terminal::{self, Terminal};
use crate::workload::{self, OUTPUT_MODE};

/// Exit status of a command whose time was over.
const TIMED_OUT: u8 = 124;

/// Exit status of a program that is not there.
const NOT_FOUND: u8 = 127;

/// What a pipe for output holds, and so the most that a process has left behind when it ended: a
/// whole window, for the more leaves in one go, the fewer interrupts and exits it costs.
const PIPE_BYTES: usize = WINDOW_BYTES as usize;

/// What programs on a terminal expect to be told of it.
const TERMINAL_ENV: [(&str, &str); 4] = [
    ("TERM", "xterm-256color"),
    ("LANG", "C.UTF-8"),
    ("LC_ALL", "C.UTF-8"),
    ("COLORTERM", "truecolor"),
];

/// A running command.
#[derive(Debug)]
pub(crate) struct Command {
    pid: Pid,
    /// How it ended, once it has.
    code: Option<u8>,
    output: Source,
    /// If it is kept apart.
    error: Source,
    input: Sink,
    credit: Credit,
    deadline: Option<Instant>,
    timed_out: bool,
}

/// One of the ends at which we hold a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Input,
    Output,
    Error,
}

/// Why there is no command.
#[derive(Debug)]
pub(crate) struct NotStarted {
    pub(crate) code: ErrorCode,
    pub(crate) message: String,
}

/// Something that a command writes to.
#[derive(Debug)]
struct Source {
    /// Nothing once there is nothing more to read.
    fd: Option<OwnedFd>,
    /// Once the command has ended: how much it can have left in here.
    left_bytes: Option<usize>,
}

/// What a command reads from.
#[derive(Debug)]
struct Sink {
    /// Nothing once the command reads no more, or gets no more.
    fd: Option<OwnedFd>,
    /// Whether that is a terminal, which has no end.
    is_terminal: bool,
    pending: VecDeque<u8>,
    ends: bool,
    taken: Taken,
}

/// Our ends and those of the command.
struct Ends {
    input: OwnedFd,
    output: OwnedFd,
    error: Option<OwnedFd>,
    theirs: [OwnedFd; 3],
}

impl Command {
    /// Starts it, with the workload's environment below its own.
    pub(crate) fn start(spec: &ExecSpec, env: &[(String, String)]) -> Result<Self, NotStarted> {
        let mut env = env.to_vec();
        if spec.terminal.is_some() {
            for (name, value) in TERMINAL_ENV {
                if !env.iter().any(|(known, _)| known == name) {
                    env.push((name.to_owned(), value.to_owned()));
                }
            }
        }
        let env = program::overlaid(env, &spec.env);
        let program = Program::new(&spec.argv, &env).map_err(|error| malformed(&error))?;
        let working_dir = spec.working_dir.as_deref().map(CString::new).transpose();
        let working_dir = working_dir.map_err(|error| malformed(&ProgramError::Nul(error)))?;
        let Ends { input, output, error, theirs } = ends(spec).map_err(system)?;
        let place = Place {
            input: Some(theirs[0].as_fd()),
            output: theirs[1].as_fd(),
            error: theirs[2].as_fd(),
            is_terminal: spec.terminal.is_some(),
            working_dir: working_dir.as_deref(),
            is_mortal: true,
        };
        let pid = start_beside_workload(&program, place).map_err(|error| match error {
            SpawnError::Clone(errno) => system(errno),
            SpawnError::Directory(errno) => {
                let path = spec.working_dir.as_deref().unwrap_or_default();
                let message = format!("working directory {path} cannot be entered: {errno}");
                NotStarted { code: ErrorCode::NotFound, message }
            }
            SpawnError::Exec(search) => {
                let Refusal { code, message } = program.refusal(search);
                let is_missing = code == NOT_FOUND;
                let code = if is_missing { ErrorCode::NotFound } else { ErrorCode::NotExecutable };
                NotStarted { code, message }
            }
        })?;
        let timeout = Duration::from_millis(spec.timeout_ms.into());
        Ok(Self {
            pid,
            code: None,
            output: Source { fd: Some(output), left_bytes: None },
            error: Source { fd: error, left_bytes: None },
            input: Sink {
                fd: Some(input),
                is_terminal: spec.terminal.is_some(),
                pending: VecDeque::new(),
                ends: false,
                taken: Taken::default(),
            },
            credit: Credit::new(),
            deadline: (spec.timeout_ms > 0).then(|| Instant::now() + timeout),
            timed_out: false,
        })
    }

    /// Its first process.
    #[cfg(test)]
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// What to wait for, if the connection has room for output or not.
    pub(crate) fn interests(&self, has_room: bool) -> impl Iterator<Item = (End, BorrowedFd<'_>)> {
        let reads = has_room && self.credit.chunk_bytes() > 0 && self.code.is_none();
        let writes = !self.input.pending.is_empty();
        [
            (End::Output, self.output.fd.as_ref().filter(|_| reads)),
            (End::Error, self.error.fd.as_ref().filter(|_| reads)),
            (End::Input, self.input.fd.as_ref().filter(|_| writes)),
        ]
        .into_iter()
        .filter_map(|(end, fd)| Some((end, fd?.as_fd())))
    }

    /// When its time is over.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether there is something to do without waiting: what an ended command has left.
    pub(crate) fn is_restless(&self) -> bool {
        self.code.is_some() && self.credit.chunk_bytes() > 0
    }

    /// Does what can be done at `end`.
    pub(crate) fn serve(&mut self, end: End, outbox: &mut Outbox<'_>) {
        match end {
            End::Input => self.input.pump(outbox),
            End::Output => self.output.pump(&mut self.credit, outbox, ToServer::Data),
            End::Error => self.error.pump(&mut self.credit, outbox, ToServer::ErrorData),
        }
    }

    /// Moves what an ended command has left; returns how it ended when that is all gone.
    pub(crate) fn finish(&mut self, outbox: &mut Outbox<'_>) -> Option<u8> {
        let code = self.code?;
        for end in [End::Output, End::Error] {
            while outbox.has_room() && self.is_restless() && self.source(end).fd.is_some() {
                self.serve(end, outbox);
            }
        }
        let is_empty = self.output.fd.is_none() && self.error.fd.is_none();
        is_empty.then_some(if self.timed_out { TIMED_OUT } else { code })
    }

    /// Input for the command.
    pub(crate) fn feed(&mut self, bytes: &[u8], outbox: &mut Outbox<'_>) -> Result<(), Closed> {
        if self.input.pending.len() + bytes.len() > WINDOW_BYTES as usize {
            return Err(Closed);
        }
        self.input.pending.extend(bytes);
        self.input.pump(outbox);
        Ok(())
    }

    /// The end of its input.
    pub(crate) fn end_input(&mut self, outbox: &mut Outbox<'_>) {
        self.input.ends = true;
        self.input.pump(outbox);
    }

    /// The server took some of the output.
    pub(crate) fn add_credit(&mut self, bytes: u32) {
        self.credit.add(bytes);
    }

    /// Another size for its terminal, if it has one.
    pub(crate) fn resize(&mut self, size: WindowSize) {
        if let Some(master) = self.input.fd.as_ref().filter(|_| self.input.is_terminal) {
            // A terminal that is gone has no size.
            let _ = terminal::resize(master, size);
        }
    }

    /// The process `pid` ended with `code`; whether that was ours.
    pub(crate) fn reaped(&mut self, pid: Pid, code: u8) -> bool {
        let is_ours = self.pid == pid && self.code.is_none();
        if is_ours {
            self.code = Some(code);
            self.deadline = None;
            self.output.left_bytes = Some(PIPE_BYTES);
            self.error.left_bytes = Some(PIPE_BYTES);
        }
        is_ours
    }

    /// Kills it if its time is over.
    pub(crate) fn check_time(&mut self, now: Instant) {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            self.deadline = None;
            self.timed_out = true;
            self.kill();
        }
    }

    /// Kills the whole group, unless its leader is gone: then the number may be another's.
    fn kill(&self) {
        if self.code.is_none() {
            // There is nobody left: as wanted.
            let _ = process::kill_process_group(self.pid, Signal::KILL);
        }
    }

    fn source(&self, end: End) -> &Source {
        if end == End::Error { &self.error } else { &self.output }
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Source {
    /// Moves what there is, as far as there is room for it.
    fn pump(
        &mut self,
        credit: &mut Credit,
        outbox: &mut Outbox<'_>,
        message: fn(Vec<u8>) -> ToServer,
    ) {
        while outbox.has_room() && self.move_chunk(credit, outbox, message) {}
    }

    /// Moves one chunk; whether there may be more.
    fn move_chunk(
        &mut self,
        credit: &mut Credit,
        outbox: &mut Outbox<'_>,
        message: fn(Vec<u8>) -> ToServer,
    ) -> bool {
        let Some(fd) = &self.fd else { return false };
        let bytes_max = credit.chunk_bytes().min(self.left_bytes.unwrap_or(usize::MAX));
        let mut chunk = Vec::with_capacity(bytes_max);
        match io::read(fd, spare_capacity(&mut chunk)) {
            Ok(0) => self.fd = None,
            Ok(read) => {
                let message = message(chunk);
                if credit.spend(&message) {
                    outbox.say(&message);
                }
                self.left_bytes = self.left_bytes.map(|left| left.saturating_sub(read));
                return read == bytes_max && credit.chunk_bytes() > 0;
            }
            Err(Errno::INTR) => {}
            // Whoever still writes is not the command.
            Err(Errno::AGAIN) if self.left_bytes.is_some() => self.fd = None,
            Err(Errno::AGAIN) => {}
            // EIO: the last one has closed the terminal.
            Err(_) => self.fd = None,
        }
        false
    }
}

impl Sink {
    /// Writes what the command takes now.
    fn pump(&mut self, outbox: &mut Outbox<'_>) {
        while let Some(fd) = &self.fd {
            let (bytes, _) = self.pending.as_slices();
            if bytes.is_empty() {
                break;
            }
            match io::write(fd, bytes) {
                Ok(written) => {
                    self.pending.drain(..written);
                    self.taken.add(written, false, outbox);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // It reads no more.
                Err(_) => self.fd = None,
            }
        }
        if self.fd.is_none() {
            self.pending.clear();
        }
        if self.ends && !self.is_terminal {
            self.fd = None;
        }
        self.taken.add(0, true, outbox);
    }
}

fn ends(spec: &ExecSpec) -> Result<Ends, Errno> {
    if let Some(size) = spec.terminal {
        let Terminal { master, slave } = Terminal::open(size)?;
        let theirs = [slave.try_clone(), slave.try_clone(), Ok(slave)];
        let [input, output, error] =
            theirs.map(|fd| fd.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO)));
        let theirs = [input?, output?, error?];
        return Ok(Ends {
            input: io::fcntl_dupfd_cloexec(&master, 0)?,
            output: master,
            error: None,
            theirs,
        });
    }
    let (their_input, input) = pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (output, their_output) = pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (error, their_error) = if spec.apart {
        let (error, their_error) = pipe::pipe_with(PipeFlags::CLOEXEC)?;
        (Some(error), their_error)
    } else {
        (None, io::fcntl_dupfd_cloexec(&their_output, 0)?)
    };
    for ours in [&output].into_iter().chain(&error) {
        pipe::fcntl_setpipe_size(ours, PIPE_BYTES)?;
    }
    for ours in [&input, &output].into_iter().chain(&error) {
        let flags = fs::fcntl_getfl(ours)?;
        fs::fcntl_setfl(ours, flags | OFlags::NONBLOCK)?;
    }
    for theirs in [&their_output, &their_error] {
        fs::fchmod(theirs, Mode::from_raw_mode(OUTPUT_MODE))?;
    }
    Ok(Ends { input, output, error, theirs: [their_input, their_output, their_error] })
}

/// Starts a command in the workload's cgroup, so that what holds the one up holds the other. A
/// workload that divides its group leaves no room in it: then the command goes without.
fn start_beside_workload(program: &Program, place: Place<'_>) -> Result<Pid, SpawnError> {
    let Ok(cgroup) = workload::cgroup() else { return spawn::spawn(program, place, None) };
    match spawn::spawn(program, place, Some(cgroup.as_fd())) {
        Err(SpawnError::Clone(_)) => spawn::spawn(program, place, None),
        started => started,
    }
}

fn malformed(error: &ProgramError) -> NotStarted {
    NotStarted { code: ErrorCode::Malformed, message: error.to_string() }
}

fn system(errno: Errno) -> NotStarted {
    NotStarted { code: ErrorCode::System, message: errno.to_string() }
}
