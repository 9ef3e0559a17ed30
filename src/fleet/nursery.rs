//! Where workers come from: the server's end of a process that forks them.
//!
//! One is started ahead, and the next when it has had [`SIBLINGS_MAX`] or one of its workers is
//! seen to have crashed: whoever makes a worker crash finds the next elsewhere (0020). One that was
//! killed, or does not answer, is replaced when it is asked.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Child;
use tokio::sync::{Mutex, oneshot};
use tokio::time;

use crate::control::{BIRTH, Birth, SIBLINGS_MAX, WORKER_COMMAND};
use crate::os::packets::{self, PacketSocket};
use crate::os::process::Process;
use crate::os::readable::readable;
use crate::os::spawn::{self, Identity};

/// How long a nursery may take to start, where memory is short or all is emulated.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// How long one that has started may take to answer.
const BIRTH_TIMEOUT: Duration = Duration::from_secs(5);

/// How long to wait for a tracer that has not let go of a worker that has ended.
const TRACER_PERIOD: Duration = Duration::from_secs(1);

/// The nursery that there is, and those that were and will be.
#[derive(Debug, Clone)]
pub struct Nursery(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    program: PathBuf,
    current: Mutex<Option<Current>>,
}

/// A process that forks. It ends with this: its workers do not depend on it.
#[derive(Debug)]
struct Current {
    socket: AsyncFd<PacketSocket>,
    born: u32,
    /// Whether a worker of it has.
    crashed: Arc<AtomicBool>,
    process: Child,
}

/// A worker that waits to be told what to be: a child of this process, which is reaped when it has
/// ended.
#[derive(Debug)]
pub(super) struct Newborn {
    pub(super) identity: Identity,
    /// Where it is told. It ends when this goes before it has been.
    pub(super) launch: PacketSocket,
    /// It is not reaped before this is dropped: until then its number is its own.
    pub(super) unreaped: oneshot::Sender<()>,
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
        let waiting = match place.take().filter(|current| !current.has_crashed()) {
            Some(current) => current,
            None => Current::start(self)?,
        };
        let (current, born) = match waiting.bear(self, log).await {
            Ok(done) => done,
            Err(error) => {
                tracing::debug!(%error, "A nursery does not answer; another is asked");
                Current::start(self)?.bear(self, log).await?
            }
        };
        *place = if current.born < SIBLINGS_MAX { Some(current) } else { self.next() };
        Ok(born)
    }

    /// Another nursery. Without one there is an error when the next worker is asked for.
    fn next(&self) -> Option<Current> {
        let next = Current::start(self);
        next.inspect_err(|error| tracing::warn!(%error, "Failed to start a nursery ahead")).ok()
    }

    /// Reaps a worker that has ended; if it crashed its nursery ends, too.
    async fn reap(self: Arc<Self>, worker: AsyncFd<Process>, crashed: Arc<AtomicBool>) {
        let mut ended = worker.readable().await.and_then(|_| worker.get_ref().reap());
        while ended.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            time::sleep(TRACER_PERIOD).await;
            ended = worker.get_ref().reap();
        }
        match ended {
            Ok(false) => {}
            Ok(true) => {
                crashed.store(true, Ordering::SeqCst);
                let mut current = self.current.lock().await;
                if current.as_ref().is_some_and(Current::has_crashed) {
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
        Ok(Self { socket: readable(ours)?, born: 0, crashed: Arc::default(), process })
    }

    fn has_crashed(&self) -> bool {
        self.crashed.load(Ordering::SeqCst)
    }

    async fn bear(mut self, shared: &Arc<Shared>, log: &File) -> io::Result<(Self, Newborn)> {
        let (launch, theirs) = packets::pair()?;
        self.socket.get_ref().send(BIRTH, &[theirs.as_fd(), log.as_fd()])?;
        // The worker's end is the worker's alone: so each hears of the other's death.
        drop(theirs);
        let answer = self.socket.async_io(Interest::READABLE, PacketSocket::try_recv);
        let patience = if self.born == 0 { START_TIMEOUT } else { BIRTH_TIMEOUT };
        let packet = time::timeout(patience, answer).await??;
        if packet.bytes.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match serde_json::from_slice(&packet.bytes)? {
            Birth::Born { pid } => {
                let [process] = <[OwnedFd; 1]>::try_from(packet.files)
                    .map_err(|_files| io::Error::from(io::ErrorKind::InvalidData))?;
                self.born += 1;
                let (unreaped, may_be) = oneshot::channel();
                let reaping = Arc::clone(shared)
                    .reap(readable(Process::from(process))?, Arc::clone(&self.crashed));
                tokio::spawn(async move {
                    // An error says that the other end was dropped, and so it is.
                    let _ = may_be.await;
                    reaping.await;
                });
                Ok((self, Newborn { identity: Identity::of(pid)?, launch, unreaped }))
            }
            Birth::Failed { message } => Err(io::Error::other(message)),
        }
    }
}

impl Drop for Current {
    /// One that was stopped would not see that nobody asks it any more.
    fn drop(&mut self) {
        // It has ended already, which is what we want.
        let _ = self.process.start_kill();
    }
}
