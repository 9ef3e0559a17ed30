//! QEMU, beside which benches measure.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use ovum_agent_proto::report::{Phase, REPORT_PORT, Report};

use crate::root;

/// A `microvm` with our kernel and what it needs to start from; devices are the caller's
/// to add. It ends where it would start again.
pub fn microvm(vcpus: u8, memory_mib: u32, initramfs: &Path, cmdline: &str) -> Command {
    machine("microvm,pit=off,pic=off,rtc=off,isa-serial=off", vcpus, memory_mib, initramfs, cmdline)
}

/// The same as a `q35`, with as little as it can have: on its bus devices of the host can be. Its
/// firmware is the quickest that there is for it.
pub fn q35(vcpus: u8, memory_mib: u32, initramfs: &Path, cmdline: &str) -> Command {
    let mut command = machine(
        "q35,sata=off,smbus=off,usb=off,pit=off,vmport=off",
        vcpus,
        memory_mib,
        initramfs,
        cmdline,
    );
    command.args(["-bios", "qboot.rom"]);
    command
}

/// Has a guest end at its first user instruction: the agent's first report, a write to the report
/// port, where an `isa-debug-exit` device sits.
pub fn end_at_first_user(command: &mut Command) {
    command.args(["-device", &format!("isa-debug-exit,iobase={REPORT_PORT:#x},iosize=4")]);
}

/// Whether a guest that was to end there did.
pub fn has_begun(status: ExitStatus) -> bool {
    let word = Report::Phase(Phase::AgentStarted).encode();
    status.code() == i32::try_from((word << 1 | 1) & 0xff).ok()
}

fn machine(kind: &str, vcpus: u8, memory_mib: u32, initramfs: &Path, cmdline: &str) -> Command {
    #[expect(clippy::disallowed_methods, reason = "QEMU is the peer, not a tool of ours")]
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-M", kind, "-accel", "kvm"])
        .args(["-cpu", "host", "-smp", &vcpus.to_string(), "-m", &memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-append", cmdline, "-kernel"])
        .arg(root().join("target/kernel/vmlinux"))
        .arg("-initrd")
        .arg(initramfs)
        .stdin(Stdio::null());
    command
}
