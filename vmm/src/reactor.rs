//! The device thread: one loop that owns all devices and waits for everything they wait for.
//!
//! Other threads reach a device only by an [`Order`], through [`Orders`]. A vCPU gives two of them,
//! when its driver is ready and when it resets; the machine puts devices into slots and takes them
//! out, pauses, saves and ends. A kick is no order but an ioeventfd, so a request costs no vCPU an
//! exit to this process.
//!
//! The host is waited for, too: when it wants a device back that it has lent, the machine ends.
//!
//! Lock order: a vCPU holds the lock of its slot's registers while it waits for an order to be
//! carried out. That cannot deadlock, because this thread waits for no vCPU and takes only locks
//! that are held for a few instructions: of a configuration space, of a rate limit.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::events::{self, MachineEventKind, StopReason};
use crate::layout::MMIO_SLOTS;
use crate::memory::Mem;
use crate::vfio::passthrough::Recall;
use crate::virtio::task::{Activation, Task, TaskState};
use crate::virtio::{Interest, TOKEN_MAX, Watch};

/// Stack of the device thread. Devices keep their buffers elsewhere.
const STACK_BYTES: usize = 256 << 10;

/// Something to be done on the device thread. Devices are named by their slot.
#[derive(Debug)]
enum Order {
    Activate { slot: u8, activation: Activation, done: Sender<()> },
    Reset { slot: u8, done: Sender<()> },
    Put { slot: u8, task: Box<Task>, done: Sender<Result<(), PutError>> },
    Take { slot: u8, done: Sender<Option<Box<Task>>> },
    Pause { done: Sender<()> },
    Resume,
    Save { states: Sender<Vec<(u8, TaskState)>> },
    End,
}

/// Why a device is not in its slot, with the device.
#[derive(Debug)]
pub struct PutError {
    /// The device.
    pub task: Box<Task>,
    /// Why.
    pub source: io::Error,
}

/// Gives orders to the device thread. They are carried out one after the other, as given.
#[derive(Debug, Clone)]
pub struct Orders {
    sender: Sender<Order>,
    signal: Arc<EventFd>,
}

/// The other end of [`Orders`], for the thread itself.
#[derive(Debug)]
pub struct Inbox {
    receiver: Receiver<Order>,
    signal: Arc<EventFd>,
}

/// A way to give orders, and where they arrive.
///
/// # Errors
///
/// What eventfd(2) says.
pub fn orders() -> io::Result<(Orders, Inbox)> {
    let signal = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, receiver) = mpsc::channel();
    Ok((Orders { sender, signal: Arc::clone(&signal) }, Inbox { receiver, signal }))
}

impl Orders {
    /// Starts the device of `slot`. One that cannot start is broken, which its driver finds in the
    /// status.
    pub fn activate(&self, slot: u8, activation: Activation) {
        let _ = self.wait_for(|done| Order::Activate { slot, activation, done });
    }

    /// Stops the device of `slot`; when this returns it touches guest memory no more.
    pub fn reset(&self, slot: u8) {
        let _ = self.wait_for(|done| Order::Reset { slot, done });
    }

    /// Puts a device into `slot`, where none is. None if the thread has ended.
    pub fn put(&self, slot: u8, task: Box<Task>) -> Option<Result<(), PutError>> {
        self.wait_for(|done| Order::Put { slot, task, done })
    }

    /// Takes the device out of `slot`, if there is one, with its requests in flight brought to an
    /// end; it touches guest memory no more. None if the thread has ended.
    pub fn take(&self, slot: u8) -> Option<Option<Box<Task>>> {
        self.wait_for(|done| Order::Take { slot, done })
    }

    /// Brings all requests in flight to an end; from then on until [`Orders::resume`] no device
    /// does anything. None if the thread has ended.
    pub fn pause(&self) -> Option<()> {
        self.wait_for(|done| Order::Pause { done })
    }

    /// Lets the devices go on. None if the thread has ended.
    pub fn resume(&self) -> Option<()> {
        self.sender.send(Order::Resume).ok()
    }

    /// What the devices would need to go on elsewhere, by slot. None if the thread has ended.
    pub fn save(&self) -> Option<Vec<(u8, TaskState)>> {
        self.wait_for(|states| Order::Save { states })
    }

    fn give(&self, order: Order) {
        // The thread ends only together with the machine; what it is told then does not matter.
        let _ = self.sender.send(order);
        let _ = self.signal.write(1);
    }

    fn wait_for<T>(&self, order: impl FnOnce(Sender<T>) -> Order) -> Option<T> {
        let (sender, answer) = mpsc::channel();
        self.give(order(sender));
        answer.recv().ok()
    }
}

/// The running device thread; ends it when dropped.
#[derive(Debug)]
pub struct Reactor {
    thread: Option<JoinHandle<()>>,
    orders: Orders,
}

impl Reactor {
    /// Starts the thread: `tasks` are the devices of slots 0 and on. Should it ever fail, or should
    /// the host want a device back, the machine ends, which it tells `machine`.
    ///
    /// # Errors
    ///
    /// What epoll_create(2), epoll_ctl(2) or clone(2) says.
    pub fn start(
        tasks: Vec<Task>,
        orders: Orders,
        inbox: Inbox,
        recalls: Vec<Recall>,
        machine: Arc<events::Events>,
    ) -> io::Result<Self> {
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        let mem = tasks.first().map(|task| Arc::clone(task.mem()));
        let tasks = (0..).zip(tasks).collect();
        let events = Arc::clone(&machine);
        let board =
            Board { tasks, mem, inbox, recalls, machine: events, failed: None, ended: false };
        let board = manager.add_subscriber(board);
        let failed = manager.subscriber_mut(board).map_err(io::Error::other)?.failed.take();
        if let Some(error) = failed {
            return Err(io::Error::other(error));
        }
        let run = move || {
            let mut result = Ok(0);
            while result.is_ok() && manager.subscriber_mut(board).is_ok_and(|board| !board.ended) {
                result = manager.run();
            }
            if let Err(error) = result {
                let reason = StopReason::Fault(format!("Device thread: {error}"));
                machine.push(MachineEventKind::Stopped { reason });
            }
        };
        let builder = thread::Builder::new().name("devices".into()).stack_size(STACK_BYTES);
        Ok(Self { thread: Some(builder.spawn(run)?), orders })
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.orders.give(Order::End);
        if let Some(thread) = self.thread.take() {
            // A device thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

/// All devices, as the event manager's one subscriber.
#[derive(Debug)]
struct Board {
    /// By slot.
    tasks: BTreeMap<u8, Task>,
    /// Guest memory as all devices know it.
    mem: Option<Arc<Mem>>,
    inbox: Inbox,
    /// By their place here.
    recalls: Vec<Recall>,
    /// Where the end of the machine is told.
    machine: Arc<events::Events>,
    failed: Option<event_manager::Error>,
    ended: bool,
}

impl MutEventSubscriber for Board {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        let kicks = self.tasks.iter().flat_map(|(&slot, task)| kicks(slot, task));
        let recalls = (0..).zip(&self.recalls);
        let recalls = recalls.map(|(index, recall)| (&recall.event, Token::Recall { index }));
        let orders = [(&*self.inbox.signal, Token::Orders)];
        for (file, token) in kicks.chain(recalls).chain(orders) {
            if let Err(error) = ops.add(Events::with_data(file, token.pack(), EventSet::IN)) {
                self.failed = Some(error);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let token = Token::unpack(events.data());
        if let Token::Orders = token {
            // How often it was raised does not matter: what counts is in the channel.
            let _ = self.inbox.signal.read();
            while let Ok(order) = self.inbox.receiver.try_recv() {
                self.obey(order, ops);
            }
        }
        if let Token::Recall { index } = token {
            self.end_without(index, ops);
        }
        let (Token::Kick { slot, .. } | Token::Device { slot, .. }) = token else { return };
        // One that was taken out may have been kicked before.
        let Some(task) = self.tasks.get_mut(&slot) else { return };
        let watch = &mut SlotWatch { ops, slot };
        match token {
            Token::Kick { queue, .. } => task.serve(queue, watch),
            Token::Device { token, .. } => task.wake(token, watch),
            Token::Orders | Token::Recall { .. } => {}
        }
        self.share_memory(slot);
    }
}

impl Board {
    fn obey(&mut self, order: Order, ops: &mut EventOps<'_>) {
        // Whoever gave the order may be gone; the order is carried out all the same.
        match order {
            Order::Activate { slot, activation, done } => {
                if let Some(task) = self.tasks.get_mut(&slot) {
                    task.activate(&activation, &mut SlotWatch { ops, slot });
                }
                let _ = done.send(());
            }
            Order::Reset { slot, done } => {
                if let Some(task) = self.tasks.get_mut(&slot) {
                    task.reset(&mut SlotWatch { ops, slot });
                }
                let _ = done.send(());
            }
            Order::Put { slot, task, done } => {
                let _ = done.send(self.put(slot, task, ops));
            }
            Order::Take { slot, done } => {
                let _ = done.send(self.take(slot, ops));
            }
            Order::Pause { done } => {
                for (&slot, task) in &mut self.tasks {
                    task.drain(&mut SlotWatch { ops, slot });
                }
                let _ = done.send(());
                self.stand_still(ops);
            }
            Order::Save { states } => {
                let _ = states
                    .send(self.tasks.iter().map(|(&slot, task)| (slot, task.save())).collect());
            }
            Order::Resume => {}
            Order::End => self.ended = true,
        }
    }

    /// The host wants a device back and waits for it. A guest cannot be told to do without: its bus
    /// has no way to say so.
    fn end_without(&mut self, index: u16, ops: &mut EventOps<'_>) {
        let Some(recall) = self.recalls.get(usize::from(index)) else { return };
        // It is asked for again and again, and once is enough.
        let _ = ops.remove(Events::empty(&recall.event));
        let reason = StopReason::Fault(format!("Its host takes device {} away", recall.name));
        self.machine.push(MachineEventKind::Stopped { reason });
    }

    fn put(
        &mut self,
        slot: u8,
        mut task: Box<Task>,
        ops: &mut EventOps<'_>,
    ) -> Result<(), PutError> {
        if self.tasks.contains_key(&slot) {
            return Err(PutError { task, source: io::ErrorKind::AlreadyExists.into() });
        }
        let add = |(kick, token): (&EventFd, Token)| {
            ops.add(Events::with_data(kick, token.pack(), EventSet::IN))
        };
        let added = kicks(slot, &task).try_for_each(add);
        if let Err(error) = added {
            forget(slot, &task, ops);
            return Err(PutError { task, source: io::Error::other(error) });
        }
        if let Some(mem) = &self.mem {
            task.set_mem(Arc::clone(mem));
        }
        self.tasks.insert(slot, *task);
        Ok(())
    }

    fn take(&mut self, slot: u8, ops: &mut EventOps<'_>) -> Option<Box<Task>> {
        let mut task = self.tasks.remove(&slot)?;
        let watch = &mut SlotWatch { ops, slot };
        task.drain(watch);
        task.reset(watch);
        forget(slot, &task, ops);
        Some(Box::new(task))
    }

    /// If the device in `slot` changed guest memory, the others learn of it before they run again.
    fn share_memory(&mut self, slot: u8) {
        let Some(mem) = self.tasks.get(&slot).map(Task::mem) else { return };
        if self.mem.as_ref().is_some_and(|known| Arc::ptr_eq(known, mem)) {
            return;
        }
        let mem = Arc::clone(mem);
        for task in self.tasks.values_mut() {
            task.set_mem(Arc::clone(&mem));
        }
        self.mem = Some(mem);
    }

    /// Follows orders and nothing else until one says to go on.
    fn stand_still(&mut self, ops: &mut EventOps<'_>) {
        loop {
            match self.inbox.receiver.recv() {
                Ok(Order::Resume) => return,
                Ok(Order::Pause { done }) => {
                    let _ = done.send(());
                }
                Ok(Order::End) | Err(mpsc::RecvError) => {
                    self.ended = true;
                    return;
                }
                Ok(order) => self.obey(order, ops),
            }
        }
    }
}

/// The kick of each queue of the device in `slot`, and what it is known by.
fn kicks(slot: u8, task: &Task) -> impl Iterator<Item = (&EventFd, Token)> {
    task.kicks().iter().zip(0..).map(move |(kick, queue)| (kick, Token::Kick { slot, queue }))
}

/// Waits for no kick of the device in `slot` any more.
fn forget(slot: u8, task: &Task, ops: &mut EventOps<'_>) {
    for (kick, _) in kicks(slot, task) {
        // It fails if the kick is not waited for, which is what is wanted.
        let _ = ops.remove(Events::empty(kick));
    }
}

/// What the thread wakes up for, as the 32 bits that come back from epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    /// There are orders.
    Orders,
    /// The driver in `slot` kicked a queue.
    Kick { slot: u8, queue: u16 },
    /// The device in `slot` waits for a file, for which it has a token of its own.
    Device { slot: u8, token: u32 },
    /// The host wants a device back.
    Recall { index: u16 },
}

/// The top byte: a slot, a slot that was kicked, or one of the last two.
const KICKED: u32 = 0x80;
const RECALL: u32 = 0xfe;
const ORDERS: u32 = 0xff;
const _: () = assert!(TOKEN_MAX == 1 << 24 && MMIO_SLOTS < (RECALL - KICKED) as u64);

impl Token {
    fn pack(self) -> u32 {
        match self {
            Self::Orders => ORDERS << 24,
            Self::Recall { index } => (RECALL << 24) | u32::from(index),
            Self::Kick { slot, queue } => ((KICKED | u32::from(slot)) << 24) | u32::from(queue),
            Self::Device { slot, token } => (u32::from(slot) << 24) | (token % TOKEN_MAX),
        }
    }

    fn unpack(packed: u32) -> Self {
        let [top, _, low @ ..] = packed.to_be_bytes();
        match u32::from(top) {
            ORDERS => Self::Orders,
            RECALL => Self::Recall { index: u16::from_be_bytes(low) },
            KICKED.. => Self::Kick { slot: top & 0x7f, queue: u16::from_be_bytes(low) },
            _ => Self::Device { slot: top, token: packed % TOKEN_MAX },
        }
    }
}

/// The event manager as the device in one slot sees it.
#[derive(Debug)]
struct SlotWatch<'o, 'm> {
    ops: &'o mut EventOps<'m>,
    slot: u8,
}

impl SlotWatch<'_, '_> {
    fn events(&self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> Events {
        let set = match interest {
            Interest::Nothing => EventSet::empty(),
            Interest::Read => EventSet::IN,
            Interest::Write => EventSet::OUT,
            Interest::ReadWrite => EventSet::IN | EventSet::OUT,
        };
        Events::with_data(&file, Token::Device { slot: self.slot, token }.pack(), set)
    }
}

impl Watch for SlotWatch<'_, '_> {
    fn add(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        self.ops.add(self.events(file, token, interest)).map_err(io::Error::other)
    }

    fn change(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()> {
        self.ops.modify(self.events(file, token, interest)).map_err(io::Error::other)
    }

    fn remove(&mut self, file: BorrowedFd<'_>) -> io::Result<()> {
        self.ops.remove(Events::empty_raw(file.as_raw_fd())).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_packing() {
        let last = u8::try_from(MMIO_SLOTS - 1).unwrap();
        for token in [
            Token::Orders,
            Token::Recall { index: 0 },
            Token::Recall { index: u16::MAX },
            Token::Kick { slot: 0, queue: 0 },
            Token::Kick { slot: last, queue: u16::MAX },
            Token::Device { slot: 0, token: 0 },
            Token::Device { slot: last, token: TOKEN_MAX - 1 },
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
