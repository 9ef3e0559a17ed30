//! The vsock port on which the host reaches this guest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;

use ovum_agent_proto::AGENT_PORT;
use rustix::io::Errno;
use rustix::net;
use rustix::net::addr::SocketAddrLen;
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 8;

/// The listening socket.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// Listens. From here on the host can connect.
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
        net::bind(&socket, &address(libc::VMADDR_CID_ANY, AGENT_PORT))?;
        net::listen(&socket, BACKLOG)?;
        Ok(Self { socket })
    }

    /// Takes the next connection, if there is one. Programs of the guest may have reached the port
    /// as well; they are no server of ours and are turned away.
    pub(crate) fn accept(&self) -> Option<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (stream, peer) = net::acceptfrom_with(&self.socket, flags).ok()?;
        (cid(&peer?) == Some(libc::VMADDR_CID_HOST)).then_some(stream)
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Bytes of a `sockaddr_vm`.
const ADDRESS_BYTES: usize = size_of::<libc::sockaddr_vm>();

fn address(cid: u32, port: u32) -> SocketAddrAny {
    let address = libc::sockaddr_vm {
        svm_family: AddressFamily::VSOCK.as_raw(),
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    };
    let bytes = SocketAddrLen::try_from(ADDRESS_BYTES).expect("16 bytes");
    // SAFETY: `address` is a whole, initialised socket address of this many bytes.
    unsafe { SocketAddrAny::read(ptr::from_ref(&address).cast(), bytes) }
}

/// The peer's context: who it is.
fn cid(peer: &SocketAddrAny) -> Option<u32> {
    let whole = usize::try_from(peer.addr_len()).is_ok_and(|bytes| bytes >= ADDRESS_BYTES);
    if !whole || peer.address_family() != AddressFamily::VSOCK {
        return None;
    }
    // SAFETY: `addr_len` bytes are initialised, which by the check above cover a `sockaddr_vm`, a
    // structure of plain integers; the storage behind the pointer is aligned for any address.
    let address: libc::sockaddr_vm = unsafe { peer.as_ptr().cast::<libc::sockaddr_vm>().read() };
    Some(address.svm_cid)
}

#[cfg(test)]
mod tests {
    use rustix::net::SocketAddrUnix;

    use super::*;

    #[test]
    fn the_host_is_told_from_other_peers_by_its_context() {
        assert_eq!(cid(&address(2, 1024)), Some(libc::VMADDR_CID_HOST));
        assert_eq!(cid(&address(1, 2)), Some(1));
        assert_eq!(cid(&SocketAddrUnix::new("/a/path").unwrap().into()), None);
        assert_eq!(cid(&SocketAddrUnix::new_unnamed().into()), None);
    }
}
