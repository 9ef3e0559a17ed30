//! A vsock device between its driver, spoken here, and real Unix sockets.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use zerocopy::FromBytes;
use zerocopy::byteorder::little_endian::{U16, U32};

use super::packet::*;
use super::*;
use crate::testing::{Bench, Buffer, Guest, QueueFixture};

mod bytes;
mod clients;
mod ends;
mod hostility;

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

fn rig_until(rig: &mut Rig<'_>, mut done: impl FnMut(&mut Rig<'_>) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done(rig) {
        assert!(Instant::now() < deadline, "it did not happen in 60 s");
        let _ = rig.bench.round(1).unwrap();
    }
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
