//! What CPUID tells a vCPU: what KVM supports, with the topology of this machine.
//!
//! One socket, a core for each vCPU, one thread in each core. APIC ids are vCPU indexes. There are
//! no performance counters: they would be more state to carry and a probe at each boot. There are
//! no MTRRs: all memory is write-back, a BAR is what the guest's PAT makes of it, and a kernel that
//! finds some reads 28 registers three times, an exit each, and turns its caches off to set them.
//! Leaves as in SDM volume 2, "CPUID", and AMD's "CPUID Specification".

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const FEATURES: u32 = 0x1;
const CACHES: u32 = 0x4;
const POWER: u32 = 0x6;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const COUNTERS: u32 = 0xa;
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_COUNTERS: u32 = 0x8000_0022;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Leaf 1, ECX: the TSC-deadline timer, with which the kernel need not calibrate its own.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the register that says what the performance counters can do.
const COUNTER_CAPABILITIES: u32 = 1 << 15;
/// Leaf 1, EDX: the count of logical processors is valid.
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 1, EDX, and the same bit of AMD's leaf 0x80000001: memory type range registers.
const MEMORY_TYPE_RANGES: u32 = 1 << 12;
/// Leaf 6, ECX: the APERF and MPERF counters, which KVM does not give to guests.
const APERF_MPERF: u32 = 1;
/// AMD, leaf 0x80000001, ECX: the logical processors are cores, not threads.
const CORES_ONLY: u32 = 1 << 1;
/// AMD, leaf 0x80000001, ECX: performance counters of the core, of the northbridge, of the cache.
const AMD_EXTRA_COUNTERS: u32 = 1 << 23 | 1 << 24 | 1 << 28;

/// Adapts what KVM supports to vCPU `index` of `vcpus`.
pub fn for_vcpu(supported: &CpuId, index: u8, vcpus: u8) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        .filter(|entry| ![TOPOLOGY, TOPOLOGY_V2].contains(&entry.function))
        .copied()
        .collect();
    for entry in &mut entries {
        adapt(entry, index, vcpus);
    }
    let highest = entries.iter().find(|entry| entry.function == 0).map_or(0, |entry| entry.eax);
    for leaf in [TOPOLOGY, TOPOLOGY_V2].into_iter().filter(|&leaf| leaf <= highest) {
        entries.extend(topology(leaf, index, vcpus));
    }
    entries
}

fn adapt(entry: &mut kvm_cpuid_entry2, index: u8, vcpus: u8) {
    let (index, vcpus) = (u32::from(index), u32::from(vcpus));
    match entry.function {
        FEATURES => {
            entry.ebx = entry.ebx & 0xffff | vcpus << 16 | index << 24;
            entry.ecx |= TSC_DEADLINE | HYPERVISOR;
            entry.ecx &= !COUNTER_CAPABILITIES;
            entry.edx = with_bit(entry.edx, HYPER_THREADING, vcpus > 1) & !MEMORY_TYPE_RANGES;
        }
        AMD_FEATURES => {
            entry.ecx = with_bit(entry.ecx, CORES_ONLY, vcpus > 1);
            entry.ecx &= !AMD_EXTRA_COUNTERS;
            entry.edx &= !MEMORY_TYPE_RANGES;
        }
        // Both makers have who shares the cache in 25:14; Intel has the package's cores above.
        CACHES | AMD_CACHES if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { vcpus - 1 } else { 0 };
            let cores = if entry.function == CACHES { vcpus - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
        }
        COUNTERS | AMD_COUNTERS => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        POWER => entry.ecx &= !APERF_MPERF,
        AMD_SIZES => entry.ecx = entry.ecx & !0xf0ff | id_bits(vcpus) << 12 | (vcpus - 1),
        AMD_TOPOLOGY => {
            entry.eax = index;
            entry.ebx = index;
            entry.ecx = 0;
        }
        _ => {}
    }
}

fn with_bit(register: u32, bit: u32, set: bool) -> u32 {
    if set { register | bit } else { register & !bit }
}

/// Extended topology: level 1 is the thread (one), level 2 the core.
fn topology(leaf: u32, index: u8, vcpus: u8) -> [kvm_cpuid_entry2; 3] {
    let level = |level: u32, kind: u32, bits: u32, count: u32| kvm_cpuid_entry2 {
        function: leaf,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: bits,
        ebx: count,
        ecx: kind << 8 | level,
        edx: u32::from(index),
        ..kvm_cpuid_entry2::default()
    };
    let vcpus = u32::from(vcpus);
    [level(0, 1, 0, 1), level(1, 2, id_bits(vcpus), vcpus), level(2, 0, 0, 0)]
}

/// Bits of an APIC id that tell the cores apart.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    fn supported() -> CpuId {
        let entry = |function, eax| kvm_cpuid_entry2 { function, eax, ..Default::default() };
        let entries = [
            entry(0, 0x1f),
            kvm_cpuid_entry2 { edx: u32::MAX, ..entry(FEATURES, 0) },
            entry(4, 0x63),
            entry(0xa, 0x0730_0802),
            entry(0xb, 0xffff),
            kvm_cpuid_entry2 { ecx: u32::MAX, edx: u32::MAX, ..entry(AMD_FEATURES, 0) },
            entry(AMD_SIZES, 0x3030),
            entry(AMD_CACHES, 0x0fff_c121),
            entry(AMD_TOPOLOGY, 0xff),
        ];
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn six_cores_of_one_thread_have_ids_of_three_bits() {
        let entries = for_vcpu(&supported(), 5, 6);

        assert_eq!(leaf(&entries, 1, 0).ebx >> 16, 5 << 8 | 6);
        assert_ne!(leaf(&entries, 1, 0).ecx & HYPERVISOR, 0);
        for function in [TOPOLOGY, TOPOLOGY_V2] {
            let thread = leaf(&entries, function, 0);
            let core = leaf(&entries, function, 1);
            assert_eq!((thread.eax, thread.ebx, thread.edx), (0, 1, 5));
            assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (3, 6, 0x201, 5));
        }
        assert_eq!(leaf(&entries, CACHES, 0).eax >> 14, 5 << 12 | 5);
    }

    #[test]
    fn amd_leaves_tell_the_same() {
        let entries = for_vcpu(&supported(), 5, 6);

        assert_eq!(leaf(&entries, AMD_SIZES, 0).ecx, 3 << 12 | 5);
        let topology = leaf(&entries, AMD_TOPOLOGY, 0);
        assert_eq!((topology.eax, topology.ebx, topology.ecx), (5, 5, 0));
        // The first level of the cache is a core's own.
        assert_eq!(leaf(&entries, AMD_CACHES, 0).eax, 0x121);
        assert_ne!(leaf(&entries, AMD_FEATURES, 0).ecx & CORES_ONLY, 0);
    }

    #[test]
    fn there_are_no_performance_counters() {
        let entries = for_vcpu(&supported(), 0, 1);

        assert_eq!(leaf(&entries, COUNTERS, 0).eax, 0);
        assert_eq!(leaf(&entries, AMD_FEATURES, 0).ecx & AMD_EXTRA_COUNTERS, 0);
    }

    #[test]
    fn there_are_no_registers_for_memory_types() {
        let entries = for_vcpu(&supported(), 0, 2);

        assert_eq!(leaf(&entries, FEATURES, 0).edx & MEMORY_TYPE_RANGES, 0);
        assert_eq!(leaf(&entries, AMD_FEATURES, 0).edx & MEMORY_TYPE_RANGES, 0);
    }

    #[test]
    fn a_single_cpu_has_no_siblings() {
        let entries = for_vcpu(&supported(), 0, 1);

        assert_eq!(leaf(&entries, 1, 0).edx & HYPER_THREADING, 0);
        assert_eq!(leaf(&entries, AMD_FEATURES, 0).ecx & CORES_ONLY, 0);
        assert_eq!(leaf(&entries, TOPOLOGY, 1).ebx, 1);
    }
}
