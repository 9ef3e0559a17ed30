//! A guest that is an enemy, around any device.
//!
//! Its driver knows how to make right requests, because garbage alone gets nowhere, and how to get
//! each thing wrong: rings anywhere, descriptors in circles, indices that jump. The device thread
//! is played as well: it waits for files and serves kicks, one round at a time. What must hold is
//! said by the device itself (no panic, no overflow), by the fuzzer (no hang, no memory without
//! end), and here: a device that was reset waits for nothing.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use ovum_vmm::memory::Mem;
use ovum_vmm::virtio::config_space::ConfigSpace;
use ovum_vmm::virtio::mmio::QueueSetup;
use ovum_vmm::virtio::shown::ShownSlots;
use ovum_vmm::virtio::task::{Activation, Line, Task};
use ovum_vmm::virtio::{Device, Interest, Watch};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// All of memory. Rings lie in its first half, and the driver's buffers in the second.
pub const MEMORY_BYTES: u64 = 1 << 20;

/// Each queue's share of the first half.
const QUEUE_BYTES: u64 = 128 << 10;

/// Where the rings of a queue lie in its share.
const AVAIL_OFFSET: u64 = 8 << 10;
const USED_OFFSET: u64 = 16 << 10;

/// Rounds after the last move, in which a device that wants to go on for ever is found out: twice
/// as many as a full queue has requests, for one whose limit has no burst takes a round for each.
const ROUNDS_MAX: usize = 512;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// What the guest does, whatever the device.
#[derive(Debug, Clone, Arbitrary)]
pub enum Move {
    /// Offers a right request: these bytes, then room for so many.
    Offer {
        queue: u8,
        readable: Vec<u8>,
        cut: u8,
        writable: u16,
    },
    /// Offers room, several times.
    Fill {
        queue: u8,
        buffers: u8,
        writable: u16,
    },
    /// Writes a descriptor.
    Describe {
        queue: u8,
        index: u8,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    },
    /// Makes whatever descriptor available.
    Publish {
        queue: u8,
        head: u16,
    },
    /// Sets an index of the available ring.
    Jump {
        queue: u8,
        index: u16,
    },
    /// Writes anywhere.
    Write {
        address: u32,
        bytes: Vec<u8>,
    },
    Kick {
        queue: u8,
    },
    Round,
    /// Resets the device and sets it up again: right, or so.
    Reset {
        setup: Option<(u8, u16, u64, u64, u64)>,
    },
}

/// A device and its enemy.
pub struct HostileGuest {
    mem: Arc<Mem>,
    task: Task,
    watch: Files,
    features: u64,
    queues: Vec<Queue>,
    /// Where the next buffer lies.
    next_buffer: u64,
}

/// A queue as its driver has it.
#[derive(Debug, Clone)]
struct Queue {
    size: u16,
    start: u64,
    next_descriptor: u16,
    next_avail: u16,
}

impl HostileGuest {
    /// One that has set `device` up as it should be.
    pub fn new(device: impl Device + 'static) -> Self {
        let half = usize::try_from(MEMORY_BYTES / 2).unwrap();
        let ranges = [(GuestAddress(0), half), (GuestAddress(MEMORY_BYTES / 2), half)];
        Self::over(Arc::new(Mem::from_ranges(&ranges).unwrap()), device)
    }

    /// One that has `mem`, which the device may change.
    pub fn over(mem: Arc<Mem>, device: impl Device + 'static) -> Self {
        let (features, sizes) = (device.features(), device.queue_sizes());
        let queues = (0..).zip(sizes).map(|(number, &size)| Queue {
            size,
            start: number * QUEUE_BYTES,
            next_descriptor: 0,
            next_avail: 0,
        });
        let queues: Vec<Queue> = queues.collect();
        let shown = ShownSlots::new().unwrap().slot(0).unwrap();
        let line = Line::new(Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()), shown.clone());
        let config = ConfigSpace::new(device.config(), shown);
        let task = Task::new(Box::new(device), config, Arc::clone(&mem), line).unwrap();
        let watch = Files::default();
        let mut guest = Self { mem, task, watch, features, queues, next_buffer: MEMORY_BYTES / 2 };
        guest.activate(None);
        guest
    }

    /// Does what the fuzzer wants.
    pub fn make(&mut self, step: Move) {
        match step {
            Move::Offer { queue, readable, cut, writable } => {
                self.offer(queue, &readable, cut.into(), writable);
                self.kick(queue);
            }
            Move::Fill { queue, buffers, writable } => {
                for _ in 0..buffers {
                    self.offer(queue, &[], 0, writable);
                }
                self.kick(queue);
            }
            Move::Describe { queue, index, address, length, flags, next } => {
                let queue = self.queue(queue).clone();
                self.describe(&queue, index.into(), (address, length), flags, next);
            }
            Move::Publish { queue, head } => self.publish(queue, head),
            Move::Jump { queue, index } => {
                let start = self.queue(queue).start + AVAIL_OFFSET;
                self.queue(queue).next_avail = index;
                self.write(start + 2, &index.to_le_bytes());
            }
            Move::Write { address, bytes } => {
                self.write(u64::from(address) % MEMORY_BYTES, &bytes);
            }
            Move::Kick { queue } => self.kick(queue),
            Move::Round => drop(self.round()),
            Move::Reset { setup } => {
                self.task.reset(&mut self.watch);
                assert!(self.watch.files.is_empty(), "a device that was reset waits for files");
                self.activate(setup);
            }
        }
    }

    /// Offers a request whose readable part is cut in two.
    pub fn offer(&mut self, queue: u8, readable: &[u8], cut: usize, writable: u16) {
        let (front, back) = readable.split_at(cut.min(readable.len()));
        let mut parts = Vec::new();
        for bytes in [front, back] {
            if !bytes.is_empty() {
                let address = self.buffer(bytes.len());
                self.write(address, bytes);
                parts.push((address, bytes.len(), 0));
            }
        }
        if writable > 0 || parts.is_empty() {
            parts.push((self.buffer(writable.into()), writable.into(), WRITE));
        }
        let entry = self.queue(queue).clone();
        let at = |n: usize| entry.next_descriptor.wrapping_add(n as u16) % entry.size;
        let count = parts.len();
        for (position, (address, length, flags)) in parts.into_iter().enumerate() {
            let more = if position + 1 < count { NEXT } else { 0 };
            let length = u32::try_from(length).unwrap();
            let next = at(position + 1);
            self.describe(&entry, at(position), (address, length), flags | more, next);
        }
        self.queue(queue).next_descriptor = at(count);
        self.publish(queue, at(0));
    }

    pub fn kick(&mut self, queue: u8) {
        let index = usize::from(queue) % self.queues.len();
        self.task.serve(u16::try_from(index).unwrap(), &mut self.watch);
    }

    /// What the device thread does in one round; whether there was anything to do.
    pub fn round(&mut self) -> bool {
        let mut worked = false;
        for index in 0..self.queues.len() {
            if is_ready(self.task.kicks()[index].as_raw_fd(), PollFlags::IN) {
                self.task.serve(u16::try_from(index).unwrap(), &mut self.watch);
                worked = true;
            }
        }
        let files = self.watch.files.clone();
        for (fd, (token, interest)) in files {
            let is_watched = self.watch.files.get(&fd) == Some(&(token, interest));
            if is_watched && is_ready(fd, flags(interest)) {
                self.task.wake(token, &mut self.watch);
                worked = true;
            }
        }
        worked
    }

    /// The end: the device comes to rest, and forgets everything when it is reset.
    pub fn finish(mut self) {
        let mut rounds = 0;
        while self.round() {
            rounds += 1;
            assert!(rounds < ROUNDS_MAX, "a device goes on without anything to do");
        }
        self.task.reset(&mut self.watch);
        assert!(self.watch.files.is_empty(), "a device that was reset waits for files");
    }

    fn queue(&mut self, number: u8) -> &mut Queue {
        let index = usize::from(number) % self.queues.len();
        &mut self.queues[index]
    }

    fn activate(&mut self, wrong: Option<(u8, u16, u64, u64, u64)>) {
        let mut setups: Vec<QueueSetup> = Vec::new();
        for queue in &mut self.queues {
            (queue.next_descriptor, queue.next_avail) = (0, 0);
            setups.push(QueueSetup {
                size: queue.size,
                ready: true,
                descriptors: queue.start,
                driver: queue.start + AVAIL_OFFSET,
                device: queue.start + USED_OFFSET,
            });
        }
        for queue in self.queues.clone() {
            self.write(queue.start + AVAIL_OFFSET, &[0; 4]);
            self.write(queue.start + USED_OFFSET, &[0; 4]);
        }
        if let Some((queue, size, descriptors, driver, device)) = wrong {
            let index = usize::from(queue) % setups.len();
            setups[index] = QueueSetup { size, ready: true, descriptors, driver, device };
        }
        let activation = Activation { features: self.features, event_idx: true, queues: setups };
        self.task.activate(&activation, &mut self.watch);
    }

    fn describe(
        &mut self,
        queue: &Queue,
        index: u16,
        (address, length): (u64, u32),
        flags: u16,
        next: u16,
    ) {
        let mut bytes = Vec::with_capacity(16);
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.write(queue.start + 16 * u64::from(index % queue.size), &bytes);
    }

    fn publish(&mut self, queue: u8, head: u16) {
        let entry = self.queue(queue);
        let slot = u64::from(entry.next_avail % entry.size);
        entry.next_avail = entry.next_avail.wrapping_add(1);
        let (start, index) = (entry.start + AVAIL_OFFSET, entry.next_avail);
        self.write(start + 4 + 2 * slot, &head.to_le_bytes());
        self.write(start + 2, &index.to_le_bytes());
    }

    /// Memory for a buffer; old ones are overwritten in the end.
    fn buffer(&mut self, bytes: usize) -> u64 {
        let bytes = bytes as u64;
        if self.next_buffer + bytes > MEMORY_BYTES {
            self.next_buffer = MEMORY_BYTES / 2;
        }
        let address = self.next_buffer;
        self.next_buffer += bytes;
        address
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        // What does not fit is cut.
        let _ = self.mem.write(bytes, GuestAddress(address));
    }
}

/// The files that the device waits for.
#[derive(Debug, Default)]
struct Files {
    files: BTreeMap<RawFd, (u32, Interest)>,
}

impl Watch for Files {
    fn add(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        let before = self.files.insert(file.as_raw_fd(), (token, interest));
        assert_eq!(before, None, "a file is waited for twice");
        Ok(())
    }

    fn change(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        let before = self.files.insert(file.as_raw_fd(), (token, interest));
        assert!(before.is_some(), "a file is changed that is not waited for");
        Ok(())
    }

    fn remove(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        let before = self.files.remove(&file.as_raw_fd());
        assert!(before.is_some(), "a file is removed that is not waited for");
        Ok(())
    }
}

fn flags(interest: Interest) -> PollFlags {
    match interest {
        Interest::Nothing => PollFlags::empty(),
        Interest::Read => PollFlags::IN,
        Interest::Write => PollFlags::OUT,
        Interest::ReadWrite => PollFlags::IN | PollFlags::OUT,
    }
}

fn is_ready(fd: RawFd, flags: PollFlags) -> bool {
    // SAFETY: the device keeps what it waits for open; one that does not is caught by POLLNVAL.
    let fd = unsafe { BorrowedFd::borrow_raw(fd) };
    let mut files = [PollFd::from_borrowed_fd(fd, flags)];
    let found = poll(&mut files, Some(&Timespec::default()));
    assert!(!files[0].revents().contains(PollFlags::NVAL), "a closed file is waited for");
    found.is_ok_and(|ready| ready > 0)
}
