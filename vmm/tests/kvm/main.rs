//! Machines on a real /dev/kvm, with the real guest kernel.

mod archive;
mod guest;
mod memory;
mod program;
mod vfio;

use std::fs::File;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use kvm_bindings::kvm_msr_entry;
use kvm_ioctls::Kvm;
use ovum_vmm::arch::boot::BootError;
use ovum_vmm::layout::{REPORT_PORT, shown_slot};
use ovum_vmm::machine::{Machine, StopReason};
use ovum_vmm::machine_error::{AttachError, BuildError, Ended, SaveError};
use ovum_vmm::machine_state::MachineState;
use ovum_vmm::rate_limiter::{RateLimitSpec, RateSpec};
use ovum_vmm::spec::{DiskSpec, MachineFiles, MachineSpec, SpecError};
use ovum_vmm::vcpu_state::VcpuState;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use archive::Archive;
use guest::{GuestSpec, file, guest};
use program::port_writer;

/// Writes a line with a number, and so the disk if there is one, without end.
const BUSY: &str = "n=0; while :; do n=$((n + 1)); echo line $n; \
    [ ! -b /dev/vda ] || echo $n | dd of=/dev/vda conv=fsync 2> /dev/null; done";

#[test]
fn a_guest_powers_itself_off() {
    let (reason, said) = guest("echo hello from $0").boot().end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert_eq!(said, "hello from /init\n");
}

#[test]
fn a_reboot_is_not_a_power_off() {
    let (reason, said) = guest("reboot -f").boot().end();

    assert_eq!(reason, StopReason::Reboot, "{said}");
}

#[test]
fn a_panic_is_not_a_reboot() {
    let (reason, said) = guest("echo c > /proc/sysrq-trigger").boot().end();
    assert_eq!(reason, StopReason::Panic, "{said}");

    let (reason, said) = guest("exit 3").boot().end();
    assert_eq!(reason, StopReason::Panic, "init that ends: {said}");
}

#[test]
fn every_vcpu_comes_online() {
    for vcpus in [1, 2, 4] {
        let (reason, said) = guest("nproc").vcpus(vcpus).boot().end();

        assert_eq!((reason, said), (StopReason::PowerOff, format!("{vcpus}\n")));
    }
}

#[test]
fn thirty_two_vcpus_come_online() {
    let (reason, said) = guest("nproc").vcpus(32).boot().end();

    assert_eq!((reason, said), (StopReason::PowerOff, "32\n".into()));
}

#[test]
fn six_gib_lie_around_the_hole() {
    let script = "grep 'System RAM' /proc/iomem; awk '/MemTotal/ {print $2}' /proc/meminfo";
    let (reason, said) = guest(script).memory_mib(6 << 10).boot().end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    let lines: Vec<_> = said.lines().collect();
    let [ranges @ .., total] = &lines[..] else { panic!("{said}") };
    assert!(ranges.contains(&"00100000-cfffffff : System RAM"), "{said}");
    assert!(ranges.contains(&"100000000-1afffffff : System RAM"), "{said}");
    let total_kib: u64 = total.parse().unwrap();
    assert!(total_kib > 5_800 << 10, "{total_kib} KiB");
}

#[test]
fn a_disk_carries_data_both_ways() {
    let disk = file(b"from the host");
    disk.set_len(4 << 20).unwrap();
    let script = "head -c 13 /dev/vda; echo; cat /sys/block/vda/size /sys/block/vda/ro
        printf 'from the guest' | dd of=/dev/vda bs=512 seek=8191 conv=fsync 2> /dev/null";

    let (reason, said) = guest(script).disk(&disk, false).boot().end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert_eq!(said, "from the host\n8192\n0\n");
    let mut written = [0; 14];
    disk.read_exact_at(&mut written, 8191 * 512).unwrap();
    assert_eq!(&written, b"from the guest");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let disk = file(&[0x55; 4096]);
    let script = "cat /sys/block/vda/ro
        echo overwritten 2> /dev/null > /dev/vda || echo refused
        blockdev --setrw /dev/vda
        echo overwritten 2> /dev/null > /dev/vda || echo refused
        sync";

    let (reason, said) = guest(script).disk(&disk, true).boot().end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert!(said.starts_with("1\nrefused\n"), "{said}");
    let mut content = [0; 4096];
    disk.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, [0x55; 4096]);
}

/// 512 KiB in a second, of which a fifth may come at once.
#[test]
fn a_limit_of_disks_holds_in_a_guest_and_can_be_lifted() {
    let per_second = NonZeroU64::new(512 << 10).unwrap();
    let bytes = Some(RateSpec::steady(per_second));
    let disk = file(&[0x55; 4 << 20]);
    let read = "dd if=/dev/vda of=/dev/null bs=64k count=32 iflag=direct 2> /dev/null";
    let up = "cut -d' ' -f1 /proc/uptime";
    let script = format!("{up}; {read}; {up}; echo half; {read}; {up}");
    let limit = RateLimitSpec { bytes, operations: None };
    let mut guest = guest(&script).disk(&disk, true).disk_limit(limit).boot();

    let up: [String; 2] = guest.lines_until("half");
    guest.machine.limit_disks(RateLimitSpec::default());
    let (_, said) = guest.end();

    let [before, limited] = up.map(|line| line.parse::<f64>().unwrap());
    let free: f64 = said.trim().parse().unwrap();
    // The kernel looks for partitions before, so that nothing may be saved up. A busy host takes
    // its time, too: how well the rate is reached is measured elsewhere, by fio.
    assert!((3.75..5.5).contains(&(limited - before)), "2 MiB at 512 KiB/s: {before} {limited}");
    assert!(free - limited < 2.0, "{limited} {free}");
}

#[test]
fn the_entropy_device_gives_bytes() {
    let script = "cat /sys/class/misc/hw_random/rng_current
        head -c 64 /dev/hwrng | md5sum; head -c 64 /dev/hwrng | md5sum";

    let (_, said) = guest(script).boot().end();

    let lines: Vec<_> = said.lines().collect();
    let [name, first, second] = lines[..] else { panic!("{said}") };
    assert!(name.starts_with("virtio_rng"), "{said}");
    let nothing = "d41d8cd98f00b204e9800998ecf8427e  -";
    assert!(first != second && first != nothing && second != nothing, "{said}");
}

#[test]
fn a_paused_machine_is_silent_until_it_is_resumed() {
    let mut guest = guest(BUSY).vcpus(2).boot();
    guest.says("line 3\r\n");

    guest.machine.pause().unwrap();
    assert!(guest.is_silent());
    guest.machine.pause().unwrap();
    assert!(guest.is_silent(), "paused twice");

    guest.machine.resume().unwrap();
    guest.says("line ");
}

#[test]
fn a_saved_machine_is_plain_data_and_goes_on() {
    let disk = file(&[0; 4096]);
    let mut guest = guest(BUSY).vcpus(2).disk(&disk, false).boot();
    guest.says("line 3\r\n");

    guest.machine.pause().unwrap();
    let state = guest.machine.save().unwrap();
    let text = serde_json::to_string(&state).unwrap();
    let again: MachineState = serde_json::from_str(&text).unwrap();

    assert_eq!(serde_json::to_string(&again).unwrap(), text);
    assert_eq!((again.vcpus.len(), again.irqchips.len(), again.devices.len()), (2, 3, 3));
    assert_eq!(again.devices, state.devices);
    let running = again.devices.iter().filter(|device| device.registers.status == 0xf).count();
    assert_eq!(running, 3, "disk, console and entropy");
    let queue = again.devices[0].task.queues[0];
    assert_eq!(queue.next_avail, queue.next_used, "nothing is in flight");
    assert_ne!(queue.next_used, 0);
    // Saving changes nothing: what has not run is the same when it is saved again.
    assert_eq!(guest.machine.save().unwrap().devices, state.devices);

    guest.machine.resume().unwrap();
    guest.says("line ");
}

/// Only a panic and a reset by ACPI are what a kernel means by a reset.
#[test]
fn a_triple_fault_is_a_fault() {
    let (reason, said) = guest("reboot -f").cmdline("reboot=t").boot().end();

    assert_eq!(reason, StopReason::Fault("vCPU 0: triple fault".into()), "{said}");
}

#[test]
fn a_vcpu_is_a_core_of_its_own() {
    let script = "cd /sys/devices/system/cpu
        cat cpu*/topology/physical_package_id | sort -u
        cat cpu*/topology/core_id | sort -u | wc -l
        cat cpu*/topology/thread_siblings | sort -u | wc -l";

    let (_, said) = guest(script).vcpus(3).boot().end();

    assert_eq!(said, "0\n3\n3\n");
}

#[test]
fn archives_are_laid_over_one_another_and_words_are_passed_on() {
    let mut second = Archive::default();
    second.program("second", b"from the second archive\n");
    let mut third = Archive::default();
    third.program("third", b"from the third\n");
    let script = "cat /second /third; grep -o ' ovum.word=seven$' /proc/cmdline";

    let spec = guest(script).archive(second).archive(third).cmdline("ovum.word=seven");
    let (_, said) = spec.boot().end();

    assert_eq!(said, "from the second archive\nfrom the third\n ovum.word=seven\n");
}

/// The kernel writes by itself; programs need the interrupt that says there is room again.
#[test]
fn kernel_and_programs_speak_through_a_serial_port() {
    let script = "echo through the console; seq 1 300 > /dev/ttyS0; echo sent
        cat /proc/consoles; grep ttyS0 /proc/interrupts";

    let (reason, said) = guest(script).serial().boot().end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert!(said.starts_with("Linux version ") || said.contains("] Linux version "), "{said}");
    assert!(said.contains("through the console\n1\n2\n3\n"), "{said}");
    assert!(said.contains("\n299\n300\nsent\n"), "{said}");
    assert!(said.contains("ttyS0 "), "{said}");
}

#[test]
fn reports_arrive_in_order() {
    let mut programs = Archive::default();
    programs.program("first", &port_writer(REPORT_PORT, 0x0100_0001));
    programs.program("second", &port_writer(REPORT_PORT, u32::MAX));
    // Beside it there is nothing, and that is no report.
    programs.program("stray", &port_writer(REPORT_PORT + 4, 7));
    let mut guest = guest("/first; /stray; /second").archive(programs).boot();

    assert_eq!(guest.end().0, StopReason::PowerOff);

    assert_eq!(guest.reports(), [0x0100_0001, u32::MAX]);
}

/// The state of a vCPU is complete if one that never ran, in a machine that knows nothing of the
/// first, has the same once it was loaded.
#[test]
fn a_saved_vcpu_can_be_loaded_into_a_fresh_one() {
    let mut guest = guest(BUSY).boot();
    guest.says("line 3\r\n");
    guest.machine.pause().unwrap();
    let saved = guest.machine.save().unwrap().vcpus.remove(0);
    let vm = Kvm::new().unwrap().create_vm().unwrap();
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
    // TSC, its deadline, and the clocks of KVM and of Hyper-V go on by themselves.
    let clocks = [0x10, 0x6e0, 0x4b56_4d00, 0x4b56_4d01, 0x4000_0010, 0x4000_0020];
    // An AMD CPU has 32 bits of the SYSENTER addresses, which Linux does not use there: a guest
    // writes 64 of them, KVM writes 32.
    let short = [0x175, 0x176];
    let stays = |msr: &&kvm_msr_entry| {
        !clocks.contains(&msr.index) && !short.contains(&msr.index) && !refused.contains(&msr.index)
    };
    let kept = |state: &VcpuState| -> Vec<_> {
        state.msrs.iter().filter(stays).map(|msr| (msr.index, msr.data)).collect()
    };
    assert_eq!(kept(&loaded), kept(&saved));
    assert!(kept(&saved).len() > 20, "{:x?}", kept(&saved));
}

#[test]
fn a_machine_that_is_paused_again_and_again_boots_all_the_same() {
    let mut guest = guest("echo done").vcpus(2).boot();
    let mut pauses = 0;
    let moment = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
    while pauses < 100 {
        pauses += 1;
        guest.machine.pause().unwrap();
        guest.machine.save().unwrap();
        guest.machine.resume().unwrap();
        let mut events = [PollFd::from_borrowed_fd(guest.machine.events_fd(), PollFlags::IN)];
        poll(&mut events, Some(&moment)).unwrap();
    }

    assert_eq!(guest.end(), (StopReason::PowerOff, "done\n".into()));
}

#[test]
fn a_stopped_machine_runs_no_more() {
    let mut guest = guest(BUSY).vcpus(2).boot();
    guest.says("line 3\r\n");

    guest.machine.stop();
    assert!(guest.is_silent());
    assert_eq!(guest.machine.resume(), Err(Ended));
    assert_eq!(guest.machine.pause(), Err(Ended));
    guest.machine.stop();

    assert!(guest.is_silent());
    assert_eq!(guest.end().0, StopReason::Ordered);
    assert_eq!(guest.machine.next_event(), None);
    assert!(matches!(guest.machine.save(), Err(SaveError::Ended(Ended))));
}

#[test]
fn a_machine_that_ended_takes_orders_without_end() {
    let mut guest = guest("echo done").vcpus(2).boot();
    assert_eq!(guest.end().0, StopReason::PowerOff);

    guest.machine.pause().unwrap();
    guest.machine.save().unwrap();
    guest.machine.resume().unwrap();
    guest.machine.pause().unwrap();
    guest.machine.stop();

    assert_eq!(guest.machine.next_event(), None, "it ended once");
    guest.cut();
}

#[test]
fn a_machine_can_be_dropped_at_any_time() {
    let never_booted = guest(BUSY);
    let (files, _output) = never_booted.files();
    drop(Machine::build(&never_booted.spec, files).unwrap());

    guest(BUSY).vcpus(4).boot().cut();

    let disk = file(&[0; 4096]);
    let mut running = guest(BUSY).vcpus(2).disk(&disk, false).boot();
    running.says("line 3\r\n");
    running.cut();

    let mut paused = guest(BUSY).boot();
    paused.says("line 3\r\n");
    paused.machine.pause().unwrap();
    paused.cut();
}

#[test]
fn two_machines_run_at_once() {
    let disks = [file(b"one"), file(b"two")];
    let script = "head -c 3 /dev/vda; while :; do :; done";
    let [mut one, mut two] = disks.each_ref().map(|disk| {
        disk.set_len(512).unwrap();
        guest(script).disk(disk, true).boot()
    });

    one.says("one");
    two.says("two");
    one.machine.stop();
    assert_eq!(one.end().0, StopReason::Ordered);
    two.machine.stop();
    assert_eq!(two.end().0, StopReason::Ordered);
}

/// How a guest looks for disks that have come.
const LOOKS: &str = "look() {
        for slot in /sys/bus/platform/devices/LNRO0005:*; do
            [ -e $slot/driver ] || echo ${slot##*/} > /sys/bus/platform/drivers/virtio-mmio/bind
        done 2> /dev/null
        true
    }";

#[test]
fn disks_come_and_go_while_a_guest_runs() {
    let script = format!(
        "{LOOKS}
        echo 'slots '$(ls -d /sys/bus/platform/devices/LNRO0005:* | wc -l)
        until look; [ -b /dev/vda ]; do sleep 0.1; done
        echo \"first $(cat /sys/block/vda/serial) $(head -c 3 /dev/vda)\"
        printf 'from the guest' | dd of=/dev/vda bs=512 seek=1 conv=fsync 2> /dev/null
        slot=$(readlink -f /sys/block/vda/device)
        basename ${{slot%/*}} > /sys/bus/platform/drivers/virtio-mmio/unbind
        echo let go
        until look; [ -b /dev/vda ]; do sleep 0.1; done
        echo \"second $(cat /sys/block/vda/serial) $(head -c 3 /dev/vda)\""
    );
    let disks = [b"one", b"two"].map(|content| {
        let disk = file(content);
        disk.set_len(4 << 20).unwrap();
        disk
    });
    let spec = |id: &str| DiskSpec { id: id.into(), read_only: false };
    let mut guest = guest(&script).spare_slots(1).boot();
    // Console and entropy, and the spare one.
    guest.says("slots 3");
    assert_eq!(guest.machine.vacant_slots(), 1);

    guest.machine.attach_disk(&spec("a"), disks[0].try_clone().unwrap()).unwrap();
    let twice = guest.machine.attach_disk(&spec("a"), disks[1].try_clone().unwrap());
    let full = guest.machine.attach_disk(&spec("b"), disks[1].try_clone().unwrap());
    guest.says("first a one");
    guest.says("let go");
    assert!(guest.machine.detach_disk("a").unwrap());
    assert!(!guest.machine.detach_disk("a").unwrap(), "it is not there any more");
    guest.machine.pause().unwrap();
    guest.machine.attach_disk(&spec("b"), disks[1].try_clone().unwrap()).unwrap();
    let slots: Vec<_> = guest.machine.save().unwrap().devices.iter().map(|d| d.slot).collect();
    guest.machine.resume().unwrap();
    guest.says("second b two");
    let (reason, said) = guest.end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert!(matches!(twice, Err(AttachError::IdTaken { .. })), "{twice:?}");
    assert!(matches!(full, Err(AttachError::NoSlot)), "{full:?}");
    assert_eq!(slots, [0, 1, 2]);
    let mut written = [0; 14];
    disks[0].read_exact_at(&mut written, 512).unwrap();
    assert_eq!(&written, b"from the guest");
}

/// What registers say lies in memory, also of a slot that is vacant.
#[test]
fn a_boot_reads_registers_without_an_exit() {
    let disk = file(&[7; 1 << 20]);
    let mut guest = guest("").disk(&disk, false).spare_slots(u8::MAX).boot();
    assert_eq!(guest.end().0, StopReason::PowerOff);

    let exits = guest.machine.exits();
    assert!(exits.mmio_writes.load(Ordering::Relaxed) > 0, "nothing was counted");
    assert_eq!(exits.mmio_reads.load(Ordering::Relaxed), 0);
}

/// What is shown is not the guest's to change: that is an exit, and does nothing.
#[test]
fn a_guest_cannot_write_to_what_it_is_shown() {
    let address = shown_slot(0).unwrap();
    let script = format!(
        "devmem {address} 32 0
        echo magic $(devmem {address})"
    );
    let mut guest = guest(&script).boot();

    let (reason, said) = guest.end();

    assert_eq!(reason, StopReason::PowerOff, "{said}");
    assert!(said.contains("magic 0x74726976"), "{said}");
}

/// A guest that was not asked to let go has harmed itself, and nobody else.
#[test]
fn a_disk_that_is_torn_away_takes_no_machine_with_it() {
    let disk = file(&[7; 1 << 20]);
    let script = format!(
        "{LOOKS}
        cat /dev/vda > /dev/null; echo reads
        (while :; do dd if=/dev/vda of=/dev/null bs=4k iflag=direct; done) 2> /dev/null &
        until look; [ -b /dev/vdb ]; do sleep 0.1; done
        echo \"other $(head -c 3 /dev/vdb)\"
        until look; false; do sleep 1; done"
    );
    let mut guest = guest(&script).disk(&disk, false).spare_slots(1).boot();
    guest.says("reads");

    assert!(guest.machine.detach_disk("disk0").unwrap());

    let other = file(b"two");
    other.set_len(1 << 20).unwrap();
    let spec = DiskSpec { id: "other".into(), read_only: true };
    // The slot that is vacant now is one whose driver waits for its last request.
    assert_eq!(guest.machine.vacant_slots(), 2);
    guest.machine.attach_disk(&spec, other.try_clone().unwrap()).unwrap();
    guest.machine.attach_disk(&DiskSpec { id: "x".into(), ..spec }, other).unwrap();
    guest.says("other two");
    guest.machine.stop();
    assert_eq!(guest.end().0, StopReason::Ordered);
}

#[test]
fn what_no_machine_can_be_is_refused() {
    let refused = |spec: &GuestSpec| Machine::build(&spec.spec, spec.files().0).unwrap_err();

    let error = refused(&guest("").vcpus(33));
    assert!(matches!(error, BuildError::Spec(SpecError::Vcpus { vcpus: 33 })), "{error}");

    let error = refused(&guest("").disk(&file(b"no sector"), true));
    assert!(matches!(&error, BuildError::Disk { id, .. } if id == "disk0"), "{error}");

    let mut long = guest("");
    long.spec.cmdline = "word ".repeat(500);
    let error = refused(&long);
    assert!(matches!(error, BuildError::Boot(BootError::CmdlineTooLong { .. })), "{error}");
}

#[test]
fn files_that_are_something_else_are_refused() {
    let spec = guest("");
    let build = |change: &dyn Fn(&mut MachineFiles)| {
        let (mut files, _output) = spec.files();
        change(&mut files);
        Machine::build(&spec.spec, files).unwrap_err()
    };

    let error = build(&|files| files.kvm = file(b"").into());
    assert!(matches!(error, BuildError::NotKvm { .. }), "{error}");

    let error = build(&|files| files.kernel = file(b"no kernel"));
    assert!(matches!(error, BuildError::Boot(BootError::Kernel(_))), "{error}");

    let large = file(b"");
    large.set_len(1 << 30).unwrap();
    let error = build(&|files| files.initramfs = vec![File::try_clone(&large).unwrap()]);
    assert!(matches!(error, BuildError::Boot(BootError::InitramfsTooLarge { .. })), "{error}");

    let disk = DiskSpec { id: "a name of over twenty bytes".into(), read_only: true };
    let spec = MachineSpec { disks: vec![disk], ..spec.spec.clone() };
    let (mut files, _output) = guest("").files();
    files.disks = vec![file(&[0; 512])];
    let error = Machine::build(&spec, files).unwrap_err();
    assert!(matches!(error, BuildError::Disk { .. }), "{error}");
}
