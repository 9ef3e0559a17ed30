//! A terminal for a command: the pair of a pseudo terminal.

use std::os::fd::OwnedFd;

use ovum_agent_proto::exec::WindowSize;
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use rustix::{fs, pty, termios};

/// Both ends of a terminal.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// Ours, which never waits.
    pub(crate) master: OwnedFd,
    /// The command's.
    pub(crate) slave: OwnedFd,
}

impl Terminal {
    /// Opens a terminal of this size.
    pub(crate) fn open(size: WindowSize) -> Result<Self, Errno> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = pty::openpt(flags)?;
        pty::unlockpt(&master)?;
        let slave = pty::ioctl_tiocgptpeer(&master, flags)?;
        resize(&master, size)?;
        fs::fcntl_setfl(&master, OFlags::RDWR | OFlags::NONBLOCK)?;
        Ok(Self { master, slave })
    }
}

/// Gives the terminal another size. The kernel tells the command.
pub(crate) fn resize(master: &OwnedFd, size: WindowSize) -> Result<(), Errno> {
    let WindowSize { rows, cols } = size;
    termios::tcsetwinsize(
        master,
        Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 },
    )
}
