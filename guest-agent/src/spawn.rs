//! Starting a program: `clone3`, a few calls in the child, `execve`.
//!
//! The child borrows our memory until it has become the program, and we sleep until then, as with
//! `vfork`: no page table is copied and no page is copied on a write afterwards, which at this
//! point of a boot would be most of the cost. The kernel puts the child into its cgroup on the
//! way: moving it later would wait for an RCU grace period.
//!
//! Borrowing memory also makes the error path short: the child writes why `execve` was refused
//! into a variable of ours.

use std::arch::asm;
use std::ffi::{CStr, CString, c_char};
use std::io::Error;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::{fs, io, process, stdio};

use crate::port::Port;
use crate::program::{Program, Search};
use crate::signals;

/// Stack of the child: it calls a handful of system calls and, in a debug build, not much more.
const STACK_BYTES: usize = 64 << 10;

/// The ABI wants stacks aligned to this many bytes at a call.
const STACK_ALIGN: usize = 16;

/// CLONE_INTO_CGROUP (clone(2)), for which the libc crate has too narrow a type.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// What is added to a process's badness when memory is short; children inherit it (proc(5)).
const OOM_SCORE: &CStr = c"/proc/self/oom_score_adj";

/// Exit status of a child that became no program. Nobody sees it: `Plan::refused` says more.
const NOTHING_RAN: i32 = 127;

/// `struct clone_args` (clone(2)).
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// Where a program starts, and what it reads and writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place<'a> {
    /// Standard input; ours, if there is none.
    pub(crate) input: Option<BorrowedFd<'a>>,
    /// Standard output.
    pub(crate) output: BorrowedFd<'a>,
    /// Standard error.
    pub(crate) error: BorrowedFd<'a>,
    /// Whether all three are a terminal, which is to be the session's.
    pub(crate) is_terminal: bool,
    /// Working directory; ours, if there is none.
    pub(crate) working_dir: Option<&'a CStr>,
    /// Whether the kernel may kill it for its memory, even if it may not kill us.
    pub(crate) is_mortal: bool,
}

/// Everything the child needs, made by the parent: the child may not allocate.
struct Plan<'a> {
    program: &'a Program,
    argv: Vec<*const c_char>,
    env: Vec<*const c_char>,
    place: Place<'a>,
    /// Written by the child, if it became no program.
    refused: Option<Refused>,
}

/// Why the child became no program.
enum Refused {
    Directory(Errno),
    Exec(Search),
}

/// Why no process runs the program.
#[derive(Debug)]
pub(crate) enum SpawnError {
    /// There was no process.
    Clone(Errno),
    /// The working directory cannot be entered.
    Directory(Errno),
    /// There was one, and the kernel refused to run the program in it.
    Exec(Search),
}

/// Runs `program` in a new process and session, at `place`. No other descriptor of ours reaches it,
/// since all of them close on exec.
pub(crate) fn spawn(
    program: &Program,
    place: Place<'_>,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Pid, SpawnError> {
    let mut plan = Plan {
        program,
        argv: pointers(program.argv()),
        env: pointers(program.env()),
        place,
        refused: None,
    };
    let mut stack = Vec::<u8>::with_capacity(STACK_BYTES + STACK_ALIGN);
    let misaligned = stack.as_ptr().align_offset(STACK_ALIGN);
    let stack_start = stack.as_mut_ptr().wrapping_add(misaligned);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK;
    let mut args = CloneArgs {
        flags: u64::from(flags.unsigned_abs()),
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        stack: stack_start.addr() as u64,
        stack_size: STACK_BYTES as u64,
        ..CloneArgs::default()
    };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }

    let pid = clone_into(&args, &mut plan).map_err(SpawnError::Clone)?;
    drop(stack);
    match plan.refused {
        None => Ok(pid),
        Some(Refused::Directory(errno)) => Err(SpawnError::Directory(errno)),
        Some(Refused::Exec(search)) => Err(SpawnError::Exec(search)),
    }
}

/// Becomes `program`, in this process. Returns only if that is refused.
pub(crate) fn exec(program: &Program) -> Search {
    let (output, error) = (stdio::stdout(), stdio::stderr());
    let place = Place {
        input: None,
        output,
        error,
        is_terminal: false,
        working_dir: None,
        is_mortal: false,
    };
    let (argv, env) = (pointers(program.argv()), pointers(program.env()));
    Plan { program, argv, env, place, refused: None }.exec()
}

/// Duplicates this process, with its memory. Returns the child's id, and nothing in the child.
pub(crate) fn fork() -> Result<Option<Pid>, Errno> {
    // SAFETY: this program has one thread, so the child finds no lock that nobody will release.
    match unsafe { libc::fork() } {
        -1 => Err(Errno::AGAIN),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// `clone3` with a child that runs [`child`] on a stack of its own.
fn clone_into(args: &CloneArgs, plan: &mut Plan<'_>) -> Result<Pid, Errno> {
    let returned: i64;
    // SAFETY: the child runs on `args.stack`, which the caller keeps alive and uses for nothing
    // else, so no frame of ours changes; it starts with a call to `child`, which gets the plan
    // that we lend it and never returns. Until it has executed a program or exited we are stopped
    // (CLONE_VFORK), so nobody else uses the plan, or the rest of our memory, meanwhile.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 => returned,
            in("rdi") ptr::from_ref(args),
            in("rsi") size_of::<CloneArgs>(),
            in("r12") ptr::from_mut(plan),
            in("r13") child as extern "C" fn(&mut Plan<'_>) -> !,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    let returned = i32::try_from(returned).map_err(|_| Errno::INVAL)?;
    Pid::from_raw(returned)
        .filter(|_| returned > 0)
        .ok_or_else(|| Errno::from_raw_os_error(returned.wrapping_neg()))
}

/// What the child does.
extern "C" fn child(plan: &mut Plan<'_>) -> ! {
    plan.refused = Some(match plan.place.take() {
        Ok(()) => Refused::Exec(plan.exec()),
        Err(refused) => refused,
    });
    // SAFETY: ends this process without running what the parent registered for its own exit.
    unsafe { libc::_exit(NOTHING_RAN) }
}

impl Place<'_> {
    /// Makes this process start here.
    fn take(self) -> Result<(), Refused> {
        let Self { input, output, error, is_terminal, working_dir, is_mortal } = self;
        if is_mortal {
            become_mortal();
        }
        if let Some(path) = working_dir {
            process::chdir(path).map_err(Refused::Directory)?;
        }
        process::setsid()
            .and_then(|_| input.map_or(Ok(()), stdio::dup2_stdin))
            .and_then(|()| stdio::dup2_stdout(output))
            .and_then(|()| stdio::dup2_stderr(error))
            .and_then(
                |()| {
                    if is_terminal { process::ioctl_tiocsctty(stdio::stdin()) } else { Ok(()) }
                },
            )
            .map_err(|errno| Refused::Exec(Search::ended(errno)))
    }
}

/// Gives this process the score of anyone else. To raise one is always allowed; a guest that has
/// hidden /proc keeps its commands.
fn become_mortal() {
    if let Ok(score) = fs::open(OOM_SCORE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        let _ = io::write(&score, b"0");
    }
}

impl Plan<'_> {
    /// Becomes the program. Returns only if that is refused.
    fn exec(&self) -> Search {
        Port::close();
        signals::restore();
        let mut search = Search::default();
        for path in self.program.candidates() {
            // SAFETY: the path and the strings behind both arrays end in a NUL and the arrays in a
            // null pointer; the program owns the strings and the plan the arrays.
            unsafe { libc::execve(path.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
            let errno = Errno::from_io_error(&Error::last_os_error()).unwrap_or(Errno::IO);
            if !search.refused(errno) {
                break;
            }
        }
        search
    }
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::read_to_string;
    use std::os::fd::AsFd;

    use rustix::pipe::{PipeFlags, pipe_with};
    use rustix::process::{WaitOptions, waitpid};

    use super::*;
    use crate::signals::Signals;

    /// Runs `argv`, found by `path`; returns what it wrote and its exit status, or its refusal's.
    fn run(argv: &[&str], path: &str) -> Result<(String, i32), (u8, String)> {
        let argv: Vec<_> = argv.iter().map(ToString::to_string).collect();
        let env = [("PATH", path), ("GREETING", "hello")];
        let env = env.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let program = Program::new(&argv, &env).unwrap();
        let (output, input) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let place = Place {
            input: None,
            output: input.as_fd(),
            error: input.as_fd(),
            is_terminal: false,
            working_dir: None,
            is_mortal: true,
        };
        let pid = match spawn(&program, place, None) {
            Ok(pid) => pid,
            Err(SpawnError::Exec(search)) => {
                let refusal = program.refusal(search);
                return Err((refusal.code, refusal.message));
            }
            Err(SpawnError::Clone(errno) | SpawnError::Directory(errno)) => panic!("{errno}"),
        };
        drop(input);
        let output = read_to_string(File::from(output)).unwrap();
        let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
        Ok((output, status.exit_status().unwrap()))
    }

    #[test]
    fn a_program_gets_its_arguments_environment_and_both_streams() {
        let script = "echo $GREETING $1; echo there >&2; exit 7";

        let ran = run(&["/bin/sh", "-c", script, "sh", "you"], "/bin").unwrap();

        assert_eq!(ran, ("hello you\nthere\n".to_owned(), 7));
    }

    /// Candidates that fail before the right one leave no trace.
    #[test]
    fn the_search_goes_on_until_a_program_runs() {
        let ran = run(&["sh", "-c", "echo found"], "/nowhere:/etc/passwd:/etc:/bin").unwrap();

        assert_eq!(ran, ("found\n".to_owned(), 0));
    }

    #[test]
    fn a_child_that_became_no_program_says_why() {
        assert_eq!(run(&["sh"], "/nowhere"), Err((127, "sh: not found".to_owned())));
        assert_eq!(
            run(&["/etc/passwd"], ""),
            Err((126, "/etc/passwd: permission denied".to_owned()))
        );
    }

    /// The agent beside another PID 1 is never killed for memory; its commands are like any other.
    #[test]
    fn a_child_does_not_inherit_that_it_may_not_be_killed() {
        let before = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
        fs::write("/proc/self/oom_score_adj", "500").unwrap();

        let ran = run(&["/bin/sh", "-c", "cat /proc/self/oom_score_adj"], "/bin");
        fs::write("/proc/self/oom_score_adj", before.trim()).unwrap_or(());

        assert_eq!(ran.unwrap().0, "0\n");
    }

    #[test]
    fn the_program_leads_a_session_and_hears_every_signal() {
        let _blocks = Signals::open().unwrap();
        // Words of the shell alone: it blocks signals while it starts a program.
        let script = "cd /proc/$$
            while read key mask; do
                case $key in SigBlk:|SigIgn:) echo $mask; esac
            done < status
            read pid _ _ _ _ sid _ < stat
            test $pid = $sid && echo leads";

        let (output, _) = run(&["/bin/sh", "-c", script], "/bin").unwrap();

        let [blocked, ignored, leads] = output.lines().collect::<Vec<_>>()[..] else {
            panic!("{output}");
        };
        assert_eq!((blocked, leads), ("0000000000000000", "leads"));
        // Real-time signals are the C library's, whose first ones it may ignore.
        let ignored = u64::from_str_radix(ignored, 16).unwrap() & 0x7fff_ffff;
        assert_eq!(ignored, 0, "{output}");
    }
}
