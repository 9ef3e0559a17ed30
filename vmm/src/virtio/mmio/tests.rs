//! A driver at the registers of a real slot, with a real device thread behind it.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::any;
use proptest::{prop_assert_eq, proptest};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::events::Events;
use crate::reactor::{self, Reactor};
use crate::testing::{Guest, QueueFixture};
use crate::virtio::ring::Answer;
use crate::virtio::task::Task;
use crate::virtio::{DeviceIo, DeviceState, Fault, Served, Watch};

const OWN_FEATURE: u64 = 1 << 5;
const SIZES: [u16; 2] = [8, 16];
const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// Returns every request as it came, each as if one byte had been written.
#[derive(Debug)]
struct Echo;

impl Device for Echo {
    fn kind(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        OWN_FEATURE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &SIZES
    }

    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5, 6, 7, 8, 9]
    }

    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        io.rings[usize::from(index)].serve(io.mem, |_, _| Ok(Answer::Used { written_bytes: 1 }))
    }

    fn reset(&mut self, _watch: &mut dyn Watch) {}

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }
}

/// One slot with [`Echo`] in it.
struct Slot {
    registers: Registers,
    kicks: Vec<EventFd>,
    irq: Arc<EventFd>,
    orders: Orders,
    _reactor: Reactor,
}

impl Slot {
    fn new(guest: &Guest) -> Self {
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let line = Line::new(Arc::clone(&irq));
        let identity = Identity::of(&Echo);
        let task = Task::new(Box::new(Echo), guest.mem.clone(), line.clone()).unwrap();
        let kicks = task.kicks().iter().map(EventFd::try_clone).collect::<io::Result<_>>();
        let (orders, inbox) = reactor::orders().unwrap();
        let events = Arc::new(Events::new().unwrap());
        let reactor = Reactor::start(vec![task], orders.clone(), inbox, events).unwrap();
        let registers = Registers::new(0, identity, orders.clone(), line);
        Self { registers, kicks: kicks.unwrap(), irq, orders, _reactor: reactor }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.registers.write(offset, &value.to_le_bytes());
    }

    fn write_all(&mut self, writes: &[(u64, u32)]) {
        for &(offset, value) in writes {
            self.write(offset, value);
        }
    }

    /// What a driver does up to the queues.
    fn negotiate(&mut self) {
        let [low, high] = [0, 1].map(|select| half(TRANSPORT_FEATURES | OWN_FEATURE, select));
        self.write_all(&[
            (STATUS, ACKNOWLEDGE),
            (STATUS, ACKNOWLEDGE | DRIVER),
            (DRIVER_FEATURES_SEL, 0),
            (DRIVER_FEATURES, low),
            (DRIVER_FEATURES_SEL, 1),
            (DRIVER_FEATURES, high),
            (STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ]);
        assert_eq!(self.read(STATUS), ACKNOWLEDGE | DRIVER | FEATURES_OK);
    }

    fn set_queue(&mut self, index: u32, size: u32, [table, driver, device]: [u64; 3]) {
        self.write_all(&[
            (QUEUE_SEL, index),
            (QUEUE_SIZE, size),
            (QUEUE_DESC_LOW, half(table, 0)),
            (QUEUE_DESC_HIGH, half(table, 1)),
            (QUEUE_DRIVER_LOW, half(driver, 0)),
            (QUEUE_DRIVER_HIGH, half(driver, 1)),
            (QUEUE_DEVICE_LOW, half(device, 0)),
            (QUEUE_DEVICE_HIGH, half(device, 1)),
            (QUEUE_READY, 1),
        ]);
    }

    /// All of it, with one queue.
    fn start(&mut self, queue: &QueueFixture<'_>) {
        self.negotiate();
        self.set_queue(0, 8, queue.addresses());
        self.write(STATUS, READY);
    }

    fn waits_for_interrupt(&self, bits: u32) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.irq.read().is_err() {
            assert!(Instant::now() < deadline, "no interrupt");
            thread::yield_now();
        }
        assert_eq!(self.read(INTERRUPT_STATUS), bits);
    }
}

#[test]
fn a_slot_says_what_is_in_it() {
    let guest = Guest::new();
    let mut slot = Slot::new(&guest);

    let identity = [MAGIC_VALUE, VERSION_NUMBER, DEVICE_ID, VENDOR_ID].map(|r| slot.read(r));
    assert_eq!(identity, [0x7472_6976, 2, 42, 0x6d75_766f]);
    let sizes = [0, 1, 2, u32::MAX].map(|queue| {
        slot.write(QUEUE_SEL, queue);
        slot.read(QUEUE_SIZE_MAX)
    });
    assert_eq!(sizes, [8, 16, 0, 0]);
    let features = [0, 1, 2].map(|select| {
        slot.write(DEVICE_FEATURES_SEL, select);
        slot.read(DEVICE_FEATURES)
    });
    assert_eq!(features, [1 << 5 | 1 << 28 | 1 << 29, 1, 0]);
}

#[test]
fn configuration_is_read_in_any_width_and_ends_where_it_ends() {
    let guest = Guest::new();
    let slot = Slot::new(&guest);
    let read = |offset, width| {
        let mut data = vec![0; width];
        slot.registers.read(CONFIG + offset, &mut data);
        data
    };

    assert_eq!(read(0, 1), [1]);
    assert_eq!(read(1, 2), [2, 3]);
    assert_eq!(read(0, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(read(8, 1), [9]);
    assert_eq!(read(8, 2), [0xff, 0xff]);
    assert_eq!(read(u64::MAX - CONFIG, 4), [0xff; 4]);
}

#[test]
fn a_request_is_served_and_interrupts_until_acknowledged() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 8);
    let mut slot = Slot::new(&guest);
    slot.start(&queue);

    let head = queue.offer(&[guest.buffer(16)], &[]);
    slot.kicks[0].write(1).unwrap();

    slot.waits_for_interrupt(1);
    assert_eq!(queue.used(), [(head, 1)]);
    slot.write(INTERRUPT_ACK, 1);
    assert_eq!(slot.read(INTERRUPT_STATUS), 0);
    assert_eq!(slot.read(STATUS), READY);
}

/// Each row: what is written after ACKNOWLEDGE, and what stands there then.
#[test]
fn status_bits_are_only_added_and_in_order() {
    let guest = Guest::new();
    for (written, read) in [
        (ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER),
        (ACKNOWLEDGE | FAILED, ACKNOWLEDGE | FAILED),
        (ACKNOWLEDGE | NEEDS_RESET, ACKNOWLEDGE),
        (ACKNOWLEDGE | FEATURES_OK, ACKNOWLEDGE),
        (ACKNOWLEDGE | DRIVER_OK, ACKNOWLEDGE),
        (READY, ACKNOWLEDGE),
        (DRIVER, ACKNOWLEDGE),
        (u32::MAX, ACKNOWLEDGE),
        (0, 0),
    ] {
        let mut slot = Slot::new(&guest);
        slot.write(STATUS, ACKNOWLEDGE);

        slot.write(STATUS, written);

        assert_eq!(slot.read(STATUS), read, "{written:#x}");
    }
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let guest = Guest::new();
    for (low, high) in [(0, 0), (1 << 6, 1), (0, 1 << 31 | 1)] {
        let mut slot = Slot::new(&guest);

        slot.write_all(&[
            (STATUS, ACKNOWLEDGE),
            (STATUS, ACKNOWLEDGE | DRIVER),
            (DRIVER_FEATURES_SEL, 0),
            (DRIVER_FEATURES, low),
            (DRIVER_FEATURES_SEL, 1),
            (DRIVER_FEATURES, high),
            (STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK),
        ]);

        assert_eq!(slot.read(STATUS), ACKNOWLEDGE | DRIVER, "{high:#x} {low:#x}");
    }
}

/// A queue that grew after it was checked is how such rings were escaped from before.
#[test]
fn queues_are_frozen_while_the_device_runs() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 8);
    let mut slot = Slot::new(&guest);
    slot.start(&queue);
    let before = slot.registers.save();

    slot.set_queue(0, 4, [0x1000, 0x2000, 0x3000]);
    slot.write(QUEUE_READY, 0);

    assert_eq!(slot.registers.save().queues, before.queues);
    let head = queue.offer(&[guest.buffer(16)], &[]);
    slot.kicks[0].write(1).unwrap();
    slot.waits_for_interrupt(1);
    assert_eq!(queue.used(), [(head, 1)]);
}

#[test]
fn a_queue_that_makes_no_sense_breaks_its_device_until_reset() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 8);
    let [table, driver, device] = queue.addresses();
    let end = guest.end();
    for (size, addresses) in [
        (8, [end, driver, device]),
        (8, [end - 64, driver, device]),
        (8, [u64::MAX - 15, driver, device]),
        (8, [table, end - 8, device]),
        (8, [table, driver, end - 8]),
        (8, [table + 8, driver, device]),
        (8, [table, driver + 1, device]),
        (8, [table, driver, device + 2]),
        (0, [table, driver, device]),
        (7, [table, driver, device]),
        (16, [table, driver, device]),
        (0x1_0008, [table, driver, device]),
    ] {
        let mut slot = Slot::new(&guest);
        slot.negotiate();
        slot.set_queue(0, size, addresses);

        slot.write(STATUS, READY);

        slot.waits_for_interrupt(2);
        assert_eq!(slot.read(STATUS), READY | NEEDS_RESET, "{size} {addresses:x?}");
        slot.write(STATUS, 0);
        assert_eq!((slot.read(STATUS), slot.read(INTERRUPT_STATUS)), (0, 0));
        slot.start(&queue);
        assert_eq!(slot.read(STATUS), READY);
    }
    assert_eq!(queue.used(), []);
}

#[test]
fn a_ring_that_breaks_later_breaks_the_device_and_nothing_else() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 8);
    let mut slot = Slot::new(&guest);
    slot.start(&queue);
    for head in 0..9 {
        queue.publish(head);
    }

    slot.kicks[0].write(1).unwrap();

    slot.waits_for_interrupt(2);
    assert_eq!(slot.read(STATUS), READY | NEEDS_RESET);
    slot.write(STATUS, READY | NEEDS_RESET | FAILED);
    assert_eq!(slot.read(STATUS), READY | NEEDS_RESET | FAILED);
}

#[test]
fn nothing_is_served_between_reset_and_the_next_start() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 8);
    let mut slot = Slot::new(&guest);
    slot.start(&queue);
    slot.write(STATUS, 0);

    queue.offer(&[guest.buffer(16)], &[]);
    slot.kicks[0].write(1).unwrap();

    // Between the two the thread has looked at everything there was, the kick too.
    slot.orders.pause().unwrap();
    slot.orders.resume().unwrap();
    slot.orders.pause().unwrap();
    assert_eq!(queue.used(), []);
    assert!(slot.irq.read().is_err());
}

#[test]
fn a_kick_during_a_pause_is_served_after_it() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 8);
    let mut slot = Slot::new(&guest);
    slot.start(&queue);
    slot.orders.pause().unwrap();

    let head = queue.offer(&[guest.buffer(16)], &[]);
    slot.kicks[0].write(1).unwrap();

    let saved = slot.orders.save().unwrap();
    assert_eq!((saved[0].queues[0].next_avail, queue.used()), (0, vec![]));
    slot.orders.resume().unwrap();
    slot.waits_for_interrupt(1);
    assert_eq!(queue.used(), [(head, 1)]);
    assert_eq!(slot.registers.save().pending, 1);
}

proptest! {
    /// A vCPU can read and write anything, anywhere, in any width; a reset makes it good again.
    #[test]
    fn no_access_is_too_strange(
        accesses in vec((0_u64..0x120, vec(any::<u8>(), 1..9), any::<bool>()), 0..200),
        wild in any::<u64>(),
    ) {
        let guest = Guest::new();
        let mut slot = Slot::new(&guest);
        let new = slot.registers.save();

        for (offset, mut data, write) in accesses {
            for offset in [offset, offset / 4 * 4, wild] {
                if write {
                    slot.registers.write(offset, &data);
                } else {
                    slot.registers.read(offset, &mut data);
                }
            }
        }

        slot.write(STATUS, 0);
        prop_assert_eq!(slot.registers.save(), new);
    }
}
