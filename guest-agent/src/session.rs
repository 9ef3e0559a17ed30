//! One connection of the server: frames in, frames out, never waiting for either.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ovum_agent_proto::VERSION;
use ovum_agent_proto::frame::{
    CONNECTION, ErrorCode, FRAME_BYTES_MAX, Frame, FrameError, ToAgent, ToServer,
};
use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net;
use rustix::net::{RecvFlags, SendFlags};

/// Bytes asked of the stream at once.
const READ_BYTES: usize = 4 << 10;

/// Answers that a server may leave unread, in bytes, before we stop listening to it.
const UNSENT_BYTES_MAX: usize = FRAME_BYTES_MAX;

/// A connection.
#[derive(Debug)]
pub(crate) struct Session {
    stream: OwnedFd,
    received: Vec<u8>,
    unsent: Vec<u8>,
}

/// A request, with the stream under which it was asked.
pub(crate) type Request = (u32, ToAgent);

/// The connection is over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed;

impl Session {
    /// Greets.
    pub(crate) fn open(stream: OwnedFd) -> Self {
        let mut session = Self { stream, received: Vec::new(), unsent: Vec::new() };
        let build = env!("CARGO_PKG_VERSION").to_owned();
        session.say(CONNECTION, &ToServer::Hello { version: VERSION, build });
        session
    }

    /// What to wait for.
    pub(crate) fn interest(&self) -> PollFlags {
        let mut interest = PollFlags::empty();
        interest.set(PollFlags::IN, self.unsent.len() < UNSENT_BYTES_MAX);
        interest.set(PollFlags::OUT, !self.unsent.is_empty());
        interest
    }

    /// Queues a message. It leaves with the next [`Session::send`].
    pub(crate) fn say(&mut self, stream: u32, message: &ToServer) {
        message.encode(stream, &mut self.unsent);
    }

    /// Sends what the stream takes now.
    pub(crate) fn send(&mut self) -> Result<(), Closed> {
        while !self.unsent.is_empty() {
            match net::send(&self.stream, &self.unsent, SendFlags::NOSIGNAL) {
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(_) => return Err(Closed),
            }
        }
        Ok(())
    }

    /// Takes the requests that have arrived. What is no request is answered here.
    pub(crate) fn receive(&mut self) -> Result<Vec<Request>, Closed> {
        self.received.reserve(READ_BYTES);
        let buffer = spare_capacity(&mut self.received);
        match net::recv(&self.stream, buffer, RecvFlags::empty()) {
            Ok((0, _)) => return Err(Closed),
            Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(_) => return Err(Closed),
        }
        let mut requests = Vec::new();
        let mut taken = 0;
        while let Some((frame, bytes)) =
            Frame::decode(&self.received[taken..]).map_err(|_| Closed)?
        {
            let stream = frame.stream;
            match ToAgent::decode(frame) {
                Ok(request) => requests.push((stream, request)),
                Err(error) => refusal(&error).encode(stream, &mut self.unsent),
            }
            taken += bytes;
        }
        self.received.drain(..taken);
        Ok(requests)
    }
}

impl AsFd for Session {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn refusal(error: &FrameError) -> ToServer {
    let code = match error {
        FrameError::Kind { .. } => ErrorCode::Unsupported,
        FrameError::Length { .. } | FrameError::Body { .. } => ErrorCode::Malformed,
    };
    ToServer::Error { code, message: error.to_string() }
}
