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
use super::note::TEXT_BYTES_MAX;

/// How often Linux is asked that says to try again, as it does when it looks at a page that
/// somebody else does.
const TRIES_MAX: u32 = 5;

/// Gathers the pages of `file`, a file of memory, in huge ones, as far as there are whole ones in
/// it (madvise(2), `MADV_COLLAPSE`, Linux 6.1). Guests that have mapped it need not know.
///
/// # Errors
///
/// If the file is longer than any text, or the host has no huge pages to give, or a kernel that
/// cannot; what is in the file is the same, some of it may be gathered.
pub fn gather(file: &File) -> io::Result<()> {
    let length = file.metadata()?.len();
    if length > TEXT_BYTES_MAX + HUGE_PAGE_BYTES {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let [huge, bytes] = [HUGE_PAGE_BYTES, length - length % HUGE_PAGE_BYTES]
        .map(|bytes| usize::try_from(bytes).expect("usize is 64 bits wide"));
    if bytes == 0 {
        return Ok(());
    }
    // Linux puts a mapping where it likes, not where a huge page is: in room for one more there is
    // a place for it. Whoever is quicker to take that has it, and there is an error.
    // SAFETY: addresses that nobody has, given back before anything refers to them.
    #[expect(unsafe_code, reason = "mmap returns a raw range")]
    let room = unsafe {
        mmap_anonymous(ptr::null_mut(), bytes + huge, ProtFlags::empty(), MapFlags::PRIVATE)?
    };
    // SAFETY: exactly what was mapped.
    #[expect(unsafe_code, reason = "munmap takes a raw range")]
    unsafe {
        munmap(room, bytes + huge)?;
    }
    let start = room.wrapping_byte_add(room.addr().wrapping_neg() % huge);
    let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
    // SAFETY: only where nothing is mapped.
    #[expect(unsafe_code, reason = "mmap returns a raw range")]
    let mapped = unsafe { mmap(start, bytes, ProtFlags::READ, flags, file, 0)? };
    let gathered = collapse(mapped, bytes);
    // SAFETY: exactly what was mapped, and nothing refers to it.
    #[expect(unsafe_code, reason = "munmap takes a raw range")]
    unsafe {
        munmap(mapped, bytes)?;
    }
    gathered
}

fn collapse(start: *mut c_void, bytes: usize) -> io::Result<()> {
    let mut tries = 0;
    loop {
        // SAFETY: advice changes nothing of what is mapped there; where nothing is, it fails.
        #[expect(unsafe_code, reason = "madvise takes a raw range")]
        if unsafe { madvise(start, bytes, MADV_COLLAPSE) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        tries += 1;
        if error.kind() != io::ErrorKind::WouldBlock || tries == TRIES_MAX {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};

    use super::super::SEALS;
    use super::*;

    fn file() -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        File::from(memfd_create(c"text", flags).unwrap())
    }

    #[test]
    fn a_sealed_file_is_the_same_whether_or_not_there_are_huge_pages_for_it() {
        for bytes in [0, 100, HUGE_PAGE_BYTES - 1, 2 * HUGE_PAGE_BYTES + 100] {
            let file = file();
            let content: Vec<u8> = (0..bytes).map(|at| (at % 251) as u8).collect();
            file.write_all_at(&content, 0).unwrap();
            fcntl_add_seals(&file, SEALS).unwrap();

            let gathered = gather(&file).map_err(|error| error.raw_os_error());

            // What a host says that has none to give, or cannot; the file may be mapped.
            let excuses = [libc::ENOMEM, libc::EBUSY, libc::EAGAIN, libc::EINVAL].map(Some);
            assert!(gathered.is_ok() || excuses.contains(&gathered.unwrap_err()));
            let mut now = vec![0; content.len()];
            file.read_exact_at(&mut now, 0).unwrap();
            assert!(now == content, "{bytes} bytes");
            assert_eq!(file.metadata().unwrap().len(), bytes);
        }
    }

    #[test]
    fn what_is_longer_than_any_text_is_refused() {
        let file = file();
        file.set_len(TEXT_BYTES_MAX + HUGE_PAGE_BYTES + 1).unwrap();
        assert_eq!(gather(&file).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
    }
}
