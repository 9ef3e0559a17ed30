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
///
/// Its bytes do not wait until the agent has made the file: they would wait for a way there and
/// back, which is most of what a small file takes.
#[derive(Debug)]
pub struct Put {
    stream: Stream,
    /// The agent has made the file.
    is_made: bool,
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
        Self { stream, is_made: false }
    }

    /// Sends bytes of the file.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; why the agent refuses them, if it does.
    pub async fn send(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        let Self { stream, is_made } = self;
        let sending = time::timeout(STALL_TIMEOUT, stream.send(bytes));
        tokio::select! {
            biased;
            error = refused(stream, is_made) => Err(error),
            sent = sending => sent.map_err(|_| AgentError::Silent { after: STALL_TIMEOUT })?,
        }
    }

    /// Waits until the agent refuses the file, or what it was sent of it: for ever, if it does
    /// not. Nothing is lost if this is dropped before it is ready.
    ///
    /// # Errors
    ///
    /// Always: [`AgentError`].
    pub async fn refused(&mut self) -> AgentError {
        refused(&self.stream, &mut self.is_made).await
    }

    /// The file is complete; returns how many bytes it has in the guest.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn finish(mut self) -> Result<u64, AgentError> {
        self.stream.say(&ToAgent::End).await?;
        loop {
            match answer(&self.stream, STALL_TIMEOUT).await? {
                ToServer::Ack if !self.is_made => self.is_made = true,
                ToServer::Stored { bytes } if self.is_made => return Ok(bytes),
                _ => return Err(AgentError::OutOfPlace),
            }
        }
    }
}

async fn refused(stream: &Stream, is_made: &mut bool) -> AgentError {
    loop {
        match stream.next().await {
            Ok(ToServer::Ack) if !*is_made => *is_made = true,
            Ok(ToServer::Error { code, message }) => return AgentError::Refused { code, message },
            Ok(_) => return AgentError::OutOfPlace,
            Err(error) => return error,
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
