//! The worker: one process, one machine.
//!
//! Comes from a `nursery`, reads its [`Launch`] from the socket it was born with, builds the
//! machine, and from then on does three things in one loop: it writes what happens to the events
//! file, passes it on to whoever is connected, and follows orders. It ends when the machine ends.
//! It opens no path but those of the devices of the host that its machine is lent.
//!
//! The server may come and go, unless it has told otherwise. A connection that does not keep up is
//! dropped: the events file has everything, and the server can connect again.

mod demand;
mod files;
pub mod foreground;
mod journal;
mod log;
mod nursery;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::process;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use ovum_agent_proto::report::{MemoryReport, Phase, REPORT_PORT as AGENT_REPORT_PORT, Report};
use ovum_vmm::layout::REPORT_PORT;
use ovum_vmm::machine::{Machine, MachineEvent, MachineEventKind, StopReason};
use ovum_vmm::virtio::balloon::BalloonHandle;
use rustix::event::{self, PollFd, PollFlags, Timespec};
use rustix::io::{Errno, FdFlags, fcntl_setfd};

use crate::control::{
    Event, Happening, HotplugPolicy, LAUNCH_FD, Launch, Order, Reply, Status, StopCause, now_ns,
};
use crate::os::packets::{Packet, PacketListener, PacketSocket};
use crate::os::program;
use demand::{Demand, DemandSpec};
use files::Files;
use journal::Journal;

pub use log::WorkerLog;

/// Most control connections at a time; one more is turned away.
const CONNECTIONS_MAX: usize = 8;

/// Most report words of a guest that are kept: a boot writes fewer than ten.
const REPORTS_MAX: usize = 64;

/// How long nothing has to happen after a boot until what was mapped for it is let go.
const SETTLED: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

// The machine listens where the agent writes.
const _: () = assert!(REPORT_PORT == AGENT_REPORT_PORT);

/// A machine with everyone who watches it.
#[derive(Debug)]
struct Worker {
    machine: Machine,
    journal: Journal,
    control: PacketListener,
    connections: Vec<PacketSocket>,
    /// The process that the machine does not outlive, if there is one and it runs.
    lifeline: Option<OwnedFd>,
    running: bool,
    /// Whether the boot is over, and the code that it took is still mapped.
    settling: bool,
    reports: usize,
    growth: Growth,
}

/// How a guest gets more memory than it booted with.
#[derive(Debug)]
enum Growth {
    /// So much, when its workload has started.
    Boot(u64),
    /// When it needs it.
    Demand(Demand),
}

/// Waits until it is told to be a worker, and in each process that is one from then on runs the
/// machine that its launch socket describes, until that ends.
///
/// # Errors
///
/// Everything that kept the machine from starting, which the server was also told, and failures
/// of the worker itself afterwards.
pub fn main() -> anyhow::Result<()> {
    // SAFETY: whoever starts a nursery hands it this descriptor (`control::LAUNCH_FD`) and nothing
    // in this process has touched it; were it closed, the first receive would say so.
    #[expect(unsafe_code, reason = "an inherited descriptor has no owner until it is given one")]
    let server = unsafe { OwnedFd::from_raw_fd(LAUNCH_FD) };
    let Some(launch) = nursery::wait(server.into())? else { return Ok(()) };
    let packet = launch.recv().context("No launch message")?;
    fcntl_setfd(&launch, FdFlags::CLOEXEC).context("Failed to keep the launch socket")?;
    let launched_ns = now_ns();
    match start(packet, launched_ns) {
        Ok((mut worker, past)) => {
            worker.welcome(launch, &past);
            worker.run()
        }
        Err(error) => {
            let reply = Reply::Failed { message: format!("{error:#}") };
            send(&launch, &reply).context("Failed to say why the machine did not start")?;
            Err(error)
        }
    }
}

/// Builds and boots the machine; returns it with the events that went before.
fn start(packet: Packet, launched_ns: u64) -> anyhow::Result<(Worker, [Event; 2])> {
    if packet.bytes.is_empty() {
        bail!("The server went away before it sent a launch message");
    }
    let launch: Launch =
        serde_json::from_slice(&packet.bytes).context("Malformed launch message")?;
    let Files { machine: files, events, control, lifeline } =
        Files::sort(&launch.files, packet.files)?;
    let mut journal = Journal::new(events);
    let launched = journal.append(launched_ns, Happening::Launched);
    let mut machine =
        Machine::build(&launch.machine, files).context("Failed to build the machine")?;
    let built = journal.append(now_ns(), Happening::Built);
    machine.boot().context("Failed to start the vCPUs")?;
    let worker = Worker {
        machine,
        journal,
        control,
        connections: Vec::new(),
        lifeline,
        running: true,
        settling: false,
        reports: 0,
        growth: Growth::new(&launch),
    };
    Ok((worker, [launched, built]))
}

impl Growth {
    fn new(launch: &Launch) -> Self {
        let hotplug_bytes = launch.machine.hotplug_bytes;
        match launch.hotplug {
            HotplugPolicy::Boot => Self::Boot(hotplug_bytes),
            HotplugPolicy::Demand { quiet_ms } => Self::Demand(Demand::new(DemandSpec {
                boot_bytes: launch.machine.memory_bytes,
                hotplug_bytes,
                quiet: Duration::from_millis(quiet_ms.into()),
            })),
        }
    }
}

impl Worker {
    /// The first connection is the one the worker was launched through. It misses nothing.
    fn welcome(&mut self, launch: PacketSocket, past: &[Event]) {
        let past = past.iter().cloned().map(Reply::Event);
        let mut greeting = [self.status()].into_iter().chain(past);
        if greeting.all(|reply| send(&launch, &reply).is_ok()) {
            self.connections.push(launch);
        }
    }

    fn run(mut self) -> anyhow::Result<()> {
        loop {
            let ready = self.wait()?;
            if ready.machine {
                while let Some(event) = self.machine.next_event() {
                    if self.follow(event) {
                        return Ok(());
                    }
                }
            }
            for index in ready.connections.into_iter().rev() {
                if let Err(error) = self.serve(index) {
                    tracing::debug!(%error, "Control connection closed");
                    self.connections.swap_remove(index);
                }
            }
            if ready.control {
                self.accept();
            }
            if ready.lifeline {
                self.lifeline = None;
                self.machine.stop();
            }
            if ready.settled {
                program::release_pages();
                self.settling = false;
            }
        }
    }

    /// Passes an event of the machine on; true if it was the last.
    fn follow(&mut self, event: MachineEvent) -> bool {
        let MachineEvent { at_ns, kind } = event;
        let what = happening(kind);
        if let Happening::Reported { word } = what {
            let report = Report::decode(word);
            if let Some(Report::Memory(report)) = report {
                // Nobody else's business, and there is no end to them.
                self.adapt_memory(report, at_ns);
                return false;
            }
            self.reports += 1;
            if self.reports > REPORTS_MAX {
                return false;
            }
            if report == Some(Report::Phase(Phase::WorkloadStarted)) {
                self.extend_memory();
                self.settling = true;
            }
        }
        let last = matches!(what, Happening::Stopped { .. });
        let event = self.journal.append(at_ns, what);
        self.tell(&event);
        last
    }

    /// Once the workload runs the guest may have all its memory: earlier it would be busy with that
    /// while the workload waits.
    fn extend_memory(&self) {
        if let Growth::Boot(bytes @ 1..) = self.growth {
            self.resize(bytes);
        }
    }

    /// The guest says how it is off for memory, and may get some, or has to give up some. While its
    /// balloon is asked for some it neither gets more nor has to give up anything else.
    fn adapt_memory(&mut self, report: MemoryReport, at_ns: u64) {
        let plugged_bytes = self.machine.plugged_bytes();
        let Growth::Demand(demand) = &mut self.growth else { return };
        if self.machine.balloon().is_some_and(|balloon| balloon.wanted_bytes() > 0) {
            return;
        }
        if let Some(bytes) = demand.answer(report, plugged_bytes, at_ns) {
            tracing::debug!(?report, plugged_bytes, bytes, "Memory is resized");
            self.resize(bytes);
        }
    }

    fn resize(&self, bytes: u64) {
        if let Err(error) = self.machine.resize_hotplug(bytes) {
            tracing::error!(%error, bytes, "Failed to ask the guest for another size of memory");
        }
    }

    fn tell(&mut self, event: &Event) {
        let reply = Reply::Event(event.clone());
        self.connections.retain(|connection| send(connection, &reply).is_ok());
    }

    fn accept(&mut self) {
        match self.control.accept() {
            Ok(connection) if self.connections.len() < CONNECTIONS_MAX => {
                self.connections.push(connection);
            }
            Ok(_turned_away) => {}
            Err(error) => tracing::warn!(%error, "Failed to accept a control connection"),
        }
    }

    /// Serves one order of connection `index`.
    fn serve(&mut self, index: usize) -> anyhow::Result<()> {
        let connection = self.connections.get(index).context("No such connection")?;
        let packet = match connection.try_recv() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            received => received?,
        };
        if packet.bytes.is_empty() {
            bail!("Closed by the other end");
        }
        let reply = match serde_json::from_slice(&packet.bytes) {
            Ok(order) => self.obey(&order, packet.files),
            Err(error) => Err(anyhow!(error).context("Malformed order")),
        };
        let reply = reply.unwrap_or_else(|error| Reply::Failed { message: format!("{error:#}") });
        let connection = self.connections.get(index).context("No such connection")?;
        Ok(send(connection, &reply)?)
    }

    /// Follows an order with the files beside it.
    fn obey(&mut self, order: &Order, files: Vec<OwnedFd>) -> anyhow::Result<Reply> {
        if files.len() != order.files() {
            bail!("The order needs {} files and has {}", order.files(), files.len());
        }
        match order {
            Order::Status => {}
            Order::Pause => {
                self.machine.pause().context("Failed to pause the machine")?;
                self.running = false;
            }
            Order::Resume => {
                self.machine.resume().context("Failed to resume the machine")?;
                self.running = true;
            }
            Order::LimitDisks { limit } => self.machine.limit_disks(*limit),
            Order::Inflate { bytes } => {
                let balloon = self.machine.balloon().context("The machine has no balloon")?;
                balloon.inflate(*bytes);
            }
            Order::AttachDisk { disk } => {
                let file = files.into_iter().next().context("The order has no file")?;
                self.machine
                    .attach_disk(disk, File::from(file))
                    .context("Failed to attach a disk")?;
            }
            Order::DetachDisk { id } => {
                self.machine.detach_disk(id).context("Failed to detach a disk")?;
            }
            // The end itself arrives as an event.
            Order::Stop => self.machine.stop(),
        }
        Ok(self.status())
    }

    fn status(&self) -> Reply {
        let balloon = self.machine.balloon();
        Reply::Done(Status {
            pid: process::id(),
            running: self.running,
            plugged_bytes: self.machine.plugged_bytes(),
            given_bytes: balloon.map_or(0, BalloonHandle::given_bytes),
            vacant_slots: self.machine.vacant_slots(),
        })
    }

    fn wait(&self) -> anyhow::Result<Ready> {
        let watched = |file| PollFd::from_borrowed_fd(file, PollFlags::IN);
        let mut files = vec![watched(self.machine.events_fd()), watched(self.control.as_fd())];
        files.extend(self.connections.iter().map(|connection| watched(connection.as_fd())));
        files.extend(self.lifeline.iter().map(|process| watched(process.as_fd())));
        match event::poll(&mut files, self.settling.then_some(&SETTLED)) {
            Ok(0) => return Ok(Ready { settled: true, ..Ready::default() }),
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Ready::default()),
            Err(error) => return Err(error).context("Failed to wait for events"),
        }
        let mut ready = files.iter().map(|file| !file.revents().is_empty());
        let machine = ready.next().unwrap_or_default();
        let control = ready.next().unwrap_or_default();
        let connections = ready.by_ref().take(self.connections.len()).enumerate();
        let connections = connections.filter(|(_, is)| *is).map(|(index, _)| index).collect();
        let lifeline = ready.next().unwrap_or_default();
        Ok(Ready { machine, control, connections, lifeline, settled: false })
    }
}

/// An event of a machine in the words of the control protocol.
fn happening(kind: MachineEventKind) -> Happening {
    let reason = match kind {
        MachineEventKind::Started => return Happening::Booted,
        MachineEventKind::Reported { word } => return Happening::Reported { word },
        MachineEventKind::Stopped { reason } => reason,
    };
    let (cause, detail) = match reason {
        StopReason::PowerOff => (StopCause::PowerOff, String::new()),
        StopReason::Reboot => (StopCause::Reboot, String::new()),
        StopReason::Panic => (StopCause::Panic, String::new()),
        StopReason::Ordered => (StopCause::Ordered, String::new()),
        StopReason::Fault(detail) => (StopCause::Fault, detail),
    };
    Happening::Stopped { cause, detail }
}

/// What [`Worker::wait`] found to do.
#[derive(Debug, Default)]
struct Ready {
    machine: bool,
    control: bool,
    connections: Vec<usize>,
    lifeline: bool,
    /// Nothing, for as long as [`SETTLED`].
    settled: bool,
}

fn send(connection: &PacketSocket, reply: &Reply) -> io::Result<()> {
    connection.send(&serde_json::to_vec(reply)?, &[])
}
