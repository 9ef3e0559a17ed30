//! Interrupts as messages: from an event of a device to a vCPU, without this process between.
//!
//! KVM knows interrupts by number; a number above those of the IOAPIC stands for a message that
//! was agreed on. A [`Vector`] is an event that a device raises and, while the guest wants to hear
//! of it, such a number that the event raises in turn. What is raised while the guest does not
//! want to hear of it stays in the event until it does.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::kvm::Vm;
use crate::layout::IOAPIC_LINES;

/// Lines that the two old interrupt controllers have, and each of them.
const PIC_LINES: u32 = 16;
const PIC_LINES_EACH: u32 = 8;

/// Most messages of a machine: KVM keeps 4096 routes, and some are those of lines.
pub const MESSAGES_MAX: usize = 4000;

/// A message: what is written where (SDM 3, "Message Signalled Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Which CPUs.
    pub address: u64,
    /// Which vector of theirs.
    pub data: u32,
}

/// All messages of a machine, by number.
#[derive(Debug)]
pub struct Routes {
    vm: Arc<dyn Vm>,
    /// Beginning with the number [`IOAPIC_LINES`].
    messages: Mutex<Vec<Option<Message>>>,
}

impl Routes {
    /// None yet.
    pub fn new(vm: Arc<dyn Vm>) -> Arc<Self> {
        Arc::new(Self { vm, messages: Mutex::default() })
    }

    /// Lets number `gsi`, or a free one, stand for `message`. Returns which.
    fn set(&self, gsi: Option<u32>, message: Message) -> io::Result<u32> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let place = match gsi {
            Some(gsi) => usize::try_from(gsi.saturating_sub(IOAPIC_LINES)).unwrap_or(usize::MAX),
            None => messages.iter().position(Option::is_none).unwrap_or(messages.len()),
        };
        if place >= MESSAGES_MAX {
            return Err(io::Error::other("more messages than KVM keeps"));
        }
        if place >= messages.len() {
            messages.resize(place.saturating_add(1), None);
        }
        let before = messages[place].replace(message);
        if let Err(error) = self.tell(&messages) {
            messages[place] = before;
            return Err(error);
        }
        Ok(IOAPIC_LINES.saturating_add(u32::try_from(place).unwrap_or(u32::MAX)))
    }

    /// Gives a number back. KVM keeps its route until the next is set, which harms nobody.
    fn release(&self, gsi: u32) {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let place = usize::try_from(gsi.saturating_sub(IOAPIC_LINES)).unwrap_or(usize::MAX);
        if let Some(message) = messages.get_mut(place) {
            *message = None;
        }
    }

    /// KVM takes all routes at once, those of the lines included.
    fn tell(&self, messages: &[Option<Message>]) -> io::Result<()> {
        let mut entries: Vec<_> = (0..IOAPIC_LINES).flat_map(line_entries).collect();
        let routed = messages.iter().zip(IOAPIC_LINES..);
        entries.extend(routed.filter_map(|(message, gsi)| Some(message_entry(gsi, (*message)?))));
        let routing = KvmIrqRouting::from_entries(&entries).map_err(io::Error::other)?;
        self.vm.set_routes(&routing)
    }
}

/// A line goes to the IOAPIC and, if it is one of the old ones, to an old controller.
fn line_entries(gsi: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    let entry = move |irqchip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
        entry
    };
    let chip = if gsi < PIC_LINES_EACH { KVM_IRQCHIP_PIC_MASTER } else { KVM_IRQCHIP_PIC_SLAVE };
    let old = (gsi < PIC_LINES).then(|| entry(chip, gsi % PIC_LINES_EACH));
    [entry(KVM_IRQCHIP_IOAPIC, gsi)].into_iter().chain(old)
}

fn message_entry(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        ..kvm_irq_routing_msi::default()
    };
    entry
}

/// One interrupt of a device.
#[derive(Debug)]
pub struct Vector {
    event: EventFd,
    routes: Arc<Routes>,
    /// The number that it has, and what that stands for.
    route: Option<(u32, Message)>,
    /// What it is heard as, while it is.
    message: Option<Message>,
}

impl Vector {
    /// One that nobody hears.
    ///
    /// # Errors
    ///
    /// If this process has no descriptor left.
    pub fn new(routes: Arc<Routes>) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { event, routes, route: None, message: None })
    }

    /// What the device raises.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// From now on it is heard as `message`, or not at all.
    ///
    /// # Errors
    ///
    /// If KVM refuses; it is not heard then.
    pub fn hear(&mut self, message: Option<Message>) -> io::Result<()> {
        if message == self.message {
            return Ok(());
        }
        // What is raised in between stays in the event, and KVM looks there when it is connected.
        if let (Some((gsi, _)), Some(_)) = (self.route, self.message.take()) {
            self.routes.vm.disconnect(&self.event, gsi)?;
        }
        let Some(message) = message else { return Ok(()) };
        let gsi = match self.route {
            Some((gsi, routed)) if routed == message => gsi,
            route => self.routes.set(route.map(|(gsi, _)| gsi), message)?,
        };
        self.route = Some((gsi, message));
        self.routes.vm.connect(&self.event, gsi)?;
        self.message = Some(message);
        Ok(())
    }

    /// Whether it was raised and not heard.
    pub fn is_pending(&self) -> bool {
        // What is taken out is put back: it is heard when the guest wants to hear it.
        self.message.is_none()
            && self.event.read().is_ok_and(|raised| self.event.write(raised).is_ok())
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        // KVM forgets an event whose last descriptor is closed, too.
        let _ = self.hear(None);
        if let Some((gsi, _)) = self.route {
            self.routes.release(gsi);
        }
    }
}
