//! A process that is not necessarily our child, held so that its number cannot be taken for
//! another's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::process::{self, Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};

/// A running process. Its file becomes readable when the process ends (pidfd_open(2)).
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Takes hold of process `pid`.
    ///
    /// The caller makes sure afterwards that it is the process it means: until then the number
    /// may have been given to another.
    ///
    /// # Errors
    ///
    /// `NotFound` if there is none; else what pidfd_open(2) says.
    pub fn open(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
        match process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(file) => Ok(Self(file)),
            Err(Errno::SRCH) => Err(io::ErrorKind::NotFound.into()),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills it. One that has ended already is as good as killed.
    ///
    /// # Errors
    ///
    /// What pidfd_send_signal(2) says.
    pub fn kill(&self) -> io::Result<()> {
        match process::pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Process {
    /// Takes note that a child of ours has ended, so that its number is free; whether it crashed,
    /// and was not killed and did not end by itself with 0 or 1.
    ///
    /// # Errors
    ///
    /// What waitid(2) says; `WouldBlock` if it runs.
    pub fn reap(&self) -> io::Result<bool> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        let ended = process::waitid(WaitId::PidFd(self.as_fd()), options)?;
        let ended = ended.ok_or(io::ErrorKind::WouldBlock)?;
        let killed = ended.terminating_signal() == Some(Signal::KILL.as_raw());
        Ok(!killed && !matches!(ended.exit_status(), Some(0 | 1)))
    }
}

impl From<OwnedFd> for Process {
    fn from(pidfd: OwnedFd) -> Self {
        Self(pidfd)
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// For [`tokio::io::unix::AsyncFd`], which knows files by their number.
impl AsRawFd for Process {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
