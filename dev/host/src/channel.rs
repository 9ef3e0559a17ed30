//! The streams between us and the emulated host: sockets here, virtio-serial ports inside.
//!
//! Kernel messages go elsewhere, so nothing but what the command wrote comes through. QEMU holds
//! the other end of each socket as the chardev of one port; port numbers are the ones `init.sh`
//! opens.

use std::io::{self, BufRead, BufReader, ErrorKind, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::io::FdFlags;

/// How many ports there are: stdout, stderr, stdin, status, job and beat, numbered from 1.
pub const PORTS: usize = 6;
/// How often [`beat`] does so.
const BEAT: Duration = Duration::from_secs(1);
/// Bytes moved at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Our end of a port, and QEMU's until it is started.
#[derive(Debug)]
pub struct Port {
    ours: UnixStream,
    theirs: OwnedFd,
}

impl Port {
    /// Makes a pair whose far end a child process inherits.
    ///
    /// # Errors
    ///
    /// If the process has no fd left.
    pub fn new() -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("Failed to make a socket pair")?;
        let theirs = OwnedFd::from(theirs);
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).context("Failed to share a socket")?;
        Ok(Self { ours, theirs })
    }

    /// The number under which QEMU finds its end.
    #[must_use]
    pub fn fd(&self) -> i32 {
        self.theirs.as_raw_fd()
    }

    /// Gives up QEMU's end, so that the stream ends when QEMU does.
    #[must_use]
    pub fn started(self) -> UnixStream {
        self.ours
    }
}

/// What comes from inside, in the order it came on each port.
#[derive(Debug)]
pub enum Event {
    /// PID 1 has come this far.
    Reached(Milestone),
    /// The job ended.
    Exited(Exit),
    /// The machine is gone.
    Gone,
    /// This many bytes of the command's output reached ours.
    Passed { stream: Stream, bytes: u64 },
    /// Our own output takes no more, so that there is nobody left to run the command for.
    Unheard,
}

/// How the job ended, and how many bytes it wrote before.
#[derive(Debug)]
pub struct Exit {
    pub status: u8,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
}

/// What PID 1 has done, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Milestone {
    /// It has booted and waits for a job.
    Ready,
    /// It is about to run the job.
    Started,
}

/// One of the command's outputs.
#[derive(Debug, Clone, Copy)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// Turns what PID 1 inside writes, one line each, into events.
pub fn listen(port: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        let lines = BufReader::new(port).lines().map_while(Result::ok);
        for event in lines.filter_map(|line| parse(&line)).chain([Event::Gone]) {
            if events.send(event).is_err() {
                break;
            }
        }
    });
}

fn parse(line: &str) -> Option<Event> {
    let mut words = line.split_whitespace();
    match words.next()? {
        "ready" => Some(Event::Reached(Milestone::Ready)),
        "started" => Some(Event::Reached(Milestone::Started)),
        "exited" => Some(Event::Exited(Exit {
            status: words.next()?.parse().ok()?,
            stdout_bytes: words.next()?.parse().ok()?,
            stderr_bytes: words.next()?.parse().ok()?,
        })),
        _ => None,
    }
}

/// Copies one output of the command to the same one of ours, unbuffered.
///
/// When ours is slow the port fills up and the command inside waits.
pub fn pass(stream: Stream, mut port: UnixStream, events: Sender<Event>) {
    thread::spawn(move || {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let bytes = match port.read(&mut chunk) {
                Ok(0) => break,
                Ok(bytes) => bytes,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                // QEMU died with bytes unread; the status port says so too.
                Err(_) => break,
            };
            let event = match write(stream, &chunk[..bytes]) {
                Ok(()) => Event::Passed { stream, bytes: bytes as u64 },
                Err(_) => Event::Unheard,
            };
            if events.send(event).is_err() {
                break;
            }
        }
    });
}

fn write(stream: Stream, bytes: &[u8]) -> io::Result<()> {
    match stream {
        Stream::Stdout => {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes)?;
            stdout.flush()
        }
        Stream::Stderr => io::stderr().lock().write_all(bytes),
    }
}

/// Gives PID 1 inside its job, then ends the stream.
pub fn order(port: UnixStream, script: Vec<u8>) {
    supply(port, io::Cursor::new(script));
}

/// Copies our stdin to `port`, then ends it. A terminal is not read: the command sees the end at
/// once.
pub fn feed(port: UnixStream) {
    if io::stdin().is_terminal() {
        supply(port, io::empty());
    } else {
        supply(port, io::stdin());
    }
}

/// Writes a byte every now and then, which is an interrupt inside.
///
/// QEMU 7.2 can lose an interrupt of its emulated processor: each exit of a guest inside clears a
/// flag without a lock, and with it one that another thread sets at that moment (`do_vmexit` of
/// svm_helper.c). If that was the timer's, the processor stands still until the next interrupt from
/// somewhere else, which brings the lost one along. Without this it took minutes, once in some
/// hundred boots of a guest.
pub fn beat(mut port: UnixStream) {
    thread::spawn(move || {
        while port.write_all(b".").is_ok() {
            thread::sleep(BEAT);
        }
    });
}

/// Keeps ports open, and silent, as long as we live.
pub fn hold<const N: usize>(ports: [UnixStream; N]) {
    thread::spawn(move || {
        let _ports = ports;
        thread::park();
    });
}

/// The end is a shutdown and the socket stays open as long as we live, because QEMU drops what it
/// has not yet read from a socket that was closed.
fn supply(mut port: UnixStream, mut source: impl Read + Send + 'static) {
    thread::spawn(move || {
        // If this fails the machine is gone, and then there is nobody left to tell.
        let _ = io::copy(&mut source, &mut port);
        let _ = port.shutdown(Shutdown::Write);
        thread::park();
    });
}
