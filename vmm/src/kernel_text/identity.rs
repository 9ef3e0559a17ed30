//! What decides what Linux makes of its text: which kernel it is, and which processor it finds.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use kvm_bindings::{CpuId, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::Kvm;

use crate::arch::cpuid;

/// What an identity begins with.
const MAGIC: &[u8; 8] = b"ovumtxt2";

/// Most bytes of one; a processor with all leaves of CPUID that KVM tells of has some 4,000.
const BYTES_MAX: usize = 64 << 10;

/// A kernel and a processor, as bytes that are the same for the same: file, CPUID, registers that
/// say what the processor can do and suffers from, words for the kernel, and whether there is one
/// vCPU or more, for one needs no locks.
///
/// Nobody changes a kernel's file in place: whoever does can have a text from before the change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity(Vec<u8>);

impl Identity {
    /// Of `kernel` on a machine with so many `vcpus`, of what `supported` says of their kind.
    ///
    /// # Errors
    ///
    /// If the file has no metadata, KVM does not tell, or there is more to tell than fits.
    pub fn of(
        kernel: &File,
        kvm: &Kvm,
        supported: &CpuId,
        vcpus: u8,
        cmdline: &str,
    ) -> io::Result<Self> {
        // As for the first of one vCPU, or of two: how many more there are changes no instruction.
        let vcpus = vcpus.min(2);
        let leaves = cpuid::for_vcpu(supported, 0, vcpus);
        Self::new(&kernel.metadata()?, vcpus, &leaves, &features(kvm)?, cmdline)
    }

    fn new(
        file: &Metadata,
        vcpus: u8,
        leaves: &[kvm_cpuid_entry2],
        features: &[(u32, u64)],
        cmdline: &str,
    ) -> io::Result<Self> {
        let mut bytes = MAGIC.to_vec();
        let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
        let numbers = [file.dev(), file.ino(), file.size()];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        bytes.extend(times.iter().flat_map(|number| number.to_le_bytes()));
        bytes.push(vcpus);
        for entry in leaves {
            let words = [entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx];
            bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        for (index, value) in features {
            bytes.extend(index.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        bytes.extend(cmdline.as_bytes());
        bytes.push(0);
        if bytes.len() > BYTES_MAX {
            return Err(io::Error::other("CPUID is longer than a processor's can be"));
        }
        Ok(Self(bytes))
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Registers that say what the processor can do and suffers from (KVM api, 4.3
/// "KVM_GET_MSR_INDEX_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST").
fn features(kvm: &Kvm) -> io::Result<Vec<(u32, u64)>> {
    let mut features = Vec::new();
    for &index in kvm.get_msr_feature_index_list()?.as_slice() {
        let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(io::Error::other)?;
        // One that is listed and not there: the guest does not find it either.
        if kvm.get_msrs(&mut msrs)? == 1 {
            features.extend(msrs.as_slice().iter().map(|msr| (msr.index, msr.data)));
        }
    }
    Ok(features)
}

#[cfg(test)]
impl Identity {
    /// One that is like no other.
    pub(super) fn for_test(name: &str) -> Self {
        Self(name.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: kvm_cpuid_entry2 = kvm_cpuid_entry2 {
        function: 7,
        index: 0,
        flags: 0,
        eax: 0,
        ebx: 1,
        ecx: 0,
        edx: 0,
        padding: [0; 3],
    };

    #[test]
    fn whatever_decides_how_a_kernel_is_patched_makes_another() {
        // Both open, or the other could be given the number of the one.
        let files = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let [file, other_file] = files.each_ref().map(|file| file.metadata().unwrap());
        let other_leaf = kvm_cpuid_entry2 { edx: 1, ..LEAF };
        let all = [
            Identity::new(&file, 1, &[LEAF], &[(0x10a, 3)], "quiet"),
            Identity::new(&other_file, 1, &[LEAF], &[(0x10a, 3)], "quiet"),
            Identity::new(&file, 2, &[LEAF], &[(0x10a, 3)], "quiet"),
            Identity::new(&file, 1, &[other_leaf], &[(0x10a, 3)], "quiet"),
            Identity::new(&file, 1, &[LEAF], &[(0x10a, 2)], "quiet"),
            Identity::new(&file, 1, &[LEAF], &[(0x10a, 3)], "mitigations=off"),
        ]
        .map(Result::unwrap);

        for (nth, identity) in all.iter().enumerate() {
            assert_eq!(all.iter().position(|other| other == identity), Some(nth));
        }
        assert_eq!(Identity::new(&file, 1, &[LEAF], &[(0x10a, 3)], "quiet").unwrap(), all[0]);
    }

    #[test]
    fn more_than_there_is_room_for_is_no_identity() {
        let file = tempfile::tempfile().unwrap().metadata().unwrap();
        assert!(Identity::new(&file, 1, &[LEAF; 4096], &[], "").is_err());
    }
}
