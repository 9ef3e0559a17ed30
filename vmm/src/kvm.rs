//! What of KVM the memory and the bus of a machine need.
//!
//! The machine's own is KVM itself; whoever wants to see what a guest makes a bus ask of it has
//! another.

use std::fmt::Debug;
use std::io;

use kvm_bindings::{KVM_MEM_READONLY, KvmIrqRouting, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::memory::MemoryRange;

/// What a guest may do with memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read it and write to it.
    Write,
}

/// A virtual machine, as far as addresses and interrupts go. Each error is what KVM says.
pub trait Vm: Debug + Send + Sync {
    /// Lets slot `slot` be a live mapping of this process, or nothing, if it has no bytes. What the
    /// guest writes to one that it only reads is an exit.
    ///
    /// # Errors
    ///
    /// Above all that another slot has a part of these guest addresses.
    fn set_slot(&self, slot: u32, range: MemoryRange, access: Access) -> io::Result<()>;

    /// Says what each interrupt number stands for, all of them at once.
    ///
    /// # Errors
    ///
    /// If one stands for nothing that there is.
    fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()>;

    /// Lets `event` raise interrupt `number`.
    ///
    /// # Errors
    ///
    /// If it raises one already.
    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()>;

    /// Undoes [`Self::connect`].
    ///
    /// # Errors
    ///
    /// If this process has no memory left.
    fn disconnect(&self, event: &EventFd, number: u32) -> io::Result<()>;
}

impl Vm for VmFd {
    fn set_slot(&self, slot: u32, range: MemoryRange, access: Access) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: match access {
                Access::Write => 0,
                Access::Read => KVM_MEM_READONLY,
            },
            guest_phys_addr: range.guest_start,
            memory_size: range.bytes,
            userspace_addr: range.host_start,
        };
        // SAFETY: the range is one live mapping of `Memory`, a device or its slot, which unmap none
        // before they have told so here, or when the vCPUs have ended; KVM refuses a slot whose
        // guest addresses another has.
        #[expect(unsafe_code, reason = "the guest is given this process's memory")]
        let set = unsafe { self.set_user_memory_region(region) };
        set.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn set_routes(&self, routes: &KvmIrqRouting) -> io::Result<()> {
        let set = self.set_gsi_routing(routes);
        set.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn connect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let done = self.register_irqfd(event, number);
        done.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    fn disconnect(&self, event: &EventFd, number: u32) -> io::Result<()> {
        let done = self.unregister_irqfd(event, number);
        done.map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}
