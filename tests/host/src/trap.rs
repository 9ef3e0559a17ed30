//! A trap for a server: it is killed as it begins its n-th change of its data folder.
//!
//! Every thread is followed from system call to system call (ptrace(2)). One that would change a
//! file, a name or a socket there, or bring one to the disk, is counted; at the n-th the whole
//! process is killed before the call is carried out. Killed at each n in turn, a server has left
//! every state that a kill can leave.
//!
//! What this does not show is a loss of power: what was written stays in the page cache.

use std::fs;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::ptr;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use libc::c_long;

/// Calls that change what their first argument, a descriptor, stands for.
const BY_FILE: [(c_long, &str); 11] = [
    (libc::SYS_write, "write"),
    (libc::SYS_writev, "writev"),
    (libc::SYS_pwrite64, "pwrite64"),
    (libc::SYS_pwritev, "pwritev"),
    (libc::SYS_sendfile, "sendfile"),
    (libc::SYS_ftruncate, "ftruncate"),
    (libc::SYS_fallocate, "fallocate"),
    (libc::SYS_fsync, "fsync"),
    (libc::SYS_fdatasync, "fdatasync"),
    (libc::SYS_fchmod, "fchmod"),
    (libc::SYS_ioctl, "ioctl"),
];

/// Calls that change names.
const BY_NAME: [(c_long, &str); 16] = [
    (libc::SYS_mkdir, "mkdir"),
    (libc::SYS_mkdirat, "mkdirat"),
    (libc::SYS_rename, "rename"),
    (libc::SYS_renameat, "renameat"),
    (libc::SYS_renameat2, "renameat2"),
    (libc::SYS_unlink, "unlink"),
    (libc::SYS_unlinkat, "unlinkat"),
    (libc::SYS_rmdir, "rmdir"),
    (libc::SYS_link, "link"),
    (libc::SYS_linkat, "linkat"),
    (libc::SYS_symlink, "symlink"),
    (libc::SYS_symlinkat, "symlinkat"),
    (libc::SYS_chmod, "chmod"),
    (libc::SYS_bind, "bind"),
    (libc::SYS_copy_file_range, "copy_file_range"),
    (libc::SYS_truncate, "truncate"),
];

/// Threads are followed as they appear, calls are told from signals, and nobody who is followed
/// outlives us.
const OPTIONS: i32 =
    libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;

/// How a stop at a system call looks (ptrace(2), "Syscall-stops").
const CALL: i32 = libc::SIGTRAP | 0x80;

/// A trap that was set.
#[derive(Debug)]
pub struct Trap {
    pid: i32,
    tracer: JoinHandle<Sprung>,
}

/// What was seen until the process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sprung {
    /// How many changes the process began.
    pub changes: u64,
    /// The one at which it was killed, if there were so many.
    pub killed_at: Option<String>,
}

impl Trap {
    /// Sets a trap for process `pid`, a child of ours: it does not begin its change number `at` of
    /// what lies in `dir`, counted from now on.
    pub fn set(pid: u32, dir: &Path, at: u64) -> Self {
        let pid = pid.cast_signed();
        let (ready, is_ready) = mpsc::channel();
        let mut tracer = Tracer { pid, dir: dir.to_owned(), at, changes: 0, killed_at: None };
        // A process is traced by one thread.
        let tracer = thread::spawn(move || {
            tracer.seize();
            ready.send(()).expect("somebody waits");
            tracer.follow();
            Sprung { changes: tracer.changes, killed_at: tracer.killed_at }
        });
        is_ready.recv().expect("every thread of a child can be traced");
        Self { pid, tracer }
    }

    /// Whether it has sprung, and the process is dead.
    pub fn has_sprung(&self) -> bool {
        self.tracer.is_finished()
    }

    /// Kills the process if that has not happened, and tells what was seen. To be called before
    /// anybody else waits for the process.
    pub fn spring(self) -> Sprung {
        kill(self.pid);
        self.tracer.join().expect("the tracer follows until the end")
    }
}

struct Tracer {
    pid: i32,
    dir: PathBuf,
    at: u64,
    changes: u64,
    killed_at: Option<String>,
}

impl Tracer {
    /// Takes hold of every thread there is. Those that they start follow by themselves.
    fn seize(&self) {
        let mut known = Vec::new();
        loop {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.pid)).expect("it runs");
            let tids = tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok());
            let new: Vec<i32> = tids.filter(|tid| !known.contains(tid)).collect();
            if new.is_empty() {
                return;
            }
            for tid in new {
                // A thread that followed by itself, or ended, is refused; both are as wanted.
                if ptrace(libc::PTRACE_SEIZE, tid, 0, OPTIONS as usize) == 0 {
                    ptrace(libc::PTRACE_INTERRUPT, tid, 0, 0);
                }
                known.push(tid);
            }
        }
    }

    fn follow(&mut self) {
        while let Some((tid, code)) = next_change_of_state() {
            let is_over = !matches!(code, libc::CLD_TRAPPED | libc::CLD_STOPPED);
            if is_over && tid == self.pid {
                // Left for whoever started it.
                return;
            }
            let mut status = 0;
            // SAFETY: writes one integer, which is ours.
            let waited = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
            if waited == tid && libc::WIFSTOPPED(status) {
                self.go_on(tid, status);
            }
        }
    }

    /// Lets a thread that has stopped run to its next call.
    fn go_on(&mut self, tid: i32, status: i32) {
        let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
        let mut passed_on = 0;
        if signal == CALL {
            self.look(tid);
        } else if event == 0 {
            passed_on = signal;
        } else if event == libc::PTRACE_EVENT_STOP && signal != libc::SIGTRAP {
            // Stopped with its whole process by a signal: it stays so.
            ptrace(libc::PTRACE_LISTEN, tid, 0, 0);
            return;
        }
        ptrace(libc::PTRACE_SYSCALL, tid, 0, passed_on as usize);
    }

    /// Counts the call that a thread has begun.
    fn look(&mut self, tid: i32) {
        // SAFETY: a structure of integers, for which zeroes are a value.
        let mut info: libc::ptrace_syscall_info = unsafe { mem::zeroed() };
        let bytes = size_of_val(&info);
        ptrace(libc::PTRACE_GET_SYSCALL_INFO, tid, bytes, (&raw mut info).expose_provenance());
        if info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
            return;
        }
        // SAFETY: by `op` this is the part that was filled in.
        let (number, arguments) = unsafe { (info.u.entry.nr, info.u.entry.args) };
        let Some(change) = self.change(number.cast_signed(), arguments) else { return };
        self.changes += 1;
        if self.changes == self.at {
            self.killed_at = Some(change);
            kill(self.pid);
        }
    }

    /// What a call changes in the folder, if it does.
    fn change(&self, number: c_long, arguments: [u64; 6]) -> Option<String> {
        let named = |table: &[(c_long, &'static str)]| {
            table.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
        };
        if let Some(name) = named(&BY_NAME) {
            return Some(name.to_owned());
        }
        let flags = match number {
            libc::SYS_open => arguments[1],
            libc::SYS_openat => arguments[2],
            _ => 0,
        };
        // An int, whose upper half is anything.
        let makes = libc::O_CREAT | libc::O_TRUNC;
        if (flags as i32) & makes != 0 {
            return Some("open".to_owned());
        }
        let name = named(&BY_FILE)?;
        let link = format!("/proc/{}/fd/{}", self.pid, arguments[0] as i32);
        let path = fs::read_link(link).ok()?;
        let path = path.strip_prefix(&self.dir).ok()?;
        Some(format!("{name} {}", path.display()))
    }
}

/// The next thread or process of this tracer that stopped or ended, left as it is, with what became
/// of it.
fn next_change_of_state() -> Option<(i32, i32)> {
    let flags = libc::WEXITED | libc::WSTOPPED | libc::WNOWAIT | libc::__WALL | libc::__WNOTHREAD;
    loop {
        // SAFETY: a structure of integers and pointers, for which zeroes are a value.
        let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
        // SAFETY: writes one such structure, which is ours.
        let rc = unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) };
        if rc == 0 {
            // SAFETY: `waitid` fills in the part of a child.
            return Some((unsafe { info.si_pid() }, info.si_code));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            return None;
        }
    }
}

/// ptrace(2) with plain numbers. What it refuses concerns a thread that is gone.
fn ptrace(request: u32, tid: i32, address: usize, data: usize) -> c_long {
    let address = ptr::without_provenance_mut::<libc::c_void>(address);
    // SAFETY: of the requests here only PTRACE_GET_SYSCALL_INFO writes to our memory: `address`
    // bytes at `data`, a structure of that size that its caller lends.
    unsafe { libc::ptrace(request, tid, address, data) }
}

fn kill(pid: i32) {
    // SAFETY: sends a signal to a child that nobody has waited for, so the number is still its.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}

/// At which changes to kill, if there are `changes`: every one, or if those are more than
/// `rounds_max` about so many at equal distances, the first of them chosen by `seed`.
pub fn places(changes: u64, rounds_max: u64, seed: u64) -> impl Iterator<Item = u64> {
    let stride = changes.div_ceil(rounds_max.max(1)).max(1);
    let step = usize::try_from(stride).unwrap_or(usize::MAX);
    (1 + seed % stride..=changes).step_by(step)
}
