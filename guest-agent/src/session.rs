//! One connection of the server: frames in, frames out, never waiting for either.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ovum_agent_proto::VERSION;
use ovum_agent_proto::frame::{CONNECTION, Frame, FrameError};
use ovum_agent_proto::message::{ErrorCode, ToAgent, ToServer};
use rustix::buffer::spare_capacity;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net;
use rustix::net::{RecvFlags, SendFlags};

/// Bytes asked of the stream at once.
const READ_BYTES: usize = 64 << 10;

/// What a server may leave unread, in bytes, before streams wait with theirs and we stop listening
/// to it.
const UNSENT_BYTES_MAX: usize = 128 << 10;

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
        interest.set(PollFlags::IN, self.has_room());
        interest.set(PollFlags::OUT, !self.unsent.is_empty());
        interest
    }

    /// Whether there is room for more that can wait.
    pub(crate) fn has_room(&self) -> bool {
        self.unsent.len() < UNSENT_BYTES_MAX
    }

    /// What the server has left unread.
    #[cfg(test)]
    pub(crate) fn unsent_bytes(&self) -> usize {
        self.unsent.len()
    }

    /// Queues a message. It leaves with the next [`Session::send`].
    pub(crate) fn say(&mut self, stream: u32, message: &ToServer) {
        if let Err(error) = message.encode(stream, &mut self.unsent) {
            let (code, message) = (ErrorCode::System, error.to_string());
            // Text for people always fits: it is cut.
            let _ = ToServer::Error { code, message }.encode(stream, &mut self.unsent);
        }
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
            let request = ToAgent::decode(frame);
            match request {
                Ok(request) => requests.push((stream, request)),
                Err(error) => self.say(stream, &refusal(&error)),
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    /// A session with the server's end of its stream.
    fn session() -> (Session, UnixStream) {
        let (ours, server) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Session::open(ours.into()), server)
    }

    /// Everything that has arrived at the server.
    fn arrived(server: &mut UnixStream) -> Vec<(u32, ToServer)> {
        let mut bytes = Vec::new();
        server.set_nonblocking(true).unwrap();
        let _ = server.read_to_end(&mut bytes);
        let mut messages = Vec::new();
        while let Some((frame, taken)) = Frame::decode(&bytes).unwrap() {
            messages.push((frame.stream, ToServer::decode(frame).unwrap()));
            bytes.drain(..taken);
        }
        assert!(bytes.is_empty());
        messages
    }

    #[test]
    fn the_first_word_is_a_hello() {
        let (mut session, mut server) = session();

        session.send().unwrap();

        let build = env!("CARGO_PKG_VERSION").to_owned();
        assert_eq!(arrived(&mut server), [(0, ToServer::Hello { version: VERSION, build })]);
    }

    #[test]
    fn a_request_is_taken_when_its_last_byte_is_there() {
        let (mut session, mut server) = session();
        let request = ToAgent::Shutdown { signal: 15, grace_ms: 100 };
        let mut bytes = Vec::new();
        request.encode(7, &mut bytes).unwrap();
        request.encode(8, &mut bytes).unwrap();

        let (most, last) = bytes.split_at(bytes.len() - 1);
        server.write_all(most).unwrap();
        assert_eq!(session.receive(), Ok(vec![(7, request.clone())]));
        server.write_all(last).unwrap();
        assert_eq!(session.receive(), Ok(vec![(8, request)]));
        assert_eq!(session.receive(), Ok(vec![]));
    }

    #[test]
    fn a_request_from_the_future_is_answered_and_the_next_one_served() {
        let (mut session, mut server) = session();
        let request = ToAgent::Shutdown { signal: 0, grace_ms: 0 };
        let mut bytes = vec![6, 0, 0, 0, 0x1f, 9, 0, 0, 0, 0xff];
        request.encode(10, &mut bytes).unwrap();

        server.write_all(&bytes).unwrap();
        let requests = session.receive();
        session.send().unwrap();

        assert_eq!(requests, Ok(vec![(10, request)]));
        let [_, (9, ToServer::Error { code: ErrorCode::Unsupported, message })] =
            &arrived(&mut server)[..]
        else {
            panic!("no answer");
        };
        assert_eq!(message, "Frame of unknown kind 0x1f");
    }

    #[test]
    fn nonsense_and_the_end_of_the_stream_close_it() {
        let (mut session_1, mut server_1) = session();
        server_1.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert_eq!(session_1.receive(), Err(Closed));

        let (mut session_2, server_2) = session();
        drop(server_2);
        assert_eq!(session_2.receive(), Err(Closed));
        assert_eq!(session_2.send(), Err(Closed));
    }

    /// A server that asks and never reads costs a bounded buffer.
    #[test]
    fn a_server_that_does_not_read_is_not_listened_to() {
        let (mut session, server) = session();
        let answer = ToServer::Error { code: ErrorCode::System, message: "m".repeat(30_000) };

        assert_eq!(session.interest(), PollFlags::IN | PollFlags::OUT);
        for stream in 1..100 {
            session.say(stream, &answer);
            session.send().unwrap();
            if !session.interest().contains(PollFlags::IN) {
                break;
            }
        }

        assert_eq!(session.interest(), PollFlags::OUT);
        assert!(session.unsent.len() < UNSENT_BYTES_MAX + 2 * 30_000);
        drop(server);
    }
}
