//! Network interface over a TAP (virtio 1.3, 5.1).
//!
//! Packets go between the guest's memory and the TAP without a copy, with their virtio headers: the
//! host's stack computes checksums that the guest left open, and takes and hands over packets far
//! larger than the link's, so that a stream costs one system call for dozens of segments. Who may
//! send what to whom is the host's to say; this device sees to it that a guest sends as nobody else
//! (`send.rs`).
//!
//! A pair of queues is a lane, on a queue of the TAP of its own. A guest with several CPUs may use
//! several; all of them are served by the one device thread.

mod header;
mod receive;
mod send;
#[expect(unsafe_code, reason = "calls of the TAP driver, which rustix does not have")]
pub mod tap;

use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use zerocopy::byteorder::little_endian::U16;
use zerocopy::{Immutable, IntoBytes};

use self::tap::{
    TAKES_CSUM, TAKES_ECN, TAKES_TSO4, TAKES_TSO6, TAKES_USO4, TAKES_USO6, Tap, TapFile,
};
use super::buffers::{Buffers, Span};
use super::ring::Answer;
use super::{Device, DeviceIo, DeviceState, Fault, Interest, Served, Watch};
use crate::rate_limiter::{Cost, Gate, RateLimitSpec, RateLimiter};
use crate::spec::{NET_LANES_MAX, NetSpec};
use header::HEADER_BYTES;
use receive::Receiver;
use send::Sent;

pub use header::Mac;

/// Descriptors of a queue.
const QUEUE_SIZE: u16 = 256;

/// Queues of as many lanes as there can be, and the control queue.
const QUEUE_SIZES: [u16; 2 * NET_LANES_MAX + 1] = [QUEUE_SIZE; 2 * NET_LANES_MAX + 1];

const KIND: u32 = 1;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;
const F_GUEST_USO4: u64 = 1 << 54;
const F_GUEST_USO6: u64 = 1 << 55;
const F_HOST_USO: u64 = 1 << 56;

/// What any TAP can do.
const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF;

/// What a TAP can do since Linux 6.2.
const FEATURES_USO: u64 = F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO;

/// What a driver accepts, and what the TAP has to know of it.
const TAKES: [(u64, u32); 6] = [
    (F_GUEST_CSUM, TAKES_CSUM),
    (F_GUEST_TSO4, TAKES_TSO4),
    (F_GUEST_TSO6, TAKES_TSO6),
    (F_GUEST_ECN, TAKES_ECN),
    (F_GUEST_USO4, TAKES_USO4),
    (F_GUEST_USO6, TAKES_USO6),
];

/// Class and command to use so many lanes (5.1.6.5.6.1 "Driver Requirements: Automatic receive
/// steering in multiqueue mode").
const MQ_PAIRS_SET: [u8; 2] = [4, 0];

/// Bytes of that command with its argument.
const COMMAND_BYTES: usize = 4;

/// The token of a lane's TAP is its number; those of its limits' timers are so much more.
const TOKEN_DOWNLOAD: u32 = 0x100;
const TOKEN_UPLOAD: u32 = 0x200;
const _: () = assert!(NET_LANES_MAX <= TOKEN_DOWNLOAD as usize);

const ACK_OK: u8 = 0;
const ACK_ERROR: u8 = 1;

/// Why there is no network interface.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The file is of no use.
    #[error("Failed to use a queue of the TAP")]
    Tap(#[source] io::Error),
    /// No timer for a limit.
    #[error("Failed to make a timer for a limit")]
    Timer(#[source] io::Error),
    /// Frames to a group are sent by nobody, and an address of zeroes is none.
    #[error("Address {mac:02x?} is not that of one interface")]
    Mac {
        /// The address asked for.
        mac: Mac,
    },
    /// No lane, or too many.
    #[error("{lanes} queues of a TAP: an interface has 1 to {NET_LANES_MAX}")]
    Lanes {
        /// How many there are.
        lanes: usize,
    },
}

/// What a driver reads (5.1.4 "Device configuration layout").
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    mac: Mac,
    status: U16,
    max_virtqueue_pairs: U16,
}

/// A network interface.
#[derive(Debug)]
pub struct Net<T> {
    config: Config,
    features: u64,
    lanes: Vec<Lane<T>>,
    /// The timers of the limits are in the watch.
    watches_limits: bool,
}

/// One receive and one transmit queue, and their way to the host.
#[derive(Debug)]
struct Lane<T> {
    tap: T,
    receiver: Receiver,
    /// Where packets of the guest wait, if they are limited.
    upload: Option<Gate>,
    /// Whether the driver uses it.
    enabled: bool,
    /// The TAP takes no more packets for the moment.
    full: bool,
    /// What is waited for.
    waits_for: Option<Interest>,
}

/// What a network interface needs to go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Its address.
    pub mac: Mac,
    /// Lanes that the driver uses.
    pub lanes: u16,
}

/// An interface over `files`, the queues of one TAP.
///
/// # Errors
///
/// See [`NetError`].
pub fn over_tap(files: Vec<OwnedFd>, spec: &NetSpec) -> Result<Net<TapFile>, NetError> {
    let taps = files.into_iter().map(TapFile::new).collect::<Result<_, _>>();
    Net::new(taps.map_err(NetError::Tap)?, spec)
}

impl<T: Tap> Net<T> {
    /// An interface over the queues of one TAP.
    ///
    /// # Errors
    ///
    /// See [`NetError`].
    pub fn new(taps: Vec<T>, spec: &NetSpec) -> Result<Self, NetError> {
        let NetSpec { mac, download, upload } = *spec;
        if mac == [0; 6] || mac.first().is_some_and(|first| first & 1 != 0) {
            return Err(NetError::Mac { mac });
        }
        let count = taps.len();
        let pairs = u16::try_from(count).ok().filter(|_| (1..=NET_LANES_MAX).contains(&count));
        let pairs = pairs.ok_or(NetError::Lanes { lanes: count })?;
        let [download, upload] = [download, upload].map(Limit::new);
        let lane = |tap| {
            Ok(Lane {
                tap,
                receiver: Receiver::new(download.gate()?),
                upload: upload.gate()?,
                enabled: false,
                full: false,
                waits_for: None,
            })
        };
        let lanes: io::Result<Vec<_>> = taps.into_iter().map(lane).collect();
        let lanes = lanes.map_err(NetError::Timer)?;
        let takes_all = TAKES.iter().fold(0, |all, (_, takes)| all | takes);
        let knows_uso = lanes.first().is_some_and(|lane| lane.tap.offer(takes_all).is_ok());
        let by_kernel = if knows_uso { FEATURES_USO } else { 0 };
        let by_lanes = if pairs > 1 { F_CTRL_VQ | F_MQ } else { 0 };
        let config = Config { mac, status: U16::ZERO, max_virtqueue_pairs: U16::new(pairs) };
        Ok(Self { config, features: FEATURES | by_kernel | by_lanes, lanes, watches_limits: false })
    }

    /// Passes on what the host has for the guest by way of lane `number`.
    fn receive(&mut self, number: usize, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let ring = io.rings.get_mut(number.saturating_mul(2));
        let (Some(lane), Some(ring)) = (self.lanes.get_mut(number), ring) else {
            return Ok(Served::NOTHING);
        };
        if !lane.enabled {
            return Ok(Served::NOTHING);
        }
        lane.receiver.run(lane.tap.as_fd(), ring, io.mem)
    }

    /// Passes on what the guest has for the host.
    fn send(&mut self, number: usize, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let ring = io.rings.get_mut(number.saturating_mul(2).saturating_add(1));
        let (Some(lane), Some(ring)) = (self.lanes.get_mut(number), ring) else {
            return Ok(Served::NOTHING);
        };
        let Lane { tap, upload, full, .. } = lane;
        *full = false;
        ring.serve(io.mem, |_, Buffers { readable, .. }| {
            if !admits(upload.as_mut(), readable.len())? {
                return Ok(Answer::Blocked);
            }
            Ok(match send::send(tap.as_fd(), &self.config.mac, readable) {
                Sent::Done => Answer::Used { written_bytes: 0 },
                Sent::Full => {
                    *full = true;
                    Answer::Blocked
                }
            })
        })
    }

    /// Follows what the driver wrote into the control queue.
    fn obey(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(index)) else { return Ok(Served::NOTHING) };
        let lanes = &mut self.lanes;
        ring.serve(io.mem, |_, Buffers { readable, mut writable, .. }| {
            let ack = match lanes_wanted(readable, lanes.len()) {
                Some(count) => enable(lanes, count).map_or(ACK_ERROR, |()| ACK_OK),
                None => ACK_ERROR,
            };
            if !writable.write(&[ack]) {
                let what = "a command leaves no room for its acknowledgement";
                return Err(Fault::Protocol { index, what });
            }
            Ok(Answer::Used { written_bytes: 1 })
        })
    }

    /// Waits for what each lane lacks.
    fn settle(&mut self, watch: &mut dyn Watch) -> Result<(), Fault> {
        let failed = |source| Fault::Host { what: "wait for a TAP", source };
        let mut lanes = self.lanes.iter_mut().zip(0..);
        lanes.try_for_each(|(lane, token)| lane.settle(token, watch)).map_err(failed)
    }
}

impl<T: Tap> Lane<T> {
    /// Its gates, with what is added to its number to tell their timers.
    fn gates(&mut self) -> impl Iterator<Item = (&mut Gate, u32)> {
        let gates = [(self.receiver.gate.as_mut(), TOKEN_DOWNLOAD)];
        let gates = gates.into_iter().chain([(self.upload.as_mut(), TOKEN_UPLOAD)]);
        gates.filter_map(|(gate, token)| Some((gate?, token)))
    }

    fn settle(&mut self, token: u32, watch: &mut dyn Watch) -> io::Result<()> {
        let reads = self.enabled && self.receiver.is_ready();
        let wanted = match (reads, self.full && self.receiver.is_alive()) {
            (true, true) => Some(Interest::ReadWrite),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => None,
        };
        let tap = self.tap.as_fd();
        match (self.waits_for, wanted) {
            (before, after) if before == after => {}
            (None, Some(interest)) => watch.add(tap, token, interest)?,
            (Some(_), Some(interest)) => watch.change(tap, token, interest)?,
            // Not `Nothing`: a TAP that was deleted would be reported for ever.
            (_, None) => watch.remove(tap)?,
        }
        self.waits_for = wanted;
        Ok(())
    }
}

impl<T: Tap> Device for Net<T> {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        let pairs = self.lanes.len().saturating_mul(2);
        let control = usize::from(self.features & F_CTRL_VQ != 0);
        QUEUE_SIZES.get(..pairs.saturating_add(control)).unwrap_or(&QUEUE_SIZES)
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn activate(&mut self, features: u64, io: &mut DeviceIo<'_>) -> Result<(), Fault> {
        let accepted = TAKES.iter().filter(|(feature, _)| features & feature != 0);
        let takes = accepted.fold(0, |all, (_, takes)| all | takes);
        for lane in &mut self.lanes {
            lane.receiver.begin(features & F_MRG_RXBUF != 0);
            lane.full = false;
        }
        // What is said by way of one queue goes for all; the first is never without its TAP.
        let offered = self.lanes.first().map_or(Ok(()), |lane| lane.tap.offer(takes));
        offered.map_err(|source| Fault::Host { what: "set up a TAP", source })?;
        for (lane, number) in self.lanes.iter_mut().zip(0_u32..) {
            for (gate, token) in lane.gates() {
                io.watch
                    .add(gate.timer(), token.saturating_add(number), Interest::Read)
                    .map_err(|source| Fault::Host { what: "wait for a limit", source })?;
            }
        }
        self.watches_limits = true;
        // The driver says when it uses more than the first lane; until then nothing may come there.
        enable(&mut self.lanes, 1)
            .map_err(|source| Fault::Host { what: "choose queues of a TAP", source })?;
        self.settle(io.watch)
    }

    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let number = usize::from(index / 2);
        let served = match self.lanes.get_mut(number) {
            None => self.obey(index, io)?,
            Some(_) if index % 2 == 1 => self.send(number, io)?,
            Some(lane) => {
                lane.receiver.starved = false;
                self.receive(number, io)?
            }
        };
        self.settle(io.watch)?;
        Ok(served)
    }

    fn wake(&mut self, token: u32, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let number = (token % TOKEN_DOWNLOAD) as usize;
        let Some(lane) = self.lanes.get_mut(number) else { return Ok(Served::NOTHING) };
        let mut is_due = lane.full;
        let kind = token.saturating_sub(token % TOKEN_DOWNLOAD);
        if let Some((gate, _)) = lane.gates().find(|(_, timer)| *timer == kind) {
            gate.acknowledge();
            is_due |= kind == TOKEN_UPLOAD;
        }
        let mut served = self.receive(number, io)?;
        if is_due {
            served = served.and(self.send(number, io)?);
        }
        self.settle(io.watch)?;
        Ok(served)
    }

    fn reset(&mut self, watch: &mut dyn Watch) {
        for lane in &mut self.lanes {
            lane.enabled = false;
            lane.full = false;
            let watched = self.watches_limits;
            for (gate, _) in lane.gates() {
                gate.forget();
                if watched {
                    let _ = watch.remove(gate.timer());
                }
            }
            if lane.waits_for.take().is_some() {
                // It fails if the file is not there, which is what is wanted.
                let _ = watch.remove(lane.tap.as_fd());
            }
        }
        self.watches_limits = false;
    }

    fn save(&self) -> DeviceState {
        let used = self.lanes.iter().filter(|lane| lane.enabled).count();
        let lanes = u16::try_from(used).unwrap_or(u16::MAX);
        DeviceState::Net(NetState { mac: self.config.mac, lanes })
    }
}

/// A limit that all lanes share, if there is one.
struct Limit(Option<RateLimiter>);

impl Limit {
    fn new(spec: RateLimitSpec) -> Self {
        let is_one = spec != RateLimitSpec::default();
        Self(is_one.then(|| RateLimiter::new(spec, Instant::now())))
    }

    fn gate(&self) -> io::Result<Option<Gate>> {
        self.0.as_ref().map(RateLimiter::gate).transpose()
    }
}

/// Whether a packet of so many bytes, header included, may pass; one that may not has its turn
/// when the gate's timer says so.
fn admits(gate: Option<&mut Gate>, packet_bytes: usize) -> Result<bool, Fault> {
    let Some(gate) = gate else { return Ok(true) };
    let bytes = packet_bytes.saturating_sub(HEADER_BYTES) as u64;
    gate.admits(Cost { bytes, operations: 1 }, Instant::now())
        .map_err(|source| Fault::Host { what: "set a timer for a limit", source })
}

/// How many lanes a command asks for, if it is that command and there are as many.
fn lanes_wanted(mut command: Span<'_>, lanes: usize) -> Option<usize> {
    let mut bytes = [0; COMMAND_BYTES];
    if !command.read(&mut bytes) {
        return None;
    }
    let [class, number, low, high] = bytes;
    let count = usize::from(u16::from_le_bytes([low, high]));
    ([class, number] == MQ_PAIRS_SET && (1..=lanes).contains(&count)).then_some(count)
}

/// Uses the first `count` lanes and no other.
fn enable<T: Tap>(lanes: &mut [Lane<T>], count: usize) -> io::Result<()> {
    // A TAP with one queue has none to choose from.
    let are_several = lanes.len() > 1;
    for (lane, number) in lanes.iter_mut().zip(0..) {
        let enabled = number < count;
        if are_several {
            lane.tap.enable(enabled)?;
        }
        lane.enabled = enabled;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
