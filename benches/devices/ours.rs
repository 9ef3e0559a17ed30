//! Guests of ours: the monitor in this process, without server and worker.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ovum::os::tap;
use ovum_agent_proto::report::{Phase, Report};
use ovum_vmm::machine::{Machine, MachineEventKind, StopReason};
use ovum_vmm::rate_limiter::RateLimitSpec;
use ovum_vmm::spec::{DiskSpec, MachineFiles, MachineSpec, NetSpec};
use rustix::event::{PollFd, PollFlags, poll};

use crate::guest::{
    self, DATA, Figures, Guest, Link, MEMORY_MIB, PLUG_BYTES, figures, initramfs, kernel,
};

const LINK: Link = Link { tap: "bench-ours", subnet: 1 };

/// Has a guest do the work.
pub(crate) fn work(guest: &Guest) -> Figures {
    let taps = tap::create(LINK.tap, 1).unwrap();
    LINK.set_up();
    let unlimited = RateLimitSpec::default();
    let net = NetSpec { mac: [2, 0, 0, 0, 0, 2], download: unlimited, upload: unlimited };
    let console = guest::file("ours-console");
    let mut machine = build(guest, Some((net, taps)), File::create(&console).unwrap());
    machine.boot().unwrap();
    let end = await_event(&machine, |event| matches!(event, MachineEventKind::Stopped { .. }));
    let off = MachineEventKind::Stopped { reason: StopReason::PowerOff };
    assert_eq!(end, off, "{:?}", fs::read_to_string(&console));
    figures(&console)
}

/// How many milliseconds it takes to plug [`PLUG_BYTES`].
pub(crate) fn plug(guest: &Guest) -> f64 {
    let mut machine = build(guest, None, tempfile::tempfile().unwrap());
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

fn build(guest: &Guest, net: Option<(NetSpec, Vec<OwnedFd>)>, console: File) -> Machine {
    let mut archive = tempfile::tempfile().unwrap();
    archive.write_all(&initramfs(net.as_ref().map(|_| LINK))).unwrap();
    archive.rewind().unwrap();
    let (net, taps) = net.unzip();
    let disk = |id: &str, read_only| DiskSpec { id: id.to_owned(), read_only };
    let spec = MachineSpec {
        vcpus: 1,
        memory_bytes: u64::from(MEMORY_MIB) << 20,
        hotplug_bytes: if net.is_some() { 0 } else { PLUG_BYTES },
        balloon: false,
        cmdline: String::new(),
        disks: vec![disk("root", true), disk(DATA, false)],
        net,
        disk_limit: RateLimitSpec::default(),
        spare_slots: 0,
        vsock_cid: None,
        devices: Vec::new(),
        serial: false,
    };
    let files = MachineFiles {
        kvm: guest::open(Path::new("/dev/kvm"), true).into(),
        kernel: File::open(kernel()).unwrap(),
        initramfs: vec![archive],
        disks: vec![guest::open(&guest.root, false), guest::open(&guest.disk, true)],
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
