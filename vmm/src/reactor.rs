//! The device thread: one loop that waits for everything that devices wait for.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::virtio::task::Task;

/// Stack of the device thread. Devices keep their buffers elsewhere.
const STACK_BYTES: usize = 256 << 10;

/// The running device thread; ends it when dropped.
#[derive(Debug)]
pub struct Reactor {
    thread: Option<JoinHandle<()>>,
    stop: Stop,
}

#[derive(Debug)]
struct Stop {
    asked: Arc<AtomicBool>,
    signal: EventFd,
}

#[derive(Debug)]
enum Subscriber {
    Device(Box<Task>),
    Stop(Stop),
}

impl Reactor {
    /// Starts the thread with all its devices.
    ///
    /// # Errors
    ///
    /// What epoll_create(2), eventfd(2) or clone(2) says.
    pub fn start(tasks: Vec<Task>) -> io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        let signal = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let stop = Stop { asked: Arc::clone(&asked), signal: signal.try_clone()? };
        let mut manager = EventManager::new().map_err(io::Error::other)?;
        manager.add_subscriber(Subscriber::Stop(Stop { asked: Arc::clone(&asked), signal }));
        for task in tasks {
            manager.add_subscriber(Subscriber::Device(Box::new(task)));
        }
        let run = move || {
            while !asked.load(Ordering::SeqCst) {
                // Interrupted waits come back as zero events; an epoll that fails otherwise is a
                // machine without devices, which the guest notices by itself.
                if manager.run().is_err() {
                    break;
                }
            }
        };
        let builder = thread::Builder::new().name("devices".into()).stack_size(STACK_BYTES);
        Ok(Self { thread: Some(builder.spawn(run)?), stop })
    }
}

impl Drop for Reactor {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::SeqCst);
        let _ = self.stop.signal.write(1);
        if let Some(thread) = self.thread.take() {
            // A device thread that panicked has said so on standard error.
            let _ = thread.join();
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        match self {
            Self::Device(task) => task.init(ops),
            Self::Stop(stop) => ops
                .add(Events::new(&stop.signal, EventSet::IN))
                .expect("a new eventfd can be waited for"),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        match self {
            Self::Device(task) => task.process(events, ops),
            Self::Stop(stop) => {
                let _ = stop.signal.read();
            }
        }
    }
}
