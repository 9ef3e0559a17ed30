//! One device on the device thread: its queues, its files and its turn.
//!
//! The task owns the device and does for it what is the same for all: it checks the queues, raises
//! the interrupt if the driver wants it, comes back for what was left over, and takes a device
//! whose driver broke the rules out of service.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config_space::ConfigSpace;
use super::mmio::QueueSetup;
use super::ring::Ring;
use super::shown::Shown;
use super::{Device, DeviceIo, DeviceState, Fault, Served, Watch};
use crate::memory::Mem;

/// A used buffer waits to be looked at (virtio 1.3, 4.2.2, InterruptStatus).
const USED_BUFFER: u32 = 1;
/// The configuration, or the status, changed.
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

/// What a device has told the guest and the guest has not yet heard.
///
/// Whoever restores it raises the interrupt again if something is pending: one too many does no
/// harm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineState {
    /// InterruptStatus.
    pub pending: u32,
    /// Whether the device needs a reset.
    pub broken: bool,
}

/// Where a queue stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Index of the next request to take.
    pub next_avail: u16,
    /// Index of the next request to return.
    pub next_used: u16,
}

/// What has a guest look at its device.
pub trait Interrupt: Debug + Send + Sync {
    /// Raises it, once. Only one thread does: the device's.
    fn raise(&self);
}

/// For those who only want to see that it is raised.
impl Interrupt for EventFd {
    fn raise(&self) {
        // It refuses only when its counter is full: then the interrupt is raised already.
        let _ = self.write(1);
    }
}

/// The interrupt of a device: what is pending, and how the guest hears of it.
#[derive(Debug, Clone)]
pub struct Line {
    shown: Shown,
    broken: Arc<AtomicBool>,
    irq: Arc<dyn Interrupt>,
}

impl Line {
    /// A line that raises `irq`; what is pending is `shown`.
    pub fn new(irq: Arc<dyn Interrupt>, shown: Shown) -> Self {
        let line = Self { shown, broken: Arc::default(), irq };
        line.clear();
        line
    }

    /// What the guest sees of the device.
    pub fn shown(&self) -> &Shown {
        &self.shown
    }

    /// InterruptStatus.
    pub fn pending(&self) -> u32 {
        self.shown.interrupt_status().load(Ordering::SeqCst)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.shown.interrupt_status().fetch_and(!bits, Ordering::SeqCst);
    }

    /// Whether the device needs a reset.
    pub fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// What it would need to go on elsewhere.
    pub fn state(&self) -> LineState {
        LineState { pending: self.pending(), broken: self.broken() }
    }

    /// As after power-on.
    pub fn clear(&self) {
        self.shown.interrupt_status().store(0, Ordering::SeqCst);
        self.broken.store(false, Ordering::SeqCst);
    }

    fn raise(&self, bits: u32) {
        self.shown.interrupt_status().fetch_or(bits, Ordering::SeqCst);
        self.irq.raise();
    }

    fn fail(&self) {
        self.broken.store(true, Ordering::SeqCst);
        self.shown.need_reset();
        self.raise(CONFIG_CHANGE);
    }
}

/// A device with its queues.
#[derive(Debug)]
pub struct Task {
    device: Box<dyn Device>,
    config: ConfigSpace,
    mem: Arc<Mem>,
    /// Empty while the device is not active.
    rings: Vec<Ring>,
    kicks: Vec<EventFd>,
    line: Line,
}

impl Task {
    /// A task for `device` that shows its configuration in `config` and interrupts by `line`.
    ///
    /// # Errors
    ///
    /// What eventfd(2) says.
    pub fn new(
        device: Box<dyn Device>,
        config: ConfigSpace,
        mem: Arc<Mem>,
        line: Line,
    ) -> io::Result<Self> {
        let kicks = device
            .queue_sizes()
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        Ok(Self { device, config, mem, rings: Vec::new(), kicks, line })
    }

    /// The kick of each queue, to be registered as ioeventfd.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Guest memory as this device knows it: another after a call in which it was changed.
    pub fn mem(&self) -> &Arc<Mem> {
        &self.mem
    }

    /// Guest memory is `mem` now.
    pub fn set_mem(&mut self, mem: Arc<Mem>) {
        self.mem = mem;
    }

    /// The driver is ready: checks its queues, which are frozen from here on, and starts the
    /// device. If anything makes no sense the device is broken instead.
    pub fn activate(&mut self, activation: &Activation, watch: &mut dyn Watch) {
        if self.try_activate(activation, watch).is_err() {
            self.fail(watch);
        }
    }

    /// Stops the device. It touches guest memory no more.
    pub fn reset(&mut self, watch: &mut dyn Watch) {
        self.device.reset(watch);
        self.rings.clear();
    }

    /// Serves queue `index`, which the driver kicked.
    pub fn serve(&mut self, index: u16, watch: &mut dyn Watch) {
        let Some(kick) = self.kicks.get(usize::from(index)) else { return };
        let _ = kick.read();
        self.with_device(watch, |device, io| device.service(index, io));
    }

    /// Wakes the device: the file to which it gave `token` is ready.
    pub fn wake(&mut self, token: u32, watch: &mut dyn Watch) {
        self.with_device(watch, |device, io| device.wake(token, io));
    }

    /// Brings requests in flight to an end.
    pub fn drain(&mut self, watch: &mut dyn Watch) {
        self.with_device(watch, |device, io| device.drain(io));
    }

    /// What the device and its queues would need to go on elsewhere.
    pub fn save(&self) -> TaskState {
        let queues = self.rings.iter().map(Ring::state).collect();
        TaskState { device: self.device.save(), queues }
    }

    fn try_activate(
        &mut self,
        activation: &Activation,
        watch: &mut dyn Watch,
    ) -> Result<(), Fault> {
        self.rings.clear();
        let sizes = self.device.queue_sizes();
        for (index, (setup, &size_max)) in (0..).zip(activation.queues.iter().zip(sizes)) {
            self.rings.push(ring(index, setup, size_max, activation.event_idx, &self.mem)?);
        }
        let mut io = DeviceIo { mem: &mut self.mem, rings: &mut self.rings, watch };
        self.device.activate(activation.features, &mut io)?;
        self.config.publish(self.device.config());
        Ok(())
    }

    /// Lets the device work, then tells the guest of used buffers and comes back for the rest.
    fn with_device(
        &mut self,
        watch: &mut dyn Watch,
        work: impl FnOnce(&mut dyn Device, &mut DeviceIo<'_>) -> Result<Served, Fault>,
    ) {
        if self.rings.is_empty() {
            return;
        }
        let mut io = DeviceIo { mem: &mut self.mem, rings: &mut self.rings, watch };
        let told = work(&mut *self.device, &mut io).and_then(|served| self.tell(served));
        if told.is_err() {
            self.fail(watch);
        }
    }

    fn tell(&mut self, served: Served) -> Result<(), Fault> {
        let mut raise = 0;
        if self.device.has_variable_config() {
            self.config.publish(self.device.config());
        }
        if served.config {
            raise |= CONFIG_CHANGE;
        }
        for (index, ring) in self.rings.iter_mut().enumerate() {
            if served.used & 1 << index != 0 && ring.wants_interrupt(&self.mem)? {
                raise |= USED_BUFFER;
            }
        }
        if raise != 0 {
            self.line.raise(raise);
        }
        // What is left waits behind the other devices, as if the driver had kicked again.
        for (index, kick) in self.kicks.iter().enumerate() {
            if served.again & 1 << index != 0 {
                let _ = kick.write(1);
            }
        }
        Ok(())
    }

    /// The guest broke its device: it is stopped until the driver resets it.
    fn fail(&mut self, watch: &mut dyn Watch) {
        self.reset(watch);
        self.line.fail();
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
        queue.try_set_desc_table_address(GuestAddress(setup.descriptors)).map_err(fault)?;
        queue.try_set_avail_ring_address(GuestAddress(setup.driver)).map_err(fault)?;
        queue.try_set_used_ring_address(GuestAddress(setup.device)).map_err(fault)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        if !queue.is_valid(mem) {
            return Err(Fault::Protocol { index, what: "a ring lies outside guest memory" });
        }
    }
    Ok(Ring::new(index, queue))
}
