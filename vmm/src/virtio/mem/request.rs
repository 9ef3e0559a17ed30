//! What the driver of a memory device asks for, and how it is answered (virtio 1.3, 5.15.6).

use zerocopy::byteorder::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::blocks::Holding;
use crate::virtio::Fault;
use crate::virtio::buffers::Span;

const REQ_PLUG: u16 = 0;
const REQ_UNPLUG: u16 = 1;
const REQ_UNPLUG_ALL: u16 = 2;
const REQ_STATE: u16 = 3;

const RESP_ACK: u16 = 0;
const RESP_NACK: u16 = 1;
const RESP_BUSY: u16 = 2;
const RESP_ERROR: u16 = 3;

const STATE_PLUGGED: u16 = 0;
const STATE_UNPLUGGED: u16 = 1;
const STATE_MIXED: u16 = 2;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// Add these blocks.
    Plug(Blocks),
    /// Take these blocks away.
    Unplug(Blocks),
    /// Take all blocks away.
    UnplugAll,
    /// Say what these blocks are.
    State(Blocks),
    /// Nothing that this device knows.
    Unknown,
}

/// Blocks as the driver names them, whatever it names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocks {
    /// Guest address of the first.
    pub(super) address: u64,
    /// How many.
    pub(super) count: u16,
}

/// The answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reply {
    /// Done.
    Ack,
    /// Not wanted: it would be more than the host asked for.
    Nack,
    /// Not now.
    Busy,
    /// It makes no sense.
    Error,
    /// What the blocks are.
    State(Holding),
}

/// struct virtio_mem_req; its union holds the same fields in all cases.
#[derive(Debug, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
struct WireRequest {
    kind: U16,
    padding: [u8; 6],
    addr: U64,
    nb_blocks: U16,
    padding_of_union: [u8; 6],
}

/// struct virtio_mem_resp.
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct WireReply {
    kind: U16,
    padding: [u8; 6],
    state: U16,
}

const _: () = assert!(size_of::<WireRequest>() == 24 && size_of::<WireReply>() == 10);

impl Request {
    /// Reads a request from queue `index`.
    ///
    /// # Errors
    ///
    /// [`Fault::Protocol`] if it is cut short.
    pub(super) fn read(readable: &mut Span<'_>, index: u16) -> Result<Self, Fault> {
        let mut wire = WireRequest::new_zeroed();
        if !readable.read(wire.as_mut_bytes()) {
            return Err(Fault::Protocol { index, what: "a request is too short" });
        }
        let blocks = Blocks { address: wire.addr.get(), count: wire.nb_blocks.get() };
        Ok(match wire.kind.get() {
            REQ_PLUG => Self::Plug(blocks),
            REQ_UNPLUG => Self::Unplug(blocks),
            REQ_UNPLUG_ALL => Self::UnplugAll,
            REQ_STATE => Self::State(blocks),
            _ => Self::Unknown,
        })
    }
}

impl Reply {
    /// Writes the reply; returns its length.
    ///
    /// # Errors
    ///
    /// [`Fault::Protocol`] if there is no room for it.
    pub(super) fn write(self, writable: &mut Span<'_>, index: u16) -> Result<u32, Fault> {
        let (kind, state) = match self {
            Self::Ack => (RESP_ACK, 0),
            Self::Nack => (RESP_NACK, 0),
            Self::Busy => (RESP_BUSY, 0),
            Self::Error => (RESP_ERROR, 0),
            Self::State(Holding::Plugged) => (RESP_ACK, STATE_PLUGGED),
            Self::State(Holding::Unplugged) => (RESP_ACK, STATE_UNPLUGGED),
            Self::State(Holding::Mixed) => (RESP_ACK, STATE_MIXED),
        };
        let wire = WireReply { kind: U16::new(kind), padding: [0; 6], state: U16::new(state) };
        if !writable.write(wire.as_bytes()) {
            return Err(Fault::Protocol { index, what: "a reply has no room" });
        }
        Ok(u32::try_from(size_of::<WireReply>()).unwrap_or(0))
    }
}
