//! The kernel's text, patched once for all guests of a host.
//!
//! At each boot Linux rewrites tens of thousands of places of its text for the processor that it
//! finds, with the same result in every guest that finds the same. The first machine keeps that
//! ([`Keeper`]) in a file, which is sealed then: later ones map its pages into their guests
//! ([`Image`]) instead of copying and patching their own, and share what they do not write to.
//!
//! Only a kernel that says where its text is takes part ([`mod@note`], and `text.patch` of
//! kernel-config): such a kernel knows a patched text from another. What is kept was made before
//! the guest had read anything but what this crate put into its memory, no disk and no packet, so
//! no guest can put something there for others. docs/decisions, "One text for all guests".

mod huge_pages;
mod identity;
mod image;
mod keeper;
mod note;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

pub use huge_pages::gather;
pub use identity::Identity;
pub use image::Image;
pub use keeper::Keeper;
use rustix::fs::{SealFlags, fcntl_get_seals};

use crate::memory::Mem;

type Page = [u8; 4096];

const PAGE_BYTES: u64 = size_of::<Page>() as u64;

/// A huge page, of which guest and file have the bounds in the same places.
const HUGE_PAGE_BYTES: u64 = 2 << 20;

/// With these a file stays as it is, whoever has it open.
pub const SEALS: SealFlags =
    SealFlags::WRITE.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::SEAL);

/// Whole pages of a kernel's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    /// Where the guest has them.
    guest_start: u64,
    /// Where the kernel's file has them.
    file_start: u64,
    /// Where the file has them in which the text is kept.
    kept_start: u64,
    bytes: u64,
}

/// What a machine does with the file in which the text of its kernel is kept.
#[derive(Debug)]
pub enum KernelText {
    /// Start from it.
    Kept(KeptText),
    /// Fill it.
    Blank(Keeper),
}

/// A text that an earlier machine has kept.
#[derive(Debug)]
pub struct KeptText {
    file: File,
    pieces: Vec<Piece>,
}

impl KernelText {
    /// Looks at the `file` in which the text of `kernel` is, or is to be. None if the kernel has no
    /// such text, or what is in the file was made for another kernel or processor.
    ///
    /// # Errors
    ///
    /// If one of the files cannot be read, or `file` cannot be sealed (memfd_create(2)).
    pub fn of(
        file: File,
        kernel: &File,
        identity: &Identity,
        mem: &Arc<Mem>,
    ) -> io::Result<Option<Self>> {
        let pieces = note::pieces(kernel)?;
        let Some(last) = pieces.last() else { return Ok(None) };
        if !fcntl_get_seals(&file)?.contains(SEALS) {
            let (kernel, mem) = (kernel.try_clone()?, Arc::clone(mem));
            let keeper = Keeper::new(file, kernel, pieces, identity.clone(), mem);
            return Ok(Some(Self::Blank(keeper)));
        }
        // Behind the text is what it was made for.
        let end = last.kept_start + last.bytes;
        let mut made_for = vec![0; identity.as_bytes().len()];
        let is_whole = file.metadata()?.len() == end + made_for.len() as u64;
        if !is_whole || file.read_exact_at(&mut made_for, end).is_err() {
            return Ok(None);
        }
        if made_for != identity.as_bytes() {
            return Ok(None);
        }
        Ok(Some(Self::Kept(KeptText { file, pieces })))
    }

    /// Who fills the file, if it is to be filled.
    pub fn into_keeper(self) -> Option<Keeper> {
        match self {
            Self::Blank(keeper) => Some(keeper),
            Self::Kept(_) => None,
        }
    }
}

#[cfg(test)]
mod tests;
