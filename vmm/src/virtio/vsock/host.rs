//! Where host processes come in: the listening socket, and clients that did not yet say which port
//! they want.
//!
//! A client writes `CONNECT <port>\n` and nothing is sent to it before the guest has answered. At
//! most [`PENDING_MAX`] clients are waited for: one more takes the place of the one that has been
//! silent for the longest, so silent clients cannot keep others out.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::virtio::{Fault, Interest, Watch};

/// Clients that have connected and not yet said what they want.
pub(super) const PENDING_MAX: u32 = 32;

/// `CONNECT 4294967295\n` is the longest line there is.
const LINE_BYTES_MAX: usize = 19;

/// Clients accepted in one turn.
const ACCEPTS_PER_TURN: u32 = 16;

/// A client that wants a port of the guest. It is in no watch.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) stream: UnixStream,
    /// The guest's port.
    pub(super) port: u32,
}

/// The listening socket and the clients that are waited for.
#[derive(Debug)]
pub(super) struct Host {
    listener: UnixListener,
    /// The token of the listener; the clients' follow.
    token: u32,
    listening: bool,
    pending: Vec<Option<Pending>>,
    /// Counts clients, to know the oldest.
    clock: u64,
}

#[derive(Debug)]
struct Pending {
    stream: UnixStream,
    line: [u8; LINE_BYTES_MAX],
    length: usize,
    since: u64,
}

impl Host {
    /// Clients of `listener`, which is made non-blocking. Tokens are `token` and the
    /// [`PENDING_MAX`] behind it.
    ///
    /// # Errors
    ///
    /// What fcntl says.
    pub(super) fn new(listener: UnixListener, token: u32) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let pending = (0..PENDING_MAX).map(|_| None).collect();
        Ok(Self { listener, token, listening: false, pending, clock: 0 })
    }

    /// Waits for clients, if it does not already.
    ///
    /// # Errors
    ///
    /// [`Fault::Host`] if it cannot.
    pub(super) fn listen(&mut self, watch: &mut dyn Watch) -> Result<(), Fault> {
        if !self.listening {
            watch
                .add(self.listener.as_fd(), self.token, Interest::Read)
                .map_err(|source| Fault::Host { what: "wait for vsock clients", source })?;
            self.listening = true;
        }
        Ok(())
    }

    /// Takes the clients that wait to be accepted; returns those that have said what they want.
    pub(super) fn accept(&mut self, watch: &mut dyn Watch) -> Vec<Heard> {
        let mut heard = Vec::new();
        for _ in 0..ACCEPTS_PER_TURN {
            match self.listener.accept() {
                Ok((stream, _)) => heard.extend(self.admit(stream, watch)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    // No more files, most likely. It would be reported for ever, so the clients
                    // wait in the backlog until the guest does something.
                    self.stop_listening(watch);
                    break;
                }
            }
        }
        heard
    }

    /// The client with `token` has something to say.
    pub(super) fn hear(&mut self, token: u32, watch: &mut dyn Watch) -> Option<Heard> {
        let slot = token.checked_sub(self.token.saturating_add(1))?;
        let place = self.pending.get_mut(slot as usize)?;
        let line = place.as_mut()?.read();
        if line == Line::Unfinished {
            return None;
        }
        let Pending { stream, .. } = place.take()?;
        // Closed by another's hand or not: it is waited for under this token no longer.
        let _ = watch.remove(stream.as_fd());
        line.heard(stream)
    }

    /// Forgets all clients and waits for none.
    pub(super) fn reset(&mut self, watch: &mut dyn Watch) {
        self.stop_listening(watch);
        for Pending { stream, .. } in self.pending.iter_mut().filter_map(Option::take) {
            let _ = watch.remove(stream.as_fd());
        }
    }

    fn stop_listening(&mut self, watch: &mut dyn Watch) {
        if self.listening {
            let _ = watch.remove(self.listener.as_fd());
            self.listening = false;
        }
    }

    /// Listens to a new client at once, for most have written already, or finds it a place.
    fn admit(&mut self, stream: UnixStream, watch: &mut dyn Watch) -> Option<Heard> {
        self.clock = self.clock.saturating_add(1);
        stream.set_nonblocking(true).ok()?;
        let mut client =
            Pending { stream, line: [0; LINE_BYTES_MAX], length: 0, since: self.clock };
        let line = client.read();
        if line != Line::Unfinished {
            return line.heard(client.stream);
        }
        let age = |place: &Option<Pending>| place.as_ref().map_or(0, |client| client.since);
        let (slot, place) = (0..).zip(&mut self.pending).min_by_key(|(_, place)| age(place))?;
        if let Some(Pending { stream, .. }) = place.take() {
            let _ = watch.remove(stream.as_fd());
        }
        let token = self.token.saturating_add(1).saturating_add(slot);
        watch.add(client.stream.as_fd(), token, Interest::Read).ok()?;
        *place = Some(client);
        None
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Line {
    Unfinished,
    Connect {
        port: u32,
    },
    /// The client is gone, or does not speak the protocol.
    Wrong,
}

impl Line {
    fn heard(self, stream: UnixStream) -> Option<Heard> {
        match self {
            Self::Connect { port } => Some(Heard { stream, port }),
            Self::Unfinished | Self::Wrong => None,
        }
    }
}

impl Pending {
    /// Reads up to the end of the line and not further: what follows is the guest's.
    fn read(&mut self) -> Line {
        let Some(room) = self.line.get_mut(self.length..).filter(|room| !room.is_empty()) else {
            return Line::Wrong;
        };
        let seen = match recv(&self.stream, &mut *room, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Line::Wrong,
            Ok((_, seen)) => seen.min(room.len()),
            Err(Errno::AGAIN | Errno::INTR) => return Line::Unfinished,
            Err(_) => return Line::Wrong,
        };
        let end = room.iter().take(seen).position(|byte| *byte == b'\n');
        let wanted = end.map_or(seen, |end| end.saturating_add(1));
        let Some(target) = room.get_mut(..wanted) else { return Line::Wrong };
        if recv(&self.stream, target, RecvFlags::DONTWAIT).map(|(_, count)| count) != Ok(wanted) {
            return Line::Wrong;
        }
        self.length = self.length.saturating_add(wanted);
        match (end, self.length < LINE_BYTES_MAX) {
            (Some(_), _) => self.parse(),
            (None, true) => Line::Unfinished,
            (None, false) => Line::Wrong,
        }
    }

    fn parse(&self) -> Line {
        let line = self.line.get(..self.length).and_then(|line| str::from_utf8(line).ok());
        let port = line
            .and_then(|line| line.strip_prefix("CONNECT ")?.strip_suffix('\n'))
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok());
        port.map_or(Line::Wrong, |port| Line::Connect { port })
    }
}
