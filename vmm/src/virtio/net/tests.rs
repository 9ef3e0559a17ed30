//! A network interface as its driver sees it, with one end of a socket pair for a TAP: both keep
//! the bounds of packets, and neither waits.

use std::collections::HashMap;
use std::mem;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use proptest::prelude::*;
use rustix::io::{read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::rate_limiter::RateSpec;
use crate::testing::{Bench, Buffer, Guest, QueueFixture};

const MAC: Mac = [0x02, 0, 0, 0, 0, 5];
const OTHER: Mac = [0x02, 0, 0, 0, 0, 6];

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// What was said to a TAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Said {
    Takes(u32),
    Enabled(bool),
}

/// A TAP of an old kernel or of a new one.
#[derive(Debug)]
struct FakeTap {
    socket: OwnedFd,
    knows: u32,
    said: Arc<Mutex<Vec<Said>>>,
}

impl AsFd for FakeTap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Tap for FakeTap {
    fn offer(&self, takes: u32) -> io::Result<()> {
        if takes & !self.knows != 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.said.lock().unwrap().push(Said::Takes(takes));
        Ok(())
    }

    fn enable(&self, enabled: bool) -> io::Result<()> {
        self.said.lock().unwrap().push(Said::Enabled(enabled));
        Ok(())
    }
}

/// The host's end.
#[derive(Debug)]
struct Wire(OwnedFd);

impl Wire {
    fn send(&self, packet: &[u8]) -> io::Result<usize> {
        Ok(write(&self.0, packet)?)
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 128 << 10];
        let bytes = read(&self.0, &mut packet).ok()?;
        packet.truncate(bytes);
        Some(packet)
    }
}

/// A TAP, and the host behind it.
fn tap(knows: u32) -> (FakeTap, Wire, Arc<Mutex<Vec<Said>>>) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (socket, host) = socketpair(family, kind, flags, None).unwrap();
    let host = Wire(host);
    let said = Arc::default();
    (FakeTap { socket, knows, said: Arc::clone(&said) }, host, said)
}

fn spec() -> NetSpec {
    let unlimited = RateLimitSpec::default();
    NetSpec { mac: MAC, download: unlimited, upload: unlimited }
}

/// A million bytes in a second, and 50,000 at once.
fn limit() -> RateLimitSpec {
    let per_second = NonZeroU64::new(1_000_000).unwrap();
    RateLimitSpec { bytes: Some(RateSpec { per_second, burst: 50_000 }), operations: None }
}

/// A driver with one lane.
struct Rig<'g> {
    guest: &'g Guest,
    receive: QueueFixture<'g>,
    transmit: QueueFixture<'g>,
    bench: Bench<Net<FakeTap>>,
    host: Wire,
}

impl<'g> Rig<'g> {
    fn new(guest: &'g Guest) -> Self {
        Self::with_features(guest, !0)
    }

    /// Accepts what is offered of `wanted`.
    fn with_features(guest: &'g Guest, wanted: u64) -> Self {
        Self::with_spec(guest, wanted, &spec())
    }

    fn with_spec(guest: &'g Guest, wanted: u64, spec: &NetSpec) -> Self {
        let (tap, host, _) = tap(!0);
        let device = Net::new(vec![tap], spec).unwrap();
        let mut receive = QueueFixture::new(guest, RECEIVE, 256);
        let mut transmit = QueueFixture::new(guest, TRANSMIT, 256);
        let features = device.features() & wanted;
        let queues = &mut [&mut receive, &mut transmit];
        let bench = Bench::with_features(device, features, queues);
        Self { guest, receive, transmit, bench, host }
    }

    /// Makes `count` receive buffers of so many bytes available.
    fn fill(&mut self, count: usize, bytes: u32) -> Vec<(u16, Buffer)> {
        let buffers = (0..count).map(|_| {
            let buffer = self.guest.buffer(bytes);
            (self.receive.offer(&[], &[buffer]), buffer)
        });
        let buffers = buffers.collect();
        self.bench.kick(RECEIVE);
        buffers
    }

    /// Sends `packet` in one buffer.
    fn transmit(&mut self, packet: &[u8]) {
        let buffer = self.guest.buffer_of(packet);
        self.transmit.offer(&[buffer], &[]);
        self.bench.kick(TRANSMIT);
    }

    /// What arrives at the host.
    fn at_host(&self) -> Option<Vec<u8>> {
        self.host.receive()
    }

    /// Runs until something is used in the receive queue.
    fn arrivals(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        let queue = &mut self.receive;
        self.bench.until("an arrival", |_| {
            used.extend(queue.used());
            !used.is_empty()
        });
        used
    }

    /// Runs rounds until there is nothing more to do.
    fn rest(&mut self) {
        while self.bench.round(0).unwrap() != Served::NOTHING {}
    }
}

/// A packet from `source` with so many bytes of payload: virtio header, Ethernet header, payload.
fn packet(source: Mac, payload: usize) -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend([0xff; 6]);
    packet.extend(source);
    packet.extend([8, 0]);
    packet.extend((0..payload).map(|at| u8::try_from(at % 251).unwrap()));
    packet
}

/// The same as the guest has it: it took `buffers` buffers.
fn arrived(mut packet: Vec<u8>, buffers: u8) -> Vec<u8> {
    packet[10] = buffers;
    packet
}

#[test]
fn an_interface_says_its_address_and_what_its_tap_can() {
    let new = Net::new(vec![tap(!0).0], &spec()).unwrap();
    let old = Net::new(vec![tap(0x1f).0], &spec()).unwrap();
    let several = Net::new(vec![tap(!0).0, tap(!0).0], &spec()).unwrap();

    let always = 0xbba3;
    assert_eq!(old.features(), always);
    assert_eq!(new.features(), always | 0b111 << 54);
    assert_eq!(several.features(), always | 0b111 << 54 | 1 << 17 | 1 << 22);
    assert_eq!((new.kind(), new.queue_sizes()), (1, &[256, 256][..]));
    assert_eq!(several.queue_sizes(), [256; 5]);
    assert_eq!(new.config(), [2, 0, 0, 0, 0, 5, 0, 0, 1, 0]);
    assert_eq!(several.config()[8..], [2, 0]);
    let state = NetState { mac: MAC, lanes: 0 };
    assert_eq!(new.save(), DeviceState::Net(state));
}

#[test]
fn what_cannot_be_an_interface_is_refused() {
    for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        let error = Net::new(vec![tap(!0).0], &NetSpec { mac, ..spec() }).unwrap_err();
        assert!(matches!(error, NetError::Mac { mac: named } if named == mac), "{error}");
    }
    let error = Net::<FakeTap>::new(Vec::new(), &spec()).unwrap_err();
    assert_eq!(error.to_string(), "0 queues of a TAP: an interface has 1 to 8");
}

#[test]
fn the_tap_learns_what_the_driver_takes() {
    for (accepted, takes) in [(0, 0), (1 << 1, 1), (1 << 1 | 1 << 7 | 1 << 8, 7), (!(1 << 9), 0x67)]
    {
        let guest = Guest::new();
        let (tap, _host, said) = tap(!0);
        let device = Net::new(vec![tap], &spec()).unwrap();
        let features = device.features() & accepted;
        let mut queues = [0, 1].map(|index| QueueFixture::new(&guest, index, 256));
        let [receive, transmit] = &mut queues;
        let _bench = Bench::with_features(device, features, &mut [receive, transmit]);

        assert_eq!(said.lock().unwrap().last(), Some(&Said::Takes(takes)), "{accepted:#x}");
    }
}

/// A frame is sent as the guest laid it out, however that is.
#[test]
fn a_packet_leaves_as_one_whole() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let sent = packet(MAC, 3000);
    let pieces: Vec<_> = [&sent[..5], &sent[5..12], &sent[12..20], &sent[20..]]
        .map(|piece| guest.buffer_of(piece))
        .into();

    let head = rig.transmit.offer(&pieces, &[]);
    rig.bench.kick(TRANSMIT);

    assert_eq!(rig.at_host(), Some(sent));
    assert_eq!(rig.at_host(), None);
    assert_eq!(rig.transmit.used(), [(head, 0)]);
}

#[test]
fn several_packets_leave_at_one_kick_and_with_one_interrupt() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    for payload in [46, 1500, 60_000] {
        let buffer = guest.buffer_of(&packet(MAC, payload));
        rig.transmit.offer(&[buffer], &[]);
    }

    let served = rig.bench.service(TRANSMIT).unwrap();

    assert_eq!(served, Served::used(TRANSMIT));
    for payload in [46, 1500, 60_000] {
        assert_eq!(rig.at_host().map(|packet| packet.len()), Some(26 + payload));
    }
}

/// Another's address, no address at all, more than any packet has: nothing of it leaves.
#[test]
fn what_is_no_packet_of_this_guest_is_dropped() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let mut group = packet(MAC, 46);
    group[18] = 0xff;
    let bad =
        [packet(OTHER, 46), group, packet(MAC, 46)[..25].to_vec(), vec![], packet(MAC, 65_537)];

    for packet in &bad {
        rig.transmit(packet);
    }
    let crumbs: Vec<_> = packet(MAC, 100).chunks(1).map(|byte| guest.buffer_of(byte)).collect();
    rig.transmit.offer(&crumbs, &[]);
    rig.bench.kick(TRANSMIT);

    assert_eq!(rig.at_host(), None);
    assert_eq!(rig.transmit.used().len(), bad.len() + 1, "the driver has all of them back");
    rig.transmit(&packet(MAC, 46));
    assert_eq!(rig.at_host(), Some(packet(MAC, 46)));
}

#[test]
fn a_packet_that_fits_a_buffer_is_read_into_it() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let buffers = rig.fill(4, 1536);

    rig.host.send(&packet(OTHER, 800)).unwrap();
    let used = rig.arrivals();

    let (head, buffer) = buffers[0];
    assert_eq!(used, [(head, 826)]);
    assert_eq!(guest.read(buffer)[..826], arrived(packet(OTHER, 800), 1));
    assert_eq!(guest.read(buffer)[826..], [0; 710]);
    rig.host.send(&packet(OTHER, 46)).unwrap();
    assert_eq!(rig.arrivals(), [(buffers[1].0, 72)], "the next buffer was given back");
}

/// The first large packet comes unexpected and is copied in part, the second is not. Either way
/// the driver sees all of its buffers at once.
#[test]
fn a_packet_larger_than_a_buffer_takes_several() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let mut buffers: HashMap<u16, Buffer> = rig.fill(100, 1536).into_iter().collect();

    for round in 0..3 {
        let sent = packet(OTHER, 60_000);
        rig.host.send(&sent).unwrap();
        let used = rig.arrivals();

        assert_eq!(used.len(), 40, "round {round}");
        let mut read: Vec<u8> = Vec::new();
        for &(head, bytes) in &used {
            read.extend(&guest.read(buffers[&head])[..bytes as usize]);
        }
        assert_eq!(read, arrived(sent, 40), "round {round}");
        let freed: Vec<_> = used.iter().filter_map(|(head, _)| buffers.remove(head)).collect();
        for buffer in freed {
            buffers.insert(rig.receive.offer(&[], &[buffer]), buffer);
        }
        rig.bench.kick(RECEIVE);
    }
}

#[test]
fn a_packet_that_the_buffers_cannot_hold_is_dropped_and_the_next_one_is_not() {
    let guest = Guest::new();
    for (wanted, sizes) in [(!0, [1536; 3]), (!F_MRG_RXBUF, [1536; 3])] {
        let mut rig = Rig::with_features(&guest, wanted);
        let buffers = rig.fill(sizes.len(), sizes[0]);

        rig.host.send(&packet(OTHER, 9000)).unwrap();
        rig.host.send(&packet(OTHER, 46)).unwrap();
        let used = rig.arrivals();

        assert_eq!(used, [(buffers[0].0, 72)]);
        assert_eq!(guest.read(buffers[0].1)[..72], arrived(packet(OTHER, 46), 1));
    }
}

/// Until it kicks; and while it has none nobody is woken for what waits.
#[test]
fn a_guest_without_buffers_keeps_the_host_waiting() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    for _ in 0..3 {
        rig.host.send(&packet(OTHER, 46)).unwrap();
    }

    rig.rest();
    assert_eq!((rig.bench.watched(), rig.bench.pending()), (0, 0));
    let buffers = rig.fill(2, 1536);
    assert_eq!(rig.receive.used(), [(buffers[0].0, 72), (buffers[1].0, 72)]);
    rig.rest();
    assert_eq!(rig.bench.pending(), 0);
    rig.fill(2, 1536);
    assert_eq!(rig.receive.used().len(), 1);
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn a_queue_with_no_end_is_left_for_other_devices_in_between() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(256, 256);
    for _ in 0..2 {
        rig.host.send(&packet(OTHER, 46)).unwrap();
    }
    rig.rest();
    assert_eq!(rig.receive.used().len(), 2);

    let mut transmitted = 0;
    for _ in 0..2 {
        while rig.transmit.room() > 0 {
            let buffer = guest.buffer_of(&packet(OTHER, 46));
            rig.transmit.offer(&[buffer], &[]);
        }
        let served = rig.bench.service(TRANSMIT).unwrap();
        transmitted += rig.transmit.used().len();
        assert_eq!(served, Served::used(TRANSMIT).and(Served::again(TRANSMIT)));
    }
    assert_eq!(transmitted, 512);
}

#[test]
fn a_tap_that_is_deleted_is_not_looked_at_any_more() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(4, 1536);
    let (_, elsewhere, _) = tap(!0);
    drop(mem::replace(&mut rig.host, elsewhere));

    for _ in 0..4 {
        let _ = rig.bench.round(0).unwrap();
    }

    assert_eq!((rig.bench.watched(), rig.bench.pending()), (0, 0));
    rig.transmit(&packet(MAC, 46));
    assert_eq!(rig.transmit.used().len(), 1, "what is sent is dropped");
}

#[test]
fn a_reset_stops_everything_and_a_driver_can_begin_again() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(4, 1536);
    rig.bench.reset();
    assert_eq!(rig.bench.watched(), 0);
    rig.host.send(&packet(OTHER, 46)).unwrap();

    rig.rest();

    assert_eq!(rig.receive.used(), []);
}

#[test]
fn a_receive_buffer_without_room_breaks_the_device() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let buffer = guest.buffer(11);
    rig.receive.offer(&[], &[buffer]);

    let error = rig.bench.service(RECEIVE).unwrap_err();

    assert!(matches!(error, Fault::Protocol { index: RECEIVE, .. }), "{error}");
}

/// 50,000 bytes pass at once, the other 150,000 take as many microseconds; nobody is woken to wait.
#[test]
fn an_upload_has_its_limit() {
    let guest = Guest::new();
    let mut rig = Rig::with_spec(&guest, !0, &NetSpec { upload: limit(), ..spec() });
    let began = Instant::now();
    for _ in 0..20 {
        let buffer = guest.buffer_of(&packet(MAC, 9_986));
        rig.transmit.offer(&[buffer], &[]);
    }

    rig.bench.kick(TRANSMIT);
    let at_once = rig.transmit.used().len();
    let mut rounds = 0;
    let mut sent = 0;
    while sent < 20 {
        while rig.at_host().is_some() {
            sent += 1;
        }
        let _ = rig.bench.round(1000).unwrap();
        rounds += 1;
    }

    assert!((5..15).contains(&at_once), "{at_once}");
    assert!(rounds < 40, "{rounds} rounds for 15 packets that wait");
    let took = began.elapsed();
    assert!(took.as_millis() >= 150, "{took:?}");
}

/// One packet more than 50,000 bytes pass at once, for its size shows when it is here.
#[test]
fn a_download_has_its_limit() {
    let guest = Guest::new();
    let mut rig = Rig::with_spec(&guest, !0, &NetSpec { download: limit(), ..spec() });
    rig.fill(20, 10_240);
    let began = Instant::now();
    for _ in 0..10 {
        rig.host.send(&packet(OTHER, 9_986)).unwrap();
    }

    let mut arrived = rig.arrivals().len();
    assert!((5..8).contains(&arrived), "{arrived}");
    while arrived < 10 {
        let _ = rig.bench.round(1000).unwrap();
        arrived += rig.receive.used().len();
    }
    let took = began.elapsed();
    assert!(took.as_millis() >= 40, "{took:?}");
    rig.bench.reset();
    assert_eq!(rig.bench.watched(), 0);
}

/// A driver with two lanes and a control queue.
#[test]
fn lanes_are_used_as_the_driver_says() {
    let guest = Guest::new();
    let (taps, hosts): (Vec<_>, Vec<_>) =
        [tap(!0), tap(!0)].into_iter().map(|(tap, host, said)| (tap, (host, said))).unzip();
    let device = Net::new(taps, &spec()).unwrap();
    let mut queues = [0, 1, 2, 3].map(|index| QueueFixture::new(&guest, index, 256));
    let mut control = QueueFixture::new(&guest, 4, 256);
    let [a, b, c, d] = &mut queues;
    let mut bench = Bench::new(device, &mut [a, b, c, d, &mut control]);
    let said = |lane: usize| hosts[lane].1.lock().unwrap().last().copied();
    assert_eq!((said(0), said(1)), (Some(Said::Enabled(true)), Some(Said::Enabled(false))));
    let mut ask = |command: &[u8]| {
        let (command, ack) = (guest.buffer_of(command), guest.buffer_of(&[0xee]));
        control.offer(&[command], &[ack]);
        bench.kick(4);
        assert_eq!(control.used().len(), 1);
        guest.read(ack)[0]
    };

    for command in [&[4, 0, 0, 0][..], &[4, 0, 3, 0], &[4, 1, 2, 0], &[0, 0, 1], &[4, 0], &[]] {
        assert_eq!(ask(command), 1, "{command:?}");
    }
    assert_eq!(said(1), Some(Said::Enabled(false)));
    assert_eq!(ask(&[4, 0, 2, 0]), 0);
    assert_eq!(said(1), Some(Said::Enabled(true)));
    let buffer = guest.buffer(1536);
    queues[2].offer(&[], &[buffer]);
    hosts[1].0.send(&packet(OTHER, 46)).unwrap();
    let second = &mut queues[2];
    bench.until("an arrival", |_| !second.used().is_empty());
    assert_eq!(guest.read(buffer)[..72], arrived(packet(OTHER, 46), 1));
}

proptest! {
    /// Whatever a driver puts into its queues, the device comes back, and what leaves is the
    /// guest's own.
    #[test]
    fn no_chain_breaks_more_than_its_own_device(
        table in prop::collection::vec(
            (prop_oneof![0..0x20_0000_u64, any::<u64>()], 0..70_000_u32, 0..8_u16, 0..300_u16),
            1..32,
        ),
        heads in prop::collection::vec(0..300_u16, 1..40),
        index in 0..2_u16,
    ) {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest);
        let _ = rig.host.send(&packet(OTHER, 5000));
        let queue = if index == RECEIVE { &mut rig.receive } else { &mut rig.transmit };
        queue.fill_table(&table);
        for head in heads {
            queue.publish(head);
        }

        let outcome = rig.bench.service(index);

        if let Err(fault) = outcome {
            let by_the_driver = matches!(fault, Fault::Queue { .. } | Fault::Protocol { .. });
            prop_assert!(by_the_driver, "{fault}");
        }
        while let Some(sent) = rig.at_host() {
            prop_assert_eq!(&sent[18..24], &MAC);
        }
    }
}
