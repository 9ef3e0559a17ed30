//! Init systems other than systemd: images whose program insists on being PID 1.
//!
//! The agent forks. The parent, PID 1, becomes the init system, on the console, without a pipe; the
//! child goes on serving. Some things are lost by that. Output passes the agent by, so the first of
//! it is not reported; and PID 1 does not end before the guest does, so there is no exit status:
//! when the init system tells everything to end, the agent reports success in its name and ends.
//! The layer's disk is then written back by the init system, and left to its journal.

use std::fs;

use rustix::process::Signal;
use rustix::{process, thread};

use crate::port::Port;
use crate::program::{Program, Search};
use crate::workload::StartError;
use crate::{console, spawn};

/// The init of busybox powers off at SIGUSR2. Others are killed when their grace is over.
pub(crate) const POWER_OFF: u8 = 12;

/// Divides this process in two. Returns in the child; the parent becomes `program`.
///
/// # Errors
///
/// In the parent, with the child gone, if the program cannot be run.
pub(crate) fn hand_over(program: &Program, port: Port) -> Result<(), StartError> {
    match spawn::fork().map_err(StartError::System)? {
        None => {
            // The kernel never kills PID 1 for its memory; its child has to ask.
            if let Err(error) = fs::write("/proc/self/oom_score_adj", "-1000") {
                console::say(format_args!("agent may be killed if memory is short: {error}"));
            }
            // For people who look at processes: it would go by the name of init.
            let _ = thread::set_name(c"ovum-agent");
            process::setsid().map_err(StartError::System)?;
            Ok(())
        }
        Some(child) => {
            let search = become_init(program);
            // Still here, so there is nothing to serve for the child, and our own reports go on.
            let _ = process::kill_process(child, Signal::KILL);
            port.reopen();
            Err(StartError::Refused(program.refusal(search)))
        }
    }
}

/// Makes this process the init system. Returns only if the program cannot be run.
pub(crate) fn become_init(program: &Program) -> Search {
    if let Err(errno) = console::take_input() {
        console::say(format_args!("init system has no terminal: {errno}"));
    }
    spawn::exec(program)
}
