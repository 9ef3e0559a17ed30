//! A vCPU: a thread that runs guest code and answers what KVM cannot.
//!
//! Orders reach it over a channel. A signal takes it out of KVM_RUN; one that comes a moment too
//! early is lost, so whoever gave the order sends it again until the order is answered.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::events::{Events, MachineEventKind, StopReason};
use crate::ports::Ports;
use crate::slots::Slots;
use crate::vcpu_state::{VcpuState, VcpuStateError};

/// Stack of a vCPU thread: the run loop and what it calls are shallow.
const STACK_BYTES: usize = 256 << 10;

/// How long an order waits before its signal is sent again.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// Exits to this process, by kind.
#[derive(Debug, Default)]
pub struct Exits {
    /// Reads of virtio-mmio registers.
    pub mmio_reads: AtomicU64,
    /// Writes of virtio-mmio registers; kicks are not among them.
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
    /// Where the machine's end is told.
    pub events: Arc<Events>,
    /// Counters.
    pub exits: Exits,
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
    Resume(Sender<()>),
    Save(Vec<u32>, Sender<Result<VcpuState, VcpuStateError>>),
    End,
}

/// Makes the kick signal harmless but for interrupting KVM_RUN. Once in a process is enough.
///
/// # Errors
///
/// What sigaction(2) says.
pub fn install_kick() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), nothing)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

fn kick_signal() -> libc::c_int {
    SIGRTMIN()
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

    /// Stops it where it is. It is stopped when this returns.
    pub fn pause(&self) {
        self.order(Order::Pause);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.order(Order::Resume);
    }

    /// What it would need to go on elsewhere, the registers in `msrs` included. Only while paused.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError`].
    pub fn save(&self, msrs: Vec<u32>) -> Result<VcpuState, VcpuStateError> {
        self.order(|done| Order::Save(msrs, done)).unwrap_or(Err(VcpuStateError::Ended))
    }

    /// Gives an order and waits until it is carried out. None if the thread has ended.
    fn order<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Option<T> {
        let (done, answer) = mpsc::channel();
        self.orders.send(order(done)).ok()?;
        loop {
            self.kick();
            match answer.recv_timeout(KICK_INTERVAL) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            // It fails only for a thread that has ended, which the caller notices by itself.
            let _ = thread.kill(kick_signal());
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        let _ = self.orders.send(Order::End);
        let Some(thread) = self.thread.take() else { return };
        while !thread.is_finished() {
            let _ = thread.kill(kick_signal());
            thread::park_timeout(KICK_INTERVAL);
        }
        let _ = thread.join();
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
    /// Someone may have sent an order.
    Interrupted,
    /// The machine has ended.
    Ended(StopReason),
}

impl VcpuThread {
    fn run(mut self) {
        loop {
            match self.turn() {
                Turn::On => {}
                Turn::Interrupted => match self.orders.try_recv() {
                    Ok(order) => {
                        if !self.obey(order) {
                            return;
                        }
                    }
                    Err(TryRecvError::Empty) => {}
                    Err(TryRecvError::Disconnected) => return,
                },
                Turn::Ended(reason) => {
                    self.platform.events.push(MachineEventKind::Stopped { reason });
                    self.rest();
                    return;
                }
            }
        }
    }

    /// Carries out an order; false if it was the last.
    fn obey(&mut self, order: Order) -> bool {
        match order {
            Order::Pause(done) => {
                let _ = done.send(());
                self.rest()
            }
            Order::Resume(done) => {
                let _ = done.send(());
                true
            }
            Order::Save(msrs, done) => {
                let _ = done.send(VcpuState::save(&self.fd, &msrs));
                true
            }
            Order::End => false,
        }
    }

    /// Waits for orders without running the guest; false if the last one came.
    fn rest(&mut self) -> bool {
        loop {
            match self.orders.recv() {
                Ok(Order::Resume(done)) => {
                    let _ = done.send(());
                    return true;
                }
                Ok(Order::Pause(done)) => {
                    let _ = done.send(());
                }
                Ok(order @ Order::Save(..)) => {
                    self.obey(order);
                }
                Ok(Order::End) | Err(_) => return false,
            }
        }
    }

    /// Runs guest code until it needs an answer, and gives it.
    ///
    /// Every exit is in this `match`. One that is not ends the machine, never this process: what
    /// the guest does is input.
    fn turn(&mut self) -> Turn {
        let Platform { ports, slots, exits, .. } = &*self.platform;
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let fault = |what: String| Turn::Ended(StopReason::Fault(what));
        let index = self.index;
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&exits.mmio_reads);
                slots.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&exits.mmio_writes);
                slots.write(address, data);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&exits.port_reads);
                ports.read(port, data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&exits.port_writes);
                if let Some(reason) = ports.write(port, data) {
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
                return Turn::Interrupted;
            }
            Err(error) => return fault(format!("vCPU {index}: KVM_RUN failed: {error}")),
        }
        Turn::On
    }
}
