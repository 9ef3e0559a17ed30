//! The server's end of the vsock stream to a guest's agent.
//!
//! The worker listens at a socket in the instance's folder and leads each connection to the vsock
//! port that its first line names. [`Agents`] keeps one connection per guest while it is in use,
//! and everything that goes on in a guest shares it: a copy of a thousand files connects once.
//! What arrives comes from a guest: everything is bounded, in bytes and in time.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ovum_agent_proto::files::{GetSpec, PathInfo, PutSpec, StatSpec};
use ovum_agent_proto::frame::FrameError;
use ovum_agent_proto::message::{ToAgent, ToServer, TooLong};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::agent::connection::{CONNECT_TIMEOUT, Messages, connect};
use crate::agent::copy::{Get, Put};
use crate::agent::exec::Exec;
use crate::agent::line::{Line, Stream};

pub use ovum_agent_proto::exec::{ExecSpec, WindowSize};
pub use ovum_agent_proto::files;
pub use ovum_agent_proto::message::ErrorCode;
pub use ovum_agent_proto::volumes::{AttachSpec, DetachSpec};

mod connection;
pub mod copy;
pub mod exec;
mod line;
#[cfg(test)]
pub(crate) mod testing;

/// The only request of a connection that is not shared.
const REQUEST: u32 = 1;

/// Leaves the choice of the signal to the agent, which knows the workload.
const SIGNAL_OF_AGENT: u8 = 0;

/// How long a connection is kept that nobody uses, and how long an agent may say nothing to those
/// who use it before it is asked, and then before it is given up.
const QUIET_TIMEOUT: Duration = Duration::from_secs(30);

/// Time between two attempts to reach an agent that does not listen yet: at first, and at most.
const RETRY_FIRST: Duration = Duration::from_millis(25);
const RETRY_MAX: Duration = Duration::from_millis(250);

/// How long an agent may take to answer: it has one thread, which may wait for a disk.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The agents of this host's guests. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Agents {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By socket. Whoever connects holds the inner lock, so that all others use what comes of it.
    lines: Mutex<HashMap<PathBuf, Arc<AsyncMutex<Option<Line>>>>>,
    tasks: TaskTracker,
    closing: CancellationToken,
}

impl Agents {
    /// Runs a command in the guest behind `socket`. Returns once it runs.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; nothing runs then, unless the connection broke.
    pub async fn exec(&self, socket: &Path, spec: ExecSpec) -> Result<Exec, AgentError> {
        Ok(Exec::new(self.open(socket, ToAgent::Exec(spec)).await?))
    }

    /// Puts a file, a directory or a link into the guest behind `socket`. Whether the agent takes
    /// it is known at its end, or when it is refused.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; there may be an empty file then.
    pub async fn put(&self, socket: &Path, spec: PutSpec) -> Result<Put, AgentError> {
        Ok(Put::new(self.line(socket).await?.open(&ToAgent::Put(spec)).await?))
    }

    /// Reads a tree of the guest behind `socket`.
    ///
    /// # Errors
    ///
    /// [`AgentError`], also if there is no such path.
    pub async fn get(&self, socket: &Path, spec: GetSpec) -> Result<Get, AgentError> {
        Ok(Get::new(self.open(socket, ToAgent::Get(spec)).await?))
    }

    /// What lies at a path of the guest behind `socket`.
    ///
    /// # Errors
    ///
    /// [`AgentError`]. That nothing lies there is none.
    pub async fn stat(&self, socket: &Path, spec: StatSpec) -> Result<PathInfo, AgentError> {
        let stream = self.line(socket).await?.open(&ToAgent::Stat(spec)).await?;
        match answer(&stream, ANSWER_TIMEOUT).await? {
            ToServer::PathInfo(info) => Ok(info),
            _ => Err(AgentError::OutOfPlace),
        }
    }

    /// Mounts a volume in the guest behind `socket`.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; one that the agent did not say itself leaves open whether it is mounted.
    pub async fn attach(&self, socket: &Path, spec: AttachSpec) -> Result<(), AgentError> {
        self.open(socket, ToAgent::Attach(spec)).await.map(drop)
    }

    /// Unmounts a volume in the guest behind `socket`, if it is mounted there.
    ///
    /// # Errors
    ///
    /// As for [`Self::attach`].
    pub async fn detach(&self, socket: &Path, spec: DetachSpec) -> Result<(), AgentError> {
        self.open(socket, ToAgent::Detach(spec)).await.map(drop)
    }

    /// Waits until the agent behind `socket` takes connections, as long as the caller likes.
    pub async fn wait_until_it_listens(&self, socket: &Path) {
        let mut pause = RETRY_FIRST;
        while self.line(socket).await.is_err() {
            time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// Lets go of all agents. What still runs in guests for a client of ours is called off.
    pub async fn close(&self) {
        self.shared.closing.cancel();
        self.shared.tasks.close();
        self.shared.tasks.wait().await;
    }

    /// Asks for what is acknowledged first; what follows, if anything, comes from the stream.
    async fn open(&self, socket: &Path, request: ToAgent) -> Result<Stream, AgentError> {
        let stream = self.line(socket).await?.open(&request).await?;
        match answer(&stream, ANSWER_TIMEOUT).await? {
            ToServer::Ack => Ok(stream),
            _ => Err(AgentError::OutOfPlace),
        }
    }

    /// The connection to the agent behind `socket`: the one there is, or a new one.
    async fn line(&self, socket: &Path) -> Result<Line, AgentError> {
        let slot = self.slot(socket);
        // Whoever comes while others wait for a guest that is silent waits no longer than they.
        let waiting = time::timeout(CONNECT_TIMEOUT, slot.lock()).await;
        let mut slot = waiting.map_err(|_| AgentError::Silent { after: CONNECT_TIMEOUT })?;
        if let Some(line) = slot.as_ref().filter(|line| line.is_open()) {
            return Ok(line.clone());
        }
        let stream = connect(socket).await?;
        let (line, run) = Line::new(stream, QUIET_TIMEOUT, self.shared.closing.clone());
        self.shared.tasks.spawn(run);
        *slot = Some(line.clone());
        Ok(line)
    }

    fn slot(&self, socket: &Path) -> Arc<AsyncMutex<Option<Line>>> {
        let mut lines = self.shared.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = lines.get(socket) {
            return Arc::clone(slot);
        }
        // Guests come and go. One that nobody waits for and that is not connected is forgotten.
        lines.retain(|_, slot| {
            let is_open = |line: &Line| line.is_open();
            slot.try_lock().map_or(true, |line| line.as_ref().is_some_and(is_open))
        });
        Arc::clone(lines.entry(socket.to_owned()).or_default())
    }
}

/// The next message of a stream, which has to come within `timeout`.
async fn answer(stream: &Stream, timeout: Duration) -> Result<ToServer, AgentError> {
    let next = time::timeout(timeout, stream.next());
    match next.await.map_err(|_| AgentError::Silent { after: timeout })?? {
        ToServer::Error { code, message } => Err(AgentError::Refused { code, message }),
        message => Ok(message),
    }
}

/// Tells the agent behind `socket` to end the workload, then the guest; what still runs after
/// `grace` is killed. Returns once the agent has begun. The caller bounds the time.
///
/// # Errors
///
/// [`AgentError`]; whether the agent will end the guest is not known then.
pub async fn shutdown(socket: &Path, grace: Duration) -> Result<(), AgentError> {
    let mut stream: UnixStream = connect(socket).await?;
    let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    let order = ToAgent::Shutdown { signal: SIGNAL_OF_AGENT, grace_ms };
    order.encode(REQUEST, &mut bytes).map_err(AgentError::TooLong)?;
    stream.write_all(&bytes).await.map_err(AgentError::Io)?;
    let mut messages = Messages::new(stream);
    loop {
        match messages.next().await? {
            (REQUEST, ToServer::Ack) | (_, ToServer::Exited(_)) => return Ok(()),
            (REQUEST, ToServer::Error { code, message }) => {
                return Err(AgentError::Refused { code, message });
            }
            _ => {}
        }
    }
}

/// Why an agent did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The socket.
    #[error("Failed to speak to the agent")]
    Io(#[source] io::Error),
    /// Nobody takes the connection in the guest.
    #[error("The agent does not listen")]
    NotListening,
    /// It does not answer.
    #[error("The agent did not answer within {} s", after.as_secs())]
    Silent {
        /// How long it had.
        after: Duration,
    },
    /// It went away.
    #[error("The agent closed the connection")]
    Closed,
    /// The guest ended meanwhile.
    #[error("The guest ended")]
    GuestEnded,
    /// It said no.
    #[error("{message}")]
    Refused {
        /// What kind of no.
        code: ErrorCode,
        /// Why, as it says.
        message: String,
    },
    /// It said something that does not follow on what was asked.
    #[error("The agent answered out of place")]
    OutOfPlace,
    /// There is no room for another request.
    #[error("{streams} commands and copies are running in this guest: wait for one")]
    Busy {
        /// How many there are.
        streams: usize,
    },
    /// The request has too many bytes: arguments and environment, mostly.
    #[error("The request is too long")]
    TooLong(#[source] TooLong),
    /// It does not speak our language.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

#[cfg(test)]
mod tests;
