//! A kernel's file, of which the text comes from where it is kept: mapped, not read.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

use super::{KeptText, KernelText, PAGE_BYTES, Page, Piece};

/// What a loader reads a kernel from.
#[derive(Debug)]
pub struct Image<'a> {
    kernel: &'a mut File,
    text: Option<&'a KeptText>,
}

impl<'a> Image<'a> {
    /// The file `kernel` with `text` in place of its own, if it is kept.
    pub fn new(kernel: &'a mut File, text: Option<&'a KernelText>) -> Self {
        let text = match text {
            Some(KernelText::Kept(text)) => Some(text),
            Some(KernelText::Blank(_)) | None => None,
        };
        Self { kernel, text }
    }

    /// The first piece that is not all before `position`.
    fn next_piece(&self, position: u64) -> Option<(&'a KeptText, Piece)> {
        let text = self.text?;
        let piece = text.pieces.iter().find(|piece| piece.file_start + piece.bytes > position)?;
        Some((text, *piece))
    }
}

impl Read for Image<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.kernel.read(buffer)
    }
}

impl Seek for Image<'_> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.kernel.seek(position)
    }
}

impl ReadVolatile for Image<'_> {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        slice: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut done = 0;
        // All at once: a loader takes less for the end of the file.
        while done < slice.len() {
            match self.take(&mut slice.offset(done)?)? {
                0 => break,
                bytes => done += bytes,
            }
        }
        Ok(done)
    }
}

impl Image<'_> {
    /// Maps what is a piece of text from here on, or reads what is before the next piece.
    fn take<B: BitmapSlice>(
        &mut self,
        slice: &mut VolatileSlice<'_, B>,
    ) -> Result<usize, VolatileMemoryError> {
        let position = self.kernel.stream_position().map_err(VolatileMemoryError::IOError)?;
        let Some((text, piece)) = self.next_piece(position) else {
            return self.kernel.read_volatile(slice);
        };
        let before = piece.file_start.saturating_sub(position);
        if before > 0 {
            let bytes = usize::try_from(before).unwrap_or(usize::MAX).min(slice.len());
            return self.kernel.read_volatile(&mut slice.subslice(0, bytes)?);
        }
        let skipped = position - piece.file_start;
        let bytes = usize::try_from(piece.bytes - skipped).unwrap_or(usize::MAX).min(slice.len());
        let is_aligned = bytes % size_of::<Page>() == 0 && skipped % PAGE_BYTES == 0;
        if !is_aligned || !slice.ptr_guard_mut().as_ptr().addr().is_multiple_of(size_of::<Page>()) {
            return Err(VolatileMemoryError::IOError(io::Error::other(
                "the kernel's text does not lie in whole pages of guest memory",
            )));
        }
        map(text, slice, bytes, piece.kept_start + skipped)
            .and_then(|()| self.kernel.seek_relative(i64::try_from(bytes).unwrap_or(0)))
            .map_err(VolatileMemoryError::IOError)?;
        Ok(bytes)
    }
}

/// Puts `bytes` of the kept text from `start` on where the first of `slice` are: the guest's own as
/// soon as it writes to one, the same for all until then.
fn map<B: BitmapSlice>(
    text: &KeptText,
    slice: &VolatileSlice<'_, B>,
    bytes: usize,
    start: u64,
) -> io::Result<()> {
    let guard = slice.ptr_guard_mut();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    // SAFETY: the range is part of `slice`, whole pages of guest memory, which nobody refers to but
    // by addresses; it stays mapped, and is unmapped with the memory around it. The file is sealed:
    // no page of it goes away.
    #[expect(unsafe_code, reason = "pages of guest memory are replaced")]
    let start = unsafe { mmap(guard.as_ptr().cast(), bytes, access, flags, &text.file, start)? };
    // SAFETY: as above; what is in the pages does not change. No dump has them, as all of guest
    // memory: they are the guest's own once it writes to them.
    #[expect(unsafe_code, reason = "madvise takes a raw range")]
    unsafe {
        madvise(start, bytes, Advice::LinuxDontDump)?;
    }
    Ok(())
}
