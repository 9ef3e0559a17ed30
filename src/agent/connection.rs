//! A way to a guest's agent: the worker's vsock socket, led to the agent's port.

use std::io;
use std::path::Path;
use std::time::Duration;

use ovum_agent_proto::AGENT_PORT;
use ovum_agent_proto::frame::{Frame, FrameError};
use ovum_agent_proto::message::ToServer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time;

use crate::agent::AgentError;

/// Longest answer to `CONNECT`: `OK` and a port.
const ANSWER_BYTES_MAX: usize = 32;

/// How long a guest may take to take a connection.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes read at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// Connects to the agent behind `socket`.
pub(super) async fn connect(socket: &Path) -> Result<UnixStream, AgentError> {
    let connecting = time::timeout(CONNECT_TIMEOUT, async {
        let mut stream = UnixStream::connect(socket).await.map_err(AgentError::Io)?;
        let request = format!("CONNECT {AGENT_PORT}\n");
        stream.write_all(request.as_bytes()).await.map_err(AgentError::Io)?;
        // Byte by byte: what follows the line is already the agent's.
        let mut answer = Vec::new();
        while answer.last() != Some(&b'\n') && answer.len() < ANSWER_BYTES_MAX {
            match stream.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                Err(error) => return Err(AgentError::Io(error)),
            }
        }
        let is_ok = answer.starts_with(b"OK ") && answer.ends_with(b"\n");
        if is_ok { Ok(stream) } else { Err(AgentError::NotListening) }
    });
    connecting.await.map_err(|_| AgentError::Silent { after: CONNECT_TIMEOUT })?
}

/// The messages on a stream, one after the other.
#[derive(Debug)]
pub(super) struct Messages<R> {
    stream: R,
    received: Vec<u8>,
    /// How much of that was taken.
    taken: usize,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    pub(super) fn new(stream: R) -> Self {
        Self { stream, received: Vec::new(), taken: 0 }
    }

    /// The next message, and the stream it belongs to. Messages of an unknown kind are skipped.
    /// Nothing is lost if this is dropped before it is ready.
    pub(super) async fn next(&mut self) -> Result<(u32, ToServer), AgentError> {
        loop {
            while let Some((frame, bytes)) = Frame::decode(&self.received[self.taken..])? {
                let (stream, message) = (frame.stream, ToServer::decode(frame));
                self.taken += bytes;
                match message {
                    Ok(message) => return Ok((stream, message)),
                    Err(FrameError::Kind { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            self.received.drain(..self.taken);
            self.taken = 0;
            self.received.reserve(CHUNK_BYTES);
            if self.stream.read_buf(&mut self.received).await.map_err(AgentError::Io)? == 0 {
                return Err(AgentError::Closed);
            }
        }
    }
}
