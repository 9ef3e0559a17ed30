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

/// Why no machine can be what a description asks for.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// No vCPU, or too many.
    #[error("vcpus is {vcpus}: a machine has 1 to {VCPUS_MAX}")]
    Vcpus {
        /// What was asked for.
        vcpus: u8,
    },
    /// Too little memory, too much, or not a whole number of steps.
    #[error(
        "memory_bytes is {bytes}: it has to be {MEMORY_BYTES_MIN} to {MEMORY_BYTES_MAX}, \
         a multiple of {MEMORY_BYTES_STEP}"
    )]
    Memory {
        /// What was asked for.
        bytes: u64,
    },
    /// More disks than names for them.
    #[error("{disks} disks: a machine has at most {DISKS_MAX}")]
    Disks {
        /// What was asked for.
        disks: usize,
    },
    /// Disks and the files behind them do not match.
    #[error("{disks} disks and {files} files for them")]
    DiskFiles {
        /// In the description.
        disks: usize,
        /// Handed over.
        files: usize,
    },
    /// An address that is not a guest's.
    #[error("vsock_cid is {cid}: guests have 3 to {}", u32::MAX - 1)]
    VsockCid {
        /// What was asked for.
        cid: u32,
    },
    /// An address without a listening socket.
    #[error("vsock_cid is set, and no listening socket came with it")]
    VsockListener,
}

impl MachineSpec {
    /// Whether a machine can be this, with these files.
    ///
    /// # Errors
    ///
    /// The first [`SpecError`] found.
    pub fn check(&self, files: &MachineFiles) -> Result<(), SpecError> {
        let Self { vcpus, memory_bytes, cmdline: _, disks, vsock_cid, serial: _ } = self;
        if !(1..=VCPUS_MAX).contains(vcpus) {
            return Err(SpecError::Vcpus { vcpus: *vcpus });
        }
        let in_range = (MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(memory_bytes);
        if !in_range || !memory_bytes.is_multiple_of(MEMORY_BYTES_STEP) {
            return Err(SpecError::Memory { bytes: *memory_bytes });
        }
        if disks.len() > DISKS_MAX {
            return Err(SpecError::Disks { disks: disks.len() });
        }
        if disks.len() != files.disks.len() {
            return Err(SpecError::DiskFiles { disks: disks.len(), files: files.disks.len() });
        }
        match vsock_cid {
            Some(cid @ (0..=2 | u32::MAX)) => Err(SpecError::VsockCid { cid: *cid }),
            Some(_) if files.vsock.is_none() => Err(SpecError::VsockListener),
            _ => Ok(()),
        }
    }
}
