//! A command in a guest.

use std::path::Path;
use std::time::Duration;

use ovum_agent_proto::exec::{ExecSpec, WindowSize};
use ovum_agent_proto::message::{ErrorCode, ToAgent, ToServer};
use tokio::time;

use crate::agent::line::Stream;
use crate::agent::{AgentError, Agents};

/// Exit status of a command that could not be started.
const NOT_STARTED: u8 = 127;

/// Exit status of a command that is there and cannot be executed.
const NOT_EXECUTABLE: u8 = 126;

/// Exit status of a command that was killed, as it is when its guest ends.
const KILLED: u8 = 137;

/// Exit status of a command whose time was over.
const TIMED_OUT: u8 = 124;

/// How much longer than the command itself the agent may take.
const TIMEOUT_MARGIN: Duration = Duration::from_secs(5);

/// A running command. Dropped, it is killed with its process group.
#[derive(Debug)]
pub struct Exec {
    stream: Stream,
}

/// What a command does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote to its output: standard output and error, unless they are kept apart.
    Output(Vec<u8>),
    /// It wrote to standard error, which is kept apart.
    Error(Vec<u8>),
    /// It ended with this status, and all of its output was seen.
    Ended(u8),
}

/// What came of a command that was run to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// Its exit status: 124 if its time was over, 128 + N if signal N killed it.
    pub code: u8,
    /// The beginning of what it wrote.
    pub output: Vec<u8>,
}

impl Exec {
    pub(super) fn new(stream: Stream) -> Self {
        Self { stream }
    }

    /// What it does next. After [`ExecEvent::Ended`] it does nothing.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; how the command ends is not known then.
    pub async fn next(&self) -> Result<ExecEvent, AgentError> {
        match self.stream.next().await? {
            ToServer::Data(bytes) => Ok(ExecEvent::Output(bytes)),
            ToServer::ErrorData(bytes) => Ok(ExecEvent::Error(bytes)),
            ToServer::Ended { code } => Ok(ExecEvent::Ended(code)),
            ToServer::Error { code, message } => Err(AgentError::Refused { code, message }),
            _ => Err(AgentError::OutOfPlace),
        }
    }

    /// Gives it input, as fast as it reads.
    ///
    /// # Errors
    ///
    /// [`AgentError`], also if it has ended.
    pub async fn send(&self, bytes: &[u8]) -> Result<(), AgentError> {
        self.stream.send(bytes).await
    }

    /// Ends its input. A terminal has no end.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn end_input(&self) -> Result<(), AgentError> {
        self.stream.say(&ToAgent::End).await
    }

    /// Gives its terminal another size.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn resize(&self, size: WindowSize) -> Result<(), AgentError> {
        self.stream.say(&ToAgent::Resize(size)).await
    }
}

impl Agents {
    /// Runs the command of `spec` in the guest behind `socket` to its end, at most `timeout`, and
    /// keeps the first `output_bytes_max` of what it writes.
    ///
    /// # Errors
    ///
    /// [`AgentError`]. A command that cannot be started is none: its status is 126 or 127.
    pub async fn run(
        &self,
        socket: &Path,
        spec: ExecSpec,
        timeout: Duration,
        output_bytes_max: usize,
    ) -> Result<Ran, AgentError> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1);
        let spec = ExecSpec { timeout_ms, ..spec };
        let running = time::timeout(timeout.saturating_add(TIMEOUT_MARGIN), async {
            let exec = self.exec(socket, spec).await?;
            exec.end_input().await?;
            let mut output = Vec::new();
            loop {
                match exec.next().await? {
                    ExecEvent::Output(bytes) | ExecEvent::Error(bytes) => {
                        let room = output_bytes_max.saturating_sub(output.len());
                        output.extend_from_slice(&bytes[..bytes.len().min(room)]);
                    }
                    ExecEvent::Ended(code) => return Ok(Ran { code, output }),
                }
            }
        });
        match running.await {
            Ok(Err(AgentError::Refused { code, message })) => {
                let code = refused(code);
                Ok(Ran { code, output: message.into_bytes() })
            }
            Ok(outcome) => outcome,
            Err(_) => Ok(Ran { code: TIMED_OUT, output: Vec::new() }),
        }
    }
}

impl AgentError {
    /// What a shell would say of a command that this happened to.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::GuestEnded => KILLED,
            Self::Refused { code, .. } => refused(*code),
            _ => NOT_STARTED,
        }
    }
}

fn refused(code: ErrorCode) -> u8 {
    if code == ErrorCode::NotExecutable { NOT_EXECUTABLE } else { NOT_STARTED }
}
