//! What is particular to x86-64: CPUs, registers, tables, the way into the kernel.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod registers;
