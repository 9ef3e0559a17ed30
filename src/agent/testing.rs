//! An agent that a test plays: it hears what the server says, and says what the test wants.

use std::path::PathBuf;

use ovum_agent_proto::VERSION;
use ovum_agent_proto::frame::{CONNECTION, Frame};
use ovum_agent_proto::message::{ToAgent, ToServer};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// Where the worker of a guest listens.
pub(crate) struct PlayedWorker {
    dir: TempDir,
    listener: UnixListener,
}

/// One connection to the agent.
pub(crate) struct PlayedAgent {
    stream: UnixStream,
    received: Vec<u8>,
}

impl PlayedWorker {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock.sock")).unwrap();
        Self { dir, listener }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    /// Leads the next connection to the agent, which greets.
    pub(crate) async fn accept(&self) -> PlayedAgent {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        let mut line = [0; b"CONNECT 1024\n".len()];
        stream.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"CONNECT 1024\n");
        stream.write_all(b"OK 1073741824\n").await.unwrap();
        let mut agent = PlayedAgent::new(stream);
        let hello = ToServer::Hello { version: VERSION, build: "played".into() };
        agent.say(CONNECTION, &hello).await;
        agent
    }
}

impl PlayedAgent {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { stream, received: Vec::new() }
    }

    pub(crate) async fn say(&mut self, stream: u32, message: &ToServer) {
        let mut bytes = Vec::new();
        message.encode(stream, &mut bytes).unwrap();
        self.stream.write_all(&bytes).await.unwrap();
    }

    pub(crate) async fn hear(&mut self) -> (u32, ToAgent) {
        loop {
            if let Some((frame, bytes)) = Frame::decode(&self.received).unwrap() {
                let heard = (frame.stream, ToAgent::decode(frame).unwrap());
                self.received.drain(..bytes);
                return heard;
            }
            assert_ne!(self.stream.read_buf(&mut self.received).await.unwrap(), 0, "closed");
        }
    }
}
