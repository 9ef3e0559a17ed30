//! Keeps a kernel's text as its patching leaves it.
//!
//! Only what the patching itself changes: a guest also writes to its text what holds for it alone,
//! before and after, and does so again when it starts from a text that was kept.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::fcntl_add_seals;
use vm_memory::{Bytes, GuestAddress};

use super::{Identity, Page, Piece, SEALS};
use crate::layout::{TEXT_AFTER, TEXT_BEFORE};
use crate::memory::Mem;

/// A file that waits for a text, and the text as it was before it was patched.
#[derive(Debug)]
pub struct Keeper {
    file: File,
    kernel: File,
    pieces: Vec<Piece>,
    identity: Identity,
    mem: Arc<Mem>,
    before: Vec<u8>,
}

impl Keeper {
    pub(super) fn new(
        file: File,
        kernel: File,
        pieces: Vec<Piece>,
        identity: Identity,
        mem: Arc<Mem>,
    ) -> Self {
        Self { file, kernel, pieces, identity, mem, before: Vec::new() }
    }

    /// The guest wrote `word` to the port. Returns whether there is more to come.
    ///
    /// # Errors
    ///
    /// If memory, kernel or file cannot be read or written; the file is not sealed then.
    pub fn hear(&mut self, word: u8) -> io::Result<bool> {
        match word {
            TEXT_BEFORE if self.before.is_empty() => {
                for piece in &self.pieces {
                    let at = self.before.len();
                    self.before.resize(at + usize::try_from(piece.bytes).unwrap_or(0), 0);
                    read(&self.mem, piece.guest_start, &mut self.before[at..])?;
                }
                Ok(true)
            }
            TEXT_AFTER if !self.before.is_empty() => self.keep().map(|()| false),
            _ => Ok(false),
        }
    }

    /// Writes the kernel's text, with what has changed of it since, and seals the file.
    fn keep(&self) -> io::Result<()> {
        let mut pages_before = self.before.chunks_exact(size_of::<Page>());
        let (mut now, mut page): (Page, Page) = ([0; _], [0; _]);
        let mut end = 0;
        for piece in &self.pieces {
            for offset in (0..piece.bytes).step_by(size_of::<Page>()) {
                let before = pages_before.next().ok_or(io::ErrorKind::UnexpectedEof)?;
                read(&self.mem, piece.guest_start + offset, &mut now)?;
                self.kernel.read_exact_at(&mut page, piece.file_start + offset)?;
                for ((byte, before), now) in page.iter_mut().zip(before).zip(now) {
                    if *before != now {
                        *byte = now;
                    }
                }
                self.file.write_all_at(&page, piece.kept_start + offset)?;
            }
            end = piece.kept_start + piece.bytes;
        }
        let made_for = self.identity.as_bytes();
        self.file.write_all_at(made_for, end)?;
        self.file.set_len(end + made_for.len() as u64)?;
        Ok(fcntl_add_seals(&self.file, SEALS)?)
    }
}

fn read(mem: &Mem, start: u64, bytes: &mut [u8]) -> io::Result<()> {
    mem.read_slice(bytes, GuestAddress(start)).map_err(io::Error::other)
}
