//! Files on their way into a guest and out of it.

use std::path::{Component, Path};
use std::time::Duration;

use ovum_agent_proto::files::Entry;
use ovum_agent_proto::message::{ToAgent, ToServer};
use tokio::time;

use crate::agent::line::Stream;
use crate::agent::{ANSWER_TIMEOUT, AgentError, answer};

/// How long an agent may let a copy stand still.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// A file on its way into a guest. Dropped before its end, it stays there as it is.
#[derive(Debug)]
pub struct Put {
    stream: Stream,
}

/// A tree on its way out of a guest.
#[derive(Debug)]
pub struct Get {
    stream: Stream,
    /// Bytes of the present file that are still to come.
    left_bytes: u64,
}

/// What comes out of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GetEvent {
    /// The next entry. Its path is relative and has no `..`.
    Entry(Entry),
    /// Bytes of the file that came last; never more than it said it has.
    Data(Vec<u8>),
    /// That was all of it.
    End,
}

impl Put {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream }
    }

    /// Sends bytes of the file.
    ///
    /// # Errors
    ///
    /// [`AgentError`]: [`Self::finish`] says more, if the agent refused them.
    pub async fn send(&self, bytes: &[u8]) -> Result<(), AgentError> {
        let sending = time::timeout(STALL_TIMEOUT, self.stream.send(bytes));
        sending.await.map_err(|_| AgentError::Silent { after: STALL_TIMEOUT })?
    }

    /// Waits until the agent refuses what it was sent so far: for ever, if it does not.
    ///
    /// # Errors
    ///
    /// Always: [`AgentError`].
    pub async fn refused(&self) -> AgentError {
        match self.stream.next().await {
            Ok(ToServer::Error { code, message }) => AgentError::Refused { code, message },
            Ok(_) => AgentError::OutOfPlace,
            Err(error) => error,
        }
    }

    /// The file is complete; returns how many bytes it has in the guest.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn finish(self) -> Result<u64, AgentError> {
        self.stream.say(&ToAgent::End).await?;
        match answer(&self.stream, STALL_TIMEOUT).await? {
            ToServer::Stored { bytes } => Ok(bytes),
            _ => Err(AgentError::OutOfPlace),
        }
    }
}

impl Get {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream, left_bytes: 0 }
    }

    /// What comes next.
    ///
    /// # Errors
    ///
    /// [`AgentError`], also if what comes is no tree.
    pub async fn next(&mut self) -> Result<GetEvent, AgentError> {
        match answer(&self.stream, STALL_TIMEOUT.max(ANSWER_TIMEOUT)).await? {
            ToServer::Entry(entry) if self.left_bytes == 0 && is_inside(&entry.path) => {
                self.left_bytes = entry.size;
                Ok(GetEvent::Entry(entry))
            }
            ToServer::Data(bytes) => {
                let count = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                let left = self.left_bytes.checked_sub(count);
                self.left_bytes = left.ok_or(AgentError::OutOfPlace)?;
                Ok(GetEvent::Data(bytes))
            }
            ToServer::End if self.left_bytes == 0 => Ok(GetEvent::End),
            _ => Err(AgentError::OutOfPlace),
        }
    }
}

/// Whether a path stays below where it is put.
fn is_inside(path: &str) -> bool {
    let mut parts = Path::new(path).components().peekable();
    parts.peek().is_some()
        && parts.all(|part| matches!(part, Component::Normal(_)))
        && !path.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_from_a_guest_does_not_lead_out() {
        for path in ["a", "a/b", "a/..b", "...", "a/b/"] {
            assert!(is_inside(path), "{path}");
        }
        for path in ["", "/", "/a", "..", "a/../b", "a/..", ".", "./a", "a\0b"] {
            assert!(!is_inside(path), "{path}");
        }
    }
}
