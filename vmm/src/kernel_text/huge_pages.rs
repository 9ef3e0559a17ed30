//! Huge pages for a text that is kept: Linux gives files of memory none unless it is asked to.
//!
//! With them a guest takes one exit for two megabytes of its kernel's text that it touches first,
//! not one for each of 512 pages, and needs as many fewer entries of the processor's TLB.

use std::fs::File;
use std::io;
use std::ptr;

use libc::{MADV_COLLAPSE, c_void, madvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::HUGE_PAGE_BYTES;

/// Gathers the pages of `file`, a file of memory, in huge ones, as far as there are whole ones in
/// it (madvise(2), `MADV_COLLAPSE`, Linux 6.1).
///
/// # Errors
///
/// If the host has none to give, or a kernel that cannot; the file is as it was.
pub fn gather(file: &File) -> io::Result<()> {
    let huge = usize::try_from(HUGE_PAGE_BYTES).expect("usize is 64 bits wide");
    let bytes = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX) / huge * huge;
    if bytes == 0 {
        return Ok(());
    }
    // Longer than the file by one: Linux puts a mapping where it likes, not where a huge page is.
    let length = bytes.checked_add(huge).ok_or(io::ErrorKind::FileTooLarge)?;
    // SAFETY: addresses that nobody has, kept until they are unmapped below.
    #[expect(unsafe_code, reason = "mmap returns a raw range")]
    let room =
        unsafe { mmap_anonymous(ptr::null_mut(), length, ProtFlags::empty(), MapFlags::PRIVATE)? };
    let start = room.wrapping_byte_add(room.addr().wrapping_neg() % huge);
    let gathered = gather_at(start, bytes, file);
    // SAFETY: mapped above, all of it, and nothing has kept an address.
    #[expect(unsafe_code, reason = "munmap takes a raw range")]
    unsafe {
        munmap(room, length)?;
    }
    gathered
}

/// Maps the first `bytes` of the file at `start`, the start of a huge page, to have them gathered.
fn gather_at(start: *mut c_void, bytes: usize, file: &File) -> io::Result<()> {
    let (access, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::FIXED);
    // SAFETY: the caller has these addresses for this alone, and nothing refers to them.
    #[expect(unsafe_code, reason = "mmap returns a raw range")]
    let start = unsafe { mmap(start, bytes, access, flags, file, 0)? };
    // SAFETY: exactly what was mapped, which nobody reads, and which is the same afterwards.
    #[expect(unsafe_code, reason = "madvise takes a raw range")]
    let gathered = unsafe { madvise(start, bytes, MADV_COLLAPSE) };
    if gathered == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, memfd_create};

    use super::*;

    #[test]
    fn a_file_is_the_same_whether_or_not_there_are_huge_pages_for_it() {
        for bytes in [0, 100, HUGE_PAGE_BYTES - 1, 2 * HUGE_PAGE_BYTES + 100] {
            let file = File::from(memfd_create(c"text", MemfdFlags::CLOEXEC).unwrap());
            let content: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            file.write_all_at(&content, 0).unwrap();

            // Not every host has some to give.
            let _ = gather(&file);

            let mut now = vec![0; content.len()];
            file.read_exact_at(&mut now, 0).unwrap();
            assert!(now == content, "{bytes} bytes");
            assert_eq!(file.metadata().unwrap().len(), bytes);
        }
    }

    #[test]
    fn what_has_no_huge_pages_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * HUGE_PAGE_BYTES).unwrap();
        assert!(gather(&file).is_err());
    }
}
