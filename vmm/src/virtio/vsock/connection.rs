//! One stream between a host process and a port of the guest.
//!
//! ```text
//!            CONNECT line            RESPONSE               RST, or SHUTDOWN of both
//!   client ───────────────> Requested ────────> Open ───────────────────────> Closing ──> gone
//!                                └── RST, client hung up ──────────────────────────┘
//! ```
//!
//! A connection says what it owes the guest ([`Connection::owed`]) and what it waits for
//! ([`Connection::interest`]); the device sends the one and waits for the other. A closing
//! connection stays until the guest has its RST and the client has all that the guest sent.
//!
//! Both sides count bytes (5.10.6.3 "Buffer Space Management"). What a client does not take is kept
//! here, never more than [`BUFFER_BYTES`]: the guest is given no credit for more, and one that
//! sends without credit is reset.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use zerocopy::FromZeros;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

use super::packet::{
    HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::virtio::Interest;
use crate::virtio::buffers::Span;

/// Bytes from the guest that a connection keeps for a client which is slow to read. As many as
/// Linux keeps: each time that the guest has to be told of room costs it an interrupt.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;

/// The guest is told of room for this many bytes that it does not know of.
const CREDIT_STEP_BYTES: u32 = BUFFER_BYTES / 2;

/// The two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest was or will be asked.
    Requested,
    Open,
    /// Over for the guest.
    Closing,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    ports: Ports,
    phase: Phase,
    /// What was told to the device's watch; none if it does not wait for the stream.
    pub(super) watched: Option<Interest>,
    /// The client may have something for the guest, and there was no reason yet to try.
    pub(super) due: bool,

    // Client to guest.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,
    /// The client will write nothing more.
    client_ended: bool,
    /// The client has closed its socket.
    hung_up: bool,

    // Guest to client.
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told_forwarded: u32,
    backlog: Backlog,
    /// The client will read nothing more.
    client_deaf: bool,
    /// The guest will send nothing more; the client learns of it behind the backlog.
    guest_ended: bool,
    /// The guest will receive nothing more.
    guest_deaf: bool,

    // Owed to the guest.
    owes: Owes,
    told_shutdown: u32,
    /// CREDIT_REQUEST went out and credit did not yet come in.
    credit_asked: bool,
}

/// A packet without data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owed {
    Reset,
    Request,
    Shutdown { flags: u32 },
    CreditUpdate,
    CreditRequest,
}

#[derive(Debug, Default)]
struct Owes {
    request: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
}

impl Connection {
    /// A connection that `stream`'s client asked for. Its first packet is a REQUEST.
    pub(super) fn new(stream: UnixStream, ports: Ports) -> Self {
        Self {
            stream,
            ports,
            phase: Phase::Requested,
            watched: None,
            due: false,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            client_ended: false,
            hung_up: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            backlog: Backlog::default(),
            client_deaf: false,
            guest_ended: false,
            guest_deaf: false,
            owes: Owes { request: true, ..Owes::default() },
            told_shutdown: 0,
            credit_asked: false,
        }
    }

    pub(super) fn stream(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Whether a packet with these ports is for this connection.
    pub(super) fn is(&self, ports: Ports) -> bool {
        self.ports == ports && self.phase != Phase::Closing
    }

    /// Nothing is left to do: it can be dropped.
    pub(super) fn is_over(&self) -> bool {
        self.phase == Phase::Closing && !self.owes.reset && self.backlog.is_empty()
    }

    /// Takes a packet from the guest: `header`, and the data behind it.
    pub(super) fn take(&mut self, header: &Header, data: Span<'_>) {
        self.guest_buf_alloc = header.buf_alloc.get();
        self.guest_fwd_cnt = header.fwd_cnt.get();
        self.credit_asked &= self.credit() == 0;
        self.due = true;
        match (header.op.get(), self.phase) {
            (OP_RST, _) => self.phase = Phase::Closing,
            (OP_RESPONSE, Phase::Requested) => self.open(),
            (OP_RW, Phase::Open) => self.receive(header.len.get(), data),
            (OP_SHUTDOWN, Phase::Open) => self.shutdown(header.flags.get()),
            (OP_CREDIT_UPDATE, _) => {}
            (OP_CREDIT_REQUEST, _) => self.owes.credit_update = true,
            _ => self.reset(),
        }
    }

    /// Ends the connection; the guest is told.
    pub(super) fn reset(&mut self) {
        if self.phase != Phase::Closing {
            // Who was not told of the connection need not be told of its end.
            self.owes = Owes { reset: !self.owes.request, ..Owes::default() };
            self.phase = Phase::Closing;
        }
    }

    /// The stream is ready for something. Writes what waits to be written.
    pub(super) fn wake(&mut self) {
        self.due = true;
        self.flush();
        if self.watched == Some(Interest::Nothing) {
            self.look_for_hang_up();
        }
    }

    /// What the device shall wait for: nothing at all once a hang-up is known, for that would be
    /// reported for ever. `sending` says that there is room for packets to the guest.
    pub(super) fn interest(&self, sending: bool) -> Option<Interest> {
        match (sending && self.reads() && self.credit() > 0, !self.backlog.is_empty()) {
            (true, true) => Some(Interest::ReadWrite),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => (!self.hung_up).then_some(Interest::Nothing),
        }
    }

    /// Bytes that may be read from the client for the guest now.
    pub(super) fn sendable_bytes(&mut self) -> u32 {
        if !self.reads() {
            return 0;
        }
        let credit = self.credit();
        if credit == 0 && !self.credit_asked {
            self.credit_asked = true;
            self.owes.credit_request = true;
        }
        credit
    }

    /// The client's bytes, read into `target`, as a packet; none if there are no bytes now.
    pub(super) fn read(&mut self, target: &mut Span<'_>) -> Option<Header> {
        match target.fill_from(self.stream.as_fd()) {
            Ok(count) if count > 0 => {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                self.sent = self.sent.wrapping_add(count);
                return Some(self.header(OP_RW, 0, count));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return None,
            Ok(_) => {
                self.client_ended = true;
                self.look_for_hang_up();
            }
            Err(_) => {
                self.client_ended = true;
                self.deafen();
            }
        }
        self.due = false;
        None
    }

    /// What kind of packet without data is owed to the guest next, if any.
    pub(super) fn owed(&self) -> Option<Owed> {
        if self.owes.reset {
            return Some(Owed::Reset);
        }
        if self.phase == Phase::Closing {
            return None;
        }
        if self.owes.request {
            return Some(Owed::Request);
        }
        let flags = self.shutdown_flags();
        if self.phase == Phase::Open && flags != self.told_shutdown {
            return Some(Owed::Shutdown { flags });
        }
        let untold = self.forwarded.wrapping_sub(self.told_forwarded);
        if self.owes.credit_update || untold >= CREDIT_STEP_BYTES {
            return Some(Owed::CreditUpdate);
        }
        self.owes.credit_request.then_some(Owed::CreditRequest)
    }

    /// The packet that is owed, which is not owed any more.
    pub(super) fn pay(&mut self, owed: Owed) -> Header {
        let (op, flags) = match owed {
            Owed::Reset => {
                self.owes.reset = false;
                (OP_RST, 0)
            }
            Owed::Request => {
                self.owes.request = false;
                (OP_REQUEST, 0)
            }
            Owed::Shutdown { flags } => {
                self.told_shutdown = flags;
                (OP_SHUTDOWN, flags)
            }
            Owed::CreditUpdate => {
                self.owes.credit_update = false;
                (OP_CREDIT_UPDATE, 0)
            }
            Owed::CreditRequest => {
                self.owes.credit_request = false;
                (OP_CREDIT_REQUEST, 0)
            }
        };
        self.header(op, flags, 0)
    }

    fn shutdown_flags(&self) -> u32 {
        let send = if self.client_ended { SHUTDOWN_SEND } else { 0 };
        send | if self.client_deaf { SHUTDOWN_RECEIVE } else { 0 }
    }

    /// A packet for the guest. Every packet tells how much room there is.
    fn header(&mut self, op: u16, flags: u32, len: u32) -> Header {
        self.told_forwarded = self.forwarded;
        Header {
            src_cid: U64::new(HOST_CID),
            src_port: U32::new(self.ports.host),
            dst_port: U32::new(self.ports.guest),
            len: U32::new(len),
            kind: U16::new(TYPE_STREAM),
            op: U16::new(op),
            flags: U32::new(flags),
            buf_alloc: U32::new(BUFFER_BYTES),
            fwd_cnt: U32::new(self.forwarded),
            ..Header::new_zeroed()
        }
    }

    /// Bytes the guest has room for. It may lie, and is then sent what it has no room for.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(under_way)
    }

    /// Whether the client's bytes are wanted.
    fn reads(&self) -> bool {
        self.phase == Phase::Open && !self.client_ended && !self.guest_deaf
    }

    /// The guest listens: the client's handshake is over.
    fn open(&mut self) {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.ports.host);
        // The first bytes of a fresh socket: there is room for all of them, or nobody reads.
        let written = send(&self.stream, line.as_bytes(), SEND_FLAGS);
        if written != Ok(line.len()) {
            self.deafen();
        }
    }

    /// `len` bytes from the guest: to the client directly as far as it takes them.
    fn receive(&mut self, len: u32, mut data: Span<'_>) {
        let kept = self.received.wrapping_sub(self.forwarded);
        let fits = kept.checked_add(len).is_some_and(|bytes| bytes <= BUFFER_BYTES);
        if !fits || data.len() < len as usize || self.guest_ended {
            self.reset();
            return;
        }
        data.truncate(len as usize);
        self.received = self.received.wrapping_add(len);
        while self.backlog.is_empty() && !self.client_deaf && !data.is_empty() {
            match data.send_to(self.stream.as_fd()) {
                Ok(count) => self.forward(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.deafen(),
            }
        }
        if self.client_deaf {
            self.forward(data.len());
        } else {
            self.backlog.append(&mut data);
        }
    }

    /// The guest ends one or both directions.
    fn shutdown(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            // The client's next write fails. It may have closed its end, which is as good.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.guest_ended |= flags & SHUTDOWN_SEND != 0;
        if self.guest_deaf && self.guest_ended {
            self.reset();
        } else {
            self.flush();
        }
    }

    /// Writes the backlog as far as the client takes it, and then the end, if the guest ended.
    fn flush(&mut self) {
        while !self.backlog.is_empty() {
            match send(&self.stream, self.backlog.front(), SEND_FLAGS) {
                Ok(count) => {
                    self.backlog.advance(count);
                    self.forward(count);
                }
                Err(errno) if errno == Errno::AGAIN => return,
                Err(errno) if errno == Errno::INTR => {}
                Err(_) => self.deafen(),
            }
        }
        if self.guest_ended && self.phase == Phase::Open {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Takes note if the client has closed its socket: it will neither read nor write, but what it
    /// wrote before is still there.
    fn look_for_hang_up(&mut self) {
        if has_hung_up(&self.stream) {
            self.hung_up = true;
            self.deafen();
            if self.phase == Phase::Requested {
                self.reset();
            }
        }
    }

    /// The client reads nothing more: what is kept for it is gone, and the guest is told.
    fn deafen(&mut self) {
        self.client_deaf = true;
        self.forward(self.backlog.len());
        self.backlog = Backlog::default();
    }

    fn forward(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.forwarded = self.forwarded.wrapping_add(count);
    }
}

const SEND_FLAGS: SendFlags = SendFlags::NOSIGNAL.union(SendFlags::DONTWAIT);

/// Whether the other end of a stream is closed for good, in both directions.
fn has_hung_up(stream: &UnixStream) -> bool {
    let mut files = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let found = poll(&mut files, Some(&now));
    let [file] = files;
    found.is_ok() && file.revents().intersects(PollFlags::HUP | PollFlags::ERR)
}

/// Bytes that wait for a slow client. Takes no memory while empty.
#[derive(Debug, Default)]
struct Backlog {
    bytes: Vec<u8>,
    /// Those before are written.
    first: usize,
}

impl Backlog {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn len(&self) -> usize {
        self.front().len()
    }

    fn front(&self) -> &[u8] {
        self.bytes.get(self.first..).unwrap_or_default()
    }

    fn append(&mut self, data: &mut Span<'_>) {
        self.bytes.drain(..self.first.min(self.bytes.len()));
        self.first = 0;
        let (old, added) = (self.bytes.len(), data.len());
        self.bytes.resize(old.saturating_add(added), 0);
        if let Some(target) = self.bytes.get_mut(old..)
            && !data.read(target)
        {
            self.bytes.truncate(old);
        }
    }

    fn advance(&mut self, count: usize) {
        self.first = self.first.saturating_add(count);
        if self.first >= self.bytes.len() {
            *self = Self::default();
        }
    }
}
