//! What a machine can be asked for, and what it is handed: the words of the outside.
//!
//! [`MachineSpec`] is plain data and travels between processes. [`MachineFiles`] holds the open
//! files that stand behind it: this crate opens no path, so what it was not given it cannot reach.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;

use serde::{Deserialize, Serialize};

/// Most vCPUs a machine can have.
pub const VCPUS_MAX: u8 = 32;

/// Least guest memory, in bytes, with which the guest kernel boots.
pub const MEMORY_BYTES_MIN: u64 = 64 << 20;

/// Most guest memory, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// Guest memory is given in multiples of this many bytes: one huge page.
pub const MEMORY_BYTES_STEP: u64 = 2 << 20;

/// Most disks a machine can have.
pub const DISKS_MAX: usize = 16;

/// One machine: everything about it that is not an open file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// vCPUs, 1 to [`VCPUS_MAX`], presented as one socket with one thread per core.
    pub vcpus: u8,
    /// Guest memory in bytes: a multiple of [`MEMORY_BYTES_STEP`] between [`MEMORY_BYTES_MIN`]
    /// and [`MEMORY_BYTES_MAX`].
    pub memory_bytes: u64,
    /// Words for the kernel's command line, after those the machine itself needs.
    pub cmdline: String,
    /// Block devices, in the order in which the guest names them (vda, vdb, ...).
    pub disks: Vec<DiskSpec>,
    /// The guest's vsock address, 3 or more; without one there is no vsock device.
    pub vsock_cid: Option<u32>,
    /// Adds a 16550 at the legacy port for the kernel's earliest messages; they go to the console
    /// file. Costs an exit for each byte: for people who develop a kernel.
    pub serial: bool,
}

/// One block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// What GET_ID answers: at most 20 bytes (virtio 1.3, 5.2.6 "Device Operation").
    pub id: String,
    /// The guest cannot write, nor discard.
    pub read_only: bool,
}

/// The open files of a machine.
#[derive(Debug)]
pub struct MachineFiles {
    /// /dev/kvm, read and write.
    pub kvm: OwnedFd,
    /// The guest kernel: an uncompressed x86-64 ELF.
    pub kernel: File,
    /// Initramfs archives, loaded one after the other at 4-byte boundaries.
    pub initramfs: Vec<File>,
    /// The file behind each disk of the spec, in the same order.
    pub disks: Vec<File>,
    /// Where the guest's console is written, from the file's present position on.
    pub console: File,
    /// Where host processes connect to reach a vsock port of the guest: a client writes
    /// `CONNECT <port>\n` and reads `OK <host port>\n`. Needed if the spec has a vsock address.
    pub vsock: Option<UnixListener>,
}
