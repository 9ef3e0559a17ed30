//! The nursery: a worker that has not been told yet which, and becomes many.
//!
//! What starts a program is the same for all workers: libraries are found, addresses filled in, the
//! first pages touched. So the server starts one worker ahead, which does that and waits. A worker
//! that is wanted is a fork of it, and a child of the server, as if that had started it.
//!
//! What is forked has the layout of addresses of what it is forked from. So that one worker's
//! secrets are worth little elsewhere a nursery has [`SIBLINGS_MAX`] and ends, and the server
//! leaves it when it sees that one of them has crashed (0020).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use anyhow::{Context, bail};
use libc::{c_int, c_long};
use rustix::process::setpgid;
use rustix::stdio::{dup2_stderr, dup2_stdin};
use rustix::thread::set_name;

use crate::control::{Birth, NURSERY_NAME, SIBLINGS_MAX, WORKER_NAME};
use crate::os::packets::PacketSocket;

/// Waits, and returns in each process that shall be a worker, with its launch socket; in this one,
/// which has one thread, when the server is gone or has had all workers that it gets from here.
///
/// `server` is standard input, and in a worker its launch socket is.
///
/// # Errors
///
/// What the socket to the server says, and what keeps a new process from its place. Nothing of it
/// concerns those that are workers already.
pub(super) fn wait(server: PacketSocket) -> anyhow::Result<Option<PacketSocket>> {
    set_name(NURSERY_NAME).context("Failed to set the name of the nursery")?;
    for _ in 0..SIBLINGS_MAX {
        let packet = server.recv().context("No orders: a nursery is started by the server")?;
        if packet.bytes.is_empty() {
            break;
        }
        let Ok([launch, log]) = <[OwnedFd; 2]>::try_from(packet.files) else {
            bail!("A worker is made with a socket and a log");
        };
        match fork() {
            Ok(Fork::Child) => {
                settle(launch, File::from(log))?;
                return Ok(Some(server));
            }
            Ok(Fork::Parent { child, process }) => {
                answer(&server, &Birth::Born { pid: child }, &[process.as_fd()])?;
            }
            Err(error) => answer(&server, &Birth::Failed { message: error.to_string() }, &[])?,
        }
    }
    Ok(None)
}

fn answer(server: &PacketSocket, birth: &Birth, process: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
    server.send(&serde_json::to_vec(birth)?, process).context("Failed to answer the server")
}

/// In a new process: takes its place among others, and its files.
fn settle(launch: OwnedFd, log: File) -> anyhow::Result<()> {
    set_name(WORKER_NAME).context("Failed to set the name of a worker")?;
    // A process group of its own, as the nursery has.
    setpgid(None, None).context("Failed to leave the nursery's process group")?;
    dup2_stdin(launch).context("Failed to take the launch socket")?;
    dup2_stderr(log).context("Failed to take the log")
}

enum Fork {
    Child,
    Parent { child: u32, process: OwnedFd },
}

/// As fork(2), but the new process is a child of this one's parent, which is told when it ends.
fn fork() -> io::Result<Fork> {
    let mut process: RawFd = -1;
    let flags = c_long::from(libc::CLONE_PARENT | libc::CLONE_PIDFD | libc::SIGCHLD);
    let none = ptr::null_mut::<c_int>();
    // SAFETY: without CLONE_VM the new process has a copy of all memory, stack included, and
    // `process` outlives the call that writes it. This process has one thread, so that no lock is
    // held in the copy by one that is not there. The C library is not told: what it goes on to
    // believe is the thread's number, by which a recursive mutex knows its owner. Of these there is
    // the loader's, which this process takes in one thread, and no other has that number as long as
    // the nursery lives or the kernel does not give it to a thread of this very process.
    #[expect(unsafe_code, reason = "fork(3) makes a child of its own, which it would have to reap")]
    let child =
        unsafe { libc::syscall(libc::SYS_clone, flags, none, &raw mut process, none, none) };
    match u32::try_from(child) {
        Ok(0) => Ok(Fork::Child),
        Ok(child) => {
            // SAFETY: the call above has made it, and nobody else knows it.
            #[expect(unsafe_code, reason = "the kernel returns a new file as a number")]
            let process = unsafe { OwnedFd::from_raw_fd(process) };
            Ok(Fork::Parent { child, process })
        }
        Err(_negative) => Err(io::Error::last_os_error()),
    }
}
