//! A guest: the real kernel, a busybox, and a script in place of PID 1.

use std::env;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ovum_vmm::machine::{Machine, MachineEventKind, StopReason};
use ovum_vmm::rate_limiter::RateLimitSpec;
use ovum_vmm::spec::{DiskSpec, HostDeviceSpec, MachineFiles, MachineSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::archive::Archive;
use crate::vfio::Lent;

/// How long a guest may take for anything: an emulated host on a busy machine is slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// What comes before every script. The shell finds its own applets through /proc.
const PROLOGUE: &str = "#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
";

/// A machine to be.
#[derive(Debug)]
pub(crate) struct GuestSpec {
    pub(crate) spec: MachineSpec,
    pub(crate) script: String,
    pub(crate) disks: Vec<File>,
    pub(crate) archives: Vec<Archive>,
}

/// A machine that runs `script` on one vCPU with 128 MiB.
pub(crate) fn guest(script: &str) -> GuestSpec {
    let spec = MachineSpec {
        vcpus: 1,
        memory_bytes: 128 << 20,
        hotplug_bytes: 0,
        balloon: false,
        cmdline: String::new(),
        disks: Vec::new(),
        spare_slots: 0,
        disk_limit: RateLimitSpec::default(),
        net: None,
        vsock_cid: None,
        devices: Vec::new(),
        serial: false,
    };
    GuestSpec { spec, script: script.into(), disks: Vec::new(), archives: Vec::new() }
}

impl GuestSpec {
    pub(crate) fn vcpus(mut self, vcpus: u8) -> Self {
        self.spec.vcpus = vcpus;
        self
    }

    pub(crate) fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.spec.memory_bytes = memory_mib << 20;
        self
    }

    /// Memory that can be added later.
    pub(crate) fn hotplug_mib(mut self, hotplug_mib: u64) -> Self {
        self.spec.hotplug_bytes = hotplug_mib << 20;
        self
    }

    pub(crate) fn balloon(mut self) -> Self {
        self.spec.balloon = true;
        self
    }

    /// Room for disks that come while it runs.
    pub(crate) fn spare_slots(mut self, slots: u8) -> Self {
        self.spec.spare_slots = slots;
        self
    }

    /// What all disks may do together.
    pub(crate) fn disk_limit(mut self, limit: RateLimitSpec) -> Self {
        self.spec.disk_limit = limit;
        self
    }

    pub(crate) fn cmdline(mut self, words: &str) -> Self {
        self.spec.cmdline = words.into();
        self
    }

    /// With a 16550, at which the kernel's own messages come out, too.
    pub(crate) fn serial(mut self) -> Self {
        self.spec.serial = true;
        self
    }

    /// Adds an archive behind the one that has the script.
    pub(crate) fn archive(mut self, archive: Archive) -> Self {
        self.archives.push(archive);
        self
    }

    /// Adds a disk over the file that `file` is.
    pub(crate) fn disk(mut self, file: &File, read_only: bool) -> Self {
        let id = format!("disk{}", self.disks.len());
        self.spec.disks.push(DiskSpec { id, read_only });
        self.disks.push(file.try_clone().unwrap());
        self
    }

    /// Lends it a device of the host.
    pub(crate) fn device(mut self, lent: &Lent) -> Self {
        self.spec.devices.push(HostDeviceSpec { path: lent.path.clone() });
        self
    }

    /// The files for it, the console among them, and the console's other end.
    pub(crate) fn files(&self) -> (MachineFiles, File) {
        let (output, console) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let files = MachineFiles {
            kvm: kvm(),
            kernel: kernel(),
            kernel_text: None,
            initramfs: [initramfs(&self.script)]
                .into_iter()
                .chain(self.archives.iter().map(|archive| file(&archive.clone().finish())))
                .collect(),
            disks: self.disks.iter().map(|disk| disk.try_clone().unwrap()).collect(),
            taps: Vec::new(),
            console: File::from(console),
            vsock: None,
        };
        (files, File::from(output))
    }

    pub(crate) fn boot(self) -> Guest {
        let (files, output) = self.files();
        let mut machine = Machine::build(&self.spec, files).unwrap();
        machine.boot().unwrap();
        Guest { machine, console: Console { output, seen: Vec::new() }, events: Vec::new() }
    }
}

/// A running machine, and what it said so far.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) machine: Machine,
    pub(crate) console: Console,
    events: Vec<MachineEventKind>,
}

impl Guest {
    /// Waits for the machine to end; returns why, and all it wrote.
    pub(crate) fn end(&mut self) -> (StopReason, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(event) = self.machine.next_event() {
                self.events.push(event.kind);
            }
            if let Some(MachineEventKind::Stopped { reason }) = self.events.last().cloned() {
                assert_eq!(self.events.first(), Some(&MachineEventKind::Started));
                self.console.take(Duration::ZERO);
                return (reason, self.console.text());
            }
            let files = [self.machine.events_fd(), self.console.output.as_fd()];
            let ready = wait(&files, deadline.saturating_duration_since(Instant::now()));
            assert!(ready, "no end in time; the guest said:\n{}", self.console.text());
            self.console.take(Duration::ZERO);
        }
    }

    /// The words it has reported, in order.
    pub(crate) fn reports(&self) -> Vec<u32> {
        let word = |event: &MachineEventKind| match event {
            MachineEventKind::Reported { word } => Some(*word),
            MachineEventKind::Started | MachineEventKind::Stopped { .. } => None,
        };
        self.events.iter().filter_map(word).collect()
    }

    /// Waits until it has written `text` after what was waited for before.
    pub(crate) fn says(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.console.skip_past(text) {
            let more = self.console.take(deadline.saturating_duration_since(Instant::now()));
            assert!(more, "no {text:?} in time; the guest said:\n{}", self.console.text());
        }
    }

    /// The lines it writes before one that is `last`, of which there must be so many.
    pub(crate) fn lines_until<const N: usize>(&mut self, last: &str) -> [String; N] {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.console.text();
            if let Some((before, _)) = text.split_once(&format!("{last}\n")) {
                let lines: Vec<_> = before.lines().map(String::from).collect();
                self.console.skip_past(last);
                return lines[lines.len().saturating_sub(N)..].to_vec().try_into().expect(&text);
            }
            let more = self.console.take(deadline.saturating_duration_since(Instant::now()));
            assert!(more, "no {last:?} in time; the guest said:\n{text}");
        }
    }

    /// Waits until `done`, whatever it writes meanwhile.
    pub(crate) fn until(&mut self, what: &str, done: impl Fn(&Machine) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(&self.machine) {
            self.console.take(Duration::from_millis(50));
            assert!(Instant::now() < deadline, "not {what} in time: {}", self.console.text());
        }
    }

    /// Whether it writes nothing for a while, apart from what it has written already.
    pub(crate) fn is_silent(&mut self) -> bool {
        self.console.take(Duration::ZERO);
        self.console.seen.clear();
        !self.console.take(Duration::from_millis(300))
    }

    /// Drops the machine; returns once nothing of it can write to its console any more.
    pub(crate) fn cut(mut self) {
        drop(self.machine);
        self.console.output.read_to_end(&mut self.console.seen).unwrap();
    }
}

/// The host's end of a console.
#[derive(Debug)]
pub(crate) struct Console {
    output: File,
    seen: Vec<u8>,
}

impl Console {
    /// Takes what is there, or waits for something; false if nothing came.
    fn take(&mut self, patience: Duration) -> bool {
        let mut patience = patience;
        let mut some = false;
        while wait(&[self.output.as_fd()], mem::take(&mut patience)) {
            let mut chunk = [0; 4096];
            let count = self.output.read(&mut chunk).unwrap();
            if count == 0 {
                break;
            }
            self.seen.extend(&chunk[..count]);
            some = true;
        }
        some
    }

    fn skip_past(&mut self, text: &str) -> bool {
        let found = self.seen.windows(text.len()).position(|window| window == text.as_bytes());
        if let Some(start) = found {
            self.seen.drain(..start + text.len());
        }
        found.is_some()
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.seen).replace('\r', "")
    }
}

fn wait(files: &[BorrowedFd<'_>], patience: Duration) -> bool {
    let mut files: Vec<_> =
        files.iter().map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN)).collect();
    let patience = Timespec::try_from(patience).unwrap();
    poll(&mut files, Some(&patience)).unwrap() > 0
}

pub(crate) fn kvm() -> OwnedFd {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.expect("these tests need /dev/kvm: run them by dev/end-to-end or dev/in-host").into()
}

pub(crate) fn kernel() -> File {
    let built = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/kernel/vmlinux");
    let path = env::var_os("OVUM_KERNEL").map_or(built, PathBuf::from);
    File::open(&path).unwrap_or_else(|error| {
        let path = path.display();
        panic!("these tests need a guest kernel at {path}, or OVUM_KERNEL set to one: {error}")
    })
}

/// A file that holds `content`.
pub(crate) fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file
}

fn initramfs(script: &str) -> File {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find_map(|p| fs::read(p).ok());
    let busybox = busybox.expect("these tests need busybox-static");
    let mut archive = Archive::default();
    for directory in ["bin", "dev", "proc", "sys"] {
        archive.directory(directory);
    }
    archive.character_device("dev/console", (5, 1));
    archive.program("bin/busybox", &busybox);
    archive.program("init", format!("{PROLOGUE}{script}\npoweroff -f\n").as_bytes());
    file(&archive.finish())
}
