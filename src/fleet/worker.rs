//! The server's end of one worker: events come out, orders go in, death is seen at once.
//!
//! Events arrive over the control connection, numbered. Whatever a connection misses (the server
//! was away, the worker dropped it for being slow, it died with words in the pipe) is read from
//! the events file, so that each event comes out exactly once and in order.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time;

use crate::control::{Event, Order, Reply};
use crate::fleet::{connect, journal};
use crate::os::cgroup::Cgroup;
use crate::os::packets::PacketSocket;
use crate::os::process::Process;
use crate::os::readable::readable;
use crate::os::spawn::Identity;

/// How often a lost connection is made anew. A worker drops one only when it is eight events
/// behind, which takes a stopped server; a connection that keeps breaking is a broken worker.
const RECONNECTS_MAX: u32 = 16;

/// How long an order may take.
const ORDER_TIMEOUT: Duration = Duration::from_secs(5);

/// Most events kept that nobody asked for yet: more than a worker ever sends.
const QUEUE_MAX: usize = 256;

/// A running worker process.
#[derive(Debug)]
pub struct Worker {
    identity: Identity,
    process: AsyncFd<Process>,
    dir: PathBuf,
    /// Its share of the host; goes with it.
    group: Option<Cgroup>,
    connection: Option<AsyncFd<PacketSocket>>,
    reconnects: u32,
    queue: VecDeque<Event>,
    next_seq: u64,
    is_gone: bool,
    ran_out_of_memory: bool,
}

/// What comes from a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// The next event.
    Event(Event),
    /// The process ended; there are no more events.
    Gone,
}

impl Worker {
    /// Around a process that an earlier server started.
    pub(super) fn found(identity: Identity, process: Process, dir: &Path) -> io::Result<Self> {
        let mut worker = Self::new(identity, process, dir)?;
        worker.catch_up();
        Ok(worker)
    }

    /// Around one that has not been told anything.
    pub(super) fn new(identity: Identity, process: Process, dir: &Path) -> io::Result<Self> {
        Ok(Self {
            identity,
            process: readable(process)?,
            dir: dir.to_owned(),
            group: None,
            connection: None,
            reconnects: 0,
            queue: VecDeque::new(),
            next_seq: 0,
            is_gone: false,
            ran_out_of_memory: false,
        })
    }

    /// This control group is its.
    pub(super) fn in_group(mut self, group: Option<Cgroup>) -> Self {
        self.group = group;
        self
    }

    /// Puts the process into its group, if it has one.
    pub(super) fn enter_group(&self) -> io::Result<()> {
        self.group.as_ref().map_or(Ok(()), |group| group.take(self.pid()))
    }

    /// Its group goes, as soon as it has.
    pub(super) fn leave_group(&mut self) {
        if let Some(group) = self.group.take() {
            group.remove();
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.identity.pid
    }

    /// Whether it has ended because it took more memory than its share.
    pub fn ran_out_of_memory(&self) -> bool {
        self.ran_out_of_memory
    }

    /// The folder of its instance.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Speaks through `socket` from now on.
    pub(super) fn connect_with(&mut self, socket: PacketSocket) -> io::Result<()> {
        self.connection = Some(readable(socket)?);
        Ok(())
    }

    /// Kills the process. Its end still comes out of [`Self::next`].
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn kill(&self) -> io::Result<()> {
        self.process.get_ref().kill()
    }

    /// The next event that is already here.
    pub fn queued(&mut self) -> Option<Event> {
        self.queue.pop_front()
    }

    /// What happens next. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Happened {
        loop {
            if let Some(event) = self.queue.pop_front() {
                return Happened::Event(event);
            }
            if self.is_gone {
                return Happened::Gone;
            }
            // What it says outside of an order is an event, or nothing we asked for.
            self.receive().await;
        }
    }

    /// Waits for the end of the process, whatever it still says.
    pub async fn gone(&mut self) {
        while self.next().await != Happened::Gone {}
    }

    /// Sends an order and waits for the answer; events meanwhile come out of [`Self::next`].
    ///
    /// # Errors
    ///
    /// [`OrderError`].
    pub async fn order(&mut self, order: &Order) -> Result<Reply, OrderError> {
        self.order_with(order, &[]).await
    }

    /// As [`Self::order`], with files beside it.
    ///
    /// # Errors
    ///
    /// [`OrderError`].
    pub async fn order_with(
        &mut self,
        order: &Order,
        files: &[BorrowedFd<'_>],
    ) -> Result<Reply, OrderError> {
        let answer = time::timeout(ORDER_TIMEOUT, self.exchange(order, files)).await;
        answer.unwrap_or_else(|_elapsed| {
            // What it still answers is not the answer to the next order.
            self.connection = None;
            Err(OrderError::Silent)
        })
    }

    async fn exchange(
        &mut self,
        order: &Order,
        files: &[BorrowedFd<'_>],
    ) -> Result<Reply, OrderError> {
        let message = serde_json::to_vec(order).map_err(|e| OrderError::Send(e.into()))?;
        self.ensure_connected();
        let Some(connection) = &self.connection else { return Err(OrderError::Gone) };
        connection.get_ref().send(&message, files).map_err(OrderError::Send)?;
        match self.reply().await? {
            Reply::Failed { message } => Err(OrderError::Refused { message }),
            reply => Ok(reply),
        }
    }

    /// Its process id, as the worker itself says.
    pub(super) async fn status(&mut self) -> Result<u32, OrderError> {
        match self.exchange(&Order::Status, &[]).await? {
            Reply::Done(status) => Ok(status.pid),
            Reply::Failed { .. } | Reply::Event(_) => Err(OrderError::Gone),
        }
    }

    /// The next reply that is not an event.
    pub(super) async fn reply(&mut self) -> Result<Reply, OrderError> {
        loop {
            let had_connection = self.connection.is_some();
            if let Some(reply) = self.receive().await {
                return Ok(reply);
            }
            if self.is_gone || (had_connection && self.connection.is_none()) {
                return Err(OrderError::Gone);
            }
        }
    }

    /// Waits until something came: a reply is returned, events are queued, and so is the end.
    async fn receive(&mut self) -> Option<Reply> {
        let Some(connection) = &self.connection else {
            if self.reconnects < RECONNECTS_MAX && self.ensure_connected() {
                return None;
            }
            self.wait_for_end().await;
            return None;
        };
        let packet = tokio::select! {
            biased;
            packet = connection.async_io(Interest::READABLE, PacketSocket::try_recv) => packet,
            _ = self.process.readable() => {
                self.end();
                return None;
            }
        };
        match packet {
            Ok(packet) if !packet.bytes.is_empty() => self.take(&packet.bytes),
            Ok(_closed) => {
                self.connection = None;
                None
            }
            Err(error) => {
                tracing::warn!(pid = self.pid(), %error, "Control connection broke");
                self.connection = None;
                None
            }
        }
    }

    /// Makes a connection if there is none, and reads what was missed.
    fn ensure_connected(&mut self) -> bool {
        if self.connection.is_none() && !self.is_gone {
            self.reconnects += 1;
            match connect(&self.dir).and_then(|socket| self.connect_with(socket)) {
                Ok(()) => self.catch_up(),
                Err(error) => {
                    tracing::debug!(pid = self.pid(), %error, "Worker takes no connection");
                    self.reconnects = RECONNECTS_MAX;
                }
            }
        }
        self.connection.is_some()
    }

    async fn wait_for_end(&mut self) {
        if let Err(error) = self.process.readable().await.map(drop) {
            tracing::error!(pid = self.pid(), %error, "Failed to watch a worker process");
        }
        self.end();
    }

    /// The process has ended: the events file has its last words.
    fn end(&mut self) {
        self.is_gone = true;
        self.connection = None;
        self.catch_up();
        self.ran_out_of_memory = self.group.as_ref().is_some_and(Cgroup::ran_out_of_memory);
        self.leave_group();
    }

    fn take(&mut self, message: &[u8]) -> Option<Reply> {
        match serde_json::from_slice(message) {
            Ok(Reply::Event(event)) => {
                if event.seq > self.next_seq {
                    self.catch_up();
                }
                self.push(event);
                None
            }
            Ok(reply) => Some(reply),
            Err(error) => {
                tracing::warn!(pid = self.pid(), %error, "Malformed message from a worker");
                None
            }
        }
    }

    fn push(&mut self, event: Event) {
        if event.seq >= self.next_seq && self.queue.len() < QUEUE_MAX {
            self.next_seq = event.seq + 1;
            self.queue.push_back(event);
        }
    }

    fn catch_up(&mut self) {
        match journal::read(&self.dir) {
            Ok(events) => events.into_iter().for_each(|event| self.push(event)),
            Err(error) => {
                tracing::error!(dir = %self.dir.display(), %error, "Failed to read an events file");
            }
        }
    }
}

/// Why an order was not followed.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// It could not be sent.
    #[error("Failed to send an order to the worker")]
    Send(#[source] io::Error),
    /// The worker is gone, or takes no connections.
    #[error("The worker takes no orders")]
    Gone,
    /// The worker did not answer.
    #[error("The worker did not answer an order")]
    Silent,
    /// The worker said no.
    #[error("The worker refused an order: {message}")]
    Refused {
        /// The chain of causes, as the worker tells it.
        message: String,
    },
}
