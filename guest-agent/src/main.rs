//! PID 1 of a guest.
//!
//! The kernel starts this program from the initramfs. It reads its configuration there, enters the
//! image's root, starts the workload, copies its output to the console, and when the workload has
//! ended reports how and powers off. What it does until the workload runs is most of what a guest
//! waits for at boot, so it is one thread, and each system call before that is there for a reason.
//!
//! It must not fail by ending: the kernel panics if PID 1 does.

// The `main` of the standard library first prepares for signals and stack overflows that this
// program does not have; that is a dozen system calls.
#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, expect(dead_code, reason = "tests run without a guest around them"))]

mod brake;
mod command;
mod config;
mod console;
mod disks;
mod get;
mod headers;
mod identity;
mod init;
mod jobs;
#[expect(unsafe_code, reason = "vsock addresses, which rustix does not have")]
mod listener;
mod memory;
mod network;
mod outbox;
mod output;
#[expect(unsafe_code, reason = "I/O port access")]
mod port;
mod program;
mod put;
mod root;
mod serve;
mod session;
#[expect(unsafe_code, reason = "signal masks and signalfd, which rustix does not have")]
mod signals;
#[expect(unsafe_code, reason = "clone3 and execve")]
mod spawn;
mod stat;
mod systemd;
mod terminal;
mod volumes;
mod workload;

use std::error::Error;
use std::{io, panic};

use ovum_agent_proto::config::{CONFIG_PATH, GuestConfig};
use ovum_agent_proto::report::{Exit, Failure, Phase, Report};
use rustix::io::Errno;
use rustix::system::RebootCommand;
use rustix::{fs, process, system};

use crate::brake::Brake;
use crate::config::ConfigError;
use crate::listener::Listener;
use crate::memory::MemoryWatch;
use crate::output::Output;
use crate::port::Port;
use crate::program::{Program, ProgramError, Refusal};
use crate::root::{Root, RootError};
use crate::serve::{Agent, Charge, Ending};
use crate::signals::Signals;
use crate::volumes::Volumes;
use crate::workload::{StartError, Workload};

/// Why the guest has no workload.
#[derive(Debug, thiserror::Error)]
enum AgentError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Program(#[from] ProgramError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error("Failed to prepare {what}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("Failed to prepare {path} for systemd")]
    Unit {
        path: String,
        #[source]
        source: io::Error,
    },
}

#[cfg(not(test))]
#[expect(unsafe_code, reason = "the C library calls the symbol `main`, of which there is one")]
#[unsafe(no_mangle)]
extern "C" fn main() -> i32 {
    run()
}

/// The whole life of a guest. Returns only if it cannot be ended, or never was ours.
fn run() -> i32 {
    if !process::getpid().is_init() {
        return run_as_unit();
    }
    let port = Port::open();
    port.report(Report::Phase(Phase::AgentStarted));
    // PID 1 must not end, so neither by a mistake of ours.
    panic::set_hook(Box::new(move |panic| {
        console::say(format_args!("{panic}"));
        port.report(Report::Failed(Failure::System));
        power_off();
    }));
    match live(port) {
        Ok(Ending::Over(_)) => {}
        Ok(Ending::Dismissed(_) | Ending::Relieved) => return 0,
        Err(error) => {
            console::say(format_args!("{}", chain(&error)));
            port.report(Report::Failed(error.failure()));
        }
    }
    power_off();
    1
}

/// The life of the agent beside systemd, which starts it.
fn run_as_unit() -> i32 {
    match serve_as_unit() {
        Ok(()) => 0,
        Err(error) => {
            console::say(format_args!("this program is for a guest: {}", chain(&error)));
            1
        }
    }
}

/// Serves beside systemd, and reports how the guest ended.
fn serve_as_unit() -> Result<(), AgentError> {
    let config = config::read(systemd::CONFIG)?;
    let port = Port::open();
    let signals = Signals::open().map_err(system("signals"))?;
    let listener = Listener::open().map_err(system("the listener"))?;
    port.report(Report::Phase(Phase::AgentReady));
    let (listener, charge) = (Some(listener), Charge::Systemd);
    let volumes = &mut Volumes::default();
    let memory = watch_memory(&config, &charge, port);
    match (Agent { signals, listener, charge, env: config.env, volumes, memory }).serve() {
        Ending::Over(exit) => {
            port.report(Report::Exit(exit));
            power_off();
        }
        Ending::Dismissed(exit) => port.report(Report::Exit(exit)),
        Ending::Relieved => {}
    }
    Ok(())
}

/// Boots, serves, and reports how the workload ended.
fn live(port: Port) -> Result<Ending, AgentError> {
    root::devices()?;
    console::open().map_err(system("the console"))?;
    let config = config::read(CONFIG_PATH)?;
    let program = Program::new(&config.argv, &config.env)?;
    // Dropped last: what was written is on the disk before the power goes.
    let mut root = Root::enter(&config)?;
    let is_unit = systemd::is_meant(&program);
    if !is_unit {
        root::furnish();
    }
    port.report(Report::Phase(Phase::RootMounted));
    identity::assume(&config);
    if config.kernel_headers
        && let Err(error) = headers::attach()
    {
        console::say(format_args!("{}", chain(&error)));
    }
    if is_unit {
        let exit = become_systemd(&program, &config, port)?;
        port.report(Report::Exit(exit));
        return Ok(Ending::Over(exit));
    }

    let signals = Signals::open().map_err(system("signals"))?;
    let listener = if config.listen { listen(port) } else { None };
    let ending = match start(&program, &config, port) {
        Ok(charge) => {
            let volumes = root.volumes();
            let memory = watch_memory(&config, &charge, port);
            Agent { signals, listener, charge, env: config.env, volumes, memory }.serve()
        }
        Err(StartError::Refused(refusal)) => Ending::Over(refused(&refusal)),
        Err(StartError::System(errno)) => return Err(system("the workload's process")(errno)),
    };
    match ending {
        Ending::Over(exit) => port.report(Report::Exit(exit)),
        Ending::Dismissed(exit) => {
            port.report(Report::Exit(exit));
            root.leave();
        }
        Ending::Relieved => {}
    }
    Ok(ending)
}

/// Makes this process systemd. Returns only if that is refused.
fn become_systemd(program: &Program, config: &GuestConfig, port: Port) -> Result<Exit, AgentError> {
    systemd::prepare(config).map_err(|(path, source)| AgentError::Unit { path, source })?;
    port.report(Report::Phase(Phase::WorkloadStarted));
    let search = init::become_init(program);
    port.reopen();
    Ok(refused(&program.refusal(search)))
}

/// Ends as it would have from a shell.
fn refused(refusal: &Refusal) -> Exit {
    console::say(format_args!("{}", refusal.message));
    Exit { code: refusal.code, oom: false }
}

/// Starts what the guest exists for.
fn start(program: &Program, config: &GuestConfig, port: Port) -> Result<Charge, StartError> {
    if program.is_init_system() {
        port.report(Report::Phase(Phase::WorkloadStarted));
        init::hand_over(program, port)?;
        return Ok(Charge::Init);
    }
    let Workload { pid, output } = Workload::start(program, config)?;
    port.report(Report::Phase(Phase::WorkloadStarted));
    Ok(Charge::Workload { pid, output: Output::new(output, port) })
}

/// Listens for the server. A guest that cannot be reached still has a workload to run.
fn listen(port: Port) -> Option<Listener> {
    match Listener::open() {
        Ok(listener) => {
            port.report(Report::Phase(Phase::AgentReady));
            Some(listener)
        }
        Err(errno) => {
            console::say(format_args!("agent cannot be reached: {errno}"));
            None
        }
    }
}

/// Watches memory for the machine, if it wants to know. A guest that cannot tell goes on with what
/// it has.
fn watch_memory(config: &GuestConfig, charge: &Charge, port: Port) -> Option<MemoryWatch> {
    let spec = config.memory_watch?;
    let complain = |error: &io::Error| {
        console::say(format_args!("memory is not looked after as it should be: {error}"));
    };
    // Init systems arrange control groups as they like.
    let brake = match charge {
        Charge::Workload { .. } => Brake::open().inspect_err(complain).ok(),
        Charge::Init | Charge::Systemd => None,
    };
    MemoryWatch::open(spec, brake, port).inspect_err(complain).ok()
}

fn power_off() {
    fs::sync();
    if let Err(errno) = system::reboot(RebootCommand::PowerOff) {
        console::say(format_args!("power stays on: {errno}"));
    }
}

fn system(what: &'static str) -> impl Fn(Errno) -> AgentError {
    move |errno| AgentError::System { what, source: errno.into() }
}

impl AgentError {
    fn failure(&self) -> Failure {
        match self {
            Self::Config(_) | Self::Program(_) => Failure::Config,
            Self::Root(_) => Failure::Mount,
            Self::System { .. } | Self::Unit { .. } => Failure::System,
        }
    }
}

/// An error with everything that led to it, in one line.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
