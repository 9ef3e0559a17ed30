//! What a vCPU would need to go on elsewhere.
//!
//! The order matters both ways. Reading: the multiprocessing state first, for that makes KVM take
//! pending INIT and SIPI; events last. Writing: CPUID before all that depends on it; the local APIC
//! after the special registers, which say where it is, and before the model-specific ones, for its
//! mode decides what the deadline means; events last, for writing registers clears exceptions.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

/// Registers that KVM reads in one call.
const MSRS_PER_CALL: usize = 128;

/// IA32_TIME_STAMP_COUNTER.
const MSR_TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE, which means nothing before the counter is right.
const MSR_TSC_DEADLINE: u32 = 0x6e0;

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
    /// KVM refused.
    #[error("Failed to write a vCPU's {part}")]
    Write {
        /// What was written.
        part: &'static str,
        /// What KVM says.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// CPUID has more leaves than KVM takes.
    #[error("CPUID of {leaves} leaves, KVM takes {KVM_MAX_CPUID_ENTRIES}")]
    TooManyLeaves {
        /// How many there are.
        leaves: usize,
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

impl VcpuState {
    /// Writes the state into a vCPU that never ran. Returns the model-specific registers that this
    /// host's KVM lets be read but not written.
    ///
    /// # Errors
    ///
    /// [`VcpuStateError::Write`] or [`VcpuStateError::TooManyLeaves`].
    pub fn load(&self, vcpu: &VcpuFd) -> Result<Vec<u32>, VcpuStateError> {
        let part = |part| move |source| VcpuStateError::Write { part, source };
        let Self { mp_state, regs, sregs, xsave, xcrs, debugregs, lapic, .. } = self;
        let Self { tsc_khz, cpuid, msrs, events, .. } = self;
        let leaves = CpuId::from_entries(cpuid)
            .map_err(|_too_many| VcpuStateError::TooManyLeaves { leaves: cpuid.len() })?;
        vcpu.set_cpuid2(&leaves).map_err(part("CPUID"))?;
        if vcpu.get_tsc_khz().is_ok_and(|khz| khz != *tsc_khz) {
            vcpu.set_tsc_khz(*tsc_khz).map_err(part("TSC frequency"))?;
        }
        vcpu.set_mp_state(*mp_state).map_err(part("multiprocessing state"))?;
        vcpu.set_regs(regs).map_err(part("registers"))?;
        vcpu.set_sregs(sregs).map_err(part("special registers"))?;
        // SAFETY: KVM reads more than the 4096 bytes of `kvm_xsave` only for features that a
        // process has to ask for by arch_prctl(2), and this crate never does.
        #[expect(unsafe_code, reason = "KVM takes a struct that can be longer than it looks")]
        unsafe { vcpu.set_xsave(xsave) }.map_err(part("vector registers"))?;
        vcpu.set_xcrs(xcrs).map_err(part("XCR0"))?;
        vcpu.set_debug_regs(debugregs).map_err(part("debug registers"))?;
        vcpu.set_lapic(lapic).map_err(part("local APIC"))?;
        let refused = write_msrs(vcpu, msrs).map_err(part("model-specific registers"))?;
        vcpu.set_vcpu_events(events).map_err(part("events"))?;
        Ok(refused)
    }
}

/// KVM writes a list up to the first register that it does not let be written: that one is noted
/// and the rest written all the same.
fn write_msrs(vcpu: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<Vec<u32>, kvm_ioctls::Error> {
    let (deadline, mut ordered): (Vec<_>, Vec<_>) =
        msrs.iter().copied().partition(|msr| msr.index == MSR_TSC_DEADLINE);
    let tsc = msrs.iter().find(|msr| msr.index == MSR_TSC).map_or(0, |msr| msr.data);
    // A deadline of zero is a timer that is off, or one that fired and was not delivered yet. One
    // tick too many does no harm; one too few stops the guest.
    ordered.extend(deadline.into_iter().map(|msr| match msr.data {
        0 => kvm_msr_entry { data: tsc, ..msr },
        _ => msr,
    }));
    let mut refused = Vec::new();
    let mut rest = &ordered[..];
    while !rest.is_empty() {
        let chunk = rest.get(..MSRS_PER_CALL).unwrap_or(rest);
        let list = Msrs::from_entries(chunk).expect("a chunk is below the limit");
        let count = vcpu.set_msrs(&list)?;
        if let Some(msr) = chunk.get(count) {
            refused.push(msr.index);
        }
        rest = rest.get(taken(count, chunk)..).unwrap_or_default();
    }
    Ok(refused)
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
        rest = rest.get(taken(count, chunk)..).unwrap_or_default();
    }
    Ok(read)
}

/// How much of `chunk` is done with once KVM took `count`: also the one it stopped at, if any.
fn taken<T>(count: usize, chunk: &[T]) -> usize {
    chunk.len().min(count + 1)
}
