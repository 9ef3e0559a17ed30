//! What a kernel's file says of its text: a note (ELF, "Note Section") of owner `ovum`, type 1,
//! with the guest-physical start and end of one range or several, 64 bits each.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use libc::{PT_LOAD, PT_NOTE};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::{HUGE_PAGE_BYTES, PAGE_BYTES, Piece};

const OWNER: &[u8] = b"ovum\0";
const TYPE: u32 = 1;

/// Most program headers that are looked at; Linux has five.
const HEADERS_MAX: u16 = 32;
/// Most bytes of notes; Linux has 200.
const NOTES_BYTES_MAX: u64 = 4096;
/// Most ranges; ours has one.
const RANGES_MAX: usize = 4;
/// Most bytes of text.
pub(super) const TEXT_BYTES_MAX: u64 = 64 << 20;
/// Notes, their names and their contents begin at multiples of this.
const NOTE_ALIGNMENT: usize = 4;

#[derive(Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct ElfHeader {
    ident: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    program_headers: U64,
    section_headers: U64,
    flags: U32,
    header_bytes: U16,
    program_header_bytes: U16,
    program_header_count: U16,
    section_header_bytes: U16,
    section_header_count: U16,
    names: U16,
}

#[derive(Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct ProgramHeader {
    kind: U32,
    flags: U32,
    offset: U64,
    address: U64,
    physical: U64,
    file_bytes: U64,
    memory_bytes: U64,
    alignment: U64,
}

#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct NoteHeader {
    name_bytes: U32,
    content_bytes: U32,
    kind: U32,
}

/// Where the text of `kernel` is; nowhere if it does not say, or says what cannot be.
///
/// # Errors
///
/// If the file cannot be read; one that is too short says nothing.
pub(super) fn pieces(kernel: &File) -> io::Result<Vec<Piece>> {
    let headers = match program_headers(kernel) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Vec::new()),
        headers => headers?,
    };
    let notes = headers.iter().filter(|header| header.kind.get() == PT_NOTE);
    for header in notes.filter(|header| header.file_bytes.get() <= NOTES_BYTES_MAX) {
        let mut notes = vec![0; usize::try_from(header.file_bytes.get()).unwrap_or(0)];
        if kernel.read_exact_at(&mut notes, header.offset.get()).is_err() {
            continue;
        }
        if let Some(content) = content(&notes) {
            return Ok(place(content, &headers).unwrap_or_default());
        }
    }
    Ok(Vec::new())
}

fn program_headers(kernel: &File) -> io::Result<Vec<ProgramHeader>> {
    let mut header = ElfHeader::new_zeroed();
    kernel.read_exact_at(header.as_mut_bytes(), 0)?;
    let count = header.program_header_count.get().min(HEADERS_MAX);
    let mut headers = Vec::with_capacity(count.into());
    let mut at = header.program_headers.get();
    for _ in 0..count {
        let mut header = ProgramHeader::new_zeroed();
        kernel.read_exact_at(header.as_mut_bytes(), at)?;
        headers.push(header);
        at = at.saturating_add(size_of::<ProgramHeader>() as u64);
    }
    Ok(headers)
}

/// The content of our note among `notes`.
fn content(mut notes: &[u8]) -> Option<&[u8]> {
    loop {
        let (header, rest) = NoteHeader::ref_from_prefix(notes).ok()?;
        let name_bytes = usize::try_from(header.name_bytes.get()).ok()?;
        let content_bytes = usize::try_from(header.content_bytes.get()).ok()?;
        let content_at = name_bytes.checked_next_multiple_of(NOTE_ALIGNMENT)?;
        let content = rest.get(content_at..)?.get(..content_bytes)?;
        if rest.get(..name_bytes)? == OWNER && header.kind.get() == TYPE {
            return Some(content);
        }
        let next =
            content_at.checked_add(content_bytes)?.checked_next_multiple_of(NOTE_ALIGNMENT)?;
        notes = rest.get(next..)?;
    }
}

/// Finds each range in the file. None if one is nowhere there as whole pages, or is out of order.
fn place(content: &[u8], headers: &[ProgramHeader]) -> Option<Vec<Piece>> {
    let ranges = <[[U64; 2]]>::ref_from_bytes(content).ok()?;
    let mut pieces: Vec<Piece> = Vec::new();
    let (mut guest_end, mut kept_end) = (0_u64, 0_u64);
    for [start, end] in ranges {
        let (start, end) = (start.get(), end.get().checked_next_multiple_of(PAGE_BYTES)?);
        let bytes = end.checked_sub(start).filter(|&bytes| bytes > 0)?;
        let mut loads = headers.iter().filter(|header| header.kind.get() == PT_LOAD);
        let file_start = loads.find_map(|header| {
            let skipped = start.checked_sub(header.physical.get())?;
            let is_there = skipped.checked_add(bytes)? <= header.file_bytes.get();
            header.offset.get().checked_add(skipped).filter(|_| is_there)
        })?;
        if start < guest_end || start % PAGE_BYTES != 0 || file_start % PAGE_BYTES != 0 {
            return None;
        }
        // With huge pages in it: they begin in the file where they do in the guest.
        let has_huge = bytes >= HUGE_PAGE_BYTES;
        let gap = if has_huge { start.wrapping_sub(kept_end) % HUGE_PAGE_BYTES } else { 0 };
        let kept_start = kept_end.checked_add(gap)?;
        pieces.push(Piece { guest_start: start, file_start, kept_start, bytes });
        (guest_end, kept_end) = (end, kept_start.checked_add(bytes)?);
    }
    (pieces.len() <= RANGES_MAX && kept_end <= TEXT_BYTES_MAX).then_some(pieces)
}
