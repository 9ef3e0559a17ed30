//! What stands before each frame, and what of the frame itself this device looks at.

use zerocopy::byteorder::little_endian::U16;

/// Bytes of `struct virtio_net_hdr_v1` (virtio 1.3, 5.1.6 "Device Operation").
pub(super) const HEADER_BYTES: usize = 12;

/// Where in it the number of buffers is that a packet takes; the only field that is ours to write.
pub(super) const BUFFERS_AT: usize = 10;

/// Bytes of an Ethernet header: destination, source, type.
pub(super) const ETHERNET_BYTES: usize = 14;

/// Where the sender's address is in it.
const SOURCE_AT: usize = 6;

/// Largest packet that a buffer for anything at all takes (5.1.6.3.1 "Driver Requirements: Setting
/// Up Receive Buffers"), header included.
pub(super) const PACKET_BYTES_MAX: usize = 65_562;

/// The same as long as nothing is larger than the link takes.
pub(super) const PACKET_BYTES_USUAL: usize = 1_526;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// The first bytes of a packet: both headers.
pub(super) type Front = [u8; HEADER_BYTES + ETHERNET_BYTES];

/// Who sends the packet that begins with `front`.
pub(super) fn source(front: &Front) -> Option<Mac> {
    let at = HEADER_BYTES + SOURCE_AT;
    front.get(at..at + size_of::<Mac>())?.try_into().ok()
}

/// The number of buffers as it stands in a header; more than the field can say there never are.
pub(super) fn buffers(count: usize) -> U16 {
    U16::new(u16::try_from(count).unwrap_or(u16::MAX))
}
