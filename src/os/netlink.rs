//! Links, addresses and neighbours of the kernel (rtnetlink(7)), by the few messages that a server
//! of guests needs. A program per change would take longer than the rest of a creation.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// Messages in one request, at most.
const MESSAGES_MAX: usize = 16;

/// Bytes of an answer: an acknowledgement repeats what it is about, up to a page.
const ANSWER_BYTES: usize = 8 << 10;

/// Everything in a message starts at a multiple of this many bytes.
const ALIGN: usize = 4;

/// Bytes of a message's header, and where its length is.
const HEADER_BYTES: usize = 16;

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWNEIGH: u16 = 28;

const NLMSG_ERROR: u16 = 2;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;

const IFF_UP: u32 = 1;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

const AF_INET: u8 = 2;
const AF_INET6: u16 = 10;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message(Vec<u8>);

impl Message {
    /// Makes a bridge, which is down.
    pub fn add_bridge(name: &str) -> Self {
        let kind = attribute(IFLA_INFO_KIND, b"bridge");
        Self::link(NLM_F_CREATE | NLM_F_EXCL, 0, false)
            .with(IFLA_IFNAME, name.as_bytes())
            .with(IFLA_LINKINFO, &kind)
    }

    /// Writes a text beside the link `index`, for whoever wonders whose it is.
    pub fn describe(index: u32, text: &str) -> Self {
        Self::link(0, index, false).with(IFLA_IFALIAS, text.as_bytes())
    }

    /// Gives the link `index` no IPv6 address by itself.
    pub fn without_ipv6_address(index: u32) -> Self {
        let mode = attribute(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]);
        Self::link(0, index, false).with(IFLA_AF_SPEC, &attribute(AF_INET6, &mode))
    }

    /// Sets the link `index` up, with an Ethernet address and room for so many packets.
    pub fn set_up(index: u32, mac: [u8; 6], packets: u32) -> Self {
        Self::link(0, index, true)
            .with(IFLA_ADDRESS, &mac)
            .with(IFLA_TXQLEN, &packets.to_ne_bytes())
    }

    /// Removes the link `index`.
    pub fn remove(index: u32) -> Self {
        Self::of(RTM_DELLINK, 0, &link_body(index, 0))
    }

    /// Gives the link `index` an address of this host, in a network of so many bits.
    pub fn add_address(index: u32, address: Ipv4Addr, prefix: u8) -> Self {
        Self::address(index, address, (address, prefix))
    }

    /// Gives the link `index` an address of this host, and a route to the one peer at its end.
    pub fn add_peer(index: u32, address: Ipv4Addr, peer: Ipv4Addr) -> Self {
        Self::address(index, address, (peer, 32))
    }

    /// Says once and for all which Ethernet address a neighbour on the link `index` has.
    pub fn add_neighbour(index: u32, address: Ipv4Addr, mac: [u8; 6]) -> Self {
        // struct ndmsg: family, 3 of padding, link, state, flags, type
        let mut body = vec![AF_INET, 0, 0, 0];
        body.extend(index.to_ne_bytes());
        body.extend(NUD_PERMANENT.to_ne_bytes());
        body.extend([0; 2]);
        Self::of(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body)
            .with(NDA_DST, &address.octets())
            .with(NDA_LLADDR, &mac)
    }

    fn address(index: u32, local: Ipv4Addr, (peer, prefix): (Ipv4Addr, u8)) -> Self {
        // struct ifaddrmsg: family, prefix, flags, scope (all of the world), link
        let mut body = vec![AF_INET, prefix, 0, 0];
        body.extend(index.to_ne_bytes());
        Self::of(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body)
            .with(IFA_LOCAL, &local.octets())
            .with(IFA_ADDRESS, &peer.octets())
    }

    fn link(flags: u16, index: u32, up: bool) -> Self {
        Self::of(RTM_NEWLINK, flags, &link_body(index, if up { IFF_UP } else { 0 }))
    }

    fn of(kind: u16, flags: u16, body: &[u8]) -> Self {
        // struct nlmsghdr: length, type, flags, number, sender; the length is set at last.
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        Self(bytes)
    }

    fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.0.extend(attribute(kind, value));
        self
    }

    fn into_bytes(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        self.0
    }
}

/// struct ifinfomsg: family, padding, type, link, flags, which of them change.
fn link_body(index: u32, flags: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..].copy_from_slice(&flags.to_ne_bytes());
    body
}

/// struct rtattr and its value, padded. A text ends with the zero that follows.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
    bytes
}

/// A way to tell the kernel.
#[derive(Debug)]
pub struct Netlink(OwnedFd);

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    ///
    /// What socket(2) says.
    pub fn open() -> io::Result<Self> {
        // Without a protocol, which is number 0: NETLINK_ROUTE.
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        Ok(Self(socket_with(family, SocketType::RAW, flags, None)?))
    }

    /// The number of the link called `name`; `None` if there is none.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn index(&self, name: &str) -> io::Result<Option<u32>> {
        match name_to_index(&self.0, name) {
            Ok(index) => Ok(Some(index)),
            Err(Errno::NODEV) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes changes, one after the other, in one system call.
    ///
    /// # Errors
    ///
    /// What the kernel says of the first it refuses; those behind are made all the same.
    pub fn change(&self, messages: impl IntoIterator<Item = Message>) -> io::Result<()> {
        let (mut request, mut count) = (Vec::new(), 0);
        for message in messages.into_iter().take(MESSAGES_MAX) {
            request.extend(message.into_bytes());
            request.resize(request.len().next_multiple_of(ALIGN), 0);
            count += 1;
        }
        send(&self.0, &request, SendFlags::empty())?;
        let mut outcome = Ok(());
        let mut answer = [0; ANSWER_BYTES];
        // All of it was carried out within `send`; the answers are there.
        while count > 0 {
            let (bytes, _) = recv(&self.0, &mut answer[..], RecvFlags::DONTWAIT)?;
            let mut rest = &answer[..bytes];
            while let Some((kind, body)) = next(&mut rest) {
                if kind == NLMSG_ERROR {
                    count -= 1;
                    outcome = outcome.and(verdict(body));
                }
            }
        }
        outcome
    }
}

/// Takes the next message from the front of `rest`: its type and its body.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(u16, &'a [u8])> {
    let length = usize::try_from(u32::from_ne_bytes(*rest.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
    let body = rest.get(HEADER_BYTES..length)?;
    *rest = rest.get(length.next_multiple_of(ALIGN)..).unwrap_or_default();
    Some((kind, body))
}

/// struct nlmsgerr begins with an error number, negative, or zero.
fn verdict(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|error| i32::from_ne_bytes(*error)) {
        Some(0) => Ok(()),
        Some(error) => Err(io::Error::from_raw_os_error(error.saturating_neg())),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As strace shows it of `ip address add 10.0.0.1 peer 10.0.0.2 dev ...`.
    #[test]
    fn a_message_is_laid_out_as_the_kernel_reads_it() {
        let [local, peer] = [1, 2].map(|last| Ipv4Addr::new(10, 0, 0, last));

        let bytes = Message::add_peer(7, local, peer).into_bytes();

        let header = [40, 0, 0, 0, 20, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        let body = [2, 32, 0, 0, 7, 0, 0, 0];
        let attributes = [8, 0, 2, 0, 10, 0, 0, 1, 8, 0, 1, 0, 10, 0, 0, 2];
        assert_eq!(bytes, [&header[..], &body, &attributes].concat());
    }

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        assert_eq!(attribute(3, b"abcde"), *b"\x09\0\x03\0abcde\0\0\0");
        let nested = Message::without_ipv6_address(1).into_bytes();
        assert_eq!(nested[32..], *b"\x10\0\x1a\0\x0c\0\x0a\0\x05\0\x08\0\x01\0\0\0");
    }

    /// Loopback is the first link wherever there are any; nobody may be 127.0.0.1's neighbour there
    /// by the name of a link that is not.
    #[test]
    fn the_kernel_answers() {
        let netlink = Netlink::open().unwrap();

        assert_eq!(netlink.index("lo").unwrap(), Some(1));
        assert_eq!(netlink.index("no-such-link").unwrap(), None);
        let missing = u32::MAX >> 1;
        let error = netlink.change([Message::remove(missing)]).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::ENODEV | libc::EPERM)), "{error}");
    }
}
