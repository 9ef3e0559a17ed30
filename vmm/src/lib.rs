//! A KVM virtual machine monitor as a library.
//!
//! [`machine::Machine`] is built from a [`spec::MachineSpec`] and the open files of
//! [`spec::MachineFiles`], and runs a Linux guest on threads of its own. The crate knows memory,
//! vCPUs, virtio devices and devices of the host that are lent to a guest. It knows nothing of
//! images, instances, HTTP or the agent.
//!
//! Specifications cited in this crate: "Virtual I/O Device (VIRTIO) Version 1.3"; "Intel 64 and
//! IA-32 Architectures Software Developer's Manual", volume 3 (SDM); "ACPI 6.5"; the KVM API as
//! in Documentation/virt/kvm/api.rst of Linux 6.12.

pub mod machine;
pub mod machine_error;
pub mod machine_state;
pub mod spec;

pub mod events;
pub mod vcpu;
pub mod vcpu_state;

pub mod arch;
pub mod kernel_text;
pub mod kvm;
pub mod kvm_slots;
pub mod layout;
pub mod memory;
pub mod pci;
pub mod ports;
pub mod rate_limiter;
pub mod reactor;
pub mod slots;
pub mod vfio;
pub mod virtio;

#[cfg(test)]
mod testing;
