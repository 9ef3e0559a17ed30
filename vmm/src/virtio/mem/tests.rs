//! A memory device as its driver sees it, friendly or not.

use std::sync::Mutex;

use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::memory::{MemoryListener, MemoryRange};
use crate::testing::{Bench, Guest, QueueFixture};

const RAM_BYTES: u64 = 32 << 20;
const START: u64 = 4 << 30;
const MIB: u64 = 1 << 20;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const BUSY: (u16, u16) = (2, 0);
const ERROR: (u16, u16) = (3, 0);
const MIXED: (u16, u16) = (0, 2);
const PLUGGED: (u16, u16) = (0, 0);
const UNPLUGGED: (u16, u16) = (0, 1);

/// A listener that keeps the ranges it was told of, and takes so many.
#[derive(Debug, Clone)]
struct Slots {
    ranges: Arc<Mutex<Vec<(u64, u64)>>>,
    max: usize,
}

impl Slots {
    /// Those of the region.
    fn chunks(&self) -> Vec<(u64, u64)> {
        self.ranges.lock().unwrap().iter().copied().filter(|(start, _)| *start >= START).collect()
    }
}

impl MemoryListener for Slots {
    fn added(&mut self, range: MemoryRange) -> io::Result<()> {
        let mut ranges = self.ranges.lock().unwrap();
        if ranges.len() == self.max {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        ranges.push((range.guest_start, range.bytes));
        ranges.sort_unstable();
        Ok(())
    }

    fn removed(&mut self, range: MemoryRange) {
        let range = (range.guest_start, range.bytes);
        let mut ranges = self.ranges.lock().unwrap();
        let at = ranges.iter().position(|known| *known == range).expect("it was added");
        ranges.remove(at);
    }
}

/// The guest's RAM, and the memory device's own view of it.
fn memory(slots_max: usize) -> (Memory, Slots, Guest) {
    let slots = Slots { ranges: Arc::default(), max: slots_max };
    let memory = Memory::new(RAM_BYTES, vec![Box::new(slots.clone())]).unwrap();
    let guest = Guest::over(memory.mem(), RAM_BYTES);
    (memory, slots, guest)
}

/// A driver.
struct Rig<'g> {
    guest: &'g Guest,
    queue: QueueFixture<'g>,
    bench: Bench<MemDevice>,
    handle: MemHandle,
}

impl<'g> Rig<'g> {
    /// With a region of so many MiB, all of which the host would like to be plugged.
    fn new(guest: &'g Guest, memory: Memory, mib: u64) -> Self {
        let device = MemDevice::new(memory, START, mib * MIB).unwrap();
        let handle = device.handle();
        handle.resize(mib * MIB).unwrap();
        let mut queue = QueueFixture::new(guest, 0, 64);
        let bench = Bench::new(device, &mut [&mut queue]);
        Self { guest, queue, bench, handle }
    }

    /// One request and its answer.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        let request = self.guest.buffer_of(&request);
        let reply = self.guest.buffer(10);
        self.queue.offer(&[request], &[reply]);
        self.bench.kick(0);
        let (queue, mut used) = (&mut self.queue, Vec::new());
        self.bench.until("an answer", |_| {
            used.extend(queue.used());
            !used.is_empty()
        });
        assert_eq!(used[0].1, 10);
        let reply = self.guest.read(reply);
        let word = |at: usize| u16::from_le_bytes([reply[at], reply[at + 1]]);
        (word(0), word(8))
    }

    /// Usable, plugged and requested, in MiB, as the driver reads them.
    fn sizes(&self) -> [u64; 3] {
        let config = self.bench.device.config();
        [32, 40, 48].map(|at| u64::from_le_bytes(config[at..at + 8].try_into().unwrap()) / MIB)
    }

    /// The host would like another size, and the driver hears of it.
    fn resize(&mut self, mib: u64) {
        self.handle.resize(mib * MIB).unwrap();
        let (bench, mut told) = (&mut self.bench, false);
        bench.until("a change of the configuration", |bench| {
            told |= bench.round(0).unwrap().config;
            told
        });
    }

    fn touches(&self, address: u64) -> bool {
        self.bench.mem.write_obj(7_u8, GuestAddress(address)).is_ok()
    }
}

fn at(mib: u64) -> u64 {
    START + mib * MIB
}

#[test]
fn a_region_says_where_it_is_and_in_what_pieces_it_comes() {
    let (memory, _, _) = memory(9);
    let device = MemDevice::new(memory, START, 256 * MIB).unwrap();

    let config = device.config();
    let field = |at: usize| u64::from_le_bytes(config[at..at + 8].try_into().unwrap());
    assert_eq!((config.len(), device.kind(), device.features()), (56, 24, 2));
    assert_eq!([field(0), field(16), field(24)], [2 * MIB, START, 256 * MIB]);
    assert_eq!([field(8), field(32), field(40), field(48)], [0; 4]);
}

#[test]
fn memory_is_there_while_it_is_plugged() {
    let (memory, slots, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 256);
    assert_eq!(rig.sizes(), [256, 0, 256]);
    assert!(!rig.touches(at(0)));

    assert_eq!(rig.ask(PLUG, at(0), 2), ACK);
    assert_eq!(rig.ask(PLUG, at(130), 1), ACK);
    assert_eq!(rig.sizes(), [256, 6, 256]);
    assert_eq!(rig.handle.plugged_bytes(), 6 * MIB);
    assert_eq!(slots.chunks(), [(at(0), 128 * MIB), (at(128), 128 * MIB)]);
    assert!(rig.touches(at(0)) && rig.touches(at(131)));

    assert_eq!(rig.ask(UNPLUG, at(0), 2), ACK);
    assert_eq!(slots.chunks(), [(at(128), 128 * MIB)]);
    assert!(!rig.touches(at(0)) && rig.touches(at(131)));

    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(slots.chunks(), []);
    assert_eq!(rig.sizes(), [256, 0, 256]);
}

#[test]
fn blocks_that_are_unplugged_beside_others_lose_what_they_held() {
    let (memory, _, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 128);
    assert_eq!(rig.ask(PLUG, at(0), 3), ACK);
    for mib in [0, 2, 3, 4] {
        rig.bench.mem.write_obj(7_u8, GuestAddress(at(mib))).unwrap();
    }

    assert_eq!(rig.ask(UNPLUG, at(2), 1), ACK);

    let read = |mib| rig.bench.mem.read_obj::<u8>(GuestAddress(at(mib))).unwrap();
    assert_eq!([0, 2, 3, 4].map(read), [7, 0, 0, 7]);
}

#[test]
fn states_are_told_apart() {
    let (memory, _, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 128);
    assert_eq!(rig.ask(PLUG, at(4), 2), ACK);

    assert_eq!(rig.ask(STATE, at(4), 2), PLUGGED);
    assert_eq!(rig.ask(STATE, at(0), 2), UNPLUGGED);
    assert_eq!(rig.ask(STATE, at(0), 64), MIXED);
}

/// Every rule of the specification that a driver can break.
#[test]
fn what_makes_no_sense_is_an_error_and_changes_nothing() {
    let (memory, slots, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 256);
    rig.resize(64);
    assert_eq!(rig.ask(PLUG, at(8), 2), ACK);
    let before = (rig.sizes(), slots.chunks());

    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (at(0), 0),
            (at(1), 1),
            (at(0) + 4096, 1),
            (at(0) - 2 * MIB, 1),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - 2 * MIB + 1, u16::MAX),
            (at(254), 2),
            (at(256), 1),
            (at(0), u16::MAX),
        ] {
            assert_eq!(rig.ask(kind, address, count), ERROR, "{kind} {address:#x} {count}");
        }
    }
    assert_eq!(rig.ask(PLUG, at(8), 1), ERROR, "plugged already");
    assert_eq!(rig.ask(PLUG, at(6), 2), ERROR, "in part");
    assert_eq!(rig.ask(UNPLUG, at(0), 1), ERROR, "not plugged");
    assert_eq!(rig.ask(UNPLUG, at(10), 2), ERROR, "not all of it");
    for kind in [4, u16::MAX] {
        assert_eq!(rig.ask(kind, at(0), 1), ERROR);
    }
    assert_eq!((rig.sizes(), slots.chunks()), before);
}

#[test]
fn no_more_is_plugged_than_the_host_asks_for() {
    let (memory, _, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 256);
    rig.resize(4);
    assert_eq!(rig.ask(PLUG, at(0), 3), NACK);
    assert_eq!(rig.ask(PLUG, at(0), 2), ACK);
    assert_eq!(rig.ask(PLUG, at(4), 1), NACK);

    rig.resize(0);
    assert_eq!(rig.sizes(), [256, 4, 0]);
    assert_eq!(rig.ask(UNPLUG, at(0), 1), ACK);
    assert_eq!(rig.ask(PLUG, at(0), 1), NACK);

    rig.resize(256);
    assert_eq!(rig.ask(PLUG, at(4), 126), ACK);
}

/// Until the host asks for more, chunks behind what it asked for cannot be had.
/// A driver that found no room for what it would have to note of new memory waits for a minute.
#[test]
fn what_the_driver_has_not_done_is_asked_for_again() {
    let (memory, _, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 64);
    let told = |rig: &mut Rig<'_>| {
        rig.handle.resize(64 * MIB).unwrap();
        rig.bench.round(0).unwrap().config
    };
    assert!(told(&mut rig), "it is new");

    assert!(told(&mut rig), "nothing is plugged");
    assert_eq!(rig.ask(PLUG, at(0), 32), ACK);
    assert!(!told(&mut rig), "it has it all");
}

#[test]
fn the_usable_part_grows_by_chunks_and_shrinks_when_all_is_unplugged() {
    let (memory, _, guest) = memory(9);
    let device = MemDevice::new(memory, START, 384 * MIB).unwrap();
    let handle = device.handle();
    let mut queue = QueueFixture::new(&guest, 0, 64);
    let bench = Bench::new(device, &mut [&mut queue]);
    let mut rig = Rig { guest: &guest, queue, bench, handle };
    assert_eq!(rig.sizes(), [0, 0, 0]);
    assert_eq!(rig.ask(PLUG, at(0), 1), ERROR);

    rig.resize(2);
    assert_eq!(rig.sizes(), [128, 0, 2]);
    assert_eq!(rig.ask(PLUG, at(128), 1), ERROR);
    rig.resize(130);
    assert_eq!(rig.sizes(), [256, 0, 130]);
    assert_eq!(rig.ask(PLUG, at(128), 1), ACK);

    rig.resize(2);
    assert_eq!(rig.sizes(), [256, 2, 2], "something may lie there");
    assert_eq!(rig.ask(UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(rig.sizes(), [128, 0, 2]);
}

#[test]
fn a_host_that_is_short_of_something_says_so_and_keeps_nothing() {
    let (memory, slots, guest) = memory(3);
    let mut rig = Rig::new(&guest, memory, 512);

    assert_eq!(rig.ask(PLUG, at(0), 256), BUSY);
    assert_eq!((slots.chunks(), rig.sizes()), (vec![], [512, 0, 512]));

    assert_eq!(rig.ask(PLUG, at(0), 128), ACK);
    assert_eq!(rig.ask(PLUG, at(256), 1), BUSY);
    assert_eq!(slots.chunks().len(), 2);
}

#[test]
fn a_large_region_has_few_chunks() {
    let (memory, slots, guest) = memory(99);
    let mut rig = Rig::new(&guest, memory, 64 << 10);

    assert_eq!(rig.ask(PLUG, at(0), 32 << 10), ACK);

    assert_eq!(slots.chunks().len(), 32);
    assert!(rig.touches(at((64 << 10) - 1)));
}

#[test]
fn a_size_that_is_none_is_refused() {
    for bytes in [0, 1, 3 * MIB] {
        let (memory, _, _) = memory(9);
        assert!(matches!(MemDevice::new(memory, START, bytes), Err(MemError::Size { .. })));
    }
    let (memory, _, _) = memory(9);
    let handle = MemDevice::new(memory, START, 64 * MIB).unwrap().handle();
    for bytes in [1, 66 * MIB, u64::MAX] {
        let max = 64 * MIB;
        assert!(matches!(handle.resize(bytes), Err(MemError::Size { bytes: b, max: m })
            if (b, m) == (bytes, max)));
    }
}

#[test]
fn a_request_that_is_cut_short_breaks_the_device() {
    for (request, reply) in [(23, 10), (24, 9), (0, 10)] {
        let (memory, _, guest) = memory(9);
        let mut rig = Rig::new(&guest, memory, 128);
        let request = if request == 0 { vec![] } else { vec![guest.buffer(request)] };
        rig.queue.offer(&request, &[guest.buffer(reply)]);

        let fault = rig.bench.service(0).unwrap_err();

        assert!(matches!(fault, Fault::Protocol { index: 0, .. }), "{fault}");
    }
}

#[test]
fn a_driver_that_would_touch_what_is_not_there_is_refused() {
    let (memory, _, guest) = memory(9);
    let device = MemDevice::new(memory, START, 128 * MIB).unwrap();
    let queue = QueueFixture::new(&guest, 0, 64);

    let fault = Bench::activated(device, 0, &[&queue]).unwrap_err();

    assert!(matches!(fault, Fault::Protocol { .. }), "{fault}");
}

#[test]
fn a_reset_leaves_memory_as_it_is() {
    let (memory, slots, guest) = memory(9);
    let mut rig = Rig::new(&guest, memory, 128);
    assert_eq!(rig.ask(PLUG, at(0), 2), ACK);

    rig.bench.reset();

    assert_eq!(rig.bench.watched(), 0);
    assert_eq!(slots.chunks().len(), 1);
    let state = MemState {
        region_bytes: 128 * MIB,
        usable_bytes: 128 * MIB,
        requested_bytes: 128 * MIB,
        plugged: vec![(0, 2)],
    };
    assert_eq!(rig.bench.device.save(), DeviceState::Mem(state));
}

proptest! {
    /// Whatever is asked for, in whatever order: what is plugged is counted, is mapped, and is no
    /// more than was asked for; and chunks are there if and only if something in them is plugged.
    #[test]
    fn any_sequence_of_requests_keeps_the_books(
        requests in vec((0_u16..5, 0_u64..260, 0_u16..80, 0_u64..128), 1..40),
    ) {
        let (memory, slots, guest) = memory(99);
        let mut rig = Rig::new(&guest, memory, 512);
        for (kind, block, count, wanted) in requests {
            if kind == 4 {
                rig.handle.resize(wanted * 4 * MIB).unwrap();
                let _ = rig.bench.round(0).unwrap();
            } else {
                rig.ask(kind, START + block * BLOCK_BYTES, count);
            }
            let DeviceState::Mem(state) = rig.bench.device.save() else { panic!("another") };
            let blocks: u64 = state.plugged.iter().map(|(_, count)| count).sum();
            prop_assert_eq!(blocks * BLOCK_BYTES, rig.handle.plugged_bytes());
            let mut chunks: Vec<_> = state
                .plugged
                .iter()
                .flat_map(|&(first, count)| first / 64..=(first + count - 1) / 64)
                .map(|chunk| (START + chunk * 128 * MIB, 128 * MIB))
                .collect();
            chunks.dedup();
            prop_assert_eq!(slots.chunks(), chunks);
        }
    }
}
