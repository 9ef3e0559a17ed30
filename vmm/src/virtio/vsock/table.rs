//! The connections of a device, each in a slot that its host port names.
//!
//! A host port is made of the slot and a number that no connection had before, so it is free by
//! construction and finding a connection is one look.

use super::TOKEN_CONNECTIONS;
use super::connection::{Connection, Ports};
use crate::virtio::{Fault, Interest, Watch};

/// Most connections at a time, those that are closing included.
pub(super) const CONNECTIONS_MAX: u32 = 1 << SLOT_BITS;

const SLOT_BITS: u32 = 8;

/// Host ports begin here, far from any port a person would choose.
const HOST_PORT_FIRST: u32 = 1 << 30;

/// Bits of a host port that tell the connections of one slot apart.
const SERIAL_MASK: u32 = (HOST_PORT_FIRST >> SLOT_BITS) - 1;

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Option<Connection>>,
    /// Counts connections.
    serial: u32,
    /// Who is served first in the next turn.
    first: usize,
}

impl Table {
    /// Makes a connection with a fresh host port, if there is a place for it.
    pub(super) fn add(&mut self, make: impl FnOnce(u32) -> Connection) {
        let free = self.slots.iter().position(Option::is_none);
        let index = free.unwrap_or(self.slots.len());
        let Some(slot) = u32::try_from(index).ok().filter(|slot| *slot < CONNECTIONS_MAX) else {
            return;
        };
        if index == self.slots.len() {
            self.slots.push(None);
        }
        self.serial = self.serial.wrapping_add(1);
        let host = HOST_PORT_FIRST | (self.serial & SERIAL_MASK) << SLOT_BITS | slot;
        if let Some(place) = self.slots.get_mut(index) {
            *place = Some(make(host));
        }
    }

    /// The connection with these ports that is not closing.
    pub(super) fn find(&mut self, ports: Ports) -> Option<&mut Connection> {
        let slot = ports.host & (CONNECTIONS_MAX - 1);
        self.slots.get_mut(slot as usize)?.as_mut().filter(|connection| connection.is(ports))
    }

    /// The stream of slot `slot` is ready. It may be another than the one that was waited for,
    /// which then does nothing.
    pub(super) fn wake(&mut self, slot: u32) {
        if let Some(Some(connection)) = self.slots.get_mut(slot as usize) {
            connection.wake();
        }
    }

    /// Calls `serve` for each connection, beginning with another one each time.
    pub(super) fn each_in_turn(
        &mut self,
        mut serve: impl FnMut(&mut Connection) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let first = self.first.min(self.slots.len());
        let (before, from) = self.slots.split_at_mut(first);
        from.iter_mut().chain(before).flatten().try_for_each(&mut serve)?;
        let next = self.first.saturating_add(1);
        self.first = if next < self.slots.len() { next } else { 0 };
        Ok(())
    }

    /// Drops the connections that are over and tells the watch what the others wait for; `sending`
    /// says that there is room for packets to the guest.
    pub(super) fn tidy(&mut self, watch: &mut dyn Watch, sending: bool) {
        for (token, place) in (TOKEN_CONNECTIONS..).zip(&mut self.slots) {
            let Some(connection) = place else { continue };
            if connection.is_over() {
                forget(connection, watch);
                *place = None;
                continue;
            }
            let interest = connection.interest(sending);
            if interest != connection.watched && !tell(connection, watch, token, interest) {
                // Nobody would ever wake it.
                connection.reset();
            }
        }
    }

    /// Drops all connections. The guest is not told.
    pub(super) fn clear(&mut self, watch: &mut dyn Watch) {
        for connection in self.slots.iter_mut().flatten() {
            forget(connection, watch);
        }
        self.slots.clear();
        self.first = 0;
    }
}

fn forget(connection: &mut Connection, watch: &mut dyn Watch) {
    if connection.watched.take().is_some() {
        // The watch forgets a file by itself when it is closed.
        let _ = watch.remove(connection.stream());
    }
}

fn tell(
    connection: &mut Connection,
    watch: &mut dyn Watch,
    token: u32,
    interest: Option<Interest>,
) -> bool {
    let stream = connection.stream();
    let told = match (connection.watched, interest) {
        (None, Some(interest)) => watch.add(stream, token, interest),
        (Some(_), Some(interest)) => watch.change(stream, token, interest),
        (_, None) => watch.remove(stream),
    };
    connection.watched = interest.filter(|_| told.is_ok());
    told.is_ok()
}
