//! A network interface between a guest and a host that sends what it likes, enemies both of them.

#![no_main]

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_fuzz::guest::{HostileGuest, Move};
use ovum_vmm::rate_limiter::{RateLimitSpec, RateSpec};
use ovum_vmm::spec::NetSpec;
use ovum_vmm::virtio::net::Net;
use ovum_vmm::virtio::net::tap::Tap;
use rustix::io::{read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 5];

/// Bytes before a frame (virtio 1.3, 5.1.6 "Device Operation").
const HEADER_BYTES: usize = 12;

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 64;

/// Largest packet of a TAP.
const PACKET_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, Arbitrary)]
struct Play {
    lanes: bool,
    /// What passes in a second, either way.
    per_second: u16,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Guest(Move),
    /// A packet of the guest that is nearly right.
    Send {
        queue: u8,
        header: [u8; HEADER_BYTES],
        payload: u16,
        forged: bool,
        cut: u8,
    },
    /// What the TAP has for the guest.
    Arrive {
        lane: bool,
        header: [u8; HEADER_BYTES],
        payload: u16,
    },
    /// The host takes what the guest sent.
    Take {
        lane: bool,
    },
    /// The interface is deleted.
    Delete {
        lane: bool,
    },
}

/// One end of a socket pair, which keeps the bounds of packets as a TAP does.
#[derive(Debug)]
struct Socket(OwnedFd);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Tap for Socket {
    fn offer(&self, _takes: u32) -> io::Result<()> {
        Ok(())
    }

    fn enable(&self, _enabled: bool) -> io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|play: Play| {
    let Play { lanes, per_second, steps } = play;
    let (taps, hosts): (Vec<_>, Vec<_>) = (0..=u8::from(lanes)).map(|_| pair()).unzip();
    let mut hosts: Vec<Option<OwnedFd>> = hosts.into_iter().map(Some).collect();
    let rate = NonZeroU64::new(per_second.into());
    let bytes = rate.map(|per_second| RateSpec { per_second, burst: per_second.get() });
    let limit = RateLimitSpec { bytes, operations: None };
    let spec = NetSpec { mac: MAC, download: limit, upload: limit };
    let mut guest = HostileGuest::new(Net::new(taps, &spec).unwrap());
    for step in steps.into_iter().take(STEPS_MAX) {
        match step {
            Step::Guest(step) => guest.make(step),
            Step::Send { queue, header, payload, forged, cut } => {
                let packet = packet(header, forged, payload);
                guest.offer(queue, &packet, cut.into(), 0);
                guest.kick(queue);
            }
            Step::Arrive { lane, header, payload } => {
                if let Some(Some(host)) = hosts.get(usize::from(lane)) {
                    let _ = write(host, &packet(header, false, payload));
                }
                guest.round();
            }
            Step::Take { lane } => {
                if let Some(Some(host)) = hosts.get(usize::from(lane)) {
                    let _ = read(host, &mut vec![0; PACKET_BYTES_MAX]);
                }
                guest.round();
            }
            Step::Delete { lane } => {
                if let Some(host) = hosts.get_mut(usize::from(lane)) {
                    *host = None;
                }
                guest.round();
            }
        }
    }
    guest.finish();
});

fn pair() -> (Socket, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (socket, host) = socketpair(family, kind, flags, None).unwrap();
    (Socket(socket), host)
}

fn packet(header: [u8; HEADER_BYTES], forged: bool, payload: u16) -> Vec<u8> {
    let mut packet = header.to_vec();
    packet.extend([0xff; 6]);
    packet.extend(if forged { [0x02; 6] } else { MAC });
    packet.extend([0x08, 0x00]);
    packet.resize(packet.len() + usize::from(payload), 0x45);
    packet
}
