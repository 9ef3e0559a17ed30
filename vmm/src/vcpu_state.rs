//! What a vCPU would need to go on elsewhere.
//!
//! The order of reading matters: the multiprocessing state first, for reading it makes KVM take
//! pending INIT and SIPI; events last. Restoring is a later step and needs nothing more than this.

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// Registers that KVM reads in one call.
const MSRS_PER_CALL: usize = 128;

/// Everything KVM knows of one vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    /// Running, halted, waiting for SIPI.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, tables.
    pub sregs: kvm_sregs,
    /// FPU and vector registers.
    pub xsave: kvm_xsave,
    /// XCR0.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debugregs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// TSC frequency.
    pub tsc_khz: u32,
    /// CPUID as set.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers that this host's KVM can read.
    pub msrs: Vec<kvm_msr_entry>,
    /// Exceptions, interrupts and NMIs under way.
    pub events: kvm_vcpu_events,
}

/// Why a vCPU could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused.
    #[error("Failed to read a vCPU's {part}")]
    Read {
        /// What was read.
        part: &'static str,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The machine has ended.
    #[error("The vCPU has ended")]
    Ended,
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run, with those of `msrs` that can be read.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError::Read`].
    pub fn save(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Self, VcpuStateError> {
        let part = |part| move |source| VcpuStateError::Read { part, source };
        Ok(Self {
            mp_state: vcpu.get_mp_state().map_err(part("multiprocessing state"))?,
            regs: vcpu.get_regs().map_err(part("registers"))?,
            sregs: vcpu.get_sregs().map_err(part("special registers"))?,
            xsave: vcpu.get_xsave().map_err(part("vector registers"))?,
            xcrs: vcpu.get_xcrs().map_err(part("XCR0"))?,
            debugregs: vcpu.get_debug_regs().map_err(part("debug registers"))?,
            lapic: vcpu.get_lapic().map_err(part("local APIC"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(part("TSC frequency"))?,
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(part("CPUID"))?
                .as_slice()
                .to_vec(),
            msrs: read_msrs(vcpu, msrs).map_err(part("model-specific registers"))?,
            events: vcpu.get_vcpu_events().map_err(part("events"))?,
        })
    }
}

/// KVM reads a list up to the first register that it does not know in this state: that one is
/// left out and the rest asked for again.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, kvm_ioctls::Error> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = rest.get(..MSRS_PER_CALL).unwrap_or(rest);
        let asked: Vec<_> =
            chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&asked).expect("a chunk is below the limit");
        let count = vcpu.get_msrs(&mut msrs)?;
        read.extend_from_slice(msrs.as_slice().get(..count).unwrap_or_default());
        let done = if count < chunk.len() { count + 1 } else { count };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(read)
}
