//! Vsock device: streams between host processes and ports of the guest (virtio 1.3, 5.10).
//!
//! On the host's side are Unix sockets and nothing else: no vhost, no address that another machine
//! could take. A client connects to the listening socket, writes `CONNECT <port>\n` and, once the
//! guest has accepted, reads `OK <host port>\n`; from there on the socket is the stream. Refused
//! and reset connections are closed sockets.
//!
//! Every event only notes what it changed; `settle` then sends the guest what is owed, as
//! far as there are buffers, and tells the watch what there is to wait for. Back-pressure follows
//! from that: without buffers or credit of the guest no client is read, and a guest without credit
//! of ours cannot send. What a guest can cost the host is in the constants; what it does wrong on
//! one connection resets that connection.

mod connection;
mod host;
mod packet;
mod table;

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixListener;

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::U64;

use super::buffers::{Buffers, Span};
use super::ring::{Answer, Ring};
use super::{Device, DeviceIo, DeviceState, Fault, Served, Watch};
use crate::memory::Mem;
use connection::{Connection, Ports};
use host::{Heard, Host, PENDING_MAX};
use packet::{HEADER_BYTES, HOST_CID, Header, OP_RST, TYPE_STREAM};
use table::{CONNECTIONS_MAX, Table};

/// The guest's lowest address: those below mean the hypervisor, loopback and the host.
pub const GUEST_CID_MIN: u32 = 3;

/// Resets of what is no connection that wait for buffers. Beyond, the guest's packets wait.
const RESETS_MAX: usize = 64;

/// Bytes of data in one packet, as in Linux.
const PACKET_BYTES_MAX: u32 = 64 << 10;

const KIND: u32 = 19;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

const F_STREAM: u64 = 1 << 0;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: the only event there is.
const EVENT_TRANSPORT_RESET: [u8; 4] = [0; 4];

const TOKEN_HOST: u32 = 0;
const TOKEN_CONNECTIONS: u32 = 1 << 10;
const _: () = assert!(TOKEN_HOST + PENDING_MAX < TOKEN_CONNECTIONS);
const _: () = assert!(TOKEN_CONNECTIONS + CONNECTIONS_MAX < super::TOKEN_MAX);

/// Why there is no vsock device.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The address means something else.
    #[error("Guest address {guest_cid} is reserved: the lowest is {GUEST_CID_MIN}")]
    Cid {
        /// The address asked for.
        guest_cid: u32,
    },
    /// The listening socket is of no use.
    #[error("Failed to prepare the listening socket of the vsock device")]
    Listener {
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// A vsock device.
#[derive(Debug)]
pub struct Vsock {
    /// All of the configuration space.
    guest_cid: U64,
    host: Host,
    table: Table,
    resets: VecDeque<Header>,
    /// The guest has no buffers left; its next kick says that it has.
    starved: bool,
    /// Packets of the guest wait until there is room for resets.
    blocked: bool,
    /// The driver must learn that the connections it knows are gone.
    owes_event: bool,
}

/// What a vsock device needs to go on elsewhere. Connections end: the driver is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's address.
    pub guest_cid: u32,
}

impl Vsock {
    /// The device of a guest with address `guest_cid`, whose clients connect to `listener`.
    ///
    /// # Errors
    ///
    /// See [`VsockError`].
    pub fn new(guest_cid: u32, listener: UnixListener) -> Result<Self, VsockError> {
        if !(GUEST_CID_MIN..u32::MAX).contains(&guest_cid) {
            return Err(VsockError::Cid { guest_cid });
        }
        let host =
            Host::new(listener, TOKEN_HOST).map_err(|source| VsockError::Listener { source })?;
        Ok(Self {
            guest_cid: U64::new(guest_cid.into()),
            host,
            table: Table::default(),
            resets: VecDeque::new(),
            starved: false,
            blocked: false,
            owes_event: false,
        })
    }

    /// The same for a guest that goes on from a saved state: its driver still knows connections,
    /// and is told that they are gone.
    ///
    /// # Errors
    ///
    /// See [`VsockError`].
    pub fn restored(state: &VsockState, listener: UnixListener) -> Result<Self, VsockError> {
        let VsockState { guest_cid } = *state;
        Ok(Self { owes_event: true, ..Self::new(guest_cid, listener)? })
    }

    /// Takes one packet of the guest.
    fn take(&mut self, mut packet: Span<'_>) {
        let Some(header) = Header::take(&mut packet) else { return };
        // Not from this guest, or for someone who is not here: nobody is owed an answer.
        if header.src_cid != self.guest_cid || header.dst_cid.get() != HOST_CID {
            return;
        }
        let ports = Ports { host: header.dst_port.get(), guest: header.src_port.get() };
        let op = header.op.get();
        match self.table.find(ports) {
            Some(connection) if header.kind.get() == TYPE_STREAM => {
                connection.take(&header, packet);
            }
            _ if op == OP_RST => {}
            // Nothing on the host listens. Whoever adds listeners looks a REQUEST's port up here.
            _ => self.resets.push_back(Header::reset_of(&header)),
        }
    }

    /// A client of the host asks for a port of the guest. Without a place it is closed.
    fn connect(&mut self, Heard { stream, port }: Heard) {
        self.table.add(|host| Connection::new(stream, Ports { host, guest: port }));
    }

    /// Sends the guest what is owed and waits for what is missing.
    fn settle(&mut self, io: &mut DeviceIo<'_>, served: Served) -> Result<Served, Fault> {
        let mut outlet = Outlet {
            mem: io.mem,
            guest_cid: self.guest_cid,
            starved: self.starved,
            packets_left: 0,
            served,
        };
        if let Some(ring) = io.rings.get_mut(usize::from(RECEIVE)) {
            outlet.packets_left = ring.size();
            while let Some(reset) = self.resets.front()
                && outlet.send(ring, reset)?
            {
                self.resets.pop_front();
            }
            self.table.each_in_turn(|connection| outlet.serve(ring, connection))?;
        }
        let Outlet { starved, packets_left, mut served, .. } = outlet;
        self.starved = starved;
        if packets_left == 0 {
            served = served.and(Served::again(RECEIVE));
        }
        if self.blocked && self.resets.len() < RESETS_MAX {
            self.blocked = false;
            served = served.and(Served::again(TRANSMIT));
        }
        self.table.tidy(io.watch, !starved);
        Ok(served)
    }

    /// Tells the driver that its connections are gone, if it does not know.
    fn send_event(&mut self, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(EVENT)).filter(|_| self.owes_event) else {
            return Ok(Served::NOTHING);
        };
        let Some((head, Buffers { mut writable, .. })) = ring.take(io.mem)? else {
            return Ok(Served::NOTHING);
        };
        if !writable.write(&EVENT_TRANSPORT_RESET) {
            let what = "an event buffer has no room for an event";
            return Err(Fault::Protocol { index: EVENT, what });
        }
        self.owes_event = false;
        ring.push(io.mem, head, 4)?;
        Ok(Served::used(EVENT))
    }
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        self.guest_cid.as_bytes()
    }

    fn activate(&mut self, _features: u64, io: &mut DeviceIo<'_>) -> Result<(), Fault> {
        self.host.listen(io.watch)
    }

    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        // The guest is alive, which may have given files back.
        self.host.listen(io.watch)?;
        let mut served = Served::NOTHING;
        match index {
            RECEIVE => {
                self.starved = false;
                if let Some(ring) = io.rings.get_mut(usize::from(RECEIVE)).filter(|r| r.ready()) {
                    ring.disarm(io.mem)?;
                }
            }
            TRANSMIT => {
                let Some(ring) = io.rings.get_mut(usize::from(TRANSMIT)) else {
                    return Ok(Served::NOTHING);
                };
                served = ring.serve(io.mem, |_, Buffers { readable, .. }| {
                    if self.resets.len() >= RESETS_MAX {
                        self.blocked = true;
                        return Ok(Answer::Blocked);
                    }
                    self.take(readable);
                    Ok(Answer::Used { written_bytes: 0 })
                })?;
            }
            _ => served = self.send_event(io)?,
        }
        self.settle(io, served)
    }

    fn wake(&mut self, token: u32, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        if let Some(slot) = token.checked_sub(TOKEN_CONNECTIONS) {
            self.table.wake(slot);
        } else if token == TOKEN_HOST {
            for heard in self.host.accept(io.watch) {
                self.connect(heard);
            }
        } else if let Some(heard) = self.host.hear(token, io.watch) {
            self.connect(heard);
        }
        let served = self.send_event(io)?;
        self.settle(io, served)
    }

    fn reset(&mut self, watch: &mut dyn Watch) {
        self.host.reset(watch);
        self.table.clear(watch);
        self.resets.clear();
        self.starved = false;
        self.blocked = false;
    }

    fn save(&self) -> DeviceState {
        let guest_cid = u32::try_from(self.guest_cid.get()).unwrap_or(0);
        DeviceState::Vsock(VsockState { guest_cid })
    }
}

/// The way to the guest, for one turn.
struct Outlet<'m> {
    mem: &'m Mem,
    guest_cid: U64,
    starved: bool,
    /// Packets until it is the other devices' turn.
    packets_left: u16,
    served: Served,
}

impl<'m> Outlet<'m> {
    /// Sends what `connection` owes, and what its client has written.
    fn serve(&mut self, ring: &mut Ring, connection: &mut Connection) -> Result<(), Fault> {
        while connection.due {
            let bytes = connection.sendable_bytes().min(PACKET_BYTES_MAX);
            if bytes == 0 || !self.send_data(ring, connection, bytes)? {
                break;
            }
        }
        while let Some(owed) = connection.owed() {
            let Some((head, writable)) = self.buffer(ring)? else { break };
            self.finish(ring, head, writable, connection.pay(owed))?;
        }
        Ok(())
    }

    /// Sends a packet without data; `false` if there is no buffer for it.
    fn send(&mut self, ring: &mut Ring, header: &Header) -> Result<bool, Fault> {
        let Some((head, writable)) = self.buffer(ring)? else { return Ok(false) };
        self.finish(ring, head, writable, header.clone())?;
        Ok(true)
    }

    /// Reads from the client straight into the guest's buffer; `false` if nothing came of it.
    fn send_data(
        &mut self,
        ring: &mut Ring,
        connection: &mut Connection,
        bytes_max: u32,
    ) -> Result<bool, Fault> {
        let Some((head, mut writable)) = self.buffer(ring)? else { return Ok(false) };
        let front = writable.take_front(HEADER_BYTES);
        writable.truncate(bytes_max as usize);
        let Some(header) = connection.read(&mut writable) else {
            ring.unpop();
            return Ok(false);
        };
        self.finish(ring, head, front, header)?;
        Ok(true)
    }

    fn open(&self) -> bool {
        !self.starved && self.packets_left > 0
    }

    /// The guest's next buffer. If it has none, its kicks are on from here.
    fn buffer(&mut self, ring: &mut Ring) -> Result<Option<(u16, Span<'m>)>, Fault> {
        while self.open() {
            if let Some((head, Buffers { writable, .. })) = ring.take(self.mem)? {
                if writable.len() <= HEADER_BYTES {
                    let what = "a receive buffer has no room for data";
                    return Err(Fault::Protocol { index: RECEIVE, what });
                }
                return Ok(Some((head, writable)));
            }
            if ring.ready() && ring.arm(self.mem)? {
                ring.disarm(self.mem)?;
            } else {
                self.starved = true;
            }
        }
        Ok(None)
    }

    /// Returns a buffer to the driver with `header` and the data that stands behind it already.
    fn finish(
        &mut self,
        ring: &mut Ring,
        head: u16,
        mut front: Span<'_>,
        mut header: Header,
    ) -> Result<(), Fault> {
        header.dst_cid = self.guest_cid;
        if !front.write(header.as_bytes()) {
            let what = "a receive buffer has no room for a header";
            return Err(Fault::Protocol { index: RECEIVE, what });
        }
        let packet_bytes = HEADER_BYTES.saturating_add(header.len.get() as usize);
        ring.push(self.mem, head, u32::try_from(packet_bytes).unwrap_or(u32::MAX))?;
        self.packets_left = self.packets_left.saturating_sub(1);
        self.served = self.served.and(Served::used(RECEIVE));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
