//! A machine in front of a person: a bare kernel, in this process, its console on a file that is
//! handed over. No server, no instance, no journal; what ends this process ends the guest.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, bail};
use ovum_vmm::machine::{Machine, MachineEvent, MachineEventKind, StopReason};
use ovum_vmm::rate_limiter::RateLimitSpec;
use ovum_vmm::spec::{self, DiskSpec, MachineFiles, MachineSpec};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::happening;
use crate::control::{Event, Happening, now_ns};

/// Most vCPUs that can be asked for.
pub const VCPUS_MAX: u8 = spec::VCPUS_MAX;

/// Least memory that can be asked for, in MiB.
pub const MEMORY_MIB_MIN: u64 = spec::MEMORY_BYTES_MIN >> 20;

/// Most memory that can be asked for, in MiB.
pub const MEMORY_MIB_MAX: u64 = spec::MEMORY_BYTES_MAX >> 20;

/// Memory comes in multiples of so many MiB.
pub const MEMORY_MIB_STEP: u64 = spec::MEMORY_BYTES_STEP >> 20;

/// A kernel to boot.
#[derive(Debug)]
pub struct ForegroundSpec {
    /// /dev/kvm, read and write.
    pub kvm: File,
    /// An uncompressed x86-64 ELF.
    pub kernel: File,
    /// Archives of the initramfs, one laid over the other.
    pub initramfs: Vec<File>,
    /// The first disk, if there is one: the guest cannot write to it.
    pub root: Option<File>,
    /// Whether there is a serial port, for a kernel with something to say before it has a console
    /// by virtio.
    pub serial: bool,
    /// Where the guest's console goes.
    pub console: OwnedFd,
    /// 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// A multiple of [`MEMORY_MIB_STEP`].
    pub memory_mib: u64,
    /// Words for the kernel, after those of the machine.
    pub cmdline: String,
}

/// Boots the machine and stays until it ends. Hears of all that happens.
///
/// # Errors
///
/// What keeps it from starting, and every end that is not a power-off. If nobody reads the console
/// any more that is an end, too: an [`io::ErrorKind::BrokenPipe`].
pub fn run(spec: ForegroundSpec, mut hear: impl FnMut(&Event)) -> anyhow::Result<()> {
    let mut seq = 0;
    let mut tell = |at_ns, what| {
        hear(&Event { seq, at_ns, what });
        seq += 1;
    };
    tell(now_ns(), Happening::Launched);
    let console = spec.console.try_clone().context("Failed to share the console")?;
    let mut machine = build(spec)?;
    machine.boot().context("Failed to start the vCPUs")?;
    loop {
        while let Some(MachineEvent { at_ns, kind }) = machine.next_event() {
            tell(at_ns, happening(kind.clone()));
            if let MachineEventKind::Stopped { reason } = kind {
                return judge(&reason);
            }
        }
        // No event of the console's is asked for: what remains are errors and hang-ups.
        let mut files = [
            PollFd::from_borrowed_fd(machine.events_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(console.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut files, None) {
            Ok(_) if files[1].revents().is_empty() => {}
            Ok(_) => return Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("Failed to wait for the machine"),
        }
    }
}

fn build(spec: ForegroundSpec) -> anyhow::Result<Machine> {
    let ForegroundSpec { kvm, kernel, initramfs, root, console, vcpus, memory_mib, .. } = spec;
    let disk = DiskSpec { id: "root".to_owned(), read_only: true };
    let machine = MachineSpec {
        vcpus,
        memory_bytes: memory_mib.checked_mul(1 << 20).context("--memory-mib is too large")?,
        hotplug_bytes: 0,
        balloon: false,
        cmdline: spec.cmdline,
        disks: root.iter().map(|_| disk.clone()).collect(),
        spare_slots: 0,
        net: None,
        disk_limit: RateLimitSpec::default(),
        vsock_cid: None,
        devices: Vec::new(),
        serial: spec.serial,
    };
    let files = MachineFiles {
        kvm: kvm.into(),
        kernel,
        kernel_text: None,
        initramfs,
        disks: root.into_iter().collect(),
        taps: Vec::new(),
        console: console.into(),
        vsock: None,
    };
    Machine::build(&machine, files).context("Failed to build the machine")
}

/// What the end of a machine means for whoever booted it.
fn judge(reason: &StopReason) -> anyhow::Result<()> {
    match reason {
        StopReason::PowerOff | StopReason::Ordered => Ok(()),
        StopReason::Panic => bail!("The guest kernel panicked: its last words are on the console"),
        StopReason::Reboot => bail!(
            "The guest asked for a reset: a kernel that panics without CONFIG_PVPANIC_MMIO or \
             CONFIG_PVPANIC does so, too"
        ),
        StopReason::Fault(what) => bail!("The guest cannot go on: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_power_off_is_a_success() {
        let text = |reason: &StopReason| judge(reason).unwrap_err().to_string();

        assert!(judge(&StopReason::PowerOff).is_ok());
        assert!(text(&StopReason::Panic).contains("panicked"));
        assert!(text(&StopReason::Reboot).contains("reset"));
        let fault = StopReason::Fault("vCPU 0: triple fault".into());
        assert!(text(&fault).ends_with("vCPU 0: triple fault"));
    }

    #[test]
    fn a_kvm_that_is_none_is_named() {
        let file = || tempfile::tempfile().unwrap();
        let spec = ForegroundSpec {
            kvm: file(),
            kernel: file(),
            initramfs: Vec::new(),
            root: None,
            serial: true,
            console: file().into(),
            vcpus: 1,
            memory_mib: 128,
            cmdline: String::new(),
        };

        let error = format!("{:#}", run(spec, |_| {}).unwrap_err());

        assert!(error.contains("is not KVM"), "{error}");
    }
}
