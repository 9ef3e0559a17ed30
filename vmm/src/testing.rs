//! The other side of a device, for its tests: a guest with memory, a driver that fills queues, and
//! a device thread that waits on real files.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt::{self, Debug, Formatter};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::memory::Mem;
use crate::virtio::mmio::QueueSetup;
use crate::virtio::ring::Ring;
use crate::virtio::{Device, DeviceIo, Fault, Interest, Served, Watch};

const MEMORY_BYTES: u64 = 32 << 20;
/// Queues lie at the start of memory, this far apart; buffers come behind the last.
const QUEUE_STRIDE: u64 = 64 << 10;
const QUEUES: u64 = 5;
/// Where the rings of a queue lie, for queues of at most 256 descriptors.
const AVAIL_OFFSET: u64 = 8 << 10;
const USED_OFFSET: u64 = 16 << 10;

/// (address, bytes) in guest memory.
pub(crate) type Buffer = (u64, u32);

/// Guest memory, and which of it is handed out.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) mem: Mem,
    bytes: u64,
    next: Cell<u64>,
}

impl Guest {
    pub(crate) fn new() -> Self {
        Self::with_bytes(MEMORY_BYTES)
    }

    /// The guest that has `mem`, of so many bytes.
    pub(crate) fn over(mem: &Mem, bytes: u64) -> Self {
        Self { mem: mem.clone(), bytes, next: Cell::new(QUEUES * QUEUE_STRIDE) }
    }

    /// Memory in two adjacent regions, so that buffers can cross from one to the other.
    pub(crate) fn with_bytes(bytes: u64) -> Self {
        let half = usize::try_from(bytes / 2).unwrap();
        let mem = Mem::from_ranges(&[(GuestAddress(0), half), (GuestAddress(bytes / 2), half)]);
        Self { mem: mem.unwrap(), bytes, next: Cell::new(QUEUES * QUEUE_STRIDE) }
    }

    /// Where memory ends.
    pub(crate) fn end(&self) -> u64 {
        self.bytes
    }

    /// Fresh memory of so many bytes, not adjacent to what was handed out before.
    pub(crate) fn buffer(&self, bytes: u32) -> Buffer {
        let address = self.next.get();
        self.next.set(address + u64::from(bytes) + 1);
        assert!(self.next.get() <= self.end(), "the test's guest is out of memory");
        (address, bytes)
    }

    /// Fresh memory that holds `bytes`.
    pub(crate) fn buffer_of(&self, bytes: &[u8]) -> Buffer {
        let buffer = self.buffer(u32::try_from(bytes.len()).unwrap());
        self.write(buffer, bytes);
        buffer
    }

    pub(crate) fn write(&self, (address, _): Buffer, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, (address, bytes): Buffer) -> Vec<u8> {
        let mut read = vec![0; bytes as usize];
        self.mem.read_slice(&mut read, GuestAddress(address)).unwrap();
        read
    }
}

/// One queue as its driver has it.
pub(crate) struct QueueFixture<'g> {
    guest: &'g Guest,
    descriptors: DescriptorTable<'g, Mem>,
    avail: AvailRing<'g, Mem>,
    used: UsedRing<'g, Mem>,
    index: u16,
    size: u16,
    next_avail: u16,
    next_used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
}

impl<'g> QueueFixture<'g> {
    pub(crate) fn new(guest: &'g Guest, index: u16, size: u16) -> Self {
        let start = u64::from(index) * QUEUE_STRIDE;
        let [table, avail, used] =
            [0, AVAIL_OFFSET, USED_OFFSET].map(|at| GuestAddress(start + at));
        Self {
            guest,
            descriptors: DescriptorTable::new(&guest.mem, table, size),
            avail: AvailRing::new(&guest.mem, avail, size),
            used: UsedRing::new(&guest.mem, used, size),
            index,
            size,
            next_avail: 0,
            next_used: 0,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
        }
    }

    /// The device's end of it, with EVENT_IDX negotiated.
    pub(crate) fn ring(&self) -> Ring {
        let start = u64::from(self.index) * QUEUE_STRIDE;
        let mut queue = Queue::new(self.size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(start)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(start + AVAIL_OFFSET)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(start + USED_OFFSET)).unwrap();
        queue.set_event_idx(true);
        queue.set_ready(true);
        Ring::new(self.index, queue)
    }

    /// What its driver writes into the transport's registers.
    pub(crate) fn setup(&self) -> QueueSetup {
        let start = u64::from(self.index) * QUEUE_STRIDE;
        QueueSetup {
            size: self.size,
            ready: true,
            descriptors: start,
            driver: start + AVAIL_OFFSET,
            device: start + USED_OFFSET,
        }
    }

    /// Descriptors that are not in use.
    pub(crate) fn room(&self) -> usize {
        self.free.len()
    }

    /// Makes one request of a readable and a writable part available; returns its head.
    pub(crate) fn offer(&mut self, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let list = flagged(readable, writable);
        let taken: Vec<u16> = list.iter().map(|_| self.free.pop().unwrap()).collect();
        for (position, (buffer, flags)) in list.iter().enumerate() {
            let (flags, next) = taken.get(position + 1).map_or((*flags, 0), |n| (flags | NEXT, *n));
            let descriptor = Descriptor::new(buffer.0, buffer.1, flags, next);
            self.descriptors.store(taken[position], RawDescriptor::from(descriptor)).unwrap();
        }
        let head = taken[0];
        self.chains.insert(head, taken);
        self.publish(head);
        head
    }

    /// The same through an indirect table (virtio 1.3, 2.7.5.3 "Indirect Descriptors").
    pub(crate) fn offer_indirect(&mut self, readable: &[Buffer], writable: &[Buffer]) -> u16 {
        let list = flagged(readable, writable);
        let mut table = Vec::new();
        for (position, (buffer, flags)) in list.iter().enumerate() {
            let last = position + 1 == list.len();
            let flags = if last { *flags } else { flags | NEXT };
            let next = if last { 0 } else { u16::try_from(position + 1).unwrap() };
            table.extend(buffer.0.to_le_bytes());
            table.extend(buffer.1.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        let table = self.guest.buffer_of(&table);
        self.raw(Descriptor::new(table.0, table.1, INDIRECT, 0))
    }

    /// Makes one descriptor available just as it is.
    pub(crate) fn raw(&mut self, descriptor: Descriptor) -> u16 {
        let head = self.free.pop().unwrap();
        self.descriptors.store(head, RawDescriptor::from(descriptor)).unwrap();
        self.chains.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Puts a head into the available ring, whatever it is.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = usize::from(self.next_avail % self.size);
        self.avail.ring().ref_at(slot).unwrap().store(head);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.avail.idx().store(self.next_avail);
    }

    /// Writes the descriptor table as it comes: (address, length, flags, next).
    pub(crate) fn fill_table(&mut self, table: &[(u64, u32, u16, u16)]) {
        for (index, (address, length, flags, next)) in table.iter().enumerate() {
            let descriptor = Descriptor::new(*address, *length, *flags, *next);
            let index = u16::try_from(index).unwrap();
            self.descriptors.store(index, RawDescriptor::from(descriptor)).unwrap();
        }
    }

    /// Whether the device has returned less than was made available.
    pub(crate) fn unanswered(&self) -> bool {
        self.used.idx().load() != self.next_avail
    }

    /// Makes the used ring, which is the device's to write, in `after` as in `before`.
    pub(crate) fn mask_used_ring(&self, before: &[u8], after: &mut [u8]) {
        let start = usize::try_from(u64::from(self.index) * QUEUE_STRIDE + USED_OFFSET).unwrap();
        let range = start..start + 6 + 8 * usize::from(self.size);
        after[range.clone()].copy_from_slice(&before[range]);
    }

    /// What the device returned since the last call: (head, bytes written), in its order.
    pub(crate) fn used(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while self.next_used != self.used.idx().load() {
            let slot = usize::from(self.next_used % self.size);
            let element = self.used.ring().ref_at(slot).unwrap().load();
            let head = u16::try_from(element.id()).unwrap();
            let chain = self.chains.remove(&head).expect("the device returns what it was given");
            self.free.extend(chain);
            used.push((head, element.len()));
            self.next_used = self.next_used.wrapping_add(1);
        }
        used
    }
}

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

fn flagged(readable: &[Buffer], writable: &[Buffer]) -> Vec<(Buffer, u16)> {
    let readable = readable.iter().map(|buffer| (*buffer, 0));
    readable.chain(writable.iter().map(|buffer| (*buffer, WRITE))).collect()
}

/// A device on the bench: its rings, and a thread's worth of waiting.
#[derive(Debug)]
pub(crate) struct Bench<D> {
    pub(crate) device: D,
    pub(crate) mem: Arc<Mem>,
    pub(crate) rings: Vec<Ring>,
    watch: Poll,
    again: u32,
}

impl<D: Device> Bench<D> {
    /// Activates `device` with its own features and these queues.
    pub(crate) fn new(device: D, queues: &mut [&mut QueueFixture<'_>]) -> Self {
        let features = device.features();
        Self::with_features(device, features, queues)
    }

    pub(crate) fn with_features(
        device: D,
        features: u64,
        queues: &mut [&mut QueueFixture<'_>],
    ) -> Self {
        let queues: Vec<_> = queues.iter().map(|queue| &**queue).collect();
        Self::activated(device, features, &queues).unwrap()
    }

    /// What comes of activating `device` with these features.
    pub(crate) fn activated(
        device: D,
        features: u64,
        queues: &[&QueueFixture<'_>],
    ) -> Result<Self, Fault> {
        let mem = Arc::new(queues[0].guest.mem.clone());
        let rings = queues.iter().map(|queue| queue.ring()).collect();
        let mut bench = Self { device, mem, rings, watch: Poll::new(), again: 0 };
        bench.with_io(|device, io| device.activate(features, io))?;
        Ok(bench)
    }

    /// The driver kicked a queue.
    pub(crate) fn service(&mut self, index: u16) -> Result<Served, Fault> {
        let served = self.with_io(|device, io| device.service(index, io))?;
        self.again |= served.again;
        Ok(served)
    }

    /// The driver kicked a queue and cares for nothing but what it finds there.
    pub(crate) fn kick(&mut self, index: u16) {
        let _ = self.service(index).unwrap();
    }

    /// What the device thread does in one round: serves again what asked for it, then waits up to
    /// `timeout_ms` for files and wakes the device for each. Returns what was served.
    pub(crate) fn round(&mut self, timeout_ms: i32) -> Result<Served, Fault> {
        let mut served = Served::NOTHING;
        let again = mem::take(&mut self.again);
        for index in 0..u16::try_from(self.rings.len()).unwrap() {
            if again & (1 << index) != 0 {
                served = served.and(self.service(index)?);
            }
        }
        let timeout_ms = if self.again == 0 { timeout_ms } else { 0 };
        for token in self.watch.wait(timeout_ms) {
            let woken = self.with_io(|device, io| device.wake(token, io))?;
            self.again |= woken.again;
            served = served.and(woken);
        }
        Ok(served)
    }

    /// Runs rounds until `done`; a device that never gets there fails the test.
    pub(crate) fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Instant::now() < deadline, "{what} did not happen in 20 s");
            let _ = self.round(10).unwrap();
        }
    }

    pub(crate) fn drain(&mut self) -> Result<Served, Fault> {
        self.with_io(|device, io| device.drain(io))
    }

    pub(crate) fn reset(&mut self) {
        self.device.reset(&mut self.watch);
    }

    /// Files that are ready although the device was just woken for all that are.
    pub(crate) fn pending(&mut self) -> usize {
        self.watch.wait(0).len()
    }

    /// Files the device waits for.
    pub(crate) fn watched(&self) -> usize {
        self.watch.files.len()
    }

    fn with_io<R>(&mut self, call: impl FnOnce(&mut D, &mut DeviceIo<'_>) -> R) -> R {
        let mut io =
            DeviceIo { mem: &mut self.mem, rings: &mut self.rings, watch: &mut self.watch };
        call(&mut self.device, &mut io)
    }
}

/// [`Watch`] on an epoll of its own.
struct Poll {
    epoll: Epoll,
    files: HashMap<RawFd, u32>,
}

impl Debug for Poll {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Poll").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Poll {
    fn new() -> Self {
        Self { epoll: Epoll::new().unwrap(), files: HashMap::new() }
    }

    fn wait(&mut self, timeout_ms: i32) -> Vec<u32> {
        let mut events = [EpollEvent::default(); 16];
        match self.epoll.wait(timeout_ms, &mut events) {
            Ok(count) => {
                events[..count].iter().map(|event| u32::try_from(event.data()).unwrap()).collect()
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Vec::new(),
            Err(error) => panic!("epoll_wait: {error}"),
        }
    }

    fn control(
        &mut self,
        operation: ControlOperation,
        file: BorrowedFd<'_>,
        token: u32,
        interest: Interest,
    ) -> io::Result<()> {
        let set = match interest {
            Interest::Nothing => EventSet::empty(),
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
            Interest::ReadWrite => EventSet::IN | EventSet::OUT,
        };
        self.epoll.ctl(operation, file.as_raw_fd(), EpollEvent::new(set, token.into()))
    }
}

impl Watch for Poll {
    fn add(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        self.control(ControlOperation::Add, file, token, interest)?;
        self.files.insert(file.as_raw_fd(), token);
        Ok(())
    }

    fn change(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        self.control(ControlOperation::Modify, file, token, interest)
    }

    fn remove(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.control(ControlOperation::Delete, file, 0, Interest::Nothing)?;
        self.files.remove(&file.as_raw_fd());
        Ok(())
    }
}
