//! Machines that run a real kernel, seen from where a worker stands.
//!
//! Needs /dev/kvm, so it is no part of a plain `cargo test`: it is built with
//! `cargo test -p ovum-vmm --test kvm --no-run` and run through `dev/in-host`. The kernel is
//! $OVUM_KERNEL or target/kernel/vmlinux. Each test boots a guest of its own; what a guest has to
//! say it prints to its console, which is a file here.

mod initramfs;

use std::env;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::Kvm;
use ovum_vmm::layout::REPORT_PORT;
use ovum_vmm::machine::{Machine, MachineEvent, MachineEventKind, StopReason};
use ovum_vmm::machine_state::MachineState;
use ovum_vmm::spec::{DiskSpec, MachineFiles, MachineSpec};
use ovum_vmm::vcpu_state::VcpuState;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use tempfile::NamedTempFile;

use initramfs::{Archive, port_writer};

/// How long a guest may take: seconds natively, far more in the emulated host of a busy machine.
const PATIENCE: Duration = Duration::from_secs(240);

/// Held by the one machine that runs: guests that share two CPUs only slow each other down.
static TURN: Mutex<()> = Mutex::new(());

/// A machine to be, with what most tests want.
struct Plan {
    spec: MachineSpec,
    initramfs: Vec<Archive>,
    disks: Vec<File>,
}

/// A machine and what its guest printed.
struct Guest {
    machine: Machine,
    console: NamedTempFile,
    events: Vec<MachineEvent>,
    _turn: MutexGuard<'static, ()>,
}

impl Plan {
    fn new(script: &str) -> Self {
        Self {
            spec: MachineSpec {
                vcpus: 1,
                memory_bytes: 256 << 20,
                cmdline: String::new(),
                disks: Vec::new(),
                vsock_cid: None,
                serial: false,
            },
            initramfs: vec![Archive::with_init(script)],
            disks: Vec::new(),
        }
    }

    fn vcpus(mut self, vcpus: u8) -> Self {
        self.spec.vcpus = vcpus;
        self
    }

    fn memory_bytes(mut self, bytes: u64) -> Self {
        self.spec.memory_bytes = bytes;
        self
    }

    fn cmdline(mut self, words: &str) -> Self {
        self.spec.cmdline = words.into();
        self
    }

    fn disk(mut self, id: &str, read_only: bool, file: File) -> Self {
        self.spec.disks.push(DiskSpec { id: id.into(), read_only });
        self.disks.push(file);
        self
    }

    fn archive(mut self, archive: Archive) -> Self {
        self.initramfs.push(archive);
        self
    }

    fn boot(self) -> Guest {
        // A test that failed while its machine ran has nothing to say about the next one.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let kvm = open("/dev/kvm", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let kvm: OwnedFd = kvm.expect("These tests need /dev/kvm: run them through dev/in-host");
        let console = NamedTempFile::new().expect("there is room for a console");
        let files = MachineFiles {
            kvm,
            kernel: File::open(kernel()).expect("the kernel can be read"),
            initramfs: self.initramfs.into_iter().map(Archive::into_file).collect(),
            disks: self.disks,
            console: console.reopen().expect("the console can be opened twice"),
            vsock: None,
        };
        let mut machine = Machine::build(&self.spec, files).expect("the machine can be built");
        machine.boot().expect("the machine boots");
        Guest { machine, console, events: Vec::new(), _turn: turn }
    }
}

impl Guest {
    /// What the guest printed so far.
    fn printed(&self) -> String {
        let bytes = fs::read(self.console.path()).expect("the console can be read");
        String::from_utf8_lossy(&bytes).replace('\r', "")
    }

    /// Waits until the guest has printed `text`.
    fn prints(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.printed().contains(text) {
            let ended = self.events.iter().any(is_end);
            assert!(!ended, "it ended without {text:?}:\n{}", self.printed());
            assert!(Instant::now() < deadline, "no {text:?} in time:\n{}", self.printed());
            self.wait(Duration::from_millis(20));
        }
    }

    /// Waits until the machine has ended, and says why.
    fn end(&mut self) -> StopReason {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let last = self.events.last().map(|event| &event.kind);
            if let Some(MachineEventKind::Stopped { reason }) = last {
                return reason.clone();
            }
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.printed());
            self.wait(Duration::from_secs(1));
        }
    }

    /// Takes the events that come within `at_most`.
    fn wait(&mut self, at_most: Duration) {
        let timeout = Timespec::try_from(at_most).expect("the test waits for seconds");
        let mut file = [PollFd::from_borrowed_fd(self.machine.events_fd(), PollFlags::IN)];
        poll(&mut file, Some(&timeout)).expect("events can be waited for");
        while let Some(event) = self.machine.next_event() {
            self.events.push(event);
        }
    }

    /// The words it reported.
    fn reports(&self) -> Vec<u32> {
        let word = |event: &MachineEvent| match event.kind {
            MachineEventKind::Reported { word } => Some(word),
            MachineEventKind::Started | MachineEventKind::Stopped { .. } => None,
        };
        self.events.iter().filter_map(word).collect()
    }
}

fn is_end(event: &MachineEvent) -> bool {
    matches!(event.kind, MachineEventKind::Stopped { .. })
}

fn kernel() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kernel/vmlinux");
    let kernel = env::var_os("OVUM_KERNEL").map_or(built, PathBuf::from);
    assert!(
        kernel.is_file(),
        "No kernel at {}: build it (kernel-config/build) or set OVUM_KERNEL",
        kernel.display()
    );
    kernel
}

/// Threads of machines in this process.
fn machine_threads() -> usize {
    let tasks = fs::read_dir("/proc/self/task").expect("/proc is mounted");
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    let names = tasks.flatten().filter_map(name);
    names.filter(|name| name.starts_with("vcpu-") || name == "devices\n").count()
}

#[test]
fn power_off_is_the_end_that_was_meant() {
    let mut guest = Plan::new("echo up; poweroff -f").boot();

    assert_eq!(guest.end(), StopReason::PowerOff);

    assert!(guest.printed().contains("up"), "{}", guest.printed());
    assert_eq!(guest.events.first().unwrap().kind, MachineEventKind::Started);
    assert!(guest.events.is_sorted_by_key(|event| event.at_ns));
}

#[test]
fn a_reboot_ends_the_machine_and_says_so() {
    assert_eq!(Plan::new("reboot -f").boot().end(), StopReason::Reboot);
}

/// PID 1 that exits is what panics a guest in practice.
#[test]
fn a_panic_is_told_apart_from_a_reboot() {
    let mut guest = Plan::new("exit 3").boot();

    assert_eq!(guest.end(), StopReason::Panic);

    assert!(guest.printed().contains("Attempted to kill init"), "{}", guest.printed());
}

#[test]
fn a_triple_fault_is_a_fault_of_the_guest() {
    let mut guest = Plan::new("reboot -f").cmdline("reboot=t").boot();

    let StopReason::Fault(what) = guest.end() else { panic!("{:?}", guest.events) };

    assert!(what.contains("riple fault"), "{what}");
}

#[test]
fn every_vcpu_comes_online_as_a_core_of_its_own() {
    let script = "echo cpus=$(nproc)\n\
        echo packages=$(cat /sys/devices/system/cpu/cpu*/topology/physical_package_id | sort -u)\n\
        echo cores=$(cat /sys/devices/system/cpu/cpu*/topology/core_id | sort -u | wc -l)\n\
        echo siblings=$(cat /sys/devices/system/cpu/cpu*/topology/thread_siblings | sort -u | wc -l)\n\
        poweroff -f";
    for vcpus in [1, 2, 4, 32] {
        let mut guest = Plan::new(script).vcpus(vcpus).memory_bytes(512 << 20).boot();

        assert_eq!(guest.end(), StopReason::PowerOff);

        let printed = guest.printed();
        for line in [
            format!("cpus={vcpus}\n"),
            "packages=0\n".into(),
            format!("cores={vcpus}\n"),
            format!("siblings={vcpus}\n"),
        ] {
            assert!(printed.contains(&line), "{vcpus} vCPUs, {line:?}:\n{printed}");
        }
    }
}

/// It has to lie on both sides of the 32-bit hole, and all of it has to be the guest's.
#[test]
fn a_guest_of_6_gib_has_6_gib() {
    let script = "echo kib=$(awk '/MemTotal/ { print $2 }' /proc/meminfo)\n\
        grep 'System RAM' /proc/iomem\n\
        poweroff -f";
    let mut guest = Plan::new(script).memory_bytes(6 << 30).boot();

    assert_eq!(guest.end(), StopReason::PowerOff);

    let printed = guest.printed();
    let kib = printed.lines().find_map(|line| line.strip_prefix("kib=")).unwrap();
    let kib: u64 = kib.parse().unwrap();
    // The kernel keeps some for itself: 64 bytes for each page, and its own image.
    assert!((5_900 << 10..=6 << 20).contains(&kib), "{kib} KiB:\n{printed}");
    assert!(printed.contains("100000000-"), "no RAM from 4 GiB on:\n{printed}");
}

#[test]
fn archives_of_the_initramfs_are_laid_over_one_another() {
    let mut second = Archive::default();
    second.program("second", b"from the second archive\n");
    let mut guest = Plan::new("cat /second; poweroff -f").archive(second).boot();

    assert_eq!(guest.end(), StopReason::PowerOff);

    assert!(guest.printed().contains("from the second archive"), "{}", guest.printed());
}

#[test]
fn words_of_the_spec_reach_the_kernels_command_line() {
    let mut guest = Plan::new("cat /proc/cmdline; poweroff -f").cmdline("ovum.word=seven").boot();

    assert_eq!(guest.end(), StopReason::PowerOff);

    assert!(guest.printed().contains("ovum.word=seven\n"), "{}", guest.printed());
}

#[test]
fn reports_arrive_in_order_and_before_the_end() {
    let mut tools = Archive::default();
    tools.program("first", &port_writer(REPORT_PORT, 0x0100_0001));
    tools.program("second", &port_writer(REPORT_PORT, 0xffff_ffff));
    // What no one answers at reads as ones and takes writes; a byte there is not a report.
    tools.program("stray", &port_writer(0xb40, 7));
    let mut guest = Plan::new("/first; /stray; /second; poweroff -f").archive(tools).boot();

    assert_eq!(guest.end(), StopReason::PowerOff);

    assert_eq!(guest.reports(), [0x0100_0001, 0xffff_ffff]);
    assert!(guest.events.is_sorted_by_key(|event| event.at_ns));
}

#[test]
fn a_paused_guest_stands_still_and_goes_on() {
    let script = "i=0; while true; do i=$((i+1)); echo tick $i; usleep 20000; done";
    let mut guest = Plan::new(script).vcpus(2).boot();
    guest.prints("tick 5\n");

    for _ in 0..3 {
        guest.machine.pause().unwrap();
        let before = guest.printed();
        guest.wait(Duration::from_millis(500));
        assert_eq!(guest.printed(), before, "it printed while it was paused");

        guest.machine.resume().unwrap();
        let ticks = before.matches("tick").count();
        guest.prints(&format!("tick {}\n", ticks + 3));
    }
}

/// What restore will need is all in the state; here it only has to survive being written down.
#[test]
fn a_saved_machine_is_plain_data_and_runs_on() {
    let script = "i=0; while true; do i=$((i+1)); echo tick $i; usleep 20000; done";
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(1 << 20).unwrap();
    let mut guest = Plan::new(script).vcpus(2).disk("data", false, disk).boot();
    guest.prints("tick 5\n");
    guest.machine.pause().unwrap();

    let state = guest.machine.save().unwrap();
    let again = guest.machine.save().unwrap();

    let written = serde_json::to_value(&state).unwrap();
    let read: MachineState = serde_json::from_value(written.clone()).unwrap();
    assert_eq!(serde_json::to_value(&read).unwrap(), written);
    assert_eq!(state.vcpus.len(), 2);
    // Time goes on for a paused guest too; its registers and devices do not.
    let at_rest = |state: &MachineState| serde_json::to_value(&state.devices).unwrap();
    assert_eq!(at_rest(&state), at_rest(&again));
    guest.machine.resume().unwrap();
    let ticks = guest.printed().matches("tick").count();
    guest.prints(&format!("tick {}\n", ticks + 3));
}

/// The state of a vCPU is complete if a vCPU that never ran, in a machine that knows nothing of the
/// first, has the same once it was loaded.
#[test]
fn a_saved_vcpu_can_be_loaded_into_a_fresh_one() {
    let mut guest = Plan::new("echo up; while true; do :; done").boot();
    guest.prints("up\n");
    guest.machine.pause().unwrap();
    let saved = guest.machine.save().unwrap().vcpus.remove(0);
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();

    let refused = saved.load(&vcpu).unwrap();

    let indices: Vec<_> = saved.msrs.iter().map(|msr| msr.index).collect();
    let loaded = VcpuState::save(&vcpu, &indices).unwrap();
    assert_eq!(loaded.mp_state, saved.mp_state);
    assert_eq!(loaded.regs, saved.regs);
    assert_eq!(loaded.sregs, saved.sregs);
    assert_eq!(loaded.xsave.region, saved.xsave.region);
    assert_eq!(loaded.xcrs, saved.xcrs);
    assert_eq!(loaded.debugregs, saved.debugregs);
    assert_eq!(loaded.cpuid, saved.cpuid);
    // Clocks go on; what cannot be written cannot be expected.
    let clocks = [0x10, 0x6e0, 0x4b56_4d00, 0x4b56_4d01];
    let stays = |msr: &&kvm_msr_entry| ![&clocks[..], &refused].concat().contains(&msr.index);
    let kept = |state: &VcpuState| -> Vec<_> {
        state.msrs.iter().filter(stays).map(|msr| (msr.index, msr.data)).collect()
    };
    assert_eq!(kept(&loaded), kept(&saved));
    assert!(kept(&saved).len() > 20, "{:x?}", kept(&saved));
}

#[test]
fn stop_cuts_the_power_and_drop_leaves_no_thread() {
    let mut guest = Plan::new("while true; do :; done").vcpus(2).boot();
    guest.wait(Duration::from_millis(500));
    assert_eq!(machine_threads(), 3);

    guest.machine.stop();

    assert_eq!(guest.end(), StopReason::Ordered);
    let Guest { machine, _turn, .. } = guest;
    drop(machine);
    assert_eq!(machine_threads(), 0);
}

#[test]
fn disks_keep_what_the_guest_writes_and_refuse_what_it_must_not() {
    let writable = NamedTempFile::new().unwrap();
    writable.as_file().set_len(8 << 20).unwrap();
    let read_only = tempfile::tempfile().unwrap();
    read_only.set_len(1 << 20).unwrap();
    let script = "echo written | dd of=/dev/vda bs=512 seek=2 conv=sync,fsync 2>/dev/null\n\
        dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=7 conv=fsync 2>/dev/null\n\
        dd if=/dev/vda bs=1M skip=1 2>/dev/null | md5sum\n\
        echo sectors=$(cat /sys/block/vda/size) ro=$(cat /sys/block/vdb/ro)\n\
        echo serial=$(cat /sys/block/vda/serial)\n\
        echo x | dd of=/dev/vdb 2>&1 | grep -o 'not permitted'\n\
        poweroff -f";
    let mut guest = Plan::new(script)
        .disk("data", false, writable.reopen().unwrap())
        .disk("root", true, read_only)
        .boot();

    assert_eq!(guest.end(), StopReason::PowerOff);

    let printed = guest.printed();
    assert!(printed.contains("sectors=16384 ro=1\n"), "{printed}");
    assert!(printed.contains("serial=data\n"), "{printed}");
    let content = fs::read(writable.path()).unwrap();
    assert_eq!(&content[1024..1032], b"written\n");
    assert!(content[1 << 20..].iter().any(|&byte| byte != 0), "the random part is missing");
}
