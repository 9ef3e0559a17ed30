//! Starting a process that outlives its parent, and finding it again.
//!
//! A process id alone says little after a while: the kernel gives it to another. An [`Identity`]
//! also has the time at which the process began and the boot of the host it began in, which no
//! later process shares.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Stdio};

use rustix::io::write;
use rustix::process::{Pid, Resource, Rlimit, prlimit, setsid};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};

use crate::os::process::Process;

/// Place of `starttime` among the fields after the name in /proc/PID/stat (proc_pid_stat(5): 22nd
/// of all, the name being the 2nd).
const START_TIME_FIELD: usize = 19;

/// Which process, once and for all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    start_ticks: u64,
    boot_id: String,
}

impl Identity {
    /// Of the process that is `pid` now.
    ///
    /// # Errors
    ///
    /// What /proc says: `NotFound` if there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let malformed =
            || io::Error::new(io::ErrorKind::InvalidData, "/proc/PID/stat is malformed");
        // The name is in parentheses and can hold anything, parentheses included.
        let (_, fields) = stat.rsplit_once(") ").ok_or_else(malformed)?;
        let start = fields.split(' ').nth(START_TIME_FIELD).ok_or_else(malformed)?;
        let start_ticks = start.parse().map_err(|_| malformed())?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Self { pid, start_ticks, boot_id })
    }

    /// Lets the process lock so many bytes of its memory: what devices reach is locked. The caller
    /// is its parent, so that the number is still its own.
    ///
    /// # Errors
    ///
    /// What prlimit(2) says: only root gives more than before.
    pub fn limit_locked_memory(&self, bytes: u64) -> io::Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        let limit = Rlimit { current: Some(bytes), maximum: Some(bytes) };
        prlimit(pid, Resource::Memlock, limit).map(drop).map_err(Into::into)
    }

    /// Takes hold of the process, if it still runs.
    ///
    /// # Errors
    ///
    /// What the kernel says, other than that there is none.
    pub fn find(&self) -> io::Result<Option<Process>> {
        let process = match Process::open(self.pid) {
            Ok(process) => process,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Held by its pidfd the number cannot go to another between this look and the use.
        match Self::of(self.pid) {
            Ok(found) if found == *self => Ok(Some(process)),
            Ok(_another) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Starts `program` with `argument`, in a session of its own and without environment.
///
/// It finds `file` as descriptor `number` and has no other file of ours; what it says to stderr
/// goes to `log`. If there is a `door`, of a control group, it has entered that before it runs. The
/// caller owns the child: dropped, it runs on, and is reaped when it ends.
///
/// # Errors
///
/// What fork(2) or execve(2) say.
pub fn start(
    program: &Path,
    argument: &str,
    (file, number): (&OwnedFd, i32),
    log: File,
    door: Option<File>,
) -> io::Result<Child> {
    #[expect(clippy::disallowed_methods, reason = "a worker is no tool: it is not waited for")]
    let mut command = process::Command::new(program);
    command
        .arg0("ovum")
        .arg(argument)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let file = file.as_fd().as_raw_fd();
    let prepare = move || {
        setsid()?;
        if let Some(door) = &door {
            // Whoever writes 0 means itself.
            write(door, b"0")?;
        }
        hand_over(file, number)
    };
    #[expect(unsafe_code, reason = "the only way to hand a child a file under a number")]
    // SAFETY: between fork and exec only async-signal-safe functions may run. `prepare` makes bare
    // system calls: it allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(prepare);
    }
    Command::from(command).spawn()
}

/// Makes `file` the descriptor `number`, inheritable, and everything above it close-on-exec.
#[expect(unsafe_code, reason = "descriptors are numbers here, after a fork and before an exec")]
fn hand_over(file: i32, number: i32) -> io::Result<()> {
    if file == number {
        // dup2(2) would leave close-on-exec as it is.
        // SAFETY: F_SETFD takes an integer and touches no memory.
        if unsafe { libc::fcntl(file, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    } else {
        // SAFETY: takes two integers and touches no memory. The descriptor that `number` may have
        // been is the child's own copy, close-on-exec like all of ours, so nobody misses it.
        if unsafe { libc::dup2(file, number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    let first = number.unsigned_abs() + 1;
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: takes three integers; with this flag it closes nothing yet, which would take away the
    // descriptor through which the standard library reports a failed exec.
    if unsafe { libc::close_range(first, u32::MAX, flags) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_process_is_found_by_its_identity_and_no_other_is() {
        let own = Identity::of(process::id()).unwrap();
        let other = Identity { start_ticks: own.start_ticks + 1, ..own.clone() };
        let none = Identity { pid: i32::MAX as u32, ..own.clone() };

        assert!(own.find().unwrap().is_some());
        assert!(other.find().unwrap().is_none());
        assert!(none.find().unwrap().is_none());
    }

    #[tokio::test]
    async fn a_child_has_the_file_and_nothing_else() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut log = tempfile::tempfile().unwrap();
        let shell = Path::new("/bin/sh");
        let script = tempfile::NamedTempFile::new().unwrap();
        fs::write(script.path(), "ls /proc/self/fd >&3; env >&2; echo done >&2").unwrap();
        let path = script.path().to_str().unwrap();

        let child = start(shell, path, (&theirs.into(), 3), log.try_clone().unwrap(), None);
        let mut child = child.unwrap();
        let status = child.wait().await.unwrap();

        assert!(status.success());
        let (mut listing, mut said) = (String::new(), String::new());
        ours.read_to_string(&mut listing).unwrap();
        io::Seek::rewind(&mut log).unwrap();
        log.read_to_string(&mut said).unwrap();
        // 4 is the folder that ls itself reads.
        assert_eq!(listing.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3", "4"]);
        assert_eq!(said, "PWD=/\ndone\n");
    }
}
