//! Waiting in async code for a file to become readable, or to change.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::os::packets::PacketSocket;
use crate::os::process::Process;

/// A type around exactly one [`OwnedFd`] that it never replaces. Only this file says which.
pub trait OneFile: AsRawFd + fmt::Debug + sealed::OneFile {}

mod sealed {
    /// Nobody else can implement this.
    pub trait OneFile {}
}

impl OneFile for OwnedFd {}
impl OneFile for PacketSocket {}
impl OneFile for Process {}
impl sealed::OneFile for OwnedFd {}
impl sealed::OneFile for PacketSocket {}
impl sealed::OneFile for Process {}

/// Registers `file` with the runtime of the calling task, to be told when it can be read.
///
/// # Errors
///
/// What `epoll_ctl(2)` says.
pub fn readable<T: OneFile>(file: T) -> io::Result<AsyncFd<T>> {
    register(file, Interest::READABLE)
}

/// As [`readable`], for a file whose content the kernel makes: to be told when it has changed since
/// it was last read (POLLPRI).
///
/// # Errors
///
/// As [`readable`].
pub fn notified<T: OneFile>(file: T) -> io::Result<AsyncFd<T>> {
    register(file, Interest::PRIORITY)
}

fn register<T: OneFile>(file: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    #[expect(unsafe_code, reason = "tokio wants to hear that the number stays the same file")]
    // SAFETY: a `OneFile` gives the number of the one descriptor it owns, which stays open and the
    // same until it is dropped, and the `AsyncFd` owns it until then.
    let registered = unsafe { AsyncFd::register_with_interest(file, interest) };
    registered.map_err(|error| error.into_parts().1)
}
