//! From the TAP to the guest: packets read straight into the guest's buffers.
//!
//! How large a packet is shows only once it is read, and what a read has no room for is lost. So a
//! read gets as many buffers as the last packets needed, and behind them memory of our own: what
//! ends up there, the tail of a packet larger than those before it, is copied into further buffers.
//! In a stream of large packets that happens once.
//!
//! Buffers that were taken and not needed are given back at the end of each turn. When the guest
//! has none left the TAP's queue holds what comes, and drops what it cannot: the guest's next kick
//! says that there are buffers again.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::admits;
use super::header::{BUFFERS_AT, HEADER_BYTES, PACKET_BYTES_MAX, PACKET_BYTES_USUAL, buffers};
use crate::memory::Mem;
use crate::rate_limiter::Gate;
use crate::virtio::buffers::{Buffers, IOVECS_PER_CALL, Span, scatter};
use crate::virtio::ring::Ring;
use crate::virtio::{Fault, Served};

/// Of what the largest recent packet needed, so much is expected of the next one, in eighths.
const EXPECTED_EIGHTHS: usize = 7;

/// Packets of one queue on their way to the guest.
#[derive(Debug)]
pub(super) struct Receiver {
    /// A packet may take several buffers.
    mergeable: bool,
    /// The guest has no buffers left; its next kick says that it has.
    pub(super) starved: bool,
    /// The TAP is gone, or broken: nothing comes any more.
    dead: bool,
    /// Where packets for the guest wait, if they are limited.
    pub(super) gate: Option<Gate>,
    /// The last packet was one too many: the next waits until that is made up for.
    throttled: bool,
    expected_bytes: usize,
    /// Where a packet goes that is larger than expected.
    overflow: Box<[u8]>,
    /// What one packet takes; kept for its storage.
    used: Vec<(u16, u32)>,
}

/// A buffer of the guest that was taken.
type Taken<'m> = (u16, Span<'m>);

/// What a queue has given in one turn.
struct Turn<'r, 'm> {
    ring: &'r mut Ring,
    mem: &'m Mem,
    /// Buffers taken and not yet used, in the order of the ring.
    taken: VecDeque<Taken<'m>>,
    /// Bytes in them.
    room: usize,
    /// Pieces they lie in.
    pieces: usize,
}

impl Receiver {
    pub(super) fn new(gate: Option<Gate>) -> Self {
        Self {
            mergeable: false,
            starved: false,
            dead: false,
            gate,
            throttled: false,
            expected_bytes: PACKET_BYTES_USUAL,
            overflow: vec![0; PACKET_BYTES_MAX].into(),
            used: Vec::new(),
        }
    }

    /// The driver is ready, and takes packets of one buffer or of several.
    pub(super) fn begin(&mut self, mergeable: bool) {
        self.mergeable = mergeable;
        self.starved = false;
        self.dead = false;
        self.throttled = false;
        self.expected_bytes = PACKET_BYTES_USUAL;
    }

    /// Whether there is a point in waiting for the TAP.
    pub(super) fn is_ready(&self) -> bool {
        !self.starved && !self.dead && !self.throttled
    }

    /// Whether it would be of use if the TAP took packets.
    pub(super) fn is_alive(&self) -> bool {
        !self.dead
    }

    /// Passes on what is there, at most as many packets as the ring has entries.
    ///
    /// # Errors
    ///
    /// A [`Fault`] if the driver breaks the rules.
    pub(super) fn run(
        &mut self,
        tap: BorrowedFd<'_>,
        ring: &mut Ring,
        mem: &Mem,
    ) -> Result<Served, Fault> {
        let mut served = Served::NOTHING;
        // What was one too many has paid: it asks whether it has earned that by now.
        self.throttled = self.throttled && !admits(self.gate.as_mut(), 0)?;
        if self.dead || self.throttled || !ring.ready() {
            return Ok(served);
        }
        let index = ring.index();
        let packets_max = ring.size();
        let mut turn = Turn { ring, mem, taken: VecDeque::new(), room: 0, pieces: 0 };
        for _ in 0..packets_max {
            if !turn.prepare(self.expected_bytes, self.mergeable)? {
                self.starved = true;
                break;
            }
            match scatter(tap, turn.taken.iter().map(|(_, span)| span), &mut self.overflow) {
                Ok(0) => self.dead = true,
                Ok(bytes) => {
                    if self.deliver(&mut turn, bytes)? {
                        served = served.and(Served::used(index));
                    }
                    // How large it is shows only once it is here.
                    self.throttled = !admits(self.gate.as_mut(), bytes)?;
                    if !self.throttled {
                        continue;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_gone) => self.dead = true,
            }
            break;
        }
        turn.give_back();
        Ok(served)
    }

    /// Hands the guest the packet of `bytes` that lies in the turn's buffers, and its tail in our
    /// own memory; `false` if it was dropped, because it does not fit what the guest has.
    fn deliver(&mut self, turn: &mut Turn<'_, '_>, bytes: usize) -> Result<bool, Fault> {
        let faded = self.expected_bytes.saturating_mul(EXPECTED_EIGHTHS) / 8;
        self.expected_bytes = bytes.clamp(PACKET_BYTES_USUAL, PACKET_BYTES_MAX).max(faded);
        self.used.clear();
        let Some(mut header) = turn.taken.front().map(|(_, span)| span.front(HEADER_BYTES)) else {
            return Ok(false);
        };
        let mut left = bytes;
        while left > 0 {
            let Some((head, span)) = turn.use_next() else { break };
            let filled = left.min(span.len());
            left = left.saturating_sub(filled);
            self.used.push((head, u32::try_from(filled).unwrap_or(u32::MAX)));
        }
        let mut tail = self.overflow.get(..left).unwrap_or_default();
        while !tail.is_empty() {
            let more = if self.mergeable { turn.ring.take(turn.mem)? } else { None };
            let Some((head, Buffers { mut writable, .. })) = more else {
                turn.ring.unpop_last(u16::try_from(self.used.len()).unwrap_or(u16::MAX));
                return Ok(false);
            };
            let (now, later) = tail.split_at(tail.len().min(writable.len()));
            if !writable.write(now) || now.is_empty() {
                return Err(no_room(turn.ring.index()));
            }
            self.used.push((head, u32::try_from(now.len()).unwrap_or(u32::MAX)));
            tail = later;
        }
        header.advance(BUFFERS_AT);
        if !header.write(buffers(self.used.len()).as_bytes()) {
            return Err(no_room(turn.ring.index()));
        }
        turn.ring.push_together(turn.mem, &self.used)?;
        Ok(true)
    }
}

impl<'m> Turn<'_, 'm> {
    /// Takes buffers until there is room for `bytes`, if the guest has as many; `false` if it has
    /// none at all. Its kicks are on from there.
    fn prepare(&mut self, bytes: usize, mergeable: bool) -> Result<bool, Fault> {
        while self.taken.is_empty() || mergeable && self.room < bytes {
            let Some((head, Buffers { writable, .. })) = self.ring.take(self.mem)? else {
                if !self.taken.is_empty() {
                    return Ok(true);
                }
                if self.ring.arm(self.mem)? {
                    self.ring.disarm(self.mem)?;
                    continue;
                }
                return Ok(false);
            };
            if writable.len() < HEADER_BYTES {
                return Err(no_room(self.ring.index()));
            }
            let pieces = self.pieces.saturating_add(writable.pieces());
            if pieces > IOVECS_PER_CALL {
                if self.taken.is_empty() {
                    let what = "a receive buffer lies in too many pieces";
                    return Err(Fault::Protocol { index: self.ring.index(), what });
                }
                self.ring.unpop();
                return Ok(true);
            }
            self.pieces = pieces;
            self.room = self.room.saturating_add(writable.len());
            self.taken.push_back((head, writable));
        }
        Ok(true)
    }

    fn use_next(&mut self) -> Option<Taken<'m>> {
        let (head, span) = self.taken.pop_front()?;
        self.room = self.room.saturating_sub(span.len());
        self.pieces = self.pieces.saturating_sub(span.pieces());
        Some((head, span))
    }

    fn give_back(self) {
        // There are no more of them than the ring has entries.
        self.ring.unpop_last(u16::try_from(self.taken.len()).unwrap_or(u16::MAX));
    }
}

fn no_room(index: u16) -> Fault {
    Fault::Protocol { index, what: "a receive buffer has no room for a header" }
}
