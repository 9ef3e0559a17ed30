//! The emulator: QEMU as Debian has it, less one store.
//!
//! Where QEMU 7.2 delivers an interrupt to a guest of its guest (`helper_vmrun` of svm_helper.c) it
//! also leaves the vector where exceptions are noted that are still to be raised. The next exit of
//! that guest clears it. If QEMU's own loop comes by before that, because another thread of it asks
//! or with `--count` because a slice is over, the guest has the same interrupt again, whether or
//! not it has them off. A Linux that gets its timer's twice while it holds the timer's lock waits
//! for itself, for good: with `--count` about one boot of fifty, without it seldom.
//!
//! So what runs is a copy in which that store is none. A QEMU that does not have it, or not like
//! this, runs as it is.

use std::fs::{self, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::files;

/// The emulator, from Debian's qemu-system-x86.
const QEMU: &str = "qemu-system-x86_64";

/// The vector is taken from the event, the event's error code is noted:
/// `movzbl %r12b,%esi; mov %r13d,0x3380(%rbx)`.
const BEFORE: [u8; 11] = [0x41, 0x0f, 0xb6, 0xf4, 0x44, 0x89, 0xab, 0x80, 0x33, 0x00, 0x00];
/// The vector is noted as an exception: `mov %esi,-0x10ac(%rbx)`.
const STORE: [u8; 6] = [0x89, 0xb3, 0x54, 0xef, 0xff, 0xff];
/// As long, and does nothing (SDM volume 2, "NOP").
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The program to run, made at first.
///
/// # Errors
///
/// If there is no QEMU, or no room for a copy of it.
pub fn ready(cache: &Cache) -> Result<PathBuf> {
    let qemu = fs::canonicalize(files::program(QEMU)?).context("Failed to find QEMU")?;
    let metadata = fs::metadata(&qemu).context("Failed to look at QEMU")?;
    let mut hasher = DefaultHasher::new();
    (STORE, &qemu, metadata.size(), metadata.mtime()).hash(&mut hasher);
    let folder = cache.folder(&format!("qemu-{:016x}", hasher.finish()), |folder| {
        copy(&qemu, folder).with_context(|| format!("Failed to copy {}", qemu.display()))
    })?;
    Ok(folder.join("bin").join(QEMU))
}

fn copy(qemu: &Path, folder: &Path) -> Result<()> {
    let mut program = fs::read(qemu)?;
    if !mend(&mut program) {
        eprintln!("in-host: an unknown QEMU, run as it is: see dev/host/src/emulator.rs");
    }
    let bin = folder.join("bin");
    fs::create_dir(&bin)?;
    fs::write(bin.join(QEMU), program)?;
    fs::set_permissions(bin.join(QEMU), Permissions::from_mode(0o755))?;
    // QEMU looks for its firmware and its modules from where it lies.
    let prefix = qemu.ancestors().nth(2).context("It lies in no folder of programs")?;
    for name in ["lib", "share"] {
        symlink(prefix.join(name), folder.join(name))?;
    }
    Ok(())
}

/// Takes the store out of `program`, if it is there once.
fn mend(program: &mut [u8]) -> bool {
    let places = program.windows(BEFORE.len() + STORE.len()).enumerate();
    let mut places = places
        .filter(|(_, bytes)| bytes.starts_with(&BEFORE) && bytes.ends_with(&STORE))
        .map(|(at, _)| at + BEFORE.len());
    let (Some(at), None) = (places.next(), places.next()) else { return false };
    program[at..at + STORE.len()].copy_from_slice(&NOTHING);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_is_there_once_does_nothing_any_more() {
        let mut program = [&[0x90, 0x90][..], &BEFORE, &STORE, &[0xc3]].concat();

        assert!(mend(&mut program));

        assert_eq!(program, [&[0x90, 0x90][..], &BEFORE, &NOTHING, &[0xc3]].concat());
    }

    #[test]
    fn what_is_not_known_stays_as_it_is() {
        let twice = [&BEFORE[..], &STORE, &BEFORE, &STORE].concat();
        let elsewhere = [&STORE[..], &BEFORE].concat();
        for program in [twice, elsewhere, Vec::new()] {
            let mut mended = program.clone();

            assert!(!mend(&mut mended));

            assert_eq!(mended, program);
        }
    }
}
