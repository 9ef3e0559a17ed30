//! Guests of ours: the monitor in this process, without server and worker.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::iter;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ovum::os::tap;
use ovum_agent_proto::report::{Phase, Report};
use ovum_vmm::machine::{Machine, MachineEventKind, StopReason};
use ovum_vmm::rate_limiter::RateLimitSpec;
use ovum_vmm::spec::{DiskSpec, HostDeviceSpec, MachineFiles, MachineSpec, NetSpec};
use rustix::event::{PollFd, PollFlags, poll};

use crate::guest::{
    self, DATA, DISK_MEASURES, Figures, Guest, LINK_MEASURES, Link, MEMORY_MIB, PLUG_BYTES, Task,
    figures, initramfs, kernel,
};

const LINK: Link = Link { tap: "bench-ours", subnet: 1 };

/// Has a guest work with its disk and its network.
pub(crate) fn work(guest: &Guest) -> Figures {
    let taps = tap::create(LINK.tap, 1).unwrap();
    LINK.set_up();
    let unlimited = RateLimitSpec::default();
    let net = NetSpec { mac: [2, 0, 0, 0, 0, 2], download: unlimited, upload: unlimited };
    let said = finish(guest, Task::Own(LINK), Some((net, taps)));
    figures(&said, DISK_MEASURES.iter().chain(&LINK_MEASURES))
}

/// Has a guest work with the disk that it is lent.
pub(crate) fn work_lent(guest: &Guest) -> Figures {
    figures(&finish(guest, Task::Lent, None), &DISK_MEASURES)
}

/// Has a guest do `task` to the end; returns what it said.
fn finish(guest: &Guest, task: Task, net: Option<(NetSpec, Vec<OwnedFd>)>) -> String {
    let console = guest::file("ours-console");
    let mut machine = build(guest, task, net, File::create(&console).unwrap());
    machine.boot().unwrap();
    let end = await_event(&machine, |event| matches!(event, MachineEventKind::Stopped { .. }));
    let said = fs::read_to_string(&console).unwrap();
    assert_eq!(end, MachineEventKind::Stopped { reason: StopReason::PowerOff }, "{said}");
    said
}

/// How many milliseconds it takes from nothing to the guest's first user instruction.
pub(crate) fn boot(guest: &Guest) -> f64 {
    let started = Instant::now();
    // It does not get as far as its task.
    let mut machine = build(guest, Task::Lent, None, tempfile::tempfile().unwrap());
    machine.boot().unwrap();
    let word = Report::Phase(Phase::AgentStarted).encode();
    await_event(&machine, |event| *event == MachineEventKind::Reported { word });
    started.elapsed().as_secs_f64() * 1e3
}

/// How many milliseconds it takes to plug [`PLUG_BYTES`].
pub(crate) fn plug(guest: &Guest) -> f64 {
    let mut machine = build(guest, Task::Wait, None, tempfile::tempfile().unwrap());
    machine.boot().unwrap();
    let word = Report::Phase(Phase::FirstOutput).encode();
    await_event(&machine, |event| *event == MachineEventKind::Reported { word });
    let started = Instant::now();
    machine.resize_hotplug(PLUG_BYTES).unwrap();
    while machine.plugged_bytes() < PLUG_BYTES {
        thread::sleep(Duration::from_millis(1));
    }
    started.elapsed().as_secs_f64() * 1e3
}

fn build(
    guest: &Guest,
    task: Task,
    net: Option<(NetSpec, Vec<OwnedFd>)>,
    console: File,
) -> Machine {
    let mut archive = tempfile::tempfile().unwrap();
    archive.write_all(&initramfs(task)).unwrap();
    archive.rewind().unwrap();
    let (net, taps) = net.unzip();
    let disk = |id: &str, read_only| DiskSpec { id: id.to_owned(), read_only };
    let data = guest.disk.iter();
    let spec = MachineSpec {
        vcpus: 1,
        memory_bytes: u64::from(MEMORY_MIB) << 20,
        hotplug_bytes: if matches!(task, Task::Wait) { PLUG_BYTES } else { 0 },
        balloon: false,
        cmdline: String::new(),
        disks: iter::once(disk("root", true))
            .chain(data.clone().map(|_| disk(DATA, false)))
            .collect(),
        net,
        disk_limit: RateLimitSpec::default(),
        spare_slots: 0,
        vsock_cid: None,
        devices: guest.lent.iter().map(|path| HostDeviceSpec { path: path.clone() }).collect(),
        serial: false,
    };
    let root = guest::open(&guest.root, false);
    let files = MachineFiles {
        kvm: guest::open(Path::new("/dev/kvm"), true).into(),
        kernel: File::open(kernel()).unwrap(),
        kernel_text: None,
        initramfs: vec![archive],
        disks: iter::once(root).chain(data.map(|path| guest::open(path, true))).collect(),
        taps: taps.unwrap_or_default(),
        console,
        vsock: None,
    };
    Machine::build(&spec, files).unwrap()
}

/// The first event of `machine` that is one of those.
fn await_event(
    machine: &Machine,
    is_awaited: impl Fn(&MachineEventKind) -> bool,
) -> MachineEventKind {
    loop {
        while let Some(event) = machine.next_event() {
            if is_awaited(&event.kind) {
                return event.kind;
            }
            let ended = matches!(event.kind, MachineEventKind::Stopped { .. });
            assert!(!ended, "the guest ended: {:?}", event.kind);
        }
        let mut files = [PollFd::from_borrowed_fd(machine.events_fd(), PollFlags::IN)];
        poll(&mut files, None).unwrap();
    }
}
