//! The workload: the process for which the guest exists, and how it ended.

use std::fs::{File, create_dir_all};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use ovum_agent_proto::config::GuestConfig;
use ovum_agent_proto::report::Exit;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Resource, Rlimit, WaitStatus};
use rustix::{fs, pipe, process};

use crate::program::{Program, Refusal};
use crate::root;
use crate::spawn::{self, Place, SpawnError};

/// The cgroup of the workload and of the commands beside it, apart from the agent.
pub(crate) const CGROUP: &str = "/sys/fs/cgroup/workload";

/// Open files that a workload may have at once before it asks for more, and after it asked. The
/// kernel's own 1024 and 4096 are from the time of `select`.
const FILES_MAX: u64 = 65_536;
const FILES_MAX_HARD: u64 = 1 << 20;

/// Exit statuses follow the shell: this plus the number of the signal that killed.
const KILLED: i32 = 128;

/// Room for /proc/vmstat, so that it is read at once.
const VMSTAT_BYTES: usize = 8 << 10;

/// Owner may read and write, everyone may write: a program that has dropped its privileges can
/// still open /dev/stderr.
pub(crate) const OUTPUT_MODE: u32 = 0o622;

/// A running workload.
#[derive(Debug)]
pub(crate) struct Workload {
    /// Its process.
    pub(crate) pid: Pid,
    /// The end of the pipe from which its output is read.
    pub(crate) output: OwnedFd,
}

/// Why there is none.
#[derive(Debug)]
pub(crate) enum StartError {
    /// The image cannot run this.
    Refused(Refusal),
    /// The guest kernel gave no process or pipe.
    System(Errno),
}

impl Workload {
    /// Starts the program in its working directory, which is made if it is missing.
    ///
    /// Both of its streams are one pipe, so that what it writes keeps its order.
    pub(crate) fn start(program: &Program, config: &GuestConfig) -> Result<Self, StartError> {
        enter(&config.working_dir)?;
        let (output, input) = pipe::pipe_with(PipeFlags::CLOEXEC).map_err(StartError::System)?;
        fs::fchmod(&input, Mode::from_raw_mode(OUTPUT_MODE)).map_err(StartError::System)?;
        let files = Rlimit { current: Some(FILES_MAX), maximum: Some(FILES_MAX_HARD) };
        process::setrlimit(Resource::Nofile, files).map_err(StartError::System)?;
        let cgroup = root::directory(CGROUP).and_then(|()| cgroup()).ok();
        let cgroup = cgroup.as_ref().map(AsFd::as_fd);
        let place = Place {
            input: None,
            output: input.as_fd(),
            error: input.as_fd(),
            is_terminal: false,
            working_dir: None,
            is_mortal: false,
        };
        match spawn::spawn(program, place, cgroup) {
            Ok(pid) => Ok(Self { pid, output }),
            Err(SpawnError::Clone(errno) | SpawnError::Directory(errno)) => {
                Err(StartError::System(errno))
            }
            Err(SpawnError::Exec(search)) => Err(StartError::Refused(program.refusal(search))),
        }
    }
}

/// How a process that ended so is reported; nothing if it did not end.
pub(crate) fn exit(status: WaitStatus) -> Option<Exit> {
    let code = exit_code(status.exit_status(), status.terminating_signal())?;
    Some(Exit { code, oom: oom_killed() })
}

/// The exit status as a shell tells it; nothing if the process did not end.
pub(crate) fn exit_code(status: Option<i32>, signal: Option<i32>) -> Option<u8> {
    let code = status.or(signal.map(|signal| KILLED + signal))?;
    Some(u8::try_from(code).unwrap_or(u8::MAX))
}

/// Whether the kernel ever killed a process for lack of memory.
///
/// The count for the whole guest, and not the one of a cgroup: the guest *is* the memory limit,
/// and accounting the memory of a cgroup costs every allocation of the workload.
fn oom_killed() -> bool {
    let mut vmstat = String::with_capacity(VMSTAT_BYTES);
    File::open("/proc/vmstat")
        .and_then(|mut file| file.read_to_string(&mut vmstat))
        .is_ok_and(|_| oom_kills(&vmstat) > 0)
}

/// Reads the line `oom_kill N` of /proc/vmstat.
fn oom_kills(vmstat: &str) -> u64 {
    vmstat
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill "))
        .and_then(|count| count.trim().parse().ok())
        .unwrap_or(0)
}

/// The workload's cgroup, for what is to live with it; an init system has none of ours.
pub(crate) fn cgroup() -> Result<OwnedFd, Errno> {
    fs::open(CGROUP, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Goes to the working directory, for the child to inherit.
fn enter(path: &str) -> Result<(), StartError> {
    let mut entered = process::chdir(path);
    if entered == Err(Errno::NOENT) {
        entered = create_dir_all(path)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
            .and_then(|()| process::chdir(path));
    }
    entered.map_err(|errno| {
        let message = format!("working directory {path} cannot be entered: {errno}");
        StartError::Refused(Refusal { code: 126, message })
    })
}

#[cfg(test)]
mod tests {
    use std::fs::read_to_string;

    use super::*;

    #[test]
    fn oom_kills_are_counted_by_the_line_of_that_name() {
        let vmstat = "nr_free_pages 3\noom_kill_x 9\noom_kill 2\nswap_ra 0\n";

        assert_eq!(oom_kills(vmstat), 2);
        assert_eq!(oom_kills("oom_kill 0\n"), 0);
        assert_eq!(oom_kills("oom_kill many\n"), 0);
        assert_eq!(oom_kills(""), 0);
    }

    #[test]
    fn a_kernel_counts_its_oom_kills_under_that_name() {
        let vmstat = read_to_string("/proc/vmstat").unwrap();

        assert!(vmstat.lines().any(|line| line.starts_with("oom_kill ")), "{vmstat}");
    }

    #[test]
    fn exit_codes_follow_the_shell() {
        let exited = |code: i32| exit_code(Some(code), None);
        let killed = |signal: i32| exit_code(None, Some(signal));

        assert_eq!([exited(0), exited(42), exited(255)], [Some(0), Some(42), Some(255)]);
        assert_eq!([killed(9), killed(15), killed(64)], [Some(137), Some(143), Some(192)]);
        assert_eq!(exit_code(None, None), None);
    }
}
