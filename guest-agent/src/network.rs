//! The guest's links: loopback, and the one to the host.
//!
//! The server has chosen the address, so nobody is asked for one; all there is to do goes to the
//! kernel in a single request (rtnetlink(7)).

use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use ovum_agent_proto::config::GuestNetwork;
use rustix::io::Errno;
use rustix::net;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::console;

/// The only network interface besides loopback.
const LINK: &str = "eth0";

/// Loopback is the first link in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;

/// NLM_F_REQUEST and NLM_F_ACK.
const REQUEST_ACK: u16 = 0x1 | 0x4;
/// NLM_F_CREATE and NLM_F_REPLACE.
const CREATE_REPLACE: u16 = 0x400 | 0x100;

const IFF_UP: u32 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const AF_INET: u8 = 2;

/// Bytes of a message's header, and where in an answer the error number is.
const HEADER_BYTES: usize = 16;

/// Messages of one request.
#[derive(Debug, Default)]
struct Request {
    bytes: Vec<u8>,
    messages: usize,
}

impl Request {
    /// Adds a message: its header, a body and attributes.
    fn add(&mut self, kind: u16, flags: u16, body: &[u8], attributes: &[(u16, [u8; 4])]) {
        // struct rtattr: length, type; then the value, here always 4 bytes.
        const ATTRIBUTE_BYTES: u16 = 8;
        let length = HEADER_BYTES + body.len() + attributes.len() * usize::from(ATTRIBUTE_BYTES);
        // struct nlmsghdr: length, type, flags, sequence, port
        self.bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST_ACK | flags).to_ne_bytes());
        self.bytes.extend([0; 8]);
        self.bytes.extend(body);
        for (kind, value) in attributes {
            self.bytes.extend(ATTRIBUTE_BYTES.to_ne_bytes());
            self.bytes.extend(kind.to_ne_bytes());
            self.bytes.extend(value);
        }
        self.messages += 1;
    }

    /// Sets the link `index` up. Loopback then has its addresses by itself.
    fn set_up(&mut self, index: u32) {
        // struct ifinfomsg: family and type unspecified, index, flags, which flags to change
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&IFF_UP.to_ne_bytes());
        body[12..].copy_from_slice(&IFF_UP.to_ne_bytes());
        self.add(RTM_NEWLINK, 0, &body, &[]);
    }

    fn add_address(&mut self, index: u32, address: Ipv4Addr, prefix: u8) {
        // struct ifaddrmsg: family, prefix, flags, scope, index
        let [a, b, c, d] = index.to_ne_bytes();
        let body = [AF_INET, prefix, 0, 0, a, b, c, d];
        let address = address.octets();
        let attributes = [(IFA_LOCAL, address), (IFA_ADDRESS, address)];
        self.add(RTM_NEWADDR, CREATE_REPLACE, &body, &attributes);
    }

    fn add_default_route(&mut self, index: u32, gateway: Ipv4Addr) {
        // struct rtmsg: family, bits of destination and source, service, table, who says so,
        // scope, type, flags
        let body = [AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
        let attributes = [(RTA_GATEWAY, gateway.octets()), (RTA_OIF, index.to_ne_bytes())];
        self.add(RTM_NEWROUTE, CREATE_REPLACE, &body, &attributes);
    }

    /// Has the kernel do all of it; says what it refused first.
    fn send(&self, socket: &OwnedFd) -> Result<(), Errno> {
        net::send(socket, &self.bytes, SendFlags::empty())?;
        // It was carried out within `send`; the answers are there, one message each.
        let mut outcome = Ok(());
        for _ in 0..self.messages {
            let mut answer = [0; 512];
            let (bytes, _) = net::recv(socket, &mut answer, RecvFlags::DONTWAIT)?;
            let error = answer[..bytes].get(HEADER_BYTES..).and_then(|rest| rest.first_chunk());
            outcome = outcome.and(match error.map(|error| i32::from_ne_bytes(*error)) {
                Some(0) => Ok(()),
                Some(error) => Err(Errno::from_raw_os_error(error.saturating_neg())),
                None => Err(Errno::PROTO),
            });
        }
        outcome
    }
}

/// Sets the links up, and the way to others if there is one.
pub(crate) fn connect(network: Option<&GuestNetwork>) -> Result<(), Errno> {
    // Without a protocol, which is number 0: NETLINK_ROUTE.
    let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
    let socket = net::socket_with(family, SocketType::RAW, flags, None)?;
    let mut request = Request::default();
    request.set_up(LOOPBACK_INDEX);
    if let Some(GuestNetwork { address, prefix, gateway, dns: _ }) = network {
        match name_to_index(&socket, LINK) {
            Ok(index) => {
                request.add_address(index, *address, *prefix);
                request.set_up(index);
                request.add_default_route(index, *gateway);
            }
            Err(errno) => console::say(format_args!("there is no {LINK}: {errno}")),
        }
    }
    request.send(&socket)
}

/// Writes whom to ask for names. What an image says of that is where it was built, and a link leads
/// to a program that does not run yet, or never will.
pub(crate) fn name_servers(network: &GuestNetwork) {
    const PATH: &str = "/etc/resolv.conf";
    let lines = network.dns.iter().map(|server| format!("nameserver {server}\n"));
    let wanted: String = lines.collect();
    let is_link = fs::symlink_metadata(PATH).is_ok_and(|file| file.is_symlink());
    if !is_link && fs::read(PATH).is_ok_and(|present| present == wanted.as_bytes()) {
        return;
    }
    if is_link && let Err(error) = fs::remove_file(PATH) {
        console::say(format_args!("{PATH} stays a link: {error}"));
    }
    // An image of one static program has no /etc, and the program may ask all the same.
    let written = match fs::write(PATH, &wanted) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            fs::create_dir("/etc").and_then(|()| fs::write(PATH, &wanted))
        }
        written => written,
    };
    if let Err(error) = written {
        console::say(format_args!("{PATH} is not written: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As strace shows it of `ip route replace default via 10.0.0.1 dev ...`.
    #[test]
    fn a_route_is_laid_out_as_the_kernel_reads_it() {
        let mut request = Request::default();

        request.add_default_route(2, Ipv4Addr::new(10, 0, 0, 1));

        let header = [44, 0, 0, 0, 24, 0, 5, 5, 0, 0, 0, 0, 0, 0, 0, 0];
        let body = [2, 0, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        let attributes = [8, 0, 5, 0, 10, 0, 0, 1, 8, 0, 4, 0, 2, 0, 0, 0];
        assert_eq!(request.bytes, [&header[..], &body, &attributes].concat());
    }

    #[test]
    fn the_kernel_answers_each_message() {
        let mut request = Request::default();
        request.set_up(u32::MAX >> 1);
        request.set_up(u32::MAX >> 1);
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        let socket = net::socket_with(family, SocketType::RAW, flags, None).unwrap();

        let refused = request.send(&socket);

        assert!(matches!(refused, Err(Errno::NODEV | Errno::PERM)), "{refused:?}");
        let mut rest = [0; 64];
        let more = net::recv(&socket, &mut rest, RecvFlags::DONTWAIT);
        assert_eq!(more.err(), Some(Errno::AGAIN), "all answers were taken");
    }
}
