//! Logs of bounded size: the oldest part becomes a hole, so that offsets in the file stay true
//! while the disk it takes does not grow.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, fallocate, fstat};

/// Bounds `file`, to whose end `written_bytes` were just written, to `bytes_max` on disk or a
/// little more. Half of that is left when there was more.
///
/// # Errors
///
/// What fallocate(2) says, for instance of a file system without holes; the file is as before.
pub fn bound(file: impl AsFd, written_bytes: u64, bytes_max: u64) -> io::Result<()> {
    let left_bytes = (bytes_max / 2).max(1);
    let end = fstat(&file)?.st_size.unsigned_abs();
    // One hole each time half of what may be kept was written.
    if end > bytes_max && end % left_bytes < written_bytes {
        let hole_bytes = (end - left_bytes) / left_bytes * left_bytes;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&file, mode, 0, hole_bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const BYTES_MAX: u64 = 64 << 10;

    #[test]
    fn a_log_of_any_length_takes_a_bounded_part_of_the_disk() {
        let mut file = tempfile::tempfile().unwrap();
        for _ in 0..1000 {
            file.write_all(&[b'x'; 999]).unwrap();
            bound(&file, 999, BYTES_MAX).unwrap();
        }

        let found = file.metadata().unwrap();
        assert_eq!(found.len(), 999_000);
        let taken = found.blocks() * 512;
        assert!((BYTES_MAX / 2..BYTES_MAX + 8192).contains(&taken), "{taken}");
    }

    #[test]
    fn a_pipe_is_not_bounded_and_not_harmed() {
        let (_reader, writer) = io::pipe().unwrap();

        assert!(bound(&writer, 1, 1).is_ok());
    }
}
