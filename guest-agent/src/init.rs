//! Init systems: images whose program insists on being PID 1.
//!
//! The agent forks. The parent, PID 1, becomes the init system, on the console, without a pipe; the
//! child goes on serving. Two things are lost by that. Output passes the agent by, so the first of
//! it is not reported; and PID 1 does not end before the guest does, so there is no exit status:
//! when the init system tells everything to end, the agent reports success in its name.

use std::fs;
use std::path::Path;

use rustix::io::Errno;
use rustix::process;
use rustix::process::{Pid, Signal};

use crate::port::Port;
use crate::program::{Program, Refusal};
use crate::{console, spawn};

/// systemd powers off at SIGRTMIN+4 (systemd(1), "Signals"); SIGTERM makes it start over.
const SYSTEMD_STOP: u8 = 34 + 4;

/// The init of busybox powers off at SIGUSR2. Others are killed when their grace is over.
const OTHER_STOP: u8 = 12;

/// Divides this process in two. Returns in the child; the parent becomes `program`.
///
/// # Errors
///
/// In the parent, with the child gone, if the program cannot be run.
pub(crate) fn hand_over(program: &Program) -> Result<(), HandOverError> {
    match spawn::fork().map_err(HandOverError::Fork)? {
        None => {
            // PID 1 was safe from the kernel's search for memory; the child asks to be.
            if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
                console::say(format_args!("agent may be killed if memory is short: {error}"));
            }
            process::setsid().map(drop).map_err(HandOverError::Fork)
        }
        Some(child) => Err(become_init(program, child)),
    }
}

/// Why there is no init system.
#[derive(Debug)]
pub(crate) enum HandOverError {
    /// The guest kernel gave no second process.
    Fork(Errno),
    /// The image cannot run the program.
    Refused(Refusal),
}

/// The signal at which the init system `name` powers the guest off.
pub(crate) fn stop_signal(name: &Path) -> u8 {
    let program = fs::canonicalize(name);
    if program.is_ok_and(|program| program.ends_with("systemd")) { SYSTEMD_STOP } else { OTHER_STOP }
}

fn become_init(program: &Program, child: Pid) -> HandOverError {
    if let Err(errno) = console::take_input() {
        console::say(format_args!("init system has no terminal: {errno}"));
    }
    let search = spawn::exec(program);
    // Still here, so the child has nothing to serve, and the right that `exec` gave up is needed
    // once more.
    let _ = process::kill_process(child, Signal::KILL);
    Port::open();
    HandOverError::Refused(program.refusal(search))
}
