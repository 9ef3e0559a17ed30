//! Signals as something to read: children that ended, and wishes that the guest be stopped.

use std::io::Error;
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use rustix::io;
use rustix::io::Errno;
use rustix::process::Pid;

/// What is asked of PID 1 by signals. SIGUSR2 is what a busybox `poweroff` sends, SIGPWR a power
/// daemon, SIGINT the kernel for Ctrl-Alt-Del.
const STOPS: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGPWR, libc::SIGUSR2];

/// What we may have been started with as ignored, and programs take over: the last by systemd, and
/// by the standard library of Rust, the others by a shell that started us in the background.
const IGNORED: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGPIPE];

/// Size of what one read gives, `struct signalfd_siginfo`: 32-bit words of which the first is the
/// signal's number and the fourth the sender's process (signalfd(2)).
const RECORD_BYTES: usize = 128;
const SENDER_WORD: usize = 3;

/// The signals that concern us: blocked, and readable instead.
#[derive(Debug)]
pub(crate) struct Signals {
    fd: OwnedFd,
}

/// One signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Signal {
    /// At least one child ended.
    Child,
    /// Someone in the guest wants it stopped.
    Stop {
        /// Whether that is PID 1.
        by_init: bool,
    },
}

impl Signals {
    /// Blocks our signals for this process, and for children until they call [`restore`].
    pub(crate) fn open() -> Result<Self, Errno> {
        let ours = STOPS.iter().copied().chain([libc::SIGCHLD]);
        // Beside a PID 1 that is another, a command that closed its input would end us.
        let blocked = set(ours.clone().chain([libc::SIGPIPE]));
        // SAFETY: `blocked` is initialised, and the old mask is not asked for.
        let rc = unsafe { libc::sigprocmask(libc::SIG_BLOCK, &raw const blocked, ptr::null_mut()) };
        outcome(rc)?;
        let set = set(ours);
        // SAFETY: `set` is initialised; -1 asks for a new descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        outcome(fd)?;
        // SAFETY: the kernel has just made this descriptor for us.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Takes the next signal, if there is one.
    pub(crate) fn next(&self) -> Option<Signal> {
        let mut record = [0; RECORD_BYTES];
        io::read(&self.fd, &mut record).ok()?;
        let (words, _) = record.as_chunks();
        if i32::from_ne_bytes(words[0]) == libc::SIGCHLD {
            return Some(Signal::Child);
        }
        Some(Signal::Stop { by_init: u32::from_ne_bytes(words[SENDER_WORD]) == 1 })
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Lets every signal through again and do what it does by default, in a process that is about to
/// become another program.
pub(crate) fn restore() {
    for number in IGNORED {
        // SAFETY: the default is no function of ours. Whoever shares our memory, but for a moment,
        // has dispositions of its own.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    let none = set([]);
    // SAFETY: `none` is initialised, and the old mask is not asked for.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) };
}

/// Sends a signal by its number, which may be a real-time one.
pub(crate) fn send(pid: Pid, number: u8) -> Result<(), Errno> {
    // SAFETY: sends a signal; touches no memory of ours.
    outcome(unsafe { libc::kill(pid.as_raw_nonzero().get(), number.into()) })
}

fn set(numbers: impl IntoIterator<Item = i32>) -> libc::sigset_t {
    // SAFETY: a `sigset_t` is a plain array of integers, for which zeroes are a value: the empty
    // set on Linux.
    let mut set: libc::sigset_t = unsafe { mem::zeroed() };
    for number in numbers {
        // SAFETY: `set` is initialised and the numbers are constants of libc.
        unsafe { libc::sigaddset(&raw mut set, number) };
    }
    set
}

fn outcome(rc: i32) -> Result<(), Errno> {
    if rc == -1 {
        return Err(Errno::from_io_error(&Error::last_os_error()).unwrap_or(Errno::IO));
    }
    Ok(())
}
