//! The virtio-mmio transport: the registers of one slot, as a vCPU sees them.
//!
//! A vCPU thread that touches a register works on [`Registers`] under the slot's lock. Only two
//! things reach the device thread from here, and the vCPU waits for both: that the driver is ready
//! (its queues are checked and frozen, then the device starts) and a reset. Kicks do not come by:
//! they are ioeventfds.
//! Virtio 1.3, 4.2 "Virtio Over MMIO".

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::Device;
use super::config_space::ConfigSpace;
use super::task::{Activation, Line};
use crate::reactor::Orders;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// What the driver sees as vendor: "ovum".
const VENDOR: u32 = 0x6d75_766f;

const MAGIC_VALUE: u64 = 0x000;
const VERSION_NUMBER: u64 = 0x004;
pub(super) const DEVICE_ID: u64 = 0x008;
const VENDOR_ID: u64 = 0x00c;
const DEVICE_FEATURES: u64 = 0x010;
const DEVICE_FEATURES_SEL: u64 = 0x014;
/// All features at once, for drivers that know of it (`kernel-config/patches/mmio.patch`): the
/// standard has nothing here, 4.2.2 "MMIO Device Register Layout".
const ALL_FEATURES_LOW: u64 = 0x018;
const ALL_FEATURES_HIGH: u64 = 0x01c;
const DRIVER_FEATURES: u64 = 0x020;
const DRIVER_FEATURES_SEL: u64 = 0x024;
const QUEUE_SEL: u64 = 0x030;
const QUEUE_SIZE_MAX: u64 = 0x034;
const QUEUE_SIZE: u64 = 0x038;
const QUEUE_READY: u64 = 0x044;
/// Written to kick a queue; an ioeventfd sits here.
pub const QUEUE_NOTIFY: u64 = 0x050;
pub(super) const INTERRUPT_STATUS: u64 = 0x060;
const INTERRUPT_ACK: u64 = 0x064;
pub(super) const STATUS: u64 = 0x070;
const QUEUE_DESC_LOW: u64 = 0x080;
const QUEUE_DESC_HIGH: u64 = 0x084;
const QUEUE_DRIVER_LOW: u64 = 0x090;
const QUEUE_DRIVER_HIGH: u64 = 0x094;
const QUEUE_DEVICE_LOW: u64 = 0x0a0;
const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
/// Where the configuration space begins.
pub const CONFIG: u64 = 0x100;

/// Status bits that a driver sets itself.
const DRIVER_BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;

/// What the transport offers to every driver.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The registers of one slot, and the way to its device.
#[derive(Debug)]
pub struct Registers {
    identity: Identity,
    state: RegistersState,
    slot: u8,
    orders: Orders,
    line: Line,
}

/// What a device says of itself. Only the configuration space can change while it runs.
#[derive(Debug)]
pub struct Identity {
    kind: u32,
    features: u64,
    queue_sizes: &'static [u16],
    config: ConfigSpace,
}

impl Identity {
    /// What `device` says, its configuration in `config`.
    pub fn of(device: &dyn Device, config: ConfigSpace) -> Self {
        Self {
            kind: device.kind(),
            features: device.features() | TRANSPORT_FEATURES,
            queue_sizes: device.queue_sizes(),
            config,
        }
    }
}

/// What the driver has written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegistersState {
    /// Status bits (virtio 1.3, 2.1 "Device Status Field"), NEEDS_RESET left out.
    pub status: u32,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Which half of the features is read.
    pub device_features_select: u32,
    /// Which half of the features is written.
    pub driver_features_select: u32,
    /// Which queue is being set up.
    pub queue_select: u32,
    /// The queues as they were set up.
    pub queues: Vec<QueueSetup>,
}

impl RegistersState {
    fn after_reset(queue_sizes: &[u16]) -> Self {
        let queue = |&size| QueueSetup { size, ..QueueSetup::default() };
        Self { queues: queue_sizes.iter().map(queue).collect(), ..Self::default() }
    }
}

/// A queue as the driver set it up.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSetup {
    /// In descriptors.
    pub size: u16,
    /// Whether it is used.
    pub ready: bool,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub driver: u64,
    /// Guest address of the used ring.
    pub device: u64,
}

impl Registers {
    /// Slot number `slot`: the device behind it says `identity` of itself, interrupts by `line`
    /// and is reached by `orders`.
    pub fn new(slot: u8, identity: Identity, orders: Orders, line: Line) -> Self {
        let state = RegistersState::after_reset(identity.queue_sizes);
        Self { identity, state, slot, orders, line }
    }

    /// What the driver has written.
    pub fn state(&self) -> &RegistersState {
        &self.state
    }

    /// The device's interrupt.
    pub fn line(&self) -> &Line {
        &self.line
    }

    /// A vCPU reads `data.len()` bytes at `offset`. What is not there reads as ones.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.identity.config.read(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    /// A vCPU writes at `offset`. What is not there, or not allowed now, is ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
            self.show();
        }
    }

    /// The guest finds the device.
    pub fn appear(&self) {
        // Its id last: by that it is found.
        self.show();
        for register in [ALL_FEATURES_LOW, ALL_FEATURES_HIGH, DEVICE_ID] {
            self.line.shown().set(register, self.read_register(register));
        }
    }

    /// The guest finds a placeholder.
    pub fn vanish(&self) {
        self.line.shown().blank();
    }

    /// Shows what a write can have changed.
    fn show(&self) {
        let shown = self.line.shown();
        for register in [DEVICE_FEATURES, QUEUE_SIZE_MAX, QUEUE_READY, STATUS] {
            shown.set(register, self.read_register(register));
        }
        // It broke between the look and the store: that was overwritten.
        if self.line.broken() {
            shown.need_reset();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queue();
        match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_NUMBER => VERSION,
            DEVICE_ID => self.identity.kind,
            VENDOR_ID => VENDOR,
            DEVICE_FEATURES => half(self.identity.features, self.state.device_features_select),
            ALL_FEATURES_LOW => half(self.identity.features, 0),
            ALL_FEATURES_HIGH => half(self.identity.features, 1),
            QUEUE_SIZE_MAX => queue.map_or(0, |(size_max, _)| u32::from(size_max)),
            QUEUE_READY => queue.map_or(0, |(_, queue)| u32::from(queue.ready)),
            INTERRUPT_STATUS => self.line.pending(),
            STATUS if self.line.broken() => self.state.status | NEEDS_RESET,
            STATUS => self.state.status,
            CONFIG_GENERATION => self.identity.config.generation(),
            _ => u32::MAX,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            DRIVER_FEATURES if self.in_status(DRIVER, FEATURES_OK) => {
                let select = self.state.driver_features_select;
                set_half(&mut self.state.driver_features, select, value);
            }
            QUEUE_SEL => self.state.queue_select = value,
            INTERRUPT_ACK => self.line.acknowledge(value),
            STATUS => self.write_status(value),
            _ if self.in_status(FEATURES_OK, DRIVER_OK) => self.write_queue(offset, value),
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, value: u32) {
        let select = self.state.queue_select as usize;
        let Some(queue) = self.state.queues.get_mut(select) else { return };
        match offset {
            // A size that is no power of two or too large shows when the queues are checked.
            QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(u16::MAX),
            QUEUE_READY => queue.ready = value == 1,
            QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 1, value),
            QUEUE_DRIVER_LOW => set_half(&mut queue.driver, 0, value),
            QUEUE_DRIVER_HIGH => set_half(&mut queue.driver, 1, value),
            QUEUE_DEVICE_LOW => set_half(&mut queue.device, 0, value),
            QUEUE_DEVICE_HIGH => set_half(&mut queue.device, 1, value),
            _ => {}
        }
    }

    /// Follows the driver through "3.1 Device Initialization": bits are only ever added, in order.
    fn write_status(&mut self, value: u32) {
        let old = self.state.status;
        if value == 0 {
            return self.reset();
        }
        // A driver adds a bit to what it read, and may so write NEEDS_RESET, which is not its own.
        let value = value & DRIVER_BITS;
        let added = value & !old;
        let needed = match added {
            ACKNOWLEDGE => 0,
            DRIVER => ACKNOWLEDGE,
            FEATURES_OK => ACKNOWLEDGE | DRIVER,
            DRIVER_OK => ACKNOWLEDGE | DRIVER | FEATURES_OK,
            FAILED => 0,
            _ => return,
        };
        if old & !value != 0 || old & needed != needed || old & FAILED != 0 {
            return;
        }
        match added {
            FEATURES_OK if !self.features_are_acceptable() => {}
            DRIVER_OK => self.activate(value),
            _ => self.state.status = value,
        }
    }

    fn features_are_acceptable(&self) -> bool {
        let accepted = self.state.driver_features;
        accepted & !self.identity.features == 0 && accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self, status: u32) {
        let features = self.state.driver_features;
        let activation = Activation {
            features,
            event_idx: features & 1 << VIRTIO_RING_F_EVENT_IDX != 0,
            queues: self.state.queues.clone(),
        };
        self.state.status = status;
        self.orders.activate(self.slot, activation);
    }

    fn reset(&mut self) {
        if self.state.status & DRIVER_OK != 0 {
            self.orders.reset(self.slot);
        }
        self.line.clear();
        self.state = RegistersState::after_reset(self.identity.queue_sizes);
    }

    fn in_status(&self, set: u32, unset: u32) -> bool {
        self.state.status & set != 0 && self.state.status & (unset | FAILED) == 0
    }

    fn queue(&self) -> Option<(u16, &QueueSetup)> {
        let select = self.state.queue_select as usize;
        Some((*self.identity.queue_sizes.get(select)?, self.state.queues.get(select)?))
    }
}

/// A vCPU reads at `offset` of a slot without a device: a placeholder (virtio 1.3, 4.2.2 "MMIO
/// Device Register Layout", DeviceID).
pub fn read_vacant(offset: u64, data: &mut [u8]) {
    data.fill(0xff);
    if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
        let value = match offset {
            MAGIC_VALUE => MAGIC,
            VERSION_NUMBER => VERSION,
            DEVICE_ID => 0,
            VENDOR_ID => VENDOR,
            _ => u32::MAX,
        };
        *data = value.to_le_bytes();
    }
}

/// Half `select` of a 64-bit register; there are only two.
fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(register: &mut u64, select: u32, value: u32) {
    match select {
        0 => *register = *register & !u64::from(u32::MAX) | u64::from(value),
        1 => *register = *register & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests;
