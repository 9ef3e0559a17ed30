//! A device's place in a machine: its slot with kicks, interrupt line and registers.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};

use crate::layout::{MMIO_GSI_FIRST, MMIO_SLOTS, mmio_slot};
use crate::machine_error::BuildError;
use crate::memory::Mem;
use crate::reactor::Orders;
use crate::virtio::Device;
use crate::virtio::config_space::ConfigSpace;
use crate::virtio::mmio::{Identity, QUEUE_NOTIFY, Registers};
use crate::virtio::shown::ShownSlots;
use crate::virtio::task::{Interrupt, Line, Task};

/// An interrupt by its number, as an edge.
///
/// KVM cannot pass on one of the I/O APIC where an eventfd is written: an irqfd would have a kernel
/// thread woken for each. These two calls take as long as that write, and then it is done.
#[derive(Debug)]
struct Edge {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl Interrupt for Edge {
    fn raise(&self) {
        for is_high in [true, false] {
            // KVM refuses only a number that has no pin.
            let _ = self.vm.set_irq_line(self.gsi, is_high);
        }
    }
}

/// Prepares slot number `slot` for `device`: what is served there, and what the guest finds there.
///
/// # Errors
///
/// [`BuildError`]; nothing stays behind.
pub(super) fn place(
    vm: &Arc<VmFd>,
    mem: &Arc<Mem>,
    slot: u8,
    device: Box<dyn Device>,
    orders: &Orders,
    shown: &ShownSlots,
) -> Result<(Task, Registers), BuildError> {
    let address = notify(slot)?;
    let gsi = MMIO_GSI_FIRST + u32::from(slot);
    let shown = shown.slot(slot.into()).ok_or(BuildError::TooManyDevices { max: MMIO_SLOTS })?;
    let line = Line::new(Arc::new(Edge { vm: Arc::clone(vm), gsi }), shown.clone());
    let config = ConfigSpace::new(device.config(), shown.clone());
    let identity = Identity::of(&*device, config.clone());
    let task = Task::new(device, config, Arc::clone(mem), line.clone());
    let task = task.inspect_err(|_| shown.blank()).map_err(BuildError::Thread)?;
    let registers = Registers::new(slot, identity, orders.clone(), line);
    for (kick, queue) in task.kicks().iter().zip(0_u32..) {
        if let Err(error) = vm.register_ioevent(kick, &address, queue) {
            clear(vm, slot, &task);
            registers.vanish();
            return Err(BuildError::kvm("register a kick")(error));
        }
    }
    Ok((task, registers))
}

/// Undoes [`place`]: KVM knows of the device no more.
pub(super) fn clear(vm: &VmFd, slot: u8, task: &Task) {
    let Ok(address) = notify(slot) else { return };
    for (kick, queue) in task.kicks().iter().zip(0_u32..) {
        // KVM refuses only what it does not have.
        let _ = vm.unregister_ioevent(kick, &address, queue);
    }
}

fn notify(slot: u8) -> Result<IoEventAddress, BuildError> {
    let start = mmio_slot(slot.into()).ok_or(BuildError::TooManyDevices { max: MMIO_SLOTS })?;
    Ok(IoEventAddress::Mmio(start + QUEUE_NOTIFY))
}
