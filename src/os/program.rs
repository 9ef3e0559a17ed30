//! The files that this process was started from, as far as they are mapped into it.
//!
//! Starting touches code and constants that are not needed again, and the kernel maps the pages
//! around each that is touched. They are shared with whoever runs the same program, but count as
//! resident in each process, and cannot be reclaimed while one of them has them mapped.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::slice;

use libc::{PF_W, PT_LOAD, dl_phdr_info, size_t};
use rustix::mm::{Advice, madvise};

use crate::os::PAGE_BYTES;

/// Lets go of every mapped page of the program and its libraries that is only ever read or run.
/// What is used again is mapped again, without a disk: it is in the page cache.
pub fn release_pages() {
    // SAFETY: the function is called with what the loader says of each object, before this
    // returns, and takes no data of ours.
    #[expect(unsafe_code, reason = "the loader's list is walked by a C function")]
    unsafe {
        libc::dl_iterate_phdr(Some(release_object), ptr::null_mut());
    }
}

/// Lets go of the pages of one object of the loader's list; 0 for the list to go on.
extern "C" fn release_object(info: *mut dl_phdr_info, _: size_t, _: *mut c_void) -> c_int {
    // SAFETY: the loader hands over a description that lives as long as the call.
    #[expect(unsafe_code, reason = "a pointer of the C library")]
    let Some(info) = (unsafe { info.as_ref() }) else { return 0 };
    if info.dlpi_phdr.is_null() {
        return 0;
    }
    // SAFETY: these are the program headers of a loaded object, as many as it says.
    #[expect(unsafe_code, reason = "a pointer and a length of the C library")]
    let headers = unsafe { slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers {
        if header.p_type != PT_LOAD || header.p_flags & PF_W != 0 {
            continue;
        }
        let segment = info.dlpi_addr.wrapping_add(header.p_vaddr);
        let (start, end) = (segment & !(PAGE_BYTES - 1), segment.wrapping_add(header.p_memsz));
        let Ok(bytes) = usize::try_from(end.wrapping_sub(start)) else { continue };
        let Ok(address) = usize::try_from(start) else { continue };
        // SAFETY: what is mapped of a segment that cannot be written are pages of the page cache;
        // the same are mapped again as they are touched.
        #[expect(unsafe_code, reason = "madvise takes a raw range")]
        let _ = unsafe {
            madvise(ptr::with_exposed_provenance_mut(address), bytes, Advice::LinuxDontNeed)
        };
    }
    0
}
