//! The transport as a driver has it: registers through [`Slots`], a device on a real thread.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::slice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::*;
use crate::events::Events;
use crate::layout::{MMIO_SLOT_BYTES, mmio_slot};
use crate::rate_limiter::{RateLimitSpec, RateLimiter};
use crate::reactor::{self, Orders, Reactor};
use crate::slots::Slots;
use crate::spec::DiskSpec;
use crate::testing::{Guest, QueueFixture};
use crate::virtio::blk::Blk;
use crate::virtio::entropy::Entropy;
use crate::virtio::shown::{Shown, ShownSlots};
use crate::virtio::task::Task;

mod traffic;

/// How long a device thread may be between two of its steps.
const PATIENCE: Duration = Duration::from_secs(10);

const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;
const RUNNING: u32 = READY | DRIVER_OK;
const QUEUE_SIZE_MAX_OF_ENTROPY: u16 = 64;

fn parts(
    device: Box<dyn Device>,
    guest: &Guest,
    irq: &Arc<EventFd>,
    orders: &Orders,
    shown: Shown,
) -> (Task, Registers) {
    let line = Line::new(irq.clone(), shown.clone());
    let config = ConfigSpace::new(device.config(), shown);
    let identity = Identity::of(&*device, config.clone());
    let task = Task::new(device, config, Arc::new(guest.mem.clone()), line.clone()).unwrap();
    (task, Registers::new(0, identity, orders.clone(), line))
}

/// A driver, and everything below it but KVM.
struct Driver {
    slots: Slots,
    kick: EventFd,
    irq: Arc<EventFd>,
    orders: Orders,
    // Last, so that it ends last: registers may wait for it.
    _reactor: Reactor,
}

impl Driver {
    fn of(device: Box<dyn Device>, guest: &Guest) -> Self {
        let (orders, inbox) = reactor::orders().unwrap();
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap());
        let shown = ShownSlots::new().unwrap();
        let (task, registers) = parts(device, guest, &irq, &orders, shown.slot(0).unwrap());
        let kick = task.kicks()[0].try_clone().unwrap();
        let events = Arc::new(Events::new().unwrap());
        let reactor =
            Reactor::start(vec![task], orders.clone(), inbox, Vec::new(), events).unwrap();
        let slots = Slots::new(vec![registers], 0, shown);
        Self { slots, kick, irq, orders, _reactor: reactor }
    }

    /// Another device for its slot, and what its driver finds there.
    fn parts(&self, device: Box<dyn Device>, guest: &Guest) -> (Task, Registers) {
        parts(device, guest, &self.irq, &self.orders, self.shown())
    }

    fn shown(&self) -> Shown {
        self.slots.shown().slot(0).unwrap()
    }

    /// The device goes, as one that the machine takes away.
    fn vacate(&self) {
        assert!(self.slots.vacate(0).is_some());
        assert!(self.orders.take(0).unwrap().is_some());
    }

    /// Another device comes.
    fn fill(&mut self, device: Box<dyn Device>, guest: &Guest) {
        let (task, registers) = self.parts(device, guest);
        self.kick = task.kicks()[0].try_clone().unwrap();
        assert!(self.orders.put(0, Box::new(task)).unwrap().is_ok());
        self.slots.fill(0, registers);
    }

    fn of_entropy(guest: &Guest) -> Self {
        Self::of(Box::new(Entropy::new()), guest)
    }

    fn write(&self, offset: u64, value: u32) {
        self.slots.write(mmio_slot(0).unwrap() + offset, &value.to_le_bytes());
    }

    /// What a register says, and what is shown of it, which is the same.
    fn read(&self, offset: u64) -> u32 {
        let shown = self.shown();
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut data = [0; 4];
            self.slots.read(mmio_slot(0).unwrap() + offset, &mut data);
            let says = u32::from_le_bytes(data);
            // Between two looks a device may have changed its mind.
            if !offset.is_multiple_of(4) || offset >= CONFIG || shown.says(offset) == says {
                return says;
            }
            assert!(Instant::now() < deadline, "{offset:#x} says {says:#x}, and shows other");
        }
    }

    fn read_config(&self, offset: u64, width: usize) -> Vec<u8> {
        let mut data = vec![0xaa; width];
        self.slots.read(mmio_slot(0).unwrap() + CONFIG + offset, &mut data);
        if data.iter().any(|&byte| byte != 0xff) {
            let words = (CONFIG..CONFIG + offset + width as u64).step_by(4);
            let shown: Vec<u8> = words
                .flat_map(|at| self.shown().says(at).to_le_bytes())
                .skip(usize::try_from(offset).unwrap())
                .collect();
            let shown = &shown[..width];
            assert_eq!(shown, data, "what is shown of a configuration");
        }
        data
    }

    fn write_status(&self, value: u32) -> u32 {
        self.write(STATUS, value);
        self.read(STATUS)
    }

    /// From reset to FEATURES_OK.
    fn negotiate(&self, features: u64) -> u32 {
        self.write(STATUS, 0);
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        for select in [0, 1] {
            self.write(DRIVER_FEATURES_SEL, select);
            self.write(DRIVER_FEATURES, half(features, select));
        }
        self.write_status(READY)
    }

    fn set_up(&self, queue: &QueueSetup) {
        self.write(QUEUE_SEL, 0);
        self.write(QUEUE_SIZE, queue.size.into());
        let addresses = [
            (QUEUE_DESC_LOW, queue.descriptors),
            (QUEUE_DRIVER_LOW, queue.driver),
            (QUEUE_DEVICE_LOW, queue.device),
        ];
        for (low, address) in addresses {
            self.write(low, half(address, 0));
            self.write(low + 4, half(address, 1));
        }
        self.write(QUEUE_READY, queue.ready.into());
    }

    /// From whatever was before to a device that serves `queue`.
    fn start(&self, queue: &QueueSetup) -> u32 {
        assert_eq!(self.negotiate(TRANSPORT_FEATURES), READY);
        self.set_up(queue);
        self.write_status(RUNNING)
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits for an interrupt, and returns and acknowledges what it says.
    fn interrupt(&self) -> u32 {
        let epoll = Epoll::new().unwrap();
        let readable = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, self.irq.as_raw_fd(), readable).unwrap();
        let ready = epoll.wait(20_000, &mut [EpollEvent::default()]).unwrap();
        assert_eq!(ready, 1, "no interrupt in 20 s");
        self.irq.read().unwrap();
        let pending = self.read(INTERRUPT_STATUS);
        self.write(INTERRUPT_ACK, pending);
        pending
    }

    /// Returns once the device thread has done all that it was kicked for before.
    fn settle(&self) {
        // Kicks of before the first order are served before the second.
        self.orders.save().unwrap();
        self.orders.save().unwrap();
    }

    /// Resets the device and has one request answered.
    fn gives_random_bytes(&self, guest: &Guest) {
        let mut queue = QueueFixture::new(guest, 0, QUEUE_SIZE_MAX_OF_ENTROPY);
        let _ = self.irq.read();
        assert_eq!(self.start(&queue.setup()), RUNNING);
        queue.offer(&[], &[guest.buffer(64)]);
        self.kick();
        assert_eq!(self.interrupt(), 1, "a used buffer");
        assert_eq!(queue.used(), [(0, 64)]);
    }
}

#[test]
fn the_status_register_is_this_table() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let written = [0, 1, 3, 7, 0xb, 0xf, 0x40, 0x80, 0xff];
    let row = |from: u32| {
        let cells = written.map(|value| {
            driver.write(STATUS, 0);
            for step in [1, 3, 0xb, 0xf, 0x80, 0x8f].into_iter().filter(|s| from & s == *s) {
                driver.write(STATUS, step);
                driver.write(DRIVER_FEATURES_SEL, 1);
                driver.write(DRIVER_FEATURES, 1);
            }
            assert_eq!(driver.read(STATUS), from);
            format!("{:02x}", driver.write_status(value))
        });
        cells.join(" ")
    };

    let rows = [0, 1, 3, 0xb, 0xf, 0x80, 0x8f].map(row);

    let table = [
        // 00 01 03 07 0b 0f 40 80 ff
        "00 01 00 00 00 00 00 80 00", // after reset
        "00 01 03 01 01 01 01 01 01", // ACKNOWLEDGE
        "00 03 03 03 0b 03 03 03 03", // and DRIVER
        "00 0b 0b 0b 0b 0f 0b 0b 0b", // and FEATURES_OK
        "00 0f 0f 0f 0f 0f 0f 0f 8f", // and DRIVER_OK
        "00 80 80 80 80 80 80 80 80", // FAILED from the start
        "00 8f 8f 8f 8f 8f 8f 8f 8f", // FAILED while it ran
    ];
    assert_eq!(rows, table);
}

#[test]
fn features_are_what_was_offered_and_then_frozen() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let offered = [0, 1, 2, u32::MAX].map(|select| {
        driver.write(DEVICE_FEATURES_SEL, select);
        driver.read(DEVICE_FEATURES)
    });
    assert_eq!(offered, [1 << 29 | 1 << 28, 1, 0, 0]);
    let at_once = [ALL_FEATURES_LOW, ALL_FEATURES_HIGH].map(|half| driver.read(half));
    assert_eq!(at_once, offered[..2]);

    assert_eq!(driver.negotiate(0), ACKNOWLEDGE | DRIVER, "a legacy driver");
    assert_eq!(driver.negotiate(1 << 32 | 1), ACKNOWLEDGE | DRIVER, "a bit that was not offered");
    assert_eq!(driver.negotiate(1 << 32 | 1 << 63), ACKNOWLEDGE | DRIVER);
    assert_eq!(driver.negotiate(1 << 32), READY);

    driver.write(DRIVER_FEATURES_SEL, 0);
    driver.write(DRIVER_FEATURES, u32::MAX);
    let accepted = driver.slots.each(|registers| registers.state().driver_features)[0].1;
    assert_eq!(accepted, 1 << 32);
}

#[test]
fn queues_are_set_up_between_features_and_the_start_only() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let queue = QueueFixture::new(&guest, 0, 64).setup();
    let other = QueueSetup { size: 2, ready: false, descriptors: 1, driver: 2, device: 3 };
    let state = || driver.slots.each(|registers| registers.state().queues.clone()).remove(0).1;
    let unset = QueueSetup { size: 64, ..QueueSetup::default() };

    driver.set_up(&queue);
    assert_eq!(state(), slice::from_ref(&unset), "before features");
    assert_eq!(driver.start(&queue), RUNNING);
    driver.set_up(&other);
    assert_eq!(state(), [queue], "while it runs");
    driver.write(STATUS, 0);
    assert_eq!(state(), [unset], "after a reset");
}

#[test]
fn a_queue_that_is_not_there_has_no_size_and_takes_no_setup() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    driver.negotiate(TRANSPORT_FEATURES);
    assert_eq!(driver.read(QUEUE_SIZE_MAX), 64);

    for select in [1, 32, u32::MAX] {
        driver.write(QUEUE_SEL, select);
        assert_eq!(driver.read(QUEUE_SIZE_MAX), 0);
        driver.write(QUEUE_READY, 1);
        assert_eq!(driver.read(QUEUE_READY), 0);
    }
    assert_eq!(driver.write_status(RUNNING), RUNNING, "a driver may use no queue at all");
}

#[test]
fn a_request_is_answered_and_announced() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    driver.gives_random_bytes(&guest);

    assert_eq!(driver.read(INTERRUPT_STATUS), 0, "acknowledged");
    driver.gives_random_bytes(&guest);
}

#[test]
fn a_queue_that_makes_no_sense_breaks_the_device_until_reset() {
    let guest = Guest::new();
    let good = QueueFixture::new(&guest, 0, 64).setup();
    let broken = [
        QueueSetup { size: 0, ..good.clone() },
        QueueSetup { size: 3, ..good.clone() },
        QueueSetup { size: 128, ..good.clone() },
        QueueSetup { size: u16::MAX, ..good.clone() },
        QueueSetup { descriptors: 8, ..good.clone() },
        QueueSetup { driver: 1, ..good.clone() },
        QueueSetup { device: 2, ..good.clone() },
        QueueSetup { descriptors: guest.end() - 16, ..good.clone() },
        QueueSetup { driver: guest.end(), ..good.clone() },
        QueueSetup { device: u64::MAX - 3, ..good.clone() },
        QueueSetup { descriptors: u64::MAX - 15, ..good },
    ];
    let driver = Driver::of_entropy(&guest);
    for queue in broken {
        let _ = driver.irq.read();

        assert_eq!(driver.start(&queue), RUNNING | NEEDS_RESET, "{queue:?}");
        assert_eq!(driver.interrupt(), 2, "a change of configuration");
        assert_eq!(driver.write_status(driver.read(STATUS) | FAILED), 0x8f | NEEDS_RESET);
        assert_eq!(driver.write_status(0), 0);
        driver.gives_random_bytes(&guest);
    }
}

#[test]
fn a_ring_that_breaks_while_it_runs_breaks_the_device_until_reset() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let mut queue = QueueFixture::new(&guest, 0, 64);
    assert_eq!(driver.start(&queue.setup()), RUNNING);
    queue.publish(1000);
    driver.kick();
    assert_eq!(driver.interrupt(), 2, "a change of configuration");
    assert_eq!(driver.read(STATUS), RUNNING | NEEDS_RESET);
    assert!(driver.slots.each(|registers| registers.line().state().broken)[0].1);

    // It is left alone from here on.
    driver.kick();
    driver.settle();
    assert_eq!(queue.used(), []);

    driver.gives_random_bytes(&guest);
}

#[test]
fn a_device_that_was_reset_serves_nothing() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let mut queue = QueueFixture::new(&guest, 0, 64);
    assert_eq!(driver.start(&queue.setup()), RUNNING);
    driver.write(STATUS, 0);

    queue.offer(&[], &[guest.buffer(64)]);
    driver.kick();
    driver.settle();

    assert_eq!(queue.used(), []);
    assert_eq!(driver.read(INTERRUPT_STATUS), 0);
}

#[test]
fn a_kick_during_a_pause_is_served_after_it() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let mut queue = QueueFixture::new(&guest, 0, 64);
    assert_eq!(driver.start(&queue.setup()), RUNNING);
    driver.orders.pause().unwrap();

    queue.offer(&[], &[guest.buffer(64)]);
    driver.kick();
    let saved = driver.orders.save().unwrap();

    assert_eq!((saved[0].1.queues[0].next_avail, queue.used()), (0, vec![]));
    driver.orders.resume().unwrap();
    assert_eq!(driver.interrupt(), 1);
    assert_eq!(queue.used(), [(0, 64)]);
}

#[test]
fn the_configuration_is_read_in_any_width() {
    let guest = Guest::new();
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x0001_0203 * 512).unwrap();
    let disk = DiskSpec { id: "disk".into(), read_only: false };
    let limiter = RateLimiter::new(RateLimitSpec::default(), Instant::now());
    let disk = Blk::new(file, &disk, &limiter).unwrap();
    let end = disk.config().len() as u64;
    let driver = Driver::of(Box::new(disk), &guest);
    assert_eq!(driver.read(DEVICE_ID), 2);

    assert_eq!(driver.read_config(0, 8), [3, 2, 1, 0, 0, 0, 0, 0]);
    assert_eq!(driver.read_config(0, 4), [3, 2, 1, 0]);
    assert_eq!(driver.read_config(1, 2), [2, 1]);
    assert_eq!(driver.read_config(2, 1), [1]);
    assert_eq!(driver.read_config(0, 0), [0_u8; 0]);
    assert_eq!(driver.read_config(end - 2, 4), [0xff; 4], "over the end");
    assert_eq!(
        driver.read_config(MMIO_SLOT_BYTES - 1 - CONFIG, 8),
        [0xff; 8],
        "over the end of the slot"
    );
}

/// A disk whose every byte is `content`.
fn disk(content: u8) -> Box<dyn Device> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[content; 4096]).unwrap();
    let spec = DiskSpec { id: "disk".into(), read_only: false };
    let limiter = RateLimiter::new(RateLimitSpec::default(), Instant::now());
    Box::new(Blk::new(file, &spec, &limiter).unwrap())
}

/// One reader after the other finds its own disk behind the same slot, whatever the one before left
/// in its registers; between them there is a placeholder.
#[test]
fn devices_come_and_go_in_a_slot() {
    let guest = Guest::new();
    let mut driver = Driver::of_entropy(&guest);
    for content in [0x11, 0x22] {
        driver.vacate();
        assert_eq!((driver.read(MAGIC_VALUE), driver.read(DEVICE_ID)), (MAGIC, 0));

        driver.fill(disk(content), &guest);

        assert_eq!(driver.read(DEVICE_ID), 2);
        let mut queue = QueueFixture::new(&guest, 0, 256);
        assert_eq!(driver.start(&queue.setup()), RUNNING);
        let header = guest.buffer_of(&[0; 16]);
        let (data, status) = (guest.buffer(512), guest.buffer_of(&[0xff]));
        queue.offer(&[header], &[data, status]);
        driver.kick();
        assert_eq!(driver.interrupt(), 1);
        assert_eq!((guest.read(data), guest.read(status)), (vec![content; 512], vec![0]));
    }
}

/// What was asked of a disk before it went is done, and after it nothing is.
#[test]
fn a_driver_that_does_not_let_go_of_its_device_is_left_with_a_placeholder() {
    let guest = Guest::new();
    let mut driver = Driver::of_entropy(&guest);
    driver.vacate();
    driver.fill(disk(0x33), &guest);
    let mut queue = QueueFixture::new(&guest, 0, 256);
    assert_eq!(driver.start(&queue.setup()), RUNNING);
    let request = |queue: &mut QueueFixture<'_>| {
        let header = guest.buffer_of(&[0; 16]);
        queue.offer(&[header], &[guest.buffer(512), guest.buffer(1)])
    };

    driver.orders.pause().unwrap();
    driver.vacate();
    request(&mut queue);
    driver.kick();
    driver.orders.resume().unwrap();
    driver.settle();

    assert_eq!(queue.used(), []);
    for value in [0, 1, 3, 0xb, 0xf, u32::MAX] {
        assert_eq!(driver.write_status(value), u32::MAX);
        driver.set_up(&queue.setup());
    }
    assert_eq!(driver.read(DEVICE_ID), 0);
    assert!(driver.orders.take(0).unwrap().is_none() && driver.orders.take(200).unwrap().is_none());
    driver.fill(Box::new(Entropy::new()), &guest);
    driver.gives_random_bytes(&guest);
}

#[test]
fn a_slot_has_one_device() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    let (task, _registers) = driver.parts(disk(0), &guest);

    let refused = driver.orders.put(0, Box::new(task)).unwrap().unwrap_err();

    assert_eq!(refused.source.kind(), io::ErrorKind::AlreadyExists);
    driver.gives_random_bytes(&guest);
}

#[test]
fn registers_are_four_bytes_wide() {
    let guest = Guest::new();
    let driver = Driver::of_entropy(&guest);
    for width in [1, 2, 8] {
        let mut data = vec![0; width];
        driver.slots.read(mmio_slot(0).unwrap() + MAGIC_VALUE, &mut data);
        assert_eq!(data, vec![0xff; width]);
        data.fill(1);
        driver.slots.write(mmio_slot(0).unwrap() + STATUS, &data);
        assert_eq!(driver.read(STATUS), 0);
    }
    assert_eq!(driver.read(MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(MAGIC_VALUE + 1), u32::MAX);
}
