//! What the emulated host is made of, as QEMU's command line.
//!
//! Everything here is part of a saved state and of the name it is kept under. What differs between
//! two runs on the same hardware (files, sockets, forwarded ports) is in `machine`.

use std::path::Path;

use crate::channel::PORTS;
use crate::options::Options;

/// The kernel's command line: what costs boot time and protects nothing here is left out.
///
/// Module and kernel text is patched under TCG for every mitigation, so there are none; memory is
/// not wiped at allocation; the initramfs is not wiped after use.
const APPEND: &str = "console=ttyS0 quiet loglevel=4 panic=-1 reboot=t nokaslr mitigations=off \
                      rodata=off init_on_alloc=0 retain_initrd lsm=capability \
                      rcupdate.rcu_expedited=1 tsc=reliable no_timer_check nowatchdog \
                      random.trust_cpu=on";
/// Read-only: what is inside can change its overlay, never the outer machine.
const OUTER: &str = "local,id=outer,path=/,security_model=none,readonly=on,multidevs=remap";

/// QEMU's arguments for one machine.
#[derive(Debug, Hash)]
pub struct Hardware {
    arguments: Vec<String>,
    counts: bool,
}

impl Hardware {
    /// Describes the machine that `options` ask for, booting `kernel`.
    #[must_use]
    pub fn new(options: &Options, kernel: &Path) -> Self {
        let vfio = options.vfio;
        let mut hardware = Self { arguments: Vec::new(), counts: options.count };
        hardware.add(&["-cpu", "EPYC,+svm,+npt"]);
        if options.count {
            hardware.add(&["-accel", "tcg,thread=single", "-icount", "shift=0"]);
        } else {
            hardware.add(&["-accel", "tcg,thread=multi"]);
        }
        hardware.add(&["-M", if vfio { "q35,kernel-irqchip=off" } else { "q35" }]);
        hardware.add(&["-m", &options.memory_mib.to_string()]);
        // With two CPUs, QEMU 7.2 now and then loses an instruction that one of them has patched.
        hardware.add(&["-smp", &options.cpus.to_string()]);
        hardware.add(&["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"]);
        hardware.add(&["-kernel", &kernel.to_string_lossy()]);
        hardware
            .add(&["-append", &format!("{APPEND}{}", if vfio { " intel_iommu=on" } else { "" })]);
        if vfio {
            // Addresses of BARs go above 39 bits, which the device could not map by default.
            hardware
                .add(&["-device", "intel-iommu,intremap=off,caching-mode=on,aw-bits=48"])
                .add(&["-device", "nvme,serial=ovum,drive=nvme", "-device", "edu"])
                .add(&["-netdev", "user,id=lent,restrict=on", "-device", "e1000e,netdev=lent"]);
        }
        hardware
            .add(&["-serial", "chardev:console"])
            .add(&["-fsdev", OUTER, "-device", "virtio-9p-pci,fsdev=outer,mount_tag=outer"])
            .add(&["-device", "virtio-blk-pci,drive=disk"])
            .add(&["-device", "virtio-net-pci,netdev=net,romfile="])
            // A resumed kernel must not go on with random numbers that another run has seen.
            .add(&["-device", "vmgenid,guid=auto", "-device", "virtio-rng-pci"])
            .add(&["-device", "virtio-serial-pci"]);
        for nr in 1..=PORTS {
            hardware.add(&["-device", &format!("virtserialport,nr={nr},chardev=port{nr}")]);
        }
        hardware
    }

    /// Whether its instructions are counted, so that nothing may come between them by chance.
    #[must_use]
    pub fn counts(&self) -> bool {
        self.counts
    }

    #[must_use]
    pub fn arguments(&self) -> &[String] {
        &self.arguments
    }

    fn add(&mut self, arguments: &[&str]) -> &mut Self {
        self.arguments.extend(arguments.iter().map(|&argument| argument.to_string()));
        self
    }
}
