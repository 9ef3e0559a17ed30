//! The console: where everything that people shall read goes, byte by byte as it was written.
//!
//! It lies on standard output and standard error of this process, so that whatever a library says
//! ends there too.

use std::ffi::CStr;
use std::fmt::Arguments;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::termios::OptionalActions;
use rustix::{fs, io, stdio, termios};

/// Candidates, best first. The first two take bytes as they are; the kernel's own console is
/// whatever its command line says; the last one loses everything and always opens.
const DEVICES: [&CStr; 4] = [c"/dev/hvc0", c"/dev/ttyS0", c"/dev/console", c"/dev/null"];

/// The first descriptor that is not one of the three standard ones.
const FIRST_FREE: i32 = 3;

/// Puts the console on standard output and error, and /dev/null on standard input, where the
/// workload inherits it. Needs /dev.
///
/// # Errors
///
/// Whatever /dev/null was refused with.
pub(crate) fn open() -> Result<(), Errno> {
    stdio::dup2_stdin(&device(c"/dev/null")?)?;
    let mut refused = Errno::NODEV;
    for path in DEVICES {
        match device(path) {
            Ok(console) => {
                make_raw(&console);
                stdio::dup2_stdout(&console)?;
                return stdio::dup2_stderr(&console);
            }
            Err(errno) => refused = errno,
        }
    }
    Err(refused)
}

/// Puts the console on standard input as well, for a program that expects a terminal there.
pub(crate) fn take_input() -> Result<(), Errno> {
    stdio::dup2_stdin(stdio::stdout())
}

/// Writes bytes, all of them unless the console fails: then there is nobody to tell.
pub(crate) fn write(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match io::write(stdio::stdout(), bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

/// Writes a line of our own.
pub(crate) fn say(line: Arguments<'_>) {
    write(format!("ovum: {line}\n").as_bytes());
}

/// Opens a device without making it our controlling terminal, and not as a standard descriptor:
/// those may be free, if the kernel had no console for us, and are given out by `dup2` alone.
fn device(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let device = fs::open(path, flags, Mode::empty())?;
    if device.as_raw_fd() < FIRST_FREE {
        return io::fcntl_dupfd_cloexec(&device, FIRST_FREE);
    }
    Ok(device)
}

/// Turns off what a terminal does to bytes: no carriage returns are added, nothing is echoed.
/// A device that is no terminal does nothing to them.
fn make_raw(console: &OwnedFd) {
    if let Ok(mut modes) = termios::tcgetattr(console) {
        modes.make_raw();
        if let Err(errno) = termios::tcsetattr(console, OptionalActions::Now, &modes) {
            say(format_args!("console is not raw: {errno}"));
        }
    }
}
