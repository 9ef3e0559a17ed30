//! Starting a process that outlives its parent, and finding it again.
//!
//! A process id alone says little after a while: the kernel gives it to another. An [`Identity`]
//! also has the time at which the process began and the boot of the host it began in, which no
//! later process shares.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Stdio};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
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
    /// sees to it that the process is not reaped meanwhile, so that the number is still its own.
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

/// Starts `program` with `argument`, without environment and in a process group of its own: what
/// ends this one, a key of its terminal say, does not end that.
///
/// Its standard input is `socket`, and it has no other file of ours; what it says to stderr goes to
/// `log`. The caller owns the child: dropped, it runs on, and is reaped when it ends.
///
/// Nothing is done between this process and that one but what posix_spawn(3) can: a fork would copy
/// the page tables of this one, and have each page that this one writes to next copied, too.
///
/// # Errors
///
/// What clone(2) or execve(2) say.
pub fn start(program: &Path, argument: &str, socket: OwnedFd, log: File) -> io::Result<Child> {
    keep_files_to_ourselves()?;
    #[expect(clippy::disallowed_methods, reason = "a worker is no tool: it is not waited for")]
    let mut command = process::Command::new(program);
    command
        .arg0("ovum")
        .arg(argument)
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(socket)
        .stdout(Stdio::null())
        .stderr(log);
    Command::from(command).spawn()
}

/// All files but the standard ones are closed in whatever this process starts: its own are so since
/// they were opened, but not those that were left open for it by whoever started it.
fn keep_files_to_ourselves() -> io::Result<()> {
    const FIRST: u32 = 3;
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: takes three integers, and with this flag closes nothing here.
    #[expect(unsafe_code, reason = "there is no other call for all files of a process")]
    match unsafe { libc::close_range(FIRST, u32::MAX, flags) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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
        fs::write(script.path(), "ls /proc/self/fd >&0; env >&2; echo done >&2").unwrap();
        let path = script.path().to_str().unwrap();

        let child = start(shell, path, theirs.into(), log.try_clone().unwrap());
        let mut child = child.unwrap();
        let status = child.wait().await.unwrap();

        assert!(status.success());
        let (mut listing, mut said) = (String::new(), String::new());
        ours.read_to_string(&mut listing).unwrap();
        io::Seek::rewind(&mut log).unwrap();
        log.read_to_string(&mut said).unwrap();
        // 3 is the folder that ls itself reads.
        assert_eq!(listing.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
        assert_eq!(said, "PWD=/\ndone\n");
    }
}
