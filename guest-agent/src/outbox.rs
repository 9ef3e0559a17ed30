//! What a stream says to the server, and how much of it the server has room for.

use ovum_agent_proto::frame::{DATA_BYTES_MAX, FRAME_COST_BYTES, WINDOW_BYTES};
use ovum_agent_proto::message::ToServer;

use crate::session::Session;

/// Bytes taken before the server is told, so that not every chunk costs a frame.
const TAKEN_BYTES_MIN: u32 = WINDOW_BYTES / 2;

/// How much may still be sent on a stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Credit {
    left: u32,
}

/// How much was taken of a stream, and not yet said.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Taken {
    bytes: u32,
}

/// The way out of one stream.
#[derive(Debug)]
pub(crate) struct Outbox<'a> {
    session: &'a mut Session,
    stream: u32,
}

impl Credit {
    /// As a stream has it when it opens.
    pub(crate) fn new() -> Self {
        Self { left: WINDOW_BYTES }
    }

    /// The server took `bytes`. Credit that was never given out is not counted.
    pub(crate) fn add(&mut self, bytes: u32) {
        self.left = self.left.saturating_add(bytes).min(WINDOW_BYTES);
    }

    /// Bytes that the next frame of data may have.
    pub(crate) fn chunk_bytes(self) -> usize {
        let left = self.left.saturating_sub(FRAME_COST_BYTES);
        usize::try_from(left).unwrap_or(usize::MAX).min(DATA_BYTES_MAX)
    }

    /// Whether `message` may be sent; if so, its bytes are taken off.
    pub(crate) fn spend(&mut self, message: &ToServer) -> bool {
        match self.left.checked_sub(message.cost()) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

impl Taken {
    /// Counts `bytes`, and tells the server if that is worth a frame or `at_once`.
    pub(crate) fn add(&mut self, bytes: usize, at_once: bool, outbox: &mut Outbox<'_>) {
        self.bytes = self.bytes.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        if self.bytes >= TAKEN_BYTES_MIN || (at_once && self.bytes > 0) {
            outbox.say(&ToServer::Credit(self.bytes));
            self.bytes = 0;
        }
    }
}

impl<'a> Outbox<'a> {
    pub(crate) fn new(session: &'a mut Session, stream: u32) -> Self {
        Self { session, stream }
    }

    /// Says something on this stream.
    pub(crate) fn say(&mut self, message: &ToServer) {
        self.session.say(self.stream, message);
    }

    /// Whether the connection takes more; if not, a stream waits with what can wait.
    pub(crate) fn has_room(&self) -> bool {
        self.session.has_room()
    }
}
