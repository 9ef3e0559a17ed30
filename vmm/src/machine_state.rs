//! What a machine would need to go on elsewhere, apart from the content of its memory.

use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};

use crate::vcpu_state::VcpuState;
use crate::virtio::mmio::RegistersState;
use crate::virtio::task::{LineState, TaskState};

/// A paused machine.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    /// In order.
    pub vcpus: Vec<VcpuState>,
    /// kvm-clock.
    pub clock: kvm_clock_data,
    /// Both PICs and the IOAPIC.
    pub irqchips: Vec<IrqchipState>,
    /// In the order of their slots.
    pub devices: Vec<DeviceSlotState>,
}

/// One interrupt controller, as KVM gives it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IrqchipState {
    /// KVM_IRQCHIP_*.
    pub chip_id: u32,
    /// The bytes of the union in `kvm_irqchip`.
    pub bytes: Vec<u8>,
}

/// One virtio device in its slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSlotState {
    /// Which. Not all need to be taken.
    pub slot: u8,
    /// What the driver wrote.
    pub registers: RegistersState,
    /// Its interrupt.
    pub line: LineState,
    /// The device and its queues.
    pub task: TaskState,
}

impl IrqchipState {
    /// Keeps what KVM read.
    pub fn new(chip: &kvm_irqchip) -> Self {
        // SAFETY: `dummy` is the union's member that covers all of it, and any bytes are bytes.
        #[expect(unsafe_code, reason = "KVM's answer is a union")]
        let dummy = unsafe { chip.chip.dummy };
        Self {
            chip_id: chip.chip_id,
            bytes: dummy.iter().map(|byte| byte.cast_unsigned()).collect(),
        }
    }
}
