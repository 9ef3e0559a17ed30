//! A balloon as its driver sees it.

use vm_memory::Bytes;

use super::*;
use crate::testing::{Bench, Buffer, Guest, QueueFixture};

/// The driver of a balloon that fills three of its queues.
struct Rig<'g> {
    guest: &'g Guest,
    queues: Vec<QueueFixture<'g>>,
    bench: Bench<Balloon>,
    handle: BalloonHandle,
}

impl<'g> Rig<'g> {
    fn new(guest: &'g Guest) -> Self {
        let device = Balloon::new().unwrap();
        let handle = device.handle();
        let mut queues: Vec<_> = (0..5).map(|index| QueueFixture::new(guest, index, 32)).collect();
        let bench = Bench::new(device, &mut queues.iter_mut().collect::<Vec<_>>());
        Self { guest, queues, bench, handle }
    }

    fn offer(&mut self, index: usize, readable: &[Buffer], writable: &[Buffer]) {
        self.queues[index].offer(readable, writable);
        self.bench.kick(u16::try_from(index).unwrap());
        let (queue, mut used) = (&mut self.queues[index], Vec::new());
        self.bench.until("an answer", |_| {
            used.extend(queue.used());
            !used.is_empty()
        });
        assert_eq!(used[0].1, 0, "nothing is written");
    }

    fn pages(&self, pages: &[u32]) -> Buffer {
        self.guest.buffer_of(&pages.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Fills pages from this number on.
    fn fill(&self, first: u64, count: u64) {
        for page in first..first + count {
            self.guest.mem.write_obj(7_u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
    }

    /// Which of these pages still hold something.
    fn filled(&self, first: u64, count: u64) -> Vec<u64> {
        let byte = |page: &u64| {
            self.guest.mem.read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap() != 0
        };
        (first..first + count).filter(byte).collect()
    }
}

/// Drivers count queues differently if features between are missing: 2 or 4.
#[test]
fn free_pages_that_are_reported_go_back_whatever_number_the_queue_has() {
    for index in [2, 3, 4] {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest);
        rig.fill(4096, 8);
        let page = |page: u64, count: u32| (page * PAGE_BYTES, count * 4096);

        rig.offer(index, &[], &[page(4096, 2), page(4099, 1), (4101 * PAGE_BYTES + 1, 8191)]);

        assert_eq!(rig.filled(4096, 8), [4098, 4100, 4101, 4103]);
    }
}

#[test]
fn pages_given_up_are_taken_and_counted() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(4096, 8);

    // Ascending, descending, and one that is nowhere.
    let list = rig.pages(&[4096, 4097, 4102, 4101, 4099, u32::MAX]);
    rig.offer(0, &[list], &[]);
    assert_eq!(rig.filled(4096, 8), [4098, 4100, 4103]);
    assert_eq!(rig.handle.given_bytes(), 6 * PAGE_BYTES);

    let list = rig.pages(&[4096, 4097]);
    rig.offer(1, &[list], &[]);
    assert_eq!(rig.handle.given_bytes(), 4 * PAGE_BYTES);
    for _ in 0..3 {
        rig.offer(1, &[list], &[]);
    }
    assert_eq!(rig.handle.given_bytes(), 0, "it cannot take more than it gave");
}

#[test]
fn a_list_is_read_to_the_limit_and_no_further() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let first = 4096;
    rig.fill(first, 300);

    let list: Vec<u32> = (0..300).map(|page| page + 4096).collect();
    let list = rig.pages(&list);
    rig.offer(0, &[list], &[]);

    assert_eq!(rig.filled(first, 300).len(), 300 - PAGES_PER_REQUEST_MAX);
    let cut = guest.buffer_of(&[1, 2, 3]);
    rig.offer(0, &[cut], &[]);
    rig.offer(0, &[], &[guest.buffer(8)]);
    assert_eq!(rig.handle.given_bytes(), 256 * PAGE_BYTES);
}

#[test]
fn the_driver_hears_of_another_size_once() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let size = |rig: &Rig<'_>| rig.bench.device.config()[..4].to_vec();
    assert_eq!((size(&rig), rig.bench.device.config().len()), (vec![0; 4], 8));

    rig.handle.inflate(256 << 20);
    assert!(rig.bench.round(0).unwrap().config);
    assert_eq!(size(&rig), 0x1_0000_u32.to_le_bytes());
    assert_eq!(rig.handle.wanted_bytes(), 256 << 20);

    rig.handle.inflate(256 << 20);
    assert!(!rig.bench.round(0).unwrap().config);
    assert_eq!(rig.bench.pending(), 0);
}

/// However much a driver reports, the other devices have their turn.
#[test]
fn a_turn_gives_back_no_more_than_its_share() {
    let guest = Guest::with_bytes(1 << 30);
    let mut rig = Rig::new(&guest);
    let report = (512 << 20, 200 << 20);
    for _ in 0..4 {
        rig.queues[4].offer(&[], &[report]);
    }

    let served = rig.bench.service(4).unwrap();
    assert_eq!((rig.queues[4].used().len(), served), (2, Served::used(4).and(Served::again(4))));

    rig.bench.until("the rest", |_| !rig.queues[4].unanswered());
    assert_eq!(rig.queues[4].used().len(), 2);
}

#[test]
fn a_reset_begins_with_an_empty_balloon() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let list = rig.pages(&[4096]);
    rig.offer(0, &[list], &[]);

    rig.bench.reset();

    assert_eq!((rig.bench.watched(), rig.handle.given_bytes()), (0, 0));
}
