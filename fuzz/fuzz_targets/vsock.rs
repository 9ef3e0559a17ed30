//! A vsock device between a guest and clients of the host, enemies all of them.

#![no_main]

use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_fuzz::guest::{HostileGuest, Move};
use ovum_vmm::virtio::vsock::Vsock;

const CID: u64 = 42;
const TRANSMIT: u8 = 1;

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 64;

/// Clients at a time.
const CLIENTS_MAX: usize = 8;

/// Host ports are made as in `virtio/vsock/table.rs`: the guest learns them, so it may know them.
const HOST_PORT_FIRST: u32 = 1 << 30;

#[derive(Debug, Arbitrary)]
enum Step {
    Guest(Move),
    /// A packet that is nearly right.
    Packet {
        slot: u8,
        serial: u8,
        op: u8,
        flags: u8,
        length: Length,
        credit: (u32, u32),
        cut: u8,
    },
    /// A packet that is not.
    Header {
        words: [u32; 11],
        data: Vec<u8>,
    },
    Connect {
        port: u8,
        early: Vec<u8>,
    },
    /// A client that does not speak the protocol.
    Knock {
        line: Vec<u8>,
    },
    Say {
        client: u8,
        bytes: u16,
    },
    Listen {
        client: u8,
    },
    HangUp {
        client: u8,
    },
}

#[derive(Debug, Arbitrary)]
enum Length {
    True(u8),
    Large(u16),
    Lie(u32),
}

fuzz_target!(|steps: Vec<Step>| {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let name = format!("ovum-fuzz-{}-{}", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let mut guest = HostileGuest::new(Vsock::new(CID as u32, listener).unwrap());
    let mut clients: Vec<UnixStream> = Vec::new();
    for step in steps.into_iter().take(STEPS_MAX) {
        match step {
            Step::Guest(step) => guest.make(step),
            Step::Packet { slot, serial, op, flags, length, credit, cut } => {
                let host_port = HOST_PORT_FIRST | u32::from(serial) << 8 | u32::from(slot);
                let (length, data) = length.data();
                let packet = packet(host_port, op, flags, length, credit, &data);
                guest.offer(TRANSMIT, &packet, cut.into(), 0);
                guest.kick(TRANSMIT);
            }
            Step::Header { words, data } => {
                let mut packet: Vec<u8> =
                    words.iter().flat_map(|word| word.to_le_bytes()).collect();
                packet.extend(data);
                guest.offer(TRANSMIT, &packet, 0, 0);
                guest.kick(TRANSMIT);
            }
            Step::Connect { port, early } => {
                let line = format!("CONNECT {}\n", port % 2).into_bytes();
                clients.extend(knock(&address, &[&line[..], &early].concat(), clients.len()));
                guest.round();
            }
            Step::Knock { line } => {
                clients.extend(knock(&address, &line, clients.len()));
                guest.round();
            }
            Step::Say { client, bytes } => {
                if let Some(client) = pick(&mut clients, client) {
                    let _ = client.write(&vec![b'x'; bytes.into()]);
                }
                guest.round();
            }
            Step::Listen { client } => {
                if let Some(client) = pick(&mut clients, client) {
                    let _ = client.read(&mut [0; 1 << 16]);
                }
                guest.round();
            }
            Step::HangUp { client } => {
                if !clients.is_empty() {
                    clients.remove(usize::from(client) % clients.len());
                }
                guest.round();
            }
        }
    }
    guest.finish();
});

impl Length {
    /// What a header says, and what follows it.
    fn data(&self) -> (u32, Vec<u8>) {
        match *self {
            Self::True(length) => (length.into(), vec![7; length.into()]),
            Self::Large(length) => (length.into(), vec![7; length.into()]),
            Self::Lie(length) => (length, vec![7; 5]),
        }
    }
}

fn packet(
    host_port: u32,
    op: u8,
    flags: u8,
    length: u32,
    (buf_alloc, fwd_cnt): (u32, u32),
    data: &[u8],
) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(CID.to_le_bytes());
    packet.extend(2_u64.to_le_bytes());
    // One of the two ports of the guest that clients ask for.
    packet.extend((u32::from(flags >> 2) % 2).to_le_bytes());
    packet.extend(host_port.to_le_bytes());
    packet.extend(length.to_le_bytes());
    packet.extend(1_u16.to_le_bytes());
    packet.extend(u16::from(op % 9).to_le_bytes());
    packet.extend(u32::from(flags % 4).to_le_bytes());
    packet.extend(buf_alloc.to_le_bytes());
    packet.extend(fwd_cnt.to_le_bytes());
    packet.extend(data);
    packet
}

fn knock(address: &SocketAddr, line: &[u8], clients: usize) -> Option<UnixStream> {
    if clients >= CLIENTS_MAX {
        return None;
    }
    let mut client = UnixStream::connect_addr(address).ok()?;
    client.set_nonblocking(true).ok()?;
    client.write_all(line).ok()?;
    Some(client)
}

fn pick(clients: &mut [UnixStream], client: u8) -> Option<&mut UnixStream> {
    let count = clients.len().max(1);
    clients.get_mut(usize::from(client) % count)
}
