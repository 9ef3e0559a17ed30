//! A vCPU: a thread that runs guest code and answers what KVM cannot.
//!
//! Orders reach it over a channel; a kick takes it out of KVM_RUN to look there. Between two turns
//! of guest code it looks only when it was kicked, so whatever a vCPU was doing with a device when
//! the order came, it has finished it when it obeys.

#[expect(unsafe_code, reason = "a signal handler writes to the page shared with KVM")]
mod kick;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::thread::{self, JoinHandle};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::events::{Events, MachineEventKind, StopReason};
use crate::pci::PciBus;
use crate::ports::Ports;
use crate::slots::Slots;
use crate::vcpu_state::{VcpuState, VcpuStateError};
use kick::Kickable;

/// Stack of a vCPU thread: the run loop and what it calls are shallow.
const STACK_BYTES: usize = 256 << 10;

/// Exits to this process, by kind.
#[derive(Debug, Default)]
pub struct Exits {
    /// Reads of registers of devices.
    pub mmio_reads: AtomicU64,
    /// Writes of registers of devices; kicks are not among them.
    pub mmio_writes: AtomicU64,
    /// Reads of ports.
    pub port_reads: AtomicU64,
    /// Writes of ports.
    pub port_writes: AtomicU64,
}

/// What all vCPUs of a machine share.
#[derive(Debug)]
pub struct Platform {
    /// I/O ports.
    pub ports: Ports,
    /// virtio-mmio slots.
    pub slots: Slots,
    /// The bus of devices of the host, if there are any.
    pub pci: Option<PciBus>,
    /// Where the machine's end is told.
    pub events: Arc<Events>,
    /// Counters.
    pub exits: Exits,
}

impl Platform {
    /// A vCPU reads what is not memory.
    fn read(&self, address: u64, data: &mut [u8]) {
        if !self.pci.as_ref().is_some_and(|pci| pci.read(address, data)) {
            self.slots.read(address, data);
        }
    }

    /// A vCPU writes what is not memory.
    fn write(&self, address: u64, data: &[u8]) {
        if !self.pci.as_ref().is_some_and(|pci| pci.write(address, data)) {
            self.slots.write(address, data);
        }
    }

    /// A vCPU reads ports.
    fn read_port(&self, port: u16, data: &mut [u8]) {
        if !self.pci.as_ref().is_some_and(|pci| pci.read_port(port, data)) {
            self.ports.read(port, data);
        }
    }

    /// A vCPU writes ports; an answer is the end of the machine.
    fn write_port(&self, port: u16, data: &[u8]) -> Option<StopReason> {
        if self.pci.as_ref().is_some_and(|pci| pci.write_port(port, data)) {
            return None;
        }
        self.ports.write(port, data)
    }
}

/// A running vCPU; ends its thread when dropped.
#[derive(Debug)]
pub struct Vcpu {
    orders: Sender<Order>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Order {
    Pause(Sender<()>),
    Resume,
    Save(Arc<[u32]>, Sender<Result<VcpuState, VcpuStateError>>),
    End,
}

/// Prepares this process for vCPUs. Once is enough.
///
/// # Errors
///
/// What sigaction(2) says.
pub fn install_kick() -> io::Result<()> {
    kick::install()
}

impl Vcpu {
    /// Starts the thread, which runs the guest at once.
    ///
    /// # Errors
    ///
    /// What clone(2) says.
    pub fn start(index: u8, fd: VcpuFd, platform: Arc<Platform>) -> io::Result<Self> {
        let (orders, receiver) = mpsc::channel();
        let thread = thread::Builder::new()
            .name(format!("vcpu-{index}"))
            .stack_size(STACK_BYTES)
            .spawn(move || VcpuThread { index, fd, platform, orders: receiver }.run())?;
        Ok(Self { orders, thread: Some(thread) })
    }

    /// Stops it where it is; it is stopped once the answer can be received.
    pub fn pause(&self) -> Receiver<()> {
        self.order(Order::Pause)
    }

    /// Lets it go on, if it was paused. None if the thread has ended.
    pub fn resume(&self) -> Option<()> {
        self.orders.send(Order::Resume).ok()
    }

    /// What a paused vCPU would need to go on elsewhere, those of `msrs` included that can be read.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub fn save(&self, msrs: Arc<[u32]>) -> Result<VcpuState, VcpuStateError> {
        let answer = self.order(|state| Order::Save(msrs, state));
        answer.recv().unwrap_or(Err(VcpuStateError::Ended))
    }

    /// Gives an order whose answer can be received; it cannot if the thread has ended.
    fn order<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Receiver<T> {
        let (sender, answer) = mpsc::channel();
        self.give(order(sender));
        answer
    }

    fn give(&self, order: Order) {
        // A thread that has ended follows no orders, which its caller sees by the answer.
        let _ = self.orders.send(order);
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.give(Order::End);
        if let Some(thread) = self.thread.take() {
            // One that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

struct VcpuThread {
    index: u8,
    fd: VcpuFd,
    platform: Arc<Platform>,
    orders: Receiver<Order>,
}

/// What a turn of guest code ended with.
enum Turn {
    /// Nothing that concerns others.
    On,
    /// The thread was kicked: there may be an order.
    Kicked,
    /// The machine has ended.
    Ended(StopReason),
}

impl VcpuThread {
    fn run(mut self) {
        // SAFETY: `self` owns the vCPU and is dropped after what is returned, being older.
        #[expect(unsafe_code, reason = "the signal handler needs to know this thread's vCPU")]
        let _kickable = unsafe { Kickable::new(&mut self.fd) };
        // An order that was given before the thread could be kicked is waiting already.
        let mut turn = Turn::Kicked;
        loop {
            let goes_on = match turn {
                Turn::On => true,
                Turn::Kicked => self.look_for_orders(),
                Turn::Ended(reason) => {
                    self.platform.events.push(MachineEventKind::Stopped { reason });
                    // It follows orders as ever, but there is nothing to resume.
                    while self.rest() {}
                    false
                }
            };
            if !goes_on {
                return;
            }
            turn = self.turn();
        }
    }

    /// Follows the orders there are; false if the last one was among them.
    fn look_for_orders(&mut self) -> bool {
        // First, so that a kick that comes from here on is seen by the next KVM_RUN.
        self.fd.set_kvm_immediate_exit(0);
        loop {
            let goes_on = match self.orders.try_recv() {
                Ok(order) => self.obey(order),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => false,
            };
            if !goes_on {
                return false;
            }
        }
    }

    /// Carries out an order; false if it was the last.
    fn obey(&mut self, order: Order) -> bool {
        // Whoever gave the order may be gone; it is carried out all the same.
        match order {
            Order::Pause(done) => {
                let _ = done.send(());
                self.rest()
            }
            Order::Resume => true,
            Order::Save(msrs, state) => {
                let _ = state.send(VcpuState::save(&self.fd, &msrs));
                true
            }
            Order::End => false,
        }
    }

    /// Follows orders without running the guest, until one lets it go on; false if the last one
    /// came.
    fn rest(&mut self) -> bool {
        loop {
            match self.orders.recv() {
                Ok(Order::Resume) => return true,
                Ok(Order::Pause(done)) => {
                    let _ = done.send(());
                }
                Ok(order @ Order::Save(..)) => {
                    self.obey(order);
                }
                Ok(Order::End) | Err(mpsc::RecvError) => return false,
            }
        }
    }

    /// Runs guest code until it needs an answer, and gives it.
    ///
    /// Every exit is in this `match`. One that is not ends the machine, never this process: what
    /// the guest does is input.
    fn turn(&mut self) -> Turn {
        let Platform { exits, .. } = &*self.platform;
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let fault = |what: String| Turn::Ended(StopReason::Fault(what));
        let index = self.index;
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&exits.mmio_reads);
                self.platform.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&exits.mmio_writes);
                self.platform.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&exits.port_reads);
                self.platform.read_port(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&exits.port_writes);
                if let Some(reason) = self.platform.write_port(port, data) {
                    return Turn::Ended(reason);
                }
            }
            Ok(VcpuExit::Shutdown) => return fault(format!("vCPU {index}: triple fault")),
            Ok(VcpuExit::InternalError) => {
                return fault(format!("vCPU {index}: KVM could not emulate an instruction"));
            }
            Ok(VcpuExit::FailEntry(code, _)) => {
                return fault(format!("vCPU {index}: hardware refused to enter: {code:#x}"));
            }
            Ok(exit) => return fault(format!("vCPU {index}: unexpected exit {exit:?}")),
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Turn::Kicked;
            }
            Err(error) => return fault(format!("vCPU {index}: KVM_RUN failed: {error}")),
        }
        Turn::On
    }
}
