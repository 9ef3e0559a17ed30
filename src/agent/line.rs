//! One connection to an agent, shared by all that is going on in its guest.
//!
//! Each request opens a stream. What the agent says is sorted into the streams' inboxes, never
//! waiting for a reader: an inbox holds what its window allows, and an agent that sends more has
//! lost the connection. What is for the agent goes into one outbox, where a stream's data is
//! bounded by the credit that the agent gave. So neither a slow client nor a lying agent costs
//! more than the constants here, and one stream does not hold up another.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ovum_agent_proto::VERSION;
use ovum_agent_proto::files::StatSpec;
use ovum_agent_proto::frame::{CONNECTION, DATA_BYTES_MAX, WINDOW_BYTES};
use ovum_agent_proto::message::{ToAgent, ToServer};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Notify;
use tokio::time;
use tokio_util::sync::CancellationToken;

use crate::agent::AgentError;
use crate::agent::connection::Messages;

/// Most streams of one connection: as many as an agent serves.
const STREAMS_MAX: usize = 256;

/// Bytes that may wait to be sent, before those with more to send wait.
const OUTBOX_BYTES_MAX: usize = 1 << 20;

/// Messages in one inbox. The window allows for fewer.
const INBOX_MESSAGES_MAX: usize = 8 << 10;

/// Bytes taken from an inbox before the agent is told, so that few frames are spent on it.
const TAKEN_BYTES_MIN: u32 = WINDOW_BYTES / 2;

/// How long an agent may leave everything unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Line {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Held for moments, never across an await.
    state: Mutex<State>,
    /// Something is in the outbox.
    filled: Notify,
    /// The outbox was emptied, or the line ended.
    drained: Notify,
}

#[derive(Debug, Default)]
struct State {
    outbox: Vec<u8>,
    streams: HashMap<u32, Slot>,
    last_number: u32,
    ended: Option<LineEnd>,
}

/// How a line ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LineEnd {
    /// It broke, or was closed by the agent, or by us for what the agent said.
    Lost,
    /// The guest ended.
    GuestEnded,
    /// The agent said nothing for so long, though it was asked.
    Silent(Duration),
}

/// What is known of an open stream.
#[derive(Debug)]
struct Slot {
    inbox: VecDeque<(ToServer, u32)>,
    /// What the agent may still send.
    window: u32,
    /// What was taken from the inbox and the agent was not told of.
    taken: u32,
    /// What we may still send.
    credit: u32,
    heard: Arc<Notify>,
    credited: Arc<Notify>,
}

/// An open stream. Dropped before its end, whatever it was opened for is called off.
#[derive(Debug)]
pub(super) struct Stream {
    shared: Arc<Shared>,
    number: u32,
    heard: Arc<Notify>,
    credited: Arc<Notify>,
}

impl Line {
    /// A line over `stream`, and what has to run for it until it ends. It does after
    /// `quiet_timeout` that nobody used it, and after twice that in which the agent said nothing to
    /// those who do.
    pub(super) fn new(
        stream: UnixStream,
        quiet_timeout: Duration,
        closing: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + use<>) {
        let line = Self { shared: Arc::default() };
        let shared = Arc::clone(&line.shared);
        let run = async move {
            let (reader, writer) = stream.into_split();
            let end = tokio::select! {
                end = shared.read(Messages::new(reader), quiet_timeout) => end,
                () = shared.write(writer) => LineEnd::Lost,
                () = closing.cancelled() => LineEnd::Lost,
            };
            shared.end(end);
        };
        (line, run)
    }

    /// Whether it can be used.
    pub(super) fn is_open(&self) -> bool {
        self.shared.lock().ended.is_none()
    }

    /// Asks for something.
    pub(super) async fn open(&self, request: &ToAgent) -> Result<Stream, AgentError> {
        loop {
            let drained = self.shared.drained.notified();
            {
                let mut state = self.shared.lock();
                state.check()?;
                if state.outbox.len() < OUTBOX_BYTES_MAX {
                    return self.admit(&mut state, request);
                }
            }
            drained.await;
        }
    }

    fn admit(&self, state: &mut State, request: &ToAgent) -> Result<Stream, AgentError> {
        if state.streams.len() >= STREAMS_MAX {
            return Err(AgentError::Busy { streams: STREAMS_MAX });
        }
        let number = state.free_number();
        request.encode(number, &mut state.outbox).map_err(AgentError::TooLong)?;
        let (heard, credited) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let slot = Slot {
            inbox: VecDeque::new(),
            window: WINDOW_BYTES,
            taken: 0,
            credit: WINDOW_BYTES,
            heard: Arc::clone(&heard),
            credited: Arc::clone(&credited),
        };
        state.streams.insert(number, slot);
        self.shared.filled.notify_one();
        Ok(Stream { shared: Arc::clone(&self.shared), number, heard, credited })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sorts what the agent says, until there is no more of it, or nobody wants any.
    async fn read(
        &self,
        mut messages: Messages<OwnedReadHalf>,
        quiet_timeout: Duration,
    ) -> LineEnd {
        let mut is_asked = false;
        loop {
            let Ok(next) = time::timeout(quiet_timeout, messages.next()).await else {
                if is_asked {
                    tracing::warn!("An agent is silent");
                    return LineEnd::Silent(quiet_timeout * 2);
                }
                if self.lock().ends_unused() {
                    return LineEnd::Lost;
                }
                // A command may be quiet for hours. Its agent has to answer.
                self.ask();
                is_asked = true;
                continue;
            };
            is_asked = false;
            match next {
                Ok((CONNECTION, ToServer::Exited(_))) => return LineEnd::GuestEnded,
                Ok((CONNECTION, ToServer::Hello { version, build })) => {
                    if version != VERSION {
                        tracing::warn!(version, build, "An agent speaks another version");
                        return LineEnd::Lost;
                    }
                }
                Ok((stream, message)) => {
                    if self.lock().hear(stream, message).is_err() {
                        tracing::warn!(stream, "An agent sent more than it was allowed to");
                        return LineEnd::Lost;
                    }
                }
                Err(AgentError::Closed) => return LineEnd::Lost,
                Err(error) => {
                    tracing::warn!(%error, "A connection to an agent broke");
                    return LineEnd::Lost;
                }
            }
        }
    }

    /// Asks for what any agent can say.
    fn ask(&self) {
        let root = StatSpec { path: "/".into(), follow_links: false };
        let mut state = self.lock();
        // Whoever does not read need not be asked twice. The answer is for nobody: it was heard.
        if state.outbox.len() < OUTBOX_BYTES_MAX {
            let number = state.free_number();
            // It always fits a frame.
            let _ = ToAgent::Stat(root).encode(number, &mut state.outbox);
            self.filled.notify_one();
        }
    }

    /// Sends what is in the outbox, until the agent takes no more.
    async fn write(&self, mut stream: OwnedWriteHalf) {
        loop {
            let bytes = mem::take(&mut self.lock().outbox);
            if bytes.is_empty() {
                self.filled.notified().await;
                continue;
            }
            self.drained.notify_waiters();
            match time::timeout(WRITE_TIMEOUT, stream.write_all(&bytes)).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return,
                Err(_) => {
                    tracing::warn!("An agent does not read");
                    return;
                }
            }
        }
    }

    fn end(&self, end: LineEnd) {
        let mut state = self.lock();
        state.ended = Some(end);
        state.outbox = Vec::new();
        for slot in state.streams.values() {
            slot.heard.notify_one();
            slot.credited.notify_one();
        }
        self.drained.notify_waiters();
    }
}

/// An agent sent more than it may.
struct Excess;

impl State {
    fn check(&self) -> Result<(), AgentError> {
        match self.ended {
            None => Ok(()),
            Some(LineEnd::Lost) => Err(AgentError::Closed),
            Some(LineEnd::GuestEnded) => Err(AgentError::GuestEnded),
            Some(LineEnd::Silent(after)) => Err(AgentError::Silent { after }),
        }
    }

    /// Ends the line if nobody uses it: from here on nobody can.
    fn ends_unused(&mut self) -> bool {
        if self.streams.is_empty() {
            self.ended = Some(LineEnd::Lost);
        }
        self.streams.is_empty()
    }

    /// The next number that is neither the connection's nor in use.
    fn free_number(&mut self) -> u32 {
        loop {
            self.last_number = self.last_number.wrapping_add(1);
            let number = self.last_number;
            if number != CONNECTION && !self.streams.contains_key(&number) {
                return number;
            }
        }
    }

    /// Puts a message into the inbox of its stream. What comes for a stream that is over was under
    /// way.
    fn hear(&mut self, stream: u32, message: ToServer) -> Result<(), Excess> {
        let Some(slot) = self.streams.get_mut(&stream) else { return Ok(()) };
        if let ToServer::Credit(bytes) = message {
            slot.credit = slot.credit.saturating_add(bytes).min(WINDOW_BYTES);
            slot.credited.notify_one();
            return Ok(());
        }
        let cost = message.cost();
        slot.window = slot.window.checked_sub(cost).ok_or(Excess)?;
        if slot.inbox.len() >= INBOX_MESSAGES_MAX {
            return Err(Excess);
        }
        slot.put(message, cost);
        slot.heard.notify_one();
        Ok(())
    }
}

impl Slot {
    /// Small pieces of the same become one.
    fn put(&mut self, message: ToServer, cost: u32) {
        let last = self.inbox.back_mut().map(|(last, last_cost)| (last, last_cost));
        match (last, &message) {
            (Some((ToServer::Data(last), last_cost)), ToServer::Data(more))
            | (Some((ToServer::ErrorData(last), last_cost)), ToServer::ErrorData(more))
                if last.len() + more.len() <= DATA_BYTES_MAX =>
            {
                last.extend_from_slice(more);
                *last_cost = last_cost.saturating_add(cost);
            }
            _ => self.inbox.push_back((message, cost)),
        }
    }
}

impl Stream {
    /// The next message.
    ///
    /// After the last one (an error, or the end of what was asked for) nothing else comes.
    pub(super) async fn next(&self) -> Result<ToServer, AgentError> {
        loop {
            if let Some(message) = self.take()? {
                return Ok(message);
            }
            self.heard.notified().await;
        }
    }

    fn take(&self) -> Result<Option<ToServer>, AgentError> {
        let mut state = self.shared.lock();
        let State { outbox, streams, .. } = &mut *state;
        let Some(slot) = streams.get_mut(&self.number) else { return Err(AgentError::Closed) };
        let Some((message, cost)) = slot.inbox.pop_front() else {
            return state.check().map(|()| None);
        };
        if is_last(&message) {
            streams.remove(&self.number);
            return Ok(Some(message));
        }
        slot.window += cost;
        slot.taken += cost;
        if slot.taken >= TAKEN_BYTES_MIN {
            let credit = ToAgent::Credit(mem::take(&mut slot.taken));
            credit.encode(self.number, outbox).map_err(AgentError::TooLong)?;
            self.shared.filled.notify_one();
        }
        Ok(Some(message))
    }

    /// Sends bytes, as fast as the agent takes them.
    pub(super) async fn send(&self, mut bytes: &[u8]) -> Result<(), AgentError> {
        while !bytes.is_empty() {
            let sent = self.send_some(bytes).await?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }

    async fn send_some(&self, bytes: &[u8]) -> Result<usize, AgentError> {
        loop {
            let drained = self.shared.drained.notified();
            {
                let mut state = self.shared.lock();
                state.check()?;
                let State { outbox, streams, .. } = &mut *state;
                let Some(slot) = streams.get_mut(&self.number) else {
                    return Err(AgentError::Closed);
                };
                let credit = usize::try_from(slot.credit).unwrap_or(usize::MAX);
                let count = bytes.len().min(credit).min(DATA_BYTES_MAX);
                if count > 0 && outbox.len() < OUTBOX_BYTES_MAX {
                    let message = ToAgent::Data(bytes[..count].to_vec());
                    slot.credit = slot.credit.saturating_sub(message.cost());
                    message.encode(self.number, outbox).map_err(AgentError::TooLong)?;
                    self.shared.filled.notify_one();
                    return Ok(count);
                }
            }
            tokio::select! {
                () = drained => {}
                () = self.credited.notified() => {}
            }
        }
    }

    /// Says something that takes no credit.
    pub(super) async fn say(&self, message: &ToAgent) -> Result<(), AgentError> {
        loop {
            let drained = self.shared.drained.notified();
            {
                let mut state = self.shared.lock();
                state.check()?;
                if state.outbox.len() < OUTBOX_BYTES_MAX {
                    message.encode(self.number, &mut state.outbox).map_err(AgentError::TooLong)?;
                    self.shared.filled.notify_one();
                    return Ok(());
                }
            }
            drained.await;
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        let State { outbox, streams, ended, .. } = &mut *state;
        if streams.remove(&self.number).is_some() && ended.is_none() {
            // It always fits a frame.
            let _ = ToAgent::Cancel.encode(self.number, outbox);
            self.shared.filled.notify_one();
        }
    }
}

/// Whether nothing can follow on its stream.
fn is_last(message: &ToServer) -> bool {
    matches!(
        message,
        ToServer::Error { .. }
            | ToServer::PathInfo(_)
            | ToServer::End
            | ToServer::Stored { .. }
            | ToServer::Ended { .. }
    )
}

#[cfg(test)]
mod tests;
