//! The server's end of the vsock stream to a guest's agent.
//!
//! The worker listens at a socket in the instance's folder and leads each connection to the vsock
//! port that its first line names. What arrives comes from a guest: everything is bounded, and
//! the caller bounds the time.

use std::io;
use std::path::Path;
use std::time::Duration;

use ovum_agent_proto::AGENT_PORT;
use ovum_agent_proto::frame::{Frame, FrameError, ToAgent, ToServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest answer to `CONNECT`: `OK` and a port.
const ANSWER_BYTES_MAX: usize = 32;

/// The only request of a connection.
const REQUEST: u32 = 1;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 4 << 10;

/// Leaves the choice of the signal to the agent, which knows the workload.
const SIGNAL_OF_AGENT: u8 = 0;

/// Tells the agent behind `socket` to end the workload, then the guest; what still runs after
/// `grace` is killed. Returns once the agent has begun.
///
/// # Errors
///
/// [`AgentError`]; whether the agent will end the guest is not known then.
pub async fn shutdown(socket: &Path, grace: Duration) -> Result<(), AgentError> {
    let mut connection = Connection::open(socket).await?;
    let grace_ms = u32::try_from(grace.as_millis()).unwrap_or(u32::MAX);
    let mut bytes = Vec::new();
    ToAgent::Shutdown { signal: SIGNAL_OF_AGENT, grace_ms }.encode(REQUEST, &mut bytes);
    connection.stream.write_all(&bytes).await.map_err(AgentError::Io)?;
    loop {
        match connection.next().await? {
            (REQUEST, ToServer::Ack) | (_, ToServer::Exited(_)) => return Ok(()),
            (REQUEST, ToServer::Error { code: _, message }) => {
                return Err(AgentError::Refused { message });
            }
            (_, ToServer::Hello { .. } | ToServer::Ack | ToServer::Error { .. }) => {}
        }
    }
}

/// A stream to the agent and what was read of it.
#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Connection {
    async fn open(socket: &Path) -> Result<Self, AgentError> {
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
        if answer.starts_with(b"OK ") && answer.ends_with(b"\n") {
            Ok(Self { stream, received: Vec::new() })
        } else {
            Err(AgentError::NotListening)
        }
    }

    /// The next message, and the stream it belongs to. Messages of an unknown kind are skipped.
    async fn next(&mut self) -> Result<(u32, ToServer), AgentError> {
        loop {
            while let Some((frame, taken)) = Frame::decode(&self.received)? {
                let (stream, message) = (frame.stream, ToServer::decode(frame));
                self.received.drain(..taken);
                match message {
                    Ok(message) => return Ok((stream, message)),
                    Err(FrameError::Kind { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            let mut chunk = [0; CHUNK_BYTES];
            match self.stream.read(&mut chunk).await.map_err(AgentError::Io)? {
                0 => return Err(AgentError::Closed),
                read => self.received.extend_from_slice(&chunk[..read]),
            }
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
    /// It went away.
    #[error("The agent closed the connection")]
    Closed,
    /// It said no.
    #[error("The agent refused: {message}")]
    Refused {
        /// Why, as it says.
        message: String,
    },
    /// It does not speak our language.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use ovum_agent_proto::frame::{CONNECTION, ErrorCode};
    use tokio::net::UnixListener;

    use super::*;

    /// What a worker and the agent behind it answer, whatever they hear; returns what they heard.
    async fn asked(answer: Vec<u8>) -> (Result<(), AgentError>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path: PathBuf = dir.path().join("vsock.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let peer = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&answer).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut heard = Vec::new();
            // One who gives up leaves our words unread, which is an error to us.
            let _ = stream.read_to_end(&mut heard).await;
            heard
        };
        tokio::join!(shutdown(&path, Duration::from_millis(1500)), peer)
    }

    fn answer(messages: &[(u32, ToServer)]) -> Vec<u8> {
        let mut bytes = b"OK 1073741824\n".to_vec();
        for (stream, message) in messages {
            message.encode(*stream, &mut bytes);
        }
        bytes
    }

    fn hello() -> (u32, ToServer) {
        (CONNECTION, ToServer::Hello { version: 1, build: "test".into() })
    }

    #[tokio::test]
    async fn a_shutdown_is_done_when_it_is_acknowledged() {
        let (done, heard) = asked(answer(&[hello(), (REQUEST, ToServer::Ack)])).await;

        assert!(done.is_ok(), "{done:?}");
        let mut expected = b"CONNECT 1024\n".to_vec();
        ToAgent::Shutdown { signal: 0, grace_ms: 1500 }.encode(1, &mut expected);
        assert_eq!(heard, expected);
    }

    #[tokio::test]
    async fn a_refusal_carries_the_agents_words() {
        let refusal = ToServer::Error { code: ErrorCode::System, message: "no".into() };

        let (done, _) = asked(answer(&[hello(), (REQUEST, refusal)])).await;

        assert_eq!(done.unwrap_err().to_string(), "The agent refused: no");
    }

    #[tokio::test]
    async fn nobody_silence_and_nonsense_are_told_apart() {
        let error = async |bytes: &[u8]| asked(bytes.to_vec()).await.0.unwrap_err();

        assert!(matches!(error(b"").await, AgentError::NotListening));
        assert!(matches!(error(&[b'x'; 100]).await, AgentError::NotListening));
        assert!(matches!(error(b"OK 1\n").await, AgentError::Closed));
        assert!(matches!(error(b"OK 1\n\xff\xff\xff\xff").await, AgentError::Frame(_)));
    }
}
