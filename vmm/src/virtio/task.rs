//! One device on the device thread: its queues, its files and its turn.
//!
//! The task owns the device. vCPU threads reach it through a [`TaskHandle`], whose orders are
//! rare and waited for; kicks arrive on ioeventfds and interrupts leave on an irqfd, so a request
//! costs no vCPU an exit to this process beyond KVM's own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::mmio::QueueSetup;
use super::ring::Ring;
use super::{Device, DeviceIo, DeviceState, Fault, Interest, Served, TOKEN_MAX, Watch};
use crate::memory::Mem;

/// Token of the order signal; the kick of queue n is the n-th after it.
const ORDER_TOKEN: u32 = TOKEN_MAX;
const KICK_TOKEN: u32 = ORDER_TOKEN + 1;

/// A used buffer waits to be looked at (virtio 1.3, 4.2.2, InterruptStatus).
const USED_BUFFER: u32 = 1;
/// The configuration, here the status, changed.
const CONFIG_CHANGE: u32 = 2;

/// The driver's choice, once it is ready.
#[derive(Debug)]
pub struct Activation {
    /// Accepted features.
    pub features: u64,
    /// Whether VIRTIO_F_EVENT_IDX is among them.
    pub event_idx: bool,
    /// The queues as set up.
    pub queues: Vec<QueueSetup>,
}

/// A device and its queues at rest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskState {
    /// The device's own.
    pub device: DeviceState,
    /// Where each queue stands.
    pub queues: Vec<QueueState>,
}

/// Where a queue stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Index of the next request to take.
    pub next_avail: u16,
    /// Index of the next request to return.
    pub next_used: u16,
}

/// The interrupt of a device: what is pending, and how the guest hears of it.
#[derive(Debug, Clone)]
pub struct Line {
    pending: Arc<AtomicU32>,
    broken: Arc<AtomicBool>,
    irq: Arc<EventFd>,
}

impl Line {
    /// A line that raises `irq`, which is an irqfd.
    pub fn new(irq: Arc<EventFd>) -> Self {
        Self { pending: Arc::default(), broken: Arc::default(), irq }
    }

    /// InterruptStatus.
    pub fn pending(&self) -> u32 {
        self.pending.load(Ordering::SeqCst)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.pending.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Whether the device needs a reset.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// As after power-on.
    pub fn clear(&self) {
        self.pending.store(0, Ordering::SeqCst);
        self.broken.store(false, Ordering::SeqCst);
    }

    fn raise(&self, bits: u32) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        // An eventfd refuses only when its counter is full: then the interrupt is raised already.
        let _ = self.irq.write(1);
    }

    fn fail(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.raise(CONFIG_CHANGE);
    }
}

/// How other threads reach a task.
#[derive(Debug)]
pub struct TaskHandle {
    orders: Sender<Order>,
    signal: EventFd,
}

#[derive(Debug)]
enum Order {
    Activate(Activation, Sender<()>),
    Reset(Sender<()>),
    Drain(Sender<()>),
    Save(Sender<TaskState>),
}

impl TaskHandle {
    /// Starts the device; if its queues make no sense it is broken instead.
    pub fn activate(&self, activation: Activation) {
        self.order(|done| Order::Activate(activation, done));
    }

    /// Stops the device; when this returns it touches guest memory no more.
    pub fn reset(&self) {
        self.order(Order::Reset);
    }

    /// Brings its requests in flight to an end.
    pub fn drain(&self) {
        self.order(Order::Drain);
    }

    /// What it would need to go on elsewhere; nothing if the device thread has ended.
    pub fn save(&self) -> Option<TaskState> {
        self.order(Order::Save)
    }

    /// Sends an order and waits for the answer. None if the device thread has ended, as it does
    /// only together with the machine.
    fn order<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Option<T> {
        let (done, answer) = mpsc::channel();
        self.orders.send(order(done)).ok()?;
        let _ = self.signal.write(1);
        answer.recv().ok()
    }
}

/// A device with its queues.
#[derive(Debug)]
pub struct Task {
    device: Box<dyn Device>,
    mem: Mem,
    rings: Vec<Ring>,
    kicks: Vec<EventFd>,
    line: Line,
    orders: Receiver<Order>,
    signal: EventFd,
}

impl Task {
    /// A task for `device` that interrupts by `line`, and the handle to it.
    ///
    /// # Errors
    ///
    /// What eventfd(2) says.
    pub fn new(device: Box<dyn Device>, mem: Mem, line: Line) -> io::Result<(Self, TaskHandle)> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        let signal = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let (sender, orders) = mpsc::channel();
        let handle = TaskHandle { orders: sender, signal: signal.try_clone()? };
        Ok((Self { device, mem, rings: Vec::new(), kicks, line, orders, signal }, handle))
    }

    /// The kick of each queue, to be registered as ioeventfd.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    fn obey(&mut self, watch: &mut OpsWatch<'_, '_>) {
        // The signal only says that there is an order; how often it was raised does not matter.
        let _ = self.signal.read();
        while let Ok(order) = self.orders.try_recv() {
            // Whoever gave the order may be gone; the order is carried out all the same.
            match order {
                Order::Activate(activation, done) => {
                    if self.activate(&activation, watch).is_err() {
                        self.fail(watch);
                    }
                    let _ = done.send(());
                }
                Order::Reset(done) => {
                    self.stop(watch);
                    let _ = done.send(());
                }
                Order::Drain(done) => {
                    self.with_device(watch, |device, io| device.drain(io));
                    let _ = done.send(());
                }
                Order::Save(state) => {
                    let _ = state.send(self.save());
                }
            }
        }
    }

    fn activate(
        &mut self,
        activation: &Activation,
        watch: &mut OpsWatch<'_, '_>,
    ) -> Result<(), Fault> {
        self.rings.clear();
        let sizes = self.device.queue_sizes();
        for (index, (setup, &size_max)) in (0..).zip(activation.queues.iter().zip(sizes)) {
            self.rings.push(ring(index, setup, size_max, activation.event_idx, &self.mem)?);
        }
        let mut io = DeviceIo { mem: &self.mem, rings: &mut self.rings, watch };
        self.device.activate(activation.features, &mut io)
    }

    /// Lets the device work, then tells the guest of used buffers and comes back for the rest.
    fn with_device(
        &mut self,
        watch: &mut OpsWatch<'_, '_>,
        work: impl FnOnce(&mut dyn Device, &mut DeviceIo<'_>) -> Result<Served, Fault>,
    ) {
        if self.rings.is_empty() {
            return;
        }
        let mut io = DeviceIo { mem: &self.mem, rings: &mut self.rings, watch };
        let told = work(&mut *self.device, &mut io).and_then(|served| self.tell(served));
        if told.is_err() {
            self.fail(watch);
        }
    }

    fn tell(&mut self, served: Served) -> Result<(), Fault> {
        let mut raise = false;
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if served.used & 1 << index != 0 {
                raise |= ring.wants_interrupt(&self.mem)?;
            }
        }
        if raise {
            self.line.raise(USED_BUFFER);
        }
        for (index, kick) in self.kicks.iter().enumerate() {
            if served.again & 1 << index != 0 {
                let _ = kick.write(1);
            }
        }
        Ok(())
    }

    /// The guest broke its device: it is stopped until the driver resets it.
    fn fail(&mut self, watch: &mut OpsWatch<'_, '_>) {
        self.stop(watch);
        self.line.fail();
    }

    fn stop(&mut self, watch: &mut OpsWatch<'_, '_>) {
        self.device.reset(watch);
        self.rings.clear();
    }

    fn save(&self) -> TaskState {
        let queues = self.rings.iter().map(Ring::state).collect();
        TaskState { device: self.device.save(), queues }
    }
}

impl MutEventSubscriber for Task {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let files = [&self.signal].into_iter().chain(&self.kicks);
        for (token, file) in (ORDER_TOKEN..).zip(files) {
            ops.add(Events::with_data(file, token, EventSet::IN))
                .expect("a new eventfd can be waited for");
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let watch = &mut OpsWatch { ops };
        match events.data() {
            ORDER_TOKEN => self.obey(watch),
            token @ KICK_TOKEN.. => {
                let index = token - KICK_TOKEN;
                let Some(kick) = self.kicks.get(index as usize) else { return };
                let _ = kick.read();
                let Ok(index) = u16::try_from(index) else { return };
                self.with_device(watch, |device, io| device.service(index, io));
            }
            token => self.with_device(watch, |device, io| device.wake(token, io)),
        }
    }
}

/// Builds one ring and checks that all of it lies in guest memory.
fn ring(
    index: u16,
    setup: &QueueSetup,
    size_max: u16,
    event_idx: bool,
    mem: &Mem,
) -> Result<Ring, Fault> {
    let fault = |source| Fault::Queue { index, source };
    let mut queue = Queue::new(size_max).map_err(fault)?;
    if setup.ready {
        queue.try_set_size(setup.size).map_err(fault)?;
        queue
            .try_set_desc_table_address(vm_memory::GuestAddress(setup.descriptors))
            .map_err(fault)?;
        queue.try_set_avail_ring_address(vm_memory::GuestAddress(setup.driver)).map_err(fault)?;
        queue.try_set_used_ring_address(vm_memory::GuestAddress(setup.device)).map_err(fault)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(mem) {
            return Err(Fault::Protocol { index, what: "a ring lies outside guest memory" });
        }
    }
    Ok(Ring::new(index, queue))
}

/// The event manager as a device sees it.
#[derive(Debug)]
struct OpsWatch<'o, 'm> {
    ops: &'o mut EventOps<'m>,
}

impl Watch for OpsWatch<'_, '_> {
    fn add(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        self.ops.add(Events::with_data(&file, token, event_set(interest))).map_err(io::Error::other)
    }

    fn change(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        self.ops
            .modify(Events::with_data(&file, token, event_set(interest)))
            .map_err(io::Error::other)
    }

    fn remove(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.ops.remove(Events::empty_raw(file.as_raw_fd())).map_err(io::Error::other)
    }
}

fn event_set(interest: Interest) -> EventSet {
    match interest {
        Interest::Nothing => EventSet::empty(),
        Interest::Read => EventSet::IN,
        Interest::Write => EventSet::OUT,
        Interest::ReadWrite => EventSet::IN | EventSet::OUT,
    }
}
