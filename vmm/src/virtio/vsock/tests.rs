//! A vsock device between its driver, spoken here, and real Unix sockets.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::{U16, U32};

use super::connection::BUFFER_BYTES;
use super::packet::*;
use super::*;
use crate::testing::{Bench, Buffer, Guest, QueueFixture};

const CID: u32 = 42;
const PORT: u32 = 1024;
const RX_BUFFER_BYTES: u32 = 4096;

/// A guest's vsock driver, and the directory where clients find it.
struct Rig<'g> {
    guest: &'g Guest,
    bench: Bench<Vsock>,
    rx: QueueFixture<'g>,
    tx: QueueFixture<'g>,
    event: QueueFixture<'g>,
    rx_buffers: HashMap<u16, Buffer>,
    tx_buffers: Vec<Buffer>,
    inbox: VecDeque<Packet>,
    folder: TempDir,
}

/// What the guest received: header and data.
type Packet = (Header, Vec<u8>);

/// The guest's end of a connection.
#[derive(Debug, Clone)]
struct Socket {
    host_port: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    sent: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
}

impl Socket {
    fn header(&self, op: u16, flags: u32, len: usize) -> Header {
        Header {
            src_cid: U64::new(CID.into()),
            dst_cid: U64::new(2),
            src_port: U32::new(PORT),
            dst_port: U32::new(self.host_port),
            len: U32::new(u32::try_from(len).unwrap()),
            kind: U16::new(1),
            op: U16::new(op),
            flags: U32::new(flags),
            buf_alloc: U32::new(self.buf_alloc),
            fwd_cnt: U32::new(self.fwd_cnt),
        }
    }

    fn learn(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc.get();
        self.peer_fwd_cnt = header.fwd_cnt.get();
    }

    fn credit(&self) -> u32 {
        self.peer_buf_alloc - self.sent.wrapping_sub(self.peer_fwd_cnt)
    }
}

impl<'g> Rig<'g> {
    fn new(guest: &'g Guest) -> Self {
        Self::over(guest, |listener| Vsock::new(CID, listener).unwrap())
    }

    fn over(guest: &'g Guest, device: impl FnOnce(UnixListener) -> Vsock) -> Self {
        let folder = TempDir::new().unwrap();
        let listener = UnixListener::bind(folder.path().join("vsock")).unwrap();
        let mut rx = QueueFixture::new(guest, 0, 256);
        let mut tx = QueueFixture::new(guest, 1, 256);
        let mut event = QueueFixture::new(guest, 2, 16);
        let bench = Bench::new(device(listener), &mut [&mut rx, &mut tx, &mut event]);
        let (rx_buffers, tx_buffers, inbox) = (HashMap::new(), Vec::new(), VecDeque::new());
        Self { guest, bench, rx, tx, event, rx_buffers, tx_buffers, inbox, folder }
    }

    /// A rig whose guest has given the device plenty of buffers.
    fn with_buffers(guest: &'g Guest) -> Self {
        let mut rig = Self::new(guest);
        rig.fill(128);
        rig
    }

    fn fill(&mut self, buffers: usize) {
        for _ in 0..buffers {
            let buffer = self.guest.buffer(RX_BUFFER_BYTES);
            self.give(buffer);
        }
        self.bench.kick(RECEIVE);
    }

    fn give(&mut self, buffer: Buffer) {
        let head = self.rx.offer(&[], &[buffer]);
        self.rx_buffers.insert(head, buffer);
    }

    /// Sends a packet in one readable part that is cut into pieces of these sizes.
    fn send_cut(&mut self, header: &Header, data: &[u8], cuts: &[u32]) {
        let bytes = [header.as_bytes(), data].concat();
        for _ in self.tx.used() {}
        let whole = match self.tx_buffers.pop() {
            Some(buffer) if buffer.1 as usize >= bytes.len() => buffer,
            _ => self.guest.buffer(u32::try_from(bytes.len().max(70_000)).unwrap()),
        };
        self.guest.write(whole, &bytes);
        let mut pieces = Vec::new();
        let (mut at, mut left) = (whole.0, u32::try_from(bytes.len()).unwrap());
        for cut in cuts.iter().map(|cut| (*cut).min(left)).collect::<Vec<_>>() {
            let cut = cut.min(left);
            pieces.push((at, cut));
            at += u64::from(cut);
            left -= cut;
        }
        pieces.push((at, left));
        self.tx.offer(&pieces, &[]);
        self.bench.kick(TRANSMIT);
        // The device takes a packet in one turn or, when resets pile up, later; then it stays
        // the device's.
        if !self.tx.unanswered() {
            self.tx_buffers.push(whole);
        }
    }

    fn send(&mut self, header: &Header, data: &[u8]) {
        self.send_cut(header, data, &[]);
    }

    /// Packets received since the last call; their buffers are given back if `refill`.
    fn packets(&mut self, refill: bool) -> Vec<Packet> {
        let used = self.rx.used();
        let mut taken = Vec::new();
        for (head, written) in used {
            let buffer = self.rx_buffers.remove(&head).unwrap();
            let bytes = self.guest.read((buffer.0, written));
            let (header, data) = Header::read_from_prefix(&bytes).unwrap();
            assert_eq!(header.len.get() as usize, data.len(), "the used length is the packet's");
            assert_eq!((header.src_cid.get(), header.dst_cid.get()), (2, CID.into()));
            self.inbox.push_back((header, data.to_vec()));
            taken.push(buffer);
        }
        if refill && !taken.is_empty() {
            taken.into_iter().for_each(|buffer| self.give(buffer));
            self.bench.kick(RECEIVE);
        }
        self.inbox.drain(..).collect()
    }

    /// Runs until the guest has the next packet.
    fn packet(&mut self) -> Packet {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let mut packets = VecDeque::from(self.packets(true));
            let first = packets.pop_front();
            self.inbox.extend(packets);
            if let Some(packet) = first {
                return packet;
            }
            assert!(Instant::now() < deadline, "the guest got no packet in 20 s");
            let _ = self.bench.round(10).unwrap();
        }
    }

    /// The next packet's operation and flags.
    fn next_op(&mut self) -> (u16, u32) {
        let (header, _) = self.packet();
        (header.op.get(), header.flags.get())
    }

    /// Nothing comes, and the device waits for nothing that is there already.
    fn quiet(&mut self) {
        for _ in 0..4 {
            let _ = self.bench.round(0).unwrap();
        }
        assert_eq!(self.bench.round(0).unwrap(), Served::NOTHING);
        assert_eq!(self.packets(false), []);
        assert_eq!(self.bench.pending(), 0, "the device thread would spin");
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.folder.path().join("vsock")).unwrap();
        // A device that forgets a client fails its test instead of holding it up.
        client.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        client.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        client
    }

    /// A client that asked for [`PORT`], and the host port that the guest was asked from.
    fn request(&mut self) -> (UnixStream, Socket) {
        let mut client = self.client();
        writeln!(client, "CONNECT {PORT}").unwrap();
        let (header, _) = self.packet();
        assert_eq!((header.op.get(), header.dst_port.get()), (OP_REQUEST, PORT));
        let mut socket = Socket {
            host_port: header.src_port.get(),
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            sent: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
        };
        socket.learn(&header);
        (client, socket)
    }

    /// The same, accepted.
    fn connect(&mut self) -> (UnixStream, Socket) {
        let (mut client, socket) = self.request();
        self.send(&socket.header(OP_RESPONSE, 0, 0), &[]);
        assert_eq!(line(&mut client), format!("OK {}\n", socket.host_port));
        (client, socket)
    }

    /// All that `client` reads to its end while the device runs.
    fn read_all(&mut self, mut client: UnixStream) -> Vec<u8> {
        let reader = thread::spawn(move || everything(&mut client));
        rig_until(self, |_| reader.is_finished());
        reader.join().unwrap()
    }

    /// An answer to this packet and nothing else.
    fn answer(&mut self, header: &Header, data: &[u8]) -> Header {
        self.send(header, data);
        self.packet().0
    }

    /// This connection still works, both ways.
    fn works(&mut self, client: &mut UnixStream, socket: &Socket) {
        client.write_all(b"ping").unwrap();
        let (header, data) = self.packet();
        assert_eq!((header.op.get(), &data[..]), (OP_RW, &b"ping"[..]));
        self.send(&socket.header(OP_RW, 0, 4), b"pong");
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"pong");
    }
}

/// One line, byte by byte, so that nothing behind it is lost.
fn line(client: &mut UnixStream) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        client.read_exact(&mut byte).unwrap();
        line.push(char::from(byte[0]));
    }
    line
}

fn everything(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    bytes
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from((at ^ (at >> 8) ^ (at >> 16)) & 0xff).unwrap()).collect()
}

#[test]
fn a_device_says_its_kind_and_its_guests_address() {
    let folder = TempDir::new().unwrap();
    let listen = |name| UnixListener::bind(folder.path().join(name)).unwrap();
    let device = Vsock::new(CID, listen("a")).unwrap();

    assert_eq!((device.kind(), device.features()), (19, 1));
    assert_eq!(device.queue_sizes(), [256, 256, 16]);
    assert_eq!(device.config(), [42, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(device.save(), DeviceState::Vsock(VsockState { guest_cid: 42 }));
    let error = Vsock::new(2, listen("b")).unwrap_err();
    assert_eq!(error.to_string(), "Guest address 2 is reserved: the lowest is 3");
}

#[test]
fn a_client_is_connected_once_the_guest_has_answered() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.request();
    client.set_nonblocking(true).unwrap();
    assert!(client.read(&mut [0]).is_err(), "nothing is said before the guest has answered");
    client.set_nonblocking(false).unwrap();

    rig.send(&socket.header(OP_RESPONSE, 0, 0), &[]);

    assert_eq!(line(&mut client), format!("OK {}\n", socket.host_port));
    assert_eq!(socket.peer_buf_alloc, BUFFER_BYTES);
    rig.works(&mut client, &socket);
    rig.quiet();
}

#[test]
fn a_refused_client_is_closed() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.request();

    rig.send(&socket.header(OP_RST, 0, 0), &[]);

    assert_eq!(everything(&mut client), b"");
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1, "only the listener is left");
}

#[test]
fn what_a_client_writes_behind_its_request_is_the_guests() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut client = rig.client();
    client.write_all(b"CONNECT 1024\nhello").unwrap();
    let (request, _) = rig.packet();
    let socket = Socket {
        host_port: request.src_port.get(),
        buf_alloc: 1000,
        fwd_cnt: 0,
        sent: 0,
        peer_buf_alloc: 0,
        peer_fwd_cnt: 0,
    };
    rig.quiet();

    let header = rig.answer(&socket.header(OP_RESPONSE, 0, 0), &[]);

    assert_eq!((header.op.get(), header.len.get()), (OP_RW, 5));
}

/// Through a window of 64 KiB, in buffers of 4 KiB, with the guest's credit always behind.
#[test]
fn ten_megabytes_reach_the_guest_unchanged() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.request();
    socket.buf_alloc = 64 << 10;
    rig.send(&socket.header(OP_RESPONSE, 0, 0), &[]);
    line(&mut client);
    let expected = pattern(10 << 20);
    let to_send = expected.clone();
    let sender = thread::spawn(move || {
        client.write_all(&to_send).unwrap();
        client
    });

    let mut got = Vec::new();
    rig_until(&mut rig, |rig| {
        for (header, data) in rig.packets(true) {
            got.extend(data);
            let behind = u32::try_from(got.len()).unwrap().wrapping_sub(socket.fwd_cnt);
            assert!(behind <= socket.buf_alloc, "{behind} bytes without credit");
            if behind > 40 << 10 || header.op.get() == OP_CREDIT_REQUEST {
                socket.fwd_cnt = u32::try_from(got.len()).unwrap();
                rig.send(&socket.header(OP_CREDIT_UPDATE, 0, 0), &[]);
            }
        }
        got.len() == expected.len()
    });

    assert!(got == expected);
    drop(sender.join().unwrap());
}

/// With packets cut in any way, as Linux does since 6.17, and credit that the device gives.
#[test]
fn ten_megabytes_reach_the_client_unchanged() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.connect();
    let expected = pattern(10 << 20);
    let bytes = expected.len();
    let receiver = thread::spawn(move || {
        let mut got = vec![0; bytes];
        client.read_exact(&mut got).unwrap();
        got
    });
    let sizes = [65_536, 1, 4096, 30_000, 65_536];
    let cuts: [&[u32]; 4] = [&[], &[44], &[10, 20, 30, 4096], &[43, 1, 4096, 4096, 4096, 0, 7]];

    let mut left = &expected[..];
    let mut number = 0;
    rig_until(&mut rig, |rig| {
        for (header, _) in rig.packets(true) {
            socket.learn(&header);
        }
        let size = sizes[number % sizes.len()].min(socket.credit() as usize).min(left.len());
        if size > 0 {
            let (now, later) = left.split_at(size);
            rig.send_cut(&socket.header(OP_RW, 0, size), now, cuts[number % cuts.len()]);
            socket.sent = socket.sent.wrapping_add(u32::try_from(size).unwrap());
            left = later;
            number += 1;
        }
        left.is_empty() && receiver.is_finished()
    });

    assert!(receiver.join().unwrap() == expected);
}

fn rig_until(rig: &mut Rig<'_>, mut done: impl FnMut(&mut Rig<'_>) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done(rig) {
        assert!(Instant::now() < deadline, "it did not happen in 60 s");
        let _ = rig.bench.round(1).unwrap();
    }
}

/// A client that does not read costs [`BUFFER_BYTES`] and no more; when it does, credit returns.
#[test]
fn a_slow_client_holds_the_guest_back() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.connect();
    let expected = pattern(4 << 20);

    let mut at = 0;
    loop {
        let _ = rig.bench.round(0).unwrap();
        for (header, _) in rig.packets(true) {
            socket.learn(&header);
        }
        let size = (socket.credit() as usize).min(10_000);
        if size == 0 {
            break;
        }
        rig.send(&socket.header(OP_RW, 0, size), &expected[at..at + size]);
        socket.sent += u32::try_from(size).unwrap();
        at += size;
    }
    rig.quiet();
    assert!(at > BUFFER_BYTES as usize && at < 1 << 20, "{at} bytes were taken");

    let reader = thread::spawn(move || everything(&mut client));
    let (update, _) = rig.packet();
    socket.learn(&update);
    assert_eq!(update.op.get(), OP_CREDIT_UPDATE);
    assert!(socket.credit() >= BUFFER_BYTES / 2);
    rig.send(&socket.header(OP_SHUTDOWN, SHUTDOWN_SEND, 0), &[]);
    rig_until(&mut rig, |_| reader.is_finished());
    assert!(reader.join().unwrap() == expected[..at]);
}

#[test]
fn a_guest_that_sends_without_credit_is_reset() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, socket) = rig.connect();
    let (mut other, other_socket) = rig.connect();
    let data = vec![7; 65_536];

    let mut reset = None;
    for _ in 0..100 {
        rig.send(&socket.header(OP_RW, 0, data.len()), &data);
        reset = rig.packets(true).into_iter().find(|(header, _)| header.op.get() == OP_RST);
        if reset.is_some() {
            break;
        }
    }

    let (reset, _) = reset.expect("the client never read");
    assert_eq!(reset.src_port.get(), socket.host_port);
    let kept = rig.read_all(client).len();
    assert!(kept.is_multiple_of(65_536) && kept > 0, "what had credit arrives: {kept}");
    rig.works(&mut other, &other_socket);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.request();
    socket.buf_alloc = 1000;
    rig.send(&socket.header(OP_RESPONSE, 0, 0), &[]);
    line(&mut client);
    client.write_all(&[1; 1500]).unwrap();

    let (first, data) = rig.packet();
    assert_eq!((first.op.get(), data.len()), (OP_RW, 1000));
    assert_eq!(rig.next_op(), (OP_CREDIT_REQUEST, 0));
    rig.quiet();
    socket.fwd_cnt = 300;
    let next = rig.answer(&socket.header(OP_CREDIT_UPDATE, 0, 0), &[]);
    assert_eq!((next.op.get(), next.len.get()), (OP_RW, 300));
}

/// No buffers, nothing read: the client's bytes stay in its socket, and nobody spins on them.
#[test]
fn a_guest_without_buffers_holds_the_client_back() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(1);
    let (mut client, _) = rig.connect();
    client.write_all(&pattern(10_000)).unwrap();

    // The one buffer, used and not given back.
    let _ = rig.bench.round(0).unwrap();
    let first = rig.packets(false);
    rig.quiet();
    rig.fill(1);
    let second = rig.packets(false);
    rig.fill(8);
    let third = rig.packets(false);

    let got: Vec<u8> = [first, second, third].concat().into_iter().flat_map(|(_, d)| d).collect();
    assert!(got == pattern(10_000));
    rig.quiet();
}

#[test]
fn a_client_that_hung_up_is_forgotten_in_the_watch_but_not_its_bytes() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(1);
    let (mut client, socket) = rig.connect();
    client.write_all(&pattern(5000)).unwrap();
    drop(client);

    let _ = rig.bench.round(0).unwrap();
    let first = rig.packets(false);
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1, "only the listener is waited for");
    rig.fill(8);
    let _ = rig.bench.round(0).unwrap();
    let rest = rig.packets(false);

    let got: Vec<u8> = [first, rest.clone()].concat().into_iter().flat_map(|(_, d)| d).collect();
    assert!(got == pattern(5000));
    let last = &rest.last().unwrap().0;
    assert_eq!((last.op.get(), last.flags.get()), (OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    rig.send(&socket.header(OP_RST, 0, 0), &[]);
    rig.quiet();
}

#[test]
fn a_client_may_end_its_half_first() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.connect();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();

    assert_eq!(rig.packet().1, b"last words");
    assert_eq!(rig.next_op(), (OP_SHUTDOWN, SHUTDOWN_SEND));
    rig.quiet();
    rig.send(&socket.header(OP_RW, 0, 6), b"answer");
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    rig.send(&socket.header(OP_SHUTDOWN, both, 0), &[]);

    assert_eq!(rig.next_op(), (OP_RST, 0));
    assert_eq!(everything(&mut client), b"answer");
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn a_guest_may_end_its_half_first() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.connect();
    rig.send(&socket.header(OP_RW, 0, 10), b"last words");
    rig.send(&socket.header(OP_SHUTDOWN, SHUTDOWN_SEND, 0), &[]);

    assert_eq!(everything(&mut client), b"last words");
    rig.quiet();
    client.write_all(b"answer").unwrap();
    assert_eq!(rig.packet().1, b"answer");
    drop(client);

    assert_eq!(rig.next_op(), (OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    rig.send(&socket.header(OP_RST, 0, 0), &[]);
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1);
}

/// The guest hears of the end at once; the client still gets all that was sent before it.
#[test]
fn a_guest_that_closes_does_not_wait_for_a_slow_client() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, mut socket) = rig.connect();
    let mut sent = 0;
    while socket.credit() > 0 {
        let size = socket.credit().min(60_000);
        rig.send(&socket.header(OP_RW, 0, size as usize), &pattern(size as usize));
        socket.sent += size;
        sent += size as usize;
        rig.packets(true).iter().for_each(|(header, _)| socket.learn(header));
    }

    rig.send(&socket.header(OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, 0), &[]);

    assert_eq!(rig.next_op(), (OP_RST, 0));
    assert_eq!(rig.read_all(client).len(), sent);
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn a_client_that_closes_in_the_middle_ends_the_connection_for_the_guest() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, socket) = rig.connect();
    drop(client);

    let flags: Vec<(u16, u32)> = vec![rig.next_op()];
    rig.send(&socket.header(OP_RW, 0, 4), b"late");
    rig.send(&socket.header(OP_RST, 0, 0), &[]);

    assert!(flags[0].0 == OP_SHUTDOWN && flags[0].1 & SHUTDOWN_SEND != 0, "{flags:?}");
    rig.bench.until("the end", |bench| bench.watched() == 1);
    let unknown = socket.header(OP_RW, 0, 4);
    rig.packets(true);
    assert_eq!(rig.answer(&unknown, b"late").op.get(), OP_RST);
}

#[test]
fn a_client_that_does_not_wait_for_the_answer_ends_its_request() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, socket) = rig.request();
    drop(client);

    assert_eq!(rig.next_op(), (OP_RST, 0));
    let late = rig.answer(&socket.header(OP_RESPONSE, 0, 0), &[]);
    assert_eq!(late.op.get(), OP_RST);
}

/// 5.10.6.4: what belongs to no connection is reset, a reset is not answered, and what does not
/// come from this guest or does not go to the host is dropped.
#[test]
fn packets_that_belong_to_nothing_are_reset_or_dropped() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.connect();
    let nothing = Socket { host_port: 5, ..socket.clone() };

    for op in [OP_REQUEST, OP_RESPONSE, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, 0, 99] {
        let reset = rig.answer(&nothing.header(op, 0, 0), &[]);
        assert_eq!(reset.op.get(), OP_RST, "operation {op}");
        assert_eq!((reset.src_port.get(), reset.dst_port.get()), (5, PORT));
    }
    let seqpacket = Header { kind: U16::new(2), ..socket.header(OP_RW, 0, 0) };
    let reset = rig.answer(&seqpacket, &[]);
    assert_eq!((reset.op.get(), reset.kind.get()), (OP_RST, 2), "of the type it was sent with");

    let dropped = [
        nothing.header(OP_RST, 0, 0),
        Header { src_cid: U64::new(43), ..socket.header(OP_RST, 0, 0) },
        Header { dst_cid: U64::new(3), ..socket.header(OP_RST, 0, 0) },
        Header { dst_cid: U64::new(u64::MAX), ..nothing.header(OP_RW, 0, 0) },
    ];
    for header in dropped {
        rig.send(&header, &[]);
        rig.quiet();
    }
    rig.works(&mut client, &socket);
}

#[test]
fn packets_that_make_no_sense_reset_their_connection() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut bystander, bystander_socket) = rig.connect();
    let cases: [fn(&Socket) -> Header; 5] = [
        |socket| socket.header(OP_RW, 0, 5),
        |socket| socket.header(OP_RW, 0, 1 << 30),
        |socket| socket.header(OP_RESPONSE, 0, 0),
        |socket| socket.header(OP_REQUEST, 0, 0),
        |socket| socket.header(77, 0, 0),
    ];
    for case in cases {
        let (mut client, socket) = rig.connect();

        let reset = rig.answer(&case(&socket), b"four");

        assert_eq!((reset.op.get(), reset.src_port.get()), (OP_RST, socket.host_port));
        assert_eq!(everything(&mut client), b"");
    }
    rig.works(&mut bystander, &bystander_socket);
    let (head, _) = (rig.tx.offer(&[guest.buffer(43)], &[]), rig.bench.kick(TRANSMIT));
    assert!(rig.tx.used().contains(&(head, 0)), "half a header is dropped");
}

/// Resets need buffers; a guest that gives none cannot make the device remember without end.
#[test]
fn a_guest_that_takes_no_resets_is_not_heard_until_it_does() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let nothing = Socket {
        host_port: 5,
        buf_alloc: 0,
        fwd_cnt: 0,
        sent: 0,
        peer_buf_alloc: 0,
        peer_fwd_cnt: 0,
    };
    let packet = guest.buffer_of(nothing.header(OP_RW, 0, 0).as_bytes());
    for _ in 0..100 {
        rig.tx.offer(&[packet], &[]);
    }

    rig.bench.kick(TRANSMIT);
    assert_eq!(rig.tx.used().len(), RESETS_MAX);
    rig.fill(200);
    let _ = rig.bench.round(0).unwrap();

    assert_eq!(rig.packets(false).len(), 100);
    assert_eq!(rig.tx.used().len(), 100 - RESETS_MAX);
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut silent: Vec<UnixStream> = (0..PENDING_MAX + 8).map(|_| rig.client()).collect();
    for _ in 0..8 {
        let _ = rig.bench.round(0).unwrap();
    }

    let (mut client, socket) = rig.connect();

    rig.works(&mut client, &socket);
    assert_eq!(everything(&mut silent[0]), b"", "the oldest had to go");
    let youngest = silent.last_mut().unwrap();
    youngest
        .write_all(
            b"CONNECT 1024
",
        )
        .unwrap();
    assert_eq!(rig.next_op(), (OP_REQUEST, 0));
}

#[test]
fn a_line_may_come_in_pieces_but_must_be_right() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut client = rig.client();
    for piece in [
        "CON", "NECT 10", "24", "
",
    ] {
        rig.quiet();
        client.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(rig.next_op(), (OP_REQUEST, 0));

    let wrong = [
        "
",
        "connect 1
",
        "CONNECT
",
        "CONNECT x
",
        "CONNECT +1
",
        "CONNECT 4294967296
",
    ];
    for line in wrong {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        rig.quiet();
        assert_eq!(everything(&mut client), b"", "{line:?}");
    }
    let mut client = rig.client();
    client.shutdown(Shutdown::Write).unwrap();
    rig.quiet();
    assert_eq!(everything(&mut client), b"");
}

#[test]
fn a_megabyte_of_a_line_is_not_read() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut client = rig.client();
    let writer = thread::spawn(move || client.write_all(&[b'1'; 1 << 20]));

    rig_until(&mut rig, |_| writer.is_finished());

    assert!(writer.join().unwrap().is_err(), "the socket was closed on it");
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn connections_are_bounded_and_their_ports_differ() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut connected = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        connected.push(rig.connect());
    }

    let mut refused = rig.client();
    refused
        .write_all(
            b"CONNECT 1
",
        )
        .unwrap();
    rig.quiet();
    assert_eq!(everything(&mut refused), b"");
    let (client, socket) = connected.swap_remove(100);
    drop(client);
    assert_eq!(rig.next_op().0, OP_SHUTDOWN);
    rig.send(&socket.header(OP_RST, 0, 0), &[]);
    rig.quiet();
    connected.push(rig.connect());

    let mut ports: Vec<u32> = connected.iter().map(|(_, socket)| socket.host_port).collect();
    ports.push(socket.host_port);
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), CONNECTIONS_MAX as usize + 1, "no port was used twice");
}

#[test]
fn a_reset_closes_everything_and_waits_for_nothing() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, _) = rig.connect();
    let mut silent = rig.client();
    rig.quiet();
    assert_eq!(rig.bench.watched(), 3);

    rig.bench.reset();

    assert_eq!(rig.bench.watched(), 0);
    assert_eq!(everything(&mut client), b"");
    assert_eq!(everything(&mut silent), b"");
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let guest = Guest::new();
    let state = VsockState { guest_cid: CID };
    let mut rig = Rig::over(&guest, |listener| Vsock::restored(&state, listener).unwrap());
    let buffer = guest.buffer_of(&[0xff; 4]);
    let head = rig.event.offer(&[], &[buffer]);
    rig.event.offer(&[], &[guest.buffer(4)]);

    assert_eq!(rig.bench.service(EVENT).unwrap(), Served::used(EVENT));
    assert_eq!(rig.bench.service(EVENT).unwrap(), Served::NOTHING, "it is told once");

    assert_eq!(rig.event.used(), [(head, 4)]);
    assert_eq!(guest.read(buffer), [0; 4]);
}

#[test]
fn a_receive_buffer_without_room_is_a_fault() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.give(guest.buffer(44));
    let mut client = rig.client();
    client
        .write_all(
            b"CONNECT 1
",
        )
        .unwrap();

    let fault = rig.bench.round(1000).unwrap_err();

    assert_eq!(
        fault.to_string(),
        "Driver broke the protocol of queue 0: a receive buffer has no room for data"
    );
}

/// Headers close enough to right ones to get far.
fn header(host_port: u32) -> impl Strategy<Value = Header> {
    let near = |right: u32| prop_oneof![6 => Just(right), 1 => any::<u32>()];
    let length = prop_oneof![4 => 0..64_u32, 1 => any::<u32>()];
    let numbers = (near(PORT), near(host_port), length, near(1), 0..9_u16);
    (numbers, 0..4_u32, any::<u32>(), any::<u32>()).prop_map(
        |((src_port, dst_port, len, kind, op), flags, buf_alloc, fwd_cnt)| Header {
            src_cid: U64::new(CID.into()),
            dst_cid: U64::new(2),
            src_port: U32::new(src_port),
            dst_port: U32::new(dst_port),
            len: U32::new(len),
            kind: U16::new(u16::try_from(kind & 0xff).unwrap()),
            op: U16::new(op),
            flags: U32::new(flags),
            buf_alloc: U32::new(buf_alloc),
            fwd_cnt: U32::new(fwd_cnt),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a guest sends, other connections go on and nothing is left behind a reset.
    #[test]
    fn garbage_hurts_nobody_else(
        packets in prop::collection::vec(
            (header((1 << 30) | (1 << 8)), prop::collection::vec(any::<u8>(), 0..64), 0..50_u32),
            1..40,
        ),
        written in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let guest = Guest::with_bytes(8 << 20);
        let mut rig = Rig::with_buffers(&guest);
        let (mut victim, socket) = rig.connect();
        prop_assert_eq!(socket.host_port, (1 << 30) | (1 << 8));
        let (mut client, other) = rig.connect();
        victim.set_nonblocking(true).unwrap();

        for (header, data, cut) in &packets {
            // It may be closed by now.
            let _ = victim.write_all(&written);
            rig.send_cut(header, data, &[*cut]);
            let _ = rig.bench.round(0).unwrap();
            rig.packets(true);
        }
        rig_until(&mut rig, |rig| {
            rig.packets(true);
            rig.bench.round(0).unwrap() == Served::NOTHING
        });
        rig.packets(true);

        rig.works(&mut client, &other);
        rig.bench.reset();
        prop_assert_eq!(rig.bench.watched(), 0);
    }
}
