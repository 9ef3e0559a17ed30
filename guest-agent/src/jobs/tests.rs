//! Jobs as the server sees them: real processes and files, and the server's end of the connection.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use ovum_agent_proto::exec::ExecSpec;
use ovum_agent_proto::files::{PutKind, PutSpec};
use ovum_agent_proto::frame::Frame;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{WaitOptions, waitpid};

use super::*;
use crate::workload;

mod commands;
mod copies;
mod hostility;

/// How long something may take that should take no time.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection with its jobs, and the server's end.
struct Guest {
    session: Session,
    jobs: Jobs,
    server: UnixStream,
    received: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        let (ours, server) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        server.set_nonblocking(true).unwrap();
        let mut guest = Self {
            session: Session::open(ours.into()),
            jobs: Jobs::default(),
            server,
            received: Vec::new(),
        };
        let (0, ToServer::Hello { .. }) = guest.next() else { panic!("no hello") };
        guest
    }

    /// The server says something, which arrives.
    fn say(&mut self, stream: u32, message: ToAgent) {
        self.try_say(stream, message).unwrap();
    }

    fn try_say(&mut self, stream: u32, message: ToAgent) -> Result<(), Closed> {
        let env = [("PATH".to_owned(), "/usr/bin:/bin".to_owned()), ("A".into(), "base".into())];
        self.jobs.take(stream, message, &env, &mut self.session)
    }

    /// One turn of the loop around us, without signals: ended children are looked for.
    fn turn(&mut self) {
        let pids: Vec<Pid> = self.jobs.running.values().filter_map(pid).collect();
        for pid in pids {
            if let Ok(Some((_, status))) = waitpid(Some(pid), WaitOptions::NOHANG) {
                let code = workload::exit_code(status.exit_status(), status.terminating_signal());
                self.jobs.reaped(pid, code.unwrap());
            }
        }
        let ready: Vec<_> = {
            let has_room = self.session.has_room();
            let interests: Vec<_> = self.jobs.interests(has_room).collect();
            let mut fds: Vec<_> = interests
                .iter()
                .map(|(_, end, fd)| {
                    let flags = if *end == End::Input { PollFlags::OUT } else { PollFlags::IN };
                    PollFd::from_borrowed_fd(*fd, flags)
                })
                .collect();
            let wait = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            poll(&mut fds, Some(&wait)).unwrap();
            let found = fds.iter().zip(&interests).filter(|(fd, _)| !fd.revents().is_empty());
            found.map(|(_, (stream, end, _))| (*stream, *end)).collect()
        };
        for (stream, end) in ready {
            self.jobs.serve(stream, end, &mut self.session);
        }
        self.jobs.work(&mut self.session);
        self.session.send().unwrap();
    }

    /// What the server hears without anything happening.
    fn heard(&mut self) -> Option<(u32, ToServer)> {
        let mut chunk = [0; 1 << 16];
        while let Ok(read @ 1..) = self.server.read(&mut chunk) {
            self.received.extend_from_slice(&chunk[..read]);
        }
        let (frame, bytes) = Frame::decode(&self.received).unwrap()?;
        let heard = (frame.stream, ToServer::decode(frame).unwrap());
        self.received.drain(..bytes);
        Some(heard)
    }

    /// What the server hears next.
    fn next(&mut self) -> (u32, ToServer) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(heard) = self.heard() {
                return heard;
            }
            assert!(Instant::now() < deadline, "the agent is silent");
            self.turn();
        }
    }

    /// Everything until a command ends: output, error, exit status. Gives credit for all of it.
    fn until_ended(&mut self) -> (String, String, u8) {
        let (mut output, mut error) = (Vec::new(), Vec::new());
        loop {
            let (stream, message) = self.next();
            let cost = message.cost();
            match message {
                ToServer::Data(bytes) => output.extend(bytes),
                ToServer::ErrorData(bytes) => error.extend(bytes),
                ToServer::Ended { code } => {
                    let text = |bytes| String::from_utf8(bytes).unwrap();
                    return (text(output), text(error), code);
                }
                ToServer::Ack | ToServer::Credit(_) => {}
                other => panic!("{other:?}"),
            }
            if cost > 0 {
                self.say(stream, ToAgent::Credit(cost));
            }
        }
    }

    fn run(&mut self, spec: ExecSpec) -> (String, String, u8) {
        self.say(1, ToAgent::Exec(spec));
        self.until_ended()
    }

    fn refusal(&mut self, message: ToAgent) -> (ErrorCode, String) {
        self.say(1, message);
        match self.next() {
            (1, ToServer::Error { code, message }) => (code, message),
            other => panic!("{other:?}"),
        }
    }
}

fn pid(job: &Job) -> Option<Pid> {
    match job {
        Job::Command(command) => Some(command.pid()),
        Job::Put(_) | Job::Get(_) => None,
    }
}

fn sh(script: &str) -> ExecSpec {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    ExecSpec { argv, ..ExecSpec::default() }
}

fn put(path: &Path, kind: PutKind) -> PutSpec {
    let path = path.to_str().unwrap().to_owned();
    PutSpec { path, kind, mode: 0o640, owner: None, mtime: None }
}

#[test]
fn a_stream_in_use_is_not_opened_again_and_words_for_none_are_skipped() {
    let mut guest = Guest::new();
    guest.say(1, ToAgent::Exec(sh("sleep 1000")));
    assert_eq!(guest.next(), (1, ToServer::Ack));

    let (code, _) = guest.refusal(ToAgent::Exec(sh("true")));
    assert_eq!(code, ErrorCode::Malformed);

    for message in [ToAgent::Data(vec![1]), ToAgent::End, ToAgent::Credit(1), ToAgent::Cancel] {
        guest.say(9, message);
    }
    assert_eq!(guest.jobs.running.len(), 1);
}

#[test]
fn there_is_a_limit_to_jobs() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Guest::new();
    for stream in 1..=256 {
        let path = dir.path().join(stream.to_string());
        guest.say(stream, ToAgent::Put(put(&path, PutKind::File)));
        assert_eq!(guest.next(), (stream, ToServer::Ack));
    }

    guest.say(257, ToAgent::Exec(sh("true")));

    let (257, ToServer::Error { code: ErrorCode::Busy, .. }) = guest.next() else {
        panic!("admitted")
    };
}
