//! A text that is kept, and what later guests have of it.

use std::io::Write;

use linux_loader::loader::{Elf, KernelLoader};
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::events::Events;
use crate::layout::{REPORT_PORT, TEXT_AFTER, TEXT_BEFORE, TEXT_PORT};
use crate::ports::Ports;

/// Where the guest has its kernel: two pages of text, one of data, one of text again.
const START: u64 = 1 << 20;
const PAGES: u64 = 4;
/// The file's first page has headers and notes.
const FILE_START: u64 = PAGE_BYTES;
const TEXTS: [[u64; 2]; 2] = [
    [START, START + 2 * PAGE_BYTES],
    // The end is not that of a page.
    [START + 3 * PAGE_BYTES, START + 4 * PAGE_BYTES - 100],
];

/// A note of `owner` with `ranges`.
fn note(owner: &[u8; 5], kind: u32, ranges: &[[u64; 2]]) -> Vec<u8> {
    let content: Vec<u8> = ranges.as_flattened().iter().flat_map(|at| at.to_le_bytes()).collect();
    let length = u32::try_from(content.len()).unwrap();
    let mut note: Vec<u8> = [5, length, kind].iter().flat_map(|word| word.to_le_bytes()).collect();
    note.extend(owner);
    note.extend([0; 3]);
    note.extend(content);
    note
}

/// An ELF of one segment and these notes.
fn kernel(notes: &[u8]) -> File {
    kernel_of(notes, PAGES * PAGE_BYTES)
}

/// The same, and its headers say that the segment has so many bytes.
fn kernel_of(notes: &[u8], bytes: u64) -> File {
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    elf.resize(16, 0);
    let half = |elf: &mut Vec<u8>, value: u16| elf.extend(value.to_le_bytes());
    let long = |elf: &mut Vec<u8>, value: u64| elf.extend(value.to_le_bytes());
    half(&mut elf, 2);
    half(&mut elf, 62);
    elf.extend(1_u32.to_le_bytes());
    [START, 64, 0].iter().for_each(|&value| long(&mut elf, value));
    elf.extend([0; 4]);
    [64, 56, 2, 64, 0, 0].iter().for_each(|&value| half(&mut elf, value));
    let notes_start = 64 + 2 * 56;
    for (kind, offset, start, bytes) in
        [(1_u32, FILE_START, START, bytes), (4, notes_start, 0, notes.len() as u64)]
    {
        elf.extend(kind.to_le_bytes());
        elf.extend([0; 4]);
        [offset, start, start, bytes, bytes, 4].iter().for_each(|&value| long(&mut elf, value));
    }
    elf.extend(notes);
    elf.resize(size_of::<Page>(), 0);
    for page in 0..PAGES {
        elf.resize(elf.len() + size_of::<Page>(), b'a' + u8::try_from(page).unwrap());
    }
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file
}

fn blank() -> File {
    let file = memfd_create(c"text", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let file = File::from(file);
    file.set_len(16 * PAGE_BYTES).unwrap();
    file
}

fn memory() -> Arc<Mem> {
    Arc::new(Mem::from_ranges(&[(GuestAddress(0), 4 << 20)]).unwrap())
}

fn load(mem: &Mem, kernel: &File, text: Option<&KernelText>) {
    let mut kernel = kernel.try_clone().unwrap();
    Elf::load(mem, None, &mut Image::new(&mut kernel, text), None).unwrap();
}

fn page(mem: &Mem, nth: u64) -> Page {
    let mut bytes: Page = [0; _];
    mem.read_slice(&mut bytes, GuestAddress(START + nth * PAGE_BYTES)).unwrap();
    bytes
}

fn write(mem: &Mem, at: u64, bytes: &[u8]) {
    mem.write_slice(bytes, GuestAddress(START + at)).unwrap();
}

fn identity(of: &str) -> Identity {
    Identity::for_test(of)
}

fn keeper(file: &File, kernel: &File) -> (Keeper, Arc<Mem>) {
    let mem = memory();
    load(&mem, kernel, None);
    let file = file.try_clone().unwrap();
    match KernelText::of(file, kernel, &identity("one"), &mem).unwrap() {
        Some(KernelText::Blank(keeper)) => (keeper, mem),
        other => panic!("{other:?}"),
    }
}

/// What a first guest does that writes to its text before, while and after it is patched.
fn keep(file: &File, kernel: &File) {
    let (mut keeper, mem) = keeper(file, kernel);
    write(&mem, 10, b"before");
    assert!(keeper.hear(TEXT_BEFORE).unwrap());
    write(&mem, 100, b"patched");
    write(&mem, 3 * PAGE_BYTES, b"patched");
    assert!(!keeper.hear(TEXT_AFTER).unwrap());
}

fn kept(file: &File, kernel: &File) -> KernelText {
    let file = file.try_clone().unwrap();
    match KernelText::of(file, kernel, &identity("one"), &memory()).unwrap() {
        Some(text @ KernelText::Kept(_)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_patching_changes_is_in_later_guests_and_nothing_else() {
    let (file, kernel) = (blank(), kernel(&note(b"ovum\0", 1, &TEXTS)));
    keep(&file, &kernel);
    let text = kept(&file, &kernel);

    let mem = memory();
    load(&mem, &kernel, Some(&text));

    let mut first = [b'a'; size_of::<Page>()];
    first[100..107].copy_from_slice(b"patched");
    assert_eq!(page(&mem, 0), first);
    assert_eq!(page(&mem, 1), [b'b'; size_of::<Page>()]);
    assert_eq!(page(&mem, 2), [b'c'; size_of::<Page>()]);
    assert_eq!(&page(&mem, 3)[..8], b"patchedd");
}

#[test]
fn what_a_guest_writes_to_its_text_is_its_own() {
    let (file, kernel) = (blank(), kernel(&note(b"ovum\0", 1, &TEXTS)));
    keep(&file, &kernel);
    let text = kept(&file, &kernel);
    let (one, other) = (memory(), memory());
    load(&one, &kernel, Some(&text));
    load(&other, &kernel, Some(&text));

    write(&one, PAGE_BYTES, b"mine");

    assert_eq!(page(&other, 1), [b'b'; size_of::<Page>()]);
    assert!(file.write_at(b"x", 0).is_err());
    assert!(file.set_len(0).is_err());
}

#[test]
fn a_text_of_another_kernel_or_processor_is_not_used() {
    let (file, kernel) = (blank(), kernel(&note(b"ovum\0", 1, &TEXTS)));
    keep(&file, &kernel);

    let found = KernelText::of(file, &kernel, &identity("two"), &memory()).unwrap();

    assert!(found.is_none());
}

#[test]
fn a_text_is_kept_only_in_its_order() {
    let kernel = kernel(&note(b"ovum\0", 1, &TEXTS));
    for words in [[TEXT_AFTER, TEXT_AFTER], [TEXT_BEFORE, TEXT_BEFORE], [0, 0xff]] {
        let file = blank();
        let (mut keeper, _mem) = keeper(&file, &kernel);

        let ended = words.iter().any(|&word| !keeper.hear(word).unwrap());

        assert!(ended);
        assert!(fcntl_get_seals(&file).unwrap().is_empty());
    }
}

#[test]
fn nothing_is_kept_once_the_agent_has_spoken() {
    let kernel = kernel(&note(b"ovum\0", 1, &TEXTS));
    for (agent_speaks, is_kept) in [(false, true), (true, false)] {
        let file = blank();
        let (keeper, _mem) = keeper(&file, &kernel);
        let ports = Ports::new(Arc::new(Events::new().unwrap()), None, Some(keeper));

        if agent_speaks {
            ports.write(REPORT_PORT, &[1, 0, 0, 0]);
        }
        ports.write(TEXT_PORT, &[TEXT_BEFORE]);
        ports.write(TEXT_PORT, &[TEXT_AFTER]);

        assert_eq!(!fcntl_get_seals(&file).unwrap().is_empty(), is_kept);
    }
}

#[test]
fn a_kernel_that_does_not_say_where_its_text_is_has_none() {
    let beyond = [[START, START + (PAGES + 1) * PAGE_BYTES]];
    let overlapping = [TEXTS[0], [START + PAGE_BYTES, START + 3 * PAGE_BYTES]];
    let mut cut = note(b"ovum\0", 1, &TEXTS);
    cut.truncate(40);
    for notes in [
        Vec::new(),
        note(b"Xen\0\0", 1, &TEXTS),
        note(b"ovum\0", 2, &TEXTS),
        note(b"ovum\0", 1, &beyond),
        note(b"ovum\0", 1, &overlapping),
        note(b"ovum\0", 1, &[[START + 1, START + PAGE_BYTES]]),
        note(b"ovum\0", 1, &[[START, START]]),
        note(b"ovum\0", 1, &[[u64::MAX - 10, u64::MAX]]),
        note(b"ovum\0", 1, &[[START, u64::MAX]]),
        cut,
        vec![0xff; 64],
    ] {
        assert_eq!(note::pieces(&kernel(&notes)).unwrap(), [], "{notes:?}");
    }
    assert_eq!(note::pieces(&tempfile::tempfile().unwrap()).unwrap(), []);
}

#[test]
fn a_note_behind_others_is_found() {
    let mut notes = note(b"Linux", 7, &[[1, 2]]);
    notes.extend(note(b"ovum\0", 1, &TEXTS));

    let pieces = note::pieces(&kernel(&notes)).unwrap();

    let starts = pieces.iter().map(|piece| (piece.guest_start, piece.file_start, piece.bytes));
    assert_eq!(
        starts.collect::<Vec<_>>(),
        [
            (START, FILE_START, 2 * PAGE_BYTES),
            (START + 3 * PAGE_BYTES, FILE_START + 3 * PAGE_BYTES, PAGE_BYTES),
        ]
    );
}

#[test]
fn huge_pages_begin_where_they_do_in_the_guest() {
    let (small, large) = (PAGE_BYTES, HUGE_PAGE_BYTES + PAGE_BYTES);
    let large_start = START + 3 * PAGE_BYTES;
    let last_start = large_start + large;
    let ranges =
        [(START, small), (large_start, large), (last_start, small)].map(|(at, len)| [at, at + len]);

    let kernel = kernel_of(&note(b"ovum\0", 1, &ranges), 2 * large);
    let pieces = note::pieces(&kernel).unwrap();

    let [first, large, last] = pieces[..] else { panic!("{pieces:?}") };
    assert_eq!(first.kept_start, 0);
    assert_eq!(large.kept_start % HUGE_PAGE_BYTES, large_start % HUGE_PAGE_BYTES);
    assert!(large.kept_start >= small && large.kept_start < HUGE_PAGE_BYTES + small);
    assert_eq!(last.kept_start, large.kept_start + large.bytes);
}

#[test]
fn a_file_that_cannot_be_sealed_is_refused() {
    let (file, kernel) = (tempfile::tempfile().unwrap(), kernel(&note(b"ovum\0", 1, &TEXTS)));

    let error = KernelText::of(file, &kernel, &identity("one"), &memory()).unwrap_err();

    assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
}
