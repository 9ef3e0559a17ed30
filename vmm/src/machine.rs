//! A machine, from its description to its end.
//!
//! [`Machine::build`] puts everything in place: memory and its KVM slots, interrupts, devices in
//! their slots, tables, kernel. [`Machine::boot`] starts a thread for each vCPU. From then on the
//! machine runs by itself, and what happens to it arrives as [`MachineEvent`]s; dropping it ends
//! all its threads. Disks come and go meanwhile ([`mod@disks`]).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, kvm_irqchip,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{acpi, boot, cpuid, registers};
use crate::events::Events;
pub use crate::events::{MachineEvent, MachineEventKind, StopReason};
use crate::kernel_text::{Identity, Image, KernelText};
use crate::kvm::{Access, Vm};
use crate::kvm_slots::KvmSlots;
use crate::layout::{KVM_TSS_START, MMIO_SLOTS, SERIAL_GSI, hotplug_start};
use crate::machine::place::place;
use crate::machine_error::{BuildError, Ended, SaveError};
use crate::machine_state::{DeviceSlotState, IrqchipState, MachineState};
use crate::memory::{Mem, Memory, MemoryError, MemoryListener, MemoryRange};
use crate::pci::msi::Routes;
use crate::pci::{self, PciBus};
use crate::ports::{Ports, SerialInterrupt};
use crate::rate_limiter::{RateLimitSpec, RateLimiter};
use crate::reactor::{self, Orders, Reactor};
use crate::slots::Slots;
use crate::spec::{MachineFiles, MachineSpec};
use crate::vcpu::{Exits, Platform, Vcpu, install_kick};
use crate::vfio::passthrough::{Passthrough, Place};
use crate::vfio::{Container, DmaMap};
use crate::virtio::Device;
use crate::virtio::balloon::{Balloon, BalloonHandle};
use crate::virtio::blk::Blk;
use crate::virtio::console::Console;
use crate::virtio::entropy::Entropy;
use crate::virtio::mem::{MemDevice, MemError, MemHandle};
use crate::virtio::net;
use crate::virtio::shown::ShownSlots;
use crate::virtio::vsock::Vsock;

pub mod disks;
mod place;

/// Words that every guest of this machine gets.
///
/// A panic ends the machine, and whatever a machine like this does not have is not looked for:
/// - `tsc=reliable no_timer_check`: there is no second clock or timer to check against.
const CMDLINE: &str = "quiet panic=-1 tsc=reliable no_timer_check random.trust_cpu=on";
/// Without devices of the host there is no bus, and finding that out takes over 200 exits; nor is
/// there who reaches low memory only, for whom a guest with memory above 4 GiB would set aside and
/// clear 64 MiB.
const CMDLINE_NO_PCI: &str = " pci=off swiotlb=noforce";
/// Without a 16550 the console is virtio, and
const CMDLINE_NO_SERIAL: &str = "console=hvc0";
/// there is none to look for, unless a device of the host is one.
const CMDLINE_NO_UART: &str = " 8250.nr_uarts=0";
/// With one the kernel speaks from its first line, and there only: both go to the same file. What
/// it said before it knew of the port is said again then, if by then nothing is kept quiet.
const CMDLINE_SERIAL: &str = "ignore_loglevel console=ttyS0 earlyprintk=ttyS0";

/// Memory that is added later is for programs as far as it is not needed for the kernel's own use
/// of all the memory: what programs have can be moved, and so the memory taken away again.
const CMDLINE_HOTPLUG: &str = " memory_hotplug.online_policy=auto-movable";

/// One machine.
#[derive(Debug)]
pub struct Machine {
    // In the order in which they must end: vCPUs, devices, then what both stand on.
    vcpus: Vec<Vcpu>,
    unstarted: Vec<VcpuFd>,
    _reactor: Reactor,
    orders: Orders,
    platform: Arc<Platform>,
    events: Arc<Events>,
    vm: Arc<VmFd>,
    msrs: Arc<[u32]>,
    handles: Handles,
    /// The slot and the id of each disk.
    disks: Vec<(u8, String)>,
    phase: Phase,
    mem: Arc<Mem>,
}

/// What is told to devices while they run.
#[derive(Debug)]
struct Handles {
    disk_limiter: RateLimiter,
    hotplug: Option<MemHandle>,
    balloon: Option<BalloonHandle>,
}

/// What was asked of a machine last; its guest may have ended it meanwhile.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Running,
    Paused,
    Stopped,
}

impl Machine {
    /// Builds the machine that `spec` describes out of `files`.
    ///
    /// # Errors
    ///
    /// [`BuildError`]; nothing stays behind.
    pub fn build(spec: &MachineSpec, mut files: MachineFiles) -> Result<Self, BuildError> {
        spec.check(&files)?;
        install_kick().map_err(BuildError::Thread)?;
        let kvm = kvm(files.kvm)?;
        let vm = Arc::new(kvm.create_vm().map_err(BuildError::kvm("create a virtual machine"))?);
        set_up_interrupts(&vm)?;
        let kvm_slots = KvmSlots::new(Arc::clone(&vm) as Arc<dyn Vm>);
        let mut listeners: Vec<Box<dyn MemoryListener>> = vec![Box::new(kvm_slots.clone())];
        let pci = if spec.devices.is_empty() {
            None
        } else {
            let paths = spec.devices.iter().map(|device| device.path.as_path());
            let container = Container::new(&vm, paths)?;
            let pci = bus(spec, &container, &vm, kvm_slots.clone())?;
            // After the first device, without which a container has no IOMMU to map with.
            listeners.push(Box::new(DmaMap(container)));
            Some(pci)
        };
        let memory = Memory::new(spec.memory_bytes, listeners)?;
        let mem = Arc::clone(memory.mem());
        let events = Arc::new(Events::new().map_err(BuildError::Thread)?);

        let log = files.console.try_clone().map_err(BuildError::Thread)?;
        let disk_limiter = RateLimiter::new(spec.disk_limit, Instant::now());
        let mut devices = disks(spec, files.disks, &disk_limiter)?;
        devices.extend(streams(spec, files.taps, files.vsock, files.console)?);
        let (hotplug, balloon) = add_memory_devices(&mut devices, spec, memory)?;
        let handles = Handles { disk_limiter, hotplug, balloon };
        let most = usize::try_from(MMIO_SLOTS).expect("usize is 64 bits wide");
        let slot_count = (devices.len() + usize::from(spec.spare_slots)).min(most);
        let vacant = slot_count.saturating_sub(devices.len());
        let (orders, inbox) = reactor::orders().map_err(BuildError::Thread)?;
        let shown = show_slots(&kvm_slots)?;
        let placed = devices.into_iter().zip(0..);
        let placed = placed.map(|(device, slot)| place(&vm, &mem, slot, device, &orders, &shown));
        let (tasks, registers) = placed.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
        let recalls =
            pci.as_ref().map_or(Ok(Vec::new()), PciBus::recalls).map_err(BuildError::Thread)?;
        let reactor = Reactor::start(tasks, orders.clone(), inbox, recalls, Arc::clone(&events))
            .map_err(BuildError::Thread)?;

        let windows = pci.as_ref().map(PciBus::windows);
        acpi::write_tables(&mem, spec.vcpus, slot_count as u64, spec.serial, windows)?;
        let supported = supported_cpuid(&kvm)?;
        let text = kernel_text(&kvm, &supported, spec, files.kernel_text, &files.kernel, &mem);
        let kernel = &mut Image::new(&mut files.kernel, text.as_ref());
        let entry = boot::load(&mem, kernel, &mut files.initramfs, cmdline(spec).trim_end())?;
        registers::write_tables(&mem).map_err(BuildError::Tables)?;

        let unstarted = vcpus(&vm, &supported, spec.vcpus, entry)?;
        let serial = if spec.serial { Some(serial(&vm, log)?) } else { None };
        let msrs = kvm.get_msr_index_list().map_err(BuildError::kvm("list registers"))?;
        let platform = Arc::new(Platform {
            ports: Ports::new(Arc::clone(&events), serial, text.and_then(KernelText::into_keeper)),
            slots: Slots::new(registers, vacant, shown),
            pci,
            events: Arc::clone(&events),
            exits: Exits::default(),
        });
        Ok(Self {
            vcpus: Vec::new(),
            unstarted,
            _reactor: reactor,
            orders,
            platform,
            events,
            vm,
            msrs: msrs.as_slice().into(),
            handles,
            disks: (0..).zip(spec.disks.iter().map(|disk| disk.id.clone())).collect(),
            phase: Phase::Running,
            mem,
        })
    }

    /// Starts the vCPUs. [`MachineEventKind::Started`] follows.
    ///
    /// # Errors
    ///
    /// What clone(2) says; vCPUs that were started are ended again.
    pub fn boot(&mut self) -> io::Result<()> {
        self.events.push(MachineEventKind::Started);
        // The boot CPU last: until it runs the others only wait to be woken.
        for (fd, index) in
            self.unstarted.drain(..).zip(0_u8..).collect::<Vec<_>>().into_iter().rev()
        {
            let vcpu = Vcpu::start(index, fd, Arc::clone(&self.platform));
            match vcpu {
                Ok(vcpu) => self.vcpus.push(vcpu),
                Err(error) => {
                    self.vcpus.clear();
                    return Err(error);
                }
            }
        }
        self.vcpus.reverse();
        Ok(())
    }

    /// Stops all vCPUs where they are, lets devices finish what they are at, and then stops them
    /// too: until [`Machine::resume`] nothing of this machine changes.
    ///
    /// # Errors
    ///
    /// [`Ended`] if a thread of the machine is no more.
    pub fn pause(&mut self) -> Result<(), Ended> {
        match self.phase {
            Phase::Running => self.phase = Phase::Paused,
            Phase::Paused => return Ok(()),
            Phase::Stopped => return Err(Ended),
        }
        let answers: Vec<_> = self.vcpus.iter().map(Vcpu::pause).collect();
        for answer in answers {
            answer.recv().map_err(|_gone| Ended)?;
        }
        self.orders.pause().ok_or(Ended)
    }

    /// Lets a paused machine go on.
    ///
    /// # Errors
    ///
    /// [`Ended`] if a thread of the machine is no more.
    pub fn resume(&mut self) -> Result<(), Ended> {
        match self.phase {
            Phase::Running => return Ok(()),
            Phase::Paused => self.phase = Phase::Running,
            Phase::Stopped => return Err(Ended),
        }
        self.orders.resume().ok_or(Ended)?;
        self.vcpus.iter().try_for_each(|vcpu| vcpu.resume().ok_or(Ended))
    }

    /// Ends the machine as if its power was cut: when this returns it runs no more guest code, and
    /// [`StopReason::Ordered`] follows unless it had ended by itself.
    pub fn stop(&mut self) {
        self.phase = Phase::Stopped;
        self.unstarted.clear();
        self.vcpus.clear();
        self.events.push(MachineEventKind::Stopped { reason: StopReason::Ordered });
    }

    /// Limits all disks together to something else from now on.
    pub fn limit_disks(&self, limit: RateLimitSpec) {
        self.handles.disk_limiter.set(limit, Instant::now());
    }

    /// Asks the guest to have `bytes` of memory beyond what it booted with: a multiple of the step
    /// of the spec, and at most what the spec set aside. It does so when it can.
    ///
    /// # Errors
    ///
    /// [`MemError::Size`], and nothing has changed.
    pub fn resize_hotplug(&self, bytes: u64) -> Result<(), MemError> {
        match &self.handles.hotplug {
            Some(hotplug) => hotplug.resize(bytes),
            None if bytes == 0 => Ok(()),
            None => Err(MemError::Size { bytes, max: 0 }),
        }
    }

    /// How much memory it has beyond what it booted with.
    pub fn plugged_bytes(&self) -> u64 {
        self.handles.hotplug.as_ref().map_or(0, MemHandle::plugged_bytes)
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&BalloonHandle> {
        self.handles.balloon.as_ref()
    }

    /// Everything but the content of memory, of a machine that is paused.
    ///
    /// # Errors
    ///
    /// [`SaveError`].
    pub fn save(&self) -> Result<MachineState, SaveError> {
        match self.phase {
            Phase::Running => return Err(SaveError::Running),
            Phase::Paused => {}
            Phase::Stopped => return Err(SaveError::Ended(Ended)),
        }
        if self.platform.pci.is_some() {
            return Err(SaveError::HostDevices);
        }
        let save = |vcpu: &Vcpu| vcpu.save(Arc::clone(&self.msrs));
        let vcpus = self.vcpus.iter().map(save).collect::<Result<_, _>>()?;
        let clock = self.vm.get_clock().map_err(SaveError::kvm("clock"))?;
        let mut irqchips = Vec::new();
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC] {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            self.vm.get_irqchip(&mut chip).map_err(SaveError::kvm("interrupt controller"))?;
            irqchips.push(IrqchipState::new(&chip));
        }
        let tasks = self.orders.save().ok_or(SaveError::Ended(Ended))?;
        let slots = self
            .platform
            .slots
            .each(|registers| (registers.state().clone(), registers.line().state()));
        // Disks come and go by orders to this machine, of which this is one: both lists have the
        // same slots.
        let devices = slots.into_iter().zip(tasks).map(|((slot, (registers, line)), (_, task))| {
            DeviceSlotState { slot, registers, line, task }
        });
        let devices = devices.collect();
        Ok(MachineState { vcpus, clock, irqchips, devices })
    }

    /// Exits to this process so far, by kind.
    pub fn exits(&self) -> &Exits {
        &self.platform.exits
    }

    /// The next event, if there is one.
    pub fn next_event(&self) -> Option<MachineEvent> {
        self.events.next()
    }

    /// A file that is readable while events wait.
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

/// Lets the guest see, where it cannot write, what the registers of its slots say.
fn show_slots(kvm_slots: &KvmSlots) -> Result<ShownSlots, MemoryError> {
    let shown = ShownSlots::new()?;
    let range = shown.range();
    let MemoryRange { guest_start, bytes, .. } = range;
    let added = kvm_slots.add(range, Access::Read);
    added.map_err(|source| MemoryError::Listener { guest_start, bytes, source })?;
    Ok(shown)
}

/// The words for the guest's kernel.
fn cmdline(spec: &MachineSpec) -> String {
    let has_bus = !spec.devices.is_empty();
    let console = if spec.serial { CMDLINE_SERIAL } else { CMDLINE_NO_SERIAL };
    let uart = if spec.serial || has_bus { "" } else { CMDLINE_NO_UART };
    let bus = if has_bus { "" } else { CMDLINE_NO_PCI };
    let hotplug = if spec.hotplug_bytes > 0 { CMDLINE_HOTPLUG } else { "" };
    format!("{CMDLINE} {console}{uart}{bus}{hotplug} {}", spec.cmdline)
}

fn kvm(file: OwnedFd) -> Result<Kvm, BuildError> {
    // SAFETY: the descriptor is owned and given away here; whether it is /dev/kvm is asked next.
    #[expect(unsafe_code, reason = "a descriptor that was handed over has no other way in")]
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    match kvm.get_api_version() {
        12 => Ok(kvm),
        version => Err(BuildError::NotKvm { version }),
    }
}

fn supported_cpuid(kvm: &Kvm) -> Result<CpuId, BuildError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    supported.map_err(BuildError::kvm("say what CPUs it supports"))
}

/// The text that the machine starts from or keeps for others. Devices of the host reach memory by
/// addresses of their own, under which no pages of a file can be put.
fn kernel_text(
    kvm: &Kvm,
    supported: &CpuId,
    spec: &MachineSpec,
    file: Option<File>,
    kernel: &File,
    mem: &Arc<Mem>,
) -> Option<KernelText> {
    let file = file.filter(|_| spec.devices.is_empty())?;
    // Whatever keeps it from sharing a text, the machine can do without.
    let identity = Identity::of(kernel, kvm, supported, spec.vcpus, &spec.cmdline).ok()?;
    KernelText::of(file, kernel, &identity, mem).ok()?
}

fn set_up_interrupts(vm: &VmFd) -> Result<(), BuildError> {
    let tss = usize::try_from(KVM_TSS_START).expect("usize is 64 bits wide");
    vm.set_tss_address(tss).map_err(BuildError::kvm("place its TSS"))?;
    vm.create_irq_chip().map_err(BuildError::kvm("create interrupt controllers"))
}

/// The bus with the devices of the host that the machine is lent.
fn bus(
    spec: &MachineSpec,
    container: &Container,
    vm: &Arc<VmFd>,
    slots: KvmSlots,
) -> Result<PciBus, BuildError> {
    let memory_end = hotplug_start(spec.memory_bytes) + spec.hotplug_bytes;
    let windows = pci::windows(memory_end);
    let routes = Routes::new(Arc::clone(vm) as Arc<dyn Vm>);
    let place = Place { slots, routes, windows: windows.clone() };
    let devices = spec.devices.iter().map(|device| {
        let opened = container.open(&device.path)?;
        Passthrough::new(Box::new(opened), place.clone())
    });
    Ok(PciBus::new(devices.collect::<Result<_, _>>()?, windows)?)
}

/// The machine's disks. They have the first slots, so that slot n is vd[a+n].
fn disks(
    spec: &MachineSpec,
    files: Vec<File>,
    limiter: &RateLimiter,
) -> Result<Vec<Box<dyn Device>>, BuildError> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    for (file, disk) in files.into_iter().zip(&spec.disks) {
        let failed = |source| BuildError::Disk { id: disk.id.clone(), source };
        devices.push(Box::new(Blk::new(file, disk, limiter).map_err(failed)?));
    }
    Ok(devices)
}

/// The devices that come behind the disks in every machine.
fn streams(
    spec: &MachineSpec,
    taps: Vec<OwnedFd>,
    vsock: Option<UnixListener>,
    console: File,
) -> Result<Vec<Box<dyn Device>>, BuildError> {
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    if let Some(net) = &spec.net {
        devices.push(Box::new(net::over_tap(taps, net).map_err(BuildError::Net)?));
    }
    if let (Some(cid), Some(listener)) = (spec.vsock_cid, vsock) {
        devices.push(Box::new(Vsock::new(cid, listener).map_err(BuildError::Vsock)?));
    }
    devices.push(Box::new(Console::new(console).map_err(BuildError::Console)?));
    devices.push(Box::new(Entropy::new()));
    Ok(devices)
}

/// Adds the devices that change guest memory; whoever may add memory gets to own it.
fn add_memory_devices(
    devices: &mut Vec<Box<dyn Device>>,
    spec: &MachineSpec,
    memory: Memory,
) -> Result<(Option<MemHandle>, Option<BalloonHandle>), BuildError> {
    let (mut hotplug, mut balloon) = (None, None);
    if spec.balloon {
        let device = Balloon::new().map_err(BuildError::Thread)?;
        balloon = Some(device.handle());
        devices.push(Box::new(device));
    }
    if spec.hotplug_bytes > 0 {
        let start = hotplug_start(spec.memory_bytes);
        let device = MemDevice::new(memory, start, spec.hotplug_bytes)?;
        hotplug = Some(device.handle());
        devices.push(Box::new(device));
    }
    Ok((hotplug, balloon))
}

/// Creates the vCPUs; the first enters the kernel at `entry`, the others wait for it.
fn vcpus(vm: &VmFd, supported: &CpuId, count: u8, entry: u64) -> Result<Vec<VcpuFd>, BuildError> {
    let mut vcpus = Vec::with_capacity(usize::from(count));
    for index in 0..count {
        let vcpu = vm.create_vcpu(u64::from(index)).map_err(BuildError::kvm("create a vCPU"))?;
        let leaves = cpuid::for_vcpu(supported, index, count);
        let leaves = CpuId::from_entries(&leaves).map_err(|_too_many| BuildError::TooManyLeaves)?;
        vcpu.set_cpuid2(&leaves).map_err(BuildError::kvm("set CPUID"))?;
        registers::enable_state_components(&vcpu, &leaves)
            .map_err(BuildError::kvm("set registers"))?;
        registers::set_firmware_msrs(&vcpu).map_err(BuildError::kvm("set registers"))?;
        if index == 0 {
            registers::enter_kernel(&vcpu, entry).map_err(BuildError::kvm("set registers"))?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

fn serial(vm: &VmFd, log: File) -> Result<(SerialInterrupt, File), BuildError> {
    let irq = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BuildError::Thread)?;
    vm.register_irqfd(&irq, SERIAL_GSI).map_err(BuildError::kvm("register an interrupt"))?;
    Ok((SerialInterrupt(irq), log))
}
