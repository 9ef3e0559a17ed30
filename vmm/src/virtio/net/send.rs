//! From the guest to the TAP: each packet one write, straight out of the guest's memory.
//!
//! The kernel checks the virtio header as it would any user's, and drops a packet that makes no
//! sense. What is checked here is what the kernel cannot know: that the guest sends as nobody else.

use std::io;
use std::os::fd::BorrowedFd;

use super::header::{ETHERNET_BYTES, Front, HEADER_BYTES, Mac, PACKET_BYTES_MAX, source};
use crate::virtio::buffers::{IOVECS_PER_CALL, Span};

/// What became of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is the host's now, or nobody's.
    Done,
    /// The TAP takes no more for the moment.
    Full,
}

/// Sends `packet` as `mac`, or drops it: one that is from another address, too short or too long,
/// or that the kernel refuses.
pub(super) fn send(tap: BorrowedFd<'_>, mac: &Mac, mut packet: Span<'_>) -> Sent {
    let mut front: Front = [0; HEADER_BYTES + ETHERNET_BYTES];
    let fits = packet.len() <= PACKET_BYTES_MAX && packet.pieces() <= IOVECS_PER_CALL;
    if !fits || !packet.peek(&mut front) || source(&front) != Some(*mac) {
        return Sent::Done;
    }
    loop {
        match packet.write_to(tap) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Sent::Full,
            Ok(_) | Err(_) => return Sent::Done,
        }
    }
}
