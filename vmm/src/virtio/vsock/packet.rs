//! The header that every vsock packet begins with (virtio 1.3, 5.10.6 "Device Operation").

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::virtio::buffers::Span;

/// Bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;

/// The host's own address.
pub(super) const HOST_CID: u64 = 2;

/// The only type of socket there is: a stream.
pub(super) const TYPE_STREAM: u16 = 1;

pub(super) const OP_REQUEST: u16 = 1;
pub(super) const OP_RESPONSE: u16 = 2;
pub(super) const OP_RST: u16 = 3;
pub(super) const OP_SHUTDOWN: u16 = 4;
pub(super) const OP_RW: u16 = 5;
pub(super) const OP_CREDIT_UPDATE: u16 = 6;
pub(super) const OP_CREDIT_REQUEST: u16 = 7;

/// The sender of this flag of a SHUTDOWN receives nothing more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender of this flag of a SHUTDOWN sends nothing more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// struct virtio_vsock_hdr.
#[derive(Debug, Clone, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    /// Bytes of data behind the header.
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    /// Bytes the sender can keep for this connection.
    pub(super) buf_alloc: U32,
    /// Bytes the sender has taken out of what it keeps, since the connection began.
    pub(super) fwd_cnt: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER_BYTES, "the layout is the specification's");

impl Header {
    /// Takes a header from the front of `packet`, if it is long enough.
    pub(super) fn take(packet: &mut Span<'_>) -> Option<Self> {
        let mut header = Self::new_zeroed();
        packet.read(header.as_mut_bytes()).then_some(header)
    }

    /// The answer to a packet that belongs to no connection (5.10.6.4.1).
    pub(super) fn reset_of(packet: &Self) -> Self {
        Self {
            src_cid: packet.dst_cid,
            dst_cid: packet.src_cid,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            kind: packet.kind,
            op: U16::new(OP_RST),
            ..Self::new_zeroed()
        }
    }
}
