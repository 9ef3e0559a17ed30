//! Packet sockets: whole messages between processes of one host, with open files beside them.
//!
//! A packet arrives as it was sent or not at all (unix(7), SOCK_SEQPACKET), so there is no framing
//! and no half message. Received files are close-on-exec and owned.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::net::{
    self, AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Most bytes of one packet.
pub const PACKET_BYTES_MAX: usize = 64 << 10;

/// Most files beside one packet; the kernel allows 253 (SCM_MAX_FD).
pub const PACKET_FILES_MAX: usize = 64;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;

/// One end of a packet connection.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

/// A socket that packet connections are accepted from.
#[derive(Debug)]
pub struct PacketListener(OwnedFd);

/// One received packet.
#[derive(Debug)]
pub struct Packet {
    /// Its bytes; empty means that the other end is gone.
    pub bytes: Vec<u8>,
    /// The files that came with it, in the order in which they were sent.
    pub files: Vec<OwnedFd>,
}

/// Makes two connected ends, both close-on-exec.
///
/// # Errors
///
/// What socketpair(2) says.
pub fn pair() -> io::Result<(PacketSocket, PacketSocket)> {
    let (one, other) =
        net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((PacketSocket(one), PacketSocket(other)))
}

impl PacketListener {
    /// Listens at `path`, which must not exist and fit a socket address (107 bytes).
    ///
    /// # Errors
    ///
    /// What socket(2), bind(2) or listen(2) says; nothing is left at `path` unless bind worked.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = unix_socket()?;
        net::bind(&socket, &SocketAddrUnix::new(path)?)?;
        net::listen(&socket, BACKLOG)?;
        Ok(Self(socket))
    }

    /// Takes the next connection.
    ///
    /// # Errors
    ///
    /// What accept4(2) says.
    pub fn accept(&self) -> io::Result<PacketSocket> {
        Ok(PacketSocket(net::accept_with(&self.0, SocketFlags::CLOEXEC)?))
    }
}

impl PacketSocket {
    /// Connects to the listener at `path`.
    ///
    /// # Errors
    ///
    /// What socket(2) or connect(2) says.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = unix_socket()?;
        net::connect(&socket, &SocketAddrUnix::new(path)?)?;
        Ok(Self(socket))
    }

    /// Sends one packet, at once or not at all: a full socket is `WouldBlock`.
    ///
    /// # Errors
    ///
    /// `InvalidInput` above [`PACKET_BYTES_MAX`] or [`PACKET_FILES_MAX`]; else what sendmsg(2)
    /// says.
    pub fn send(&self, bytes: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.is_empty() || bytes.len() > PACKET_BYTES_MAX || files.len() > PACKET_FILES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FILES_MAX))];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        net::sendmsg(&self.0, &[IoSlice::new(bytes)], &mut beside, flags)?;
        Ok(())
    }

    /// Waits for one packet. An empty one says that the other end is gone.
    ///
    /// # Errors
    ///
    /// `InvalidData` if the packet or its files were cut short; else what recvmsg(2) says.
    pub fn recv(&self) -> io::Result<Packet> {
        self.recv_with(RecvFlags::empty())
    }

    /// As [`Self::recv`], but `WouldBlock` if there is none.
    ///
    /// # Errors
    ///
    /// As [`Self::recv`].
    pub fn try_recv(&self) -> io::Result<Packet> {
        self.recv_with(RecvFlags::DONTWAIT)
    }

    fn recv_with(&self, flags: RecvFlags) -> io::Result<Packet> {
        let mut bytes = vec![0; PACKET_BYTES_MAX];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FILES_MAX))];
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let received = net::recvmsg(
            &self.0,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut beside,
            flags | RecvFlags::CMSG_CLOEXEC,
        )?;
        let files = beside
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(files) => Some(files),
                _ => None,
            })
            .flatten()
            .collect();
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        bytes.truncate(received.bytes);
        Ok(Packet { bytes, files })
    }
}

impl From<OwnedFd> for PacketSocket {
    fn from(file: OwnedFd) -> Self {
        Self(file)
    }
}

impl From<OwnedFd> for PacketListener {
    fn from(file: OwnedFd) -> Self {
        Self(file)
    }
}

impl From<PacketSocket> for OwnedFd {
    fn from(socket: PacketSocket) -> Self {
        socket.0
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// For [`tokio::io::unix::AsyncFd`], which knows files by their number.
impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for PacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn unix_socket() -> io::Result<OwnedFd> {
    Ok(net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn a_packet_arrives_whole_with_its_files_in_order() {
        let (one, other) = pair().unwrap();
        let mut first = tempfile::tempfile().unwrap();
        let second = tempfile::tempfile().unwrap();
        first.write_all(b"first").unwrap();

        one.send(b"hello", &[first.as_fd(), second.as_fd()]).unwrap();
        let packet = other.recv().unwrap();

        assert_eq!(packet.bytes, b"hello");
        assert_eq!(packet.files.len(), 2);
        let mut text = String::new();
        let mut received = File::from(packet.files.into_iter().next().unwrap());
        received.rewind().unwrap();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
    }

    #[test]
    fn an_empty_packet_says_that_the_other_end_is_gone() {
        let (one, other) = pair().unwrap();

        drop(one);

        assert!(other.recv().unwrap().bytes.is_empty());
    }

    #[test]
    fn a_packet_over_the_limit_is_refused_by_the_sender() {
        let (one, other) = pair().unwrap();

        let refused = one.send(&vec![0; PACKET_BYTES_MAX + 1], &[]).unwrap_err();

        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        assert_eq!(other.try_recv().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_listener_hands_out_connections() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = PacketListener::bind(&path).unwrap();

        let client = PacketSocket::connect(&path).unwrap();
        client.send(b"x", &[]).unwrap();

        assert_eq!(listener.accept().unwrap().recv().unwrap().bytes, b"x");
    }
}
