//! Where workers come from: the server's end of a process that forks them.
//!
//! One is started ahead, and the next as soon as it has had [`SIBLINGS_MAX`] or one of its workers
//! has crashed: whoever makes it crash to try again, or has learnt where things lie in one worker,
//! finds them elsewhere in the next (0020). One that was killed is replaced when it is asked.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;
use tokio::sync::Mutex;
use tokio::time;

use crate::control::{BIRTH, Birth, SIBLINGS_MAX, WORKER_COMMAND};
use crate::os::packets::{self, PacketSocket};
use crate::os::process::Process;
use crate::os::readable::readable;
use crate::os::spawn::{self, Identity};

/// How long a nursery may take to answer: to start, mostly, where memory is short.
const BIRTH_TIMEOUT: Duration = Duration::from_secs(20);

/// The nursery that there is, and those that were and will be.
#[derive(Debug, Clone)]
pub struct Nursery(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    program: PathBuf,
    current: Mutex<Option<Current>>,
}

/// A process that forks.
#[derive(Debug)]
struct Current {
    socket: AsyncFd<PacketSocket>,
    born: u32,
    /// Kept so that it is reaped. It ends by itself when `socket` goes.
    process: Child,
}

/// A worker that waits to be told what to be.
#[derive(Debug)]
pub(super) struct Newborn {
    pub(super) identity: Identity,
    /// A child of this process, reaped whatever becomes of this.
    pub(super) process: Process,
    /// Where it is told. It ends when this goes before it has been.
    pub(super) launch: PacketSocket,
}

impl Nursery {
    /// Of `program`. Nothing is started yet.
    pub fn new(program: PathBuf) -> Self {
        Self(Arc::new(Shared { program, current: Mutex::new(None) }))
    }

    /// Has one ready before it is asked for.
    pub async fn prepare(&self) {
        let mut current = self.0.current.lock().await;
        if current.is_none() {
            *current = self.0.next();
        }
    }

    /// One more worker, whose standard error is `log`.
    ///
    /// # Errors
    ///
    /// What socketpair(2), clone(2) or execve(2) say, of a second nursery if the first did not
    /// answer.
    pub(super) async fn bear(&self, log: File) -> io::Result<Newborn> {
        let shared = Arc::clone(&self.0);
        // In a task of its own: whoever is no longer waited for shall not leave half an answer.
        tokio::spawn(async move { shared.bear(&log).await }).await?
    }
}

impl Shared {
    async fn bear(self: &Arc<Self>, log: &File) -> io::Result<Newborn> {
        let mut place = self.current.lock().await;
        let waiting = match place.take() {
            Some(current) => current,
            None => Current::start(self)?,
        };
        let (current, born) = match waiting.bear(log).await {
            Ok(done) => done,
            Err(error) => {
                tracing::debug!(%error, "A nursery does not answer; another is asked");
                Current::start(self)?.bear(log).await?
            }
        };
        let whose = current.process.id();
        *place = if current.born < SIBLINGS_MAX { Some(current) } else { self.next() };
        let ended = readable(Process::from(born.process.as_fd().try_clone_to_owned()?))?;
        tokio::spawn(Arc::clone(self).reap(ended, whose));
        Ok(born)
    }

    /// Another nursery. Without one there is an error when the next worker is asked for.
    fn next(&self) -> Option<Current> {
        let next = Current::start(self);
        next.inspect_err(|error| tracing::warn!(%error, "Failed to start a nursery ahead")).ok()
    }

    /// Waits for the end of a worker of the nursery `whose`, which ends with it if it crashed.
    async fn reap(self: Arc<Self>, worker: AsyncFd<Process>, whose: Option<u32>) {
        let ended = worker.readable().await.and_then(|_| worker.get_ref().reap());
        match ended {
            Ok(false) => {}
            Ok(true) => {
                let mut current = self.current.lock().await;
                if current.as_ref().is_some_and(|current| current.process.id() == whose) {
                    *current = self.next();
                }
            }
            Err(error) => tracing::error!(%error, "Failed to reap a worker"),
        }
    }
}

impl Current {
    fn start(shared: &Shared) -> io::Result<Self> {
        let (ours, theirs) = packets::pair()?;
        // What it has to say it answers.
        let log = File::options().write(true).open("/dev/null")?;
        let process = spawn::start(&shared.program, WORKER_COMMAND, theirs.into(), log)?;
        Ok(Self { socket: readable(ours)?, born: 0, process })
    }

    async fn bear(mut self, log: &File) -> io::Result<(Self, Newborn)> {
        let (launch, theirs) = packets::pair()?;
        self.socket.get_ref().send(BIRTH, &[theirs.as_fd(), log.as_fd()])?;
        // The worker's end is the worker's alone: so each hears of the other's death.
        drop(theirs);
        let answer = self.socket.async_io(Interest::READABLE, PacketSocket::try_recv);
        let packet = time::timeout(BIRTH_TIMEOUT, answer).await??;
        if packet.bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match serde_json::from_slice(&packet.bytes)? {
            Birth::Born { pid } => {
                let [process] = <[OwnedFd; 1]>::try_from(packet.files)
                    .map_err(|_files| io::Error::from(io::ErrorKind::InvalidData))?;
                self.born += 1;
                // Nobody has reaped it yet, so the number is its own.
                let identity = Identity::of(pid)?;
                Ok((self, Newborn { identity, process: process.into(), launch }))
            }
            Birth::Failed { message } => Err(io::Error::other(message)),
        }
    }
}
