//! Host tools: the one place that runs programs which are not ours.
//!
//! A tool is found by name in fixed folders, runs with an empty environment and on its standard
//! input only what it is given, and has a deadline; what it prints is bounded. It is in a process
//! group of its own, so that ending it ends what it started.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Where tools are.
const FOLDERS: [&str; 6] =
    ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Most bytes kept of what a tool prints: the last ones.
const OUTPUT_BYTES_MAX: usize = 64 << 10;

/// Most bytes of a tool's complaint in an error.
const COMPLAINT_BYTES_MAX: usize = 2 << 10;

/// How long the output of a tool that ended may take to arrive.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(5);

/// A tool this server needs on its host.
#[derive(Debug, PartialEq, Eq)]
pub struct Tool {
    /// Its file name.
    pub name: &'static str,
    /// The Debian package that has it.
    pub package: &'static str,
    /// What does not work without it.
    pub needed_for: &'static str,
}

/// Formats overlays and volumes.
pub const MKFS_EXT4: Tool =
    Tool { name: "mkfs.ext4", package: "e2fsprogs", needed_for: "writable disks of instances" };

/// Finishes what a volume's last guest had begun to write.
pub const E2FSCK: Tool =
    Tool { name: "e2fsck", package: "e2fsprogs", needed_for: "volumes that are read only" };

/// Sets packet filters.
pub const NFT: Tool =
    Tool { name: "nft", package: "nftables", needed_for: "networks of instances" };

/// All tools, for a check of the host.
pub const TOOLS: [&Tool; 3] = [&MKFS_EXT4, &E2FSCK, &NFT];

/// What a tool printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// The end of its standard output.
    pub stdout: Vec<u8>,
    /// The end of its standard error.
    pub stderr: Vec<u8>,
}

impl Tool {
    /// Where the tool is on this host.
    pub fn find(&self) -> Option<PathBuf> {
        FOLDERS.iter().map(|folder| Path::new(folder).join(self.name)).find(|path| path.is_file())
    }

    /// Runs the tool to its end. Blocks: not for an async task.
    ///
    /// # Errors
    ///
    /// [`ToolError`], also if it exits with anything but 0. It does not run any more then.
    pub fn run(
        &self,
        arguments: &[&OsStr],
        environment: &[(&str, &str)],
        timeout: Duration,
    ) -> Result<Output, ToolError> {
        self.start_and_wait(arguments, environment, Stdio::null(), timeout)
    }

    /// As [`Self::run`], with `input` on its standard input.
    ///
    /// # Errors
    ///
    /// As for [`Self::run`].
    pub fn feed(
        &self,
        arguments: &[&OsStr],
        input: &[u8],
        timeout: Duration,
    ) -> Result<Output, ToolError> {
        let tool = self.name;
        let input = file_of(input).map_err(|source| ToolError::Io { tool, source })?;
        self.start_and_wait(arguments, &[], input.into(), timeout)
    }

    fn start_and_wait(
        &self,
        arguments: &[&OsStr],
        environment: &[(&str, &str)],
        input: Stdio,
        timeout: Duration,
    ) -> Result<Output, ToolError> {
        let tool = self.name;
        let Some(path) = self.find() else {
            return Err(ToolError::Missing { tool, package: self.package });
        };
        let begin = Instant::now();
        let running = Running::start(&path, arguments, environment, input)
            .map_err(|source| ToolError::Io { tool, source })?;
        let (status, output) = match running.finish(begin + timeout) {
            Ok(Some(ended)) => ended,
            Ok(None) => return Err(ToolError::TimedOut { tool, after_s: timeout.as_secs() }),
            Err(source) => return Err(ToolError::Io { tool, source }),
        };
        tracing::debug!(
            tool,
            arguments = %Words(arguments),
            %status,
            took_ms = begin.elapsed().as_millis(),
            "host tool ran"
        );
        if !status.success() {
            let stderr = &output.stderr;
            let start = stderr.len().saturating_sub(COMPLAINT_BYTES_MAX);
            let complaint = String::from_utf8_lossy(&stderr[start..]).trim().to_owned();
            return Err(ToolError::Failed { tool, status, complaint });
        }
        Ok(output)
    }
}

/// A tool that runs. Dropped, it is killed with all it started.
struct Running {
    child: Child,
    group: Pid,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
}

impl Running {
    fn start(
        path: &Path,
        arguments: &[&OsStr],
        environment: &[(&str, &str)],
        input: Stdio,
    ) -> io::Result<Self> {
        #[expect(clippy::disallowed_methods, reason = "this is the module that may")]
        let mut command = Command::new(path);
        command
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", FOLDERS.join(":"))
            .envs(environment.iter().copied())
            .current_dir("/")
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn()?;
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let group = Pid::from_child(&child);
        Ok(Self { child, group, stdout, stderr })
    }

    /// Waits for the end. `None` if the deadline was first.
    fn finish(mut self, deadline: Instant) -> io::Result<Option<(ExitStatus, Output)>> {
        let pidfd = pidfd_open(self.group, PidfdFlags::empty())?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(None),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        // Before the leader is reaped its group cannot be anybody else's: what it left behind ends.
        self.kill();
        let status = self.child.wait()?;
        let output = |receiver: &Receiver<Vec<u8>>| {
            receiver.recv_timeout(OUTPUT_TIMEOUT).unwrap_or_default()
        };
        Ok(Some((status, Output { stdout: output(&self.stdout), stderr: output(&self.stderr) })))
    }

    /// Ends the tool and all it started, unless they left its group.
    fn kill(&self) {
        // ESRCH: nothing is left to end.
        let _ = kill_process_group(self.group, Signal::KILL);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Reaped already: the group's number may be another's by now.
        if let Ok(None) = self.child.try_wait() {
            self.kill();
            let _ = self.child.wait();
        }
    }
}

/// A file, of no name, that is read as `content`. A pipe would need somebody to fill it meanwhile.
fn file_of(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"input", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// Reads a pipe to its end on a thread of its own and keeps the end of what came.
fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::sync_channel(1);
    thread::spawn(move || {
        let mut kept = Vec::new();
        let mut chunk = [0; 4096];
        if let Some(mut pipe) = pipe {
            while let Ok(read @ 1..) = pipe.read(&mut chunk) {
                kept.extend(&chunk[..read]);
                if kept.len() > 2 * OUTPUT_BYTES_MAX {
                    kept.drain(..kept.len() - OUTPUT_BYTES_MAX);
                }
            }
        }
        kept.drain(..kept.len().saturating_sub(OUTPUT_BYTES_MAX));
        // Nobody listens if the tool was killed.
        let _ = sender.send(kept);
    });
    receiver
}

/// A command line for a log.
struct Words<'a>(&'a [&'a OsStr]);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, word) in self.0.iter().enumerate() {
            let space = if index > 0 { " " } else { "" };
            write!(f, "{space}{}", word.display())?;
        }
        Ok(())
    }
}

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not on this host.
    #[error("Host tool {tool} is missing: install the package {package}")]
    Missing {
        /// Which.
        tool: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// It said no.
    #[error("Host tool {tool} failed ({status}): {complaint}")]
    Failed {
        /// Which.
        tool: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// The end of its standard error.
        complaint: String,
    },
    /// It did not end, and was killed.
    #[error("Host tool {tool} did not end within {after_s} s")]
    TimedOut {
        /// Which.
        tool: &'static str,
        /// Its time.
        after_s: u64,
    },
    /// It could not be started or waited for.
    #[error("Failed to run host tool {tool}")]
    Io {
        /// Which.
        tool: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const SHELL: Tool = Tool { name: "sh", package: "dash", needed_for: "these tests" };

    fn shell(script: &str, timeout: Duration) -> Result<Output, ToolError> {
        SHELL.run(&["-c".as_ref(), script.as_ref()], &[("GIVEN", "yes")], timeout)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn a_tool_sees_only_what_it_is_given() {
        let output = shell("env | sort; cat; echo oops >&2; pwd", LONG).unwrap();

        let stdout = String::from_utf8(output.stdout).unwrap();
        let names: Vec<&str> = stdout.lines().map(|line| line.split('=').next().unwrap()).collect();
        assert_eq!(names, ["GIVEN", "LC_ALL", "PATH", "PWD", "/"]);
        assert_eq!(output.stderr, b"oops\n");
    }

    #[test]
    fn a_tool_reads_what_it_is_fed() {
        let input = "line\n".repeat(100_000);
        let output = SHELL.feed(&["-c".as_ref(), "wc -l".as_ref()], input.as_bytes(), LONG);

        assert_eq!(String::from_utf8(output.unwrap().stdout).unwrap().trim(), "100000");
    }

    #[test]
    fn a_failure_says_what_the_tool_said() {
        let error = shell("echo it is broken >&2; exit 3", LONG).unwrap_err();

        assert_eq!(error.to_string(), "Host tool sh failed (exit status: 3): it is broken");
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let tool = Tool { name: "no-such-tool", package: "no-such-package", needed_for: "this" };

        let error = tool.run(&[], &[], LONG).unwrap_err();

        let text = "Host tool no-such-tool is missing: install the package no-such-package";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn this_host_has_all_tools() {
        let missing: Vec<&str> =
            TOOLS.iter().filter(|tool| tool.find().is_none()).map(|tool| tool.package).collect();

        assert_eq!(missing, [""; 0], "packages to install");
    }

    fn assert_ends(pid: &Path) {
        let child = fs::read_to_string(pid).unwrap();
        let deadline = Instant::now() + LONG;
        let alive = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", child.trim()));
            stat.is_ok_and(|stat| !stat.contains(") Z "))
        };
        while alive() {
            assert!(Instant::now() < deadline, "the grandchild lives on");
            thread::yield_now();
        }
    }

    #[test]
    fn a_tool_that_does_not_end_is_ended_with_all_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; wait", pid.display());

        let error = shell(&script, Duration::from_millis(500)).unwrap_err();

        assert!(matches!(error, ToolError::TimedOut { .. }), "{error:?}");
        assert_ends(&pid);
    }

    #[test]
    fn what_a_tool_leaves_behind_is_ended_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("sleep 1000 & echo $! > {}; echo done", pid.display());

        let output = shell(&script, LONG).unwrap();

        assert_eq!(output.stdout, b"done\n");
        assert_ends(&pid);
    }

    #[test]
    fn endless_output_is_cut_to_its_end() {
        let script = "i=0; while [ $i -lt 50000 ]; do echo line $i; i=$((i+1)); done; echo end";

        let output = shell(script, LONG).unwrap();

        assert_eq!(output.stdout.len(), OUTPUT_BYTES_MAX);
        assert!(output.stdout.ends_with(b"line 49999\nend\n"));
    }
}
