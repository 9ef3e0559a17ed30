//! Files in which the guest kernel's text is kept, patched by the first worker for all later ones
//! (`ovum_vmm::kernel_text`).
//!
//! Each is memory of this server: nothing on disk goes stale, and the first worker after a restart
//! fills another. A worker is handed the file and sees for itself what it is: sealed, it is a text
//! that nobody can change any more; unsealed, it has not been handed to anyone else.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ovum_vmm::kernel_text::{SEALS, gather};
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, fcntl_get_seals, memfd_create};

/// How long a worker may take to fill a file until another is tried: kernels start sooner.
const FILL_TIMEOUT: Duration = Duration::from_secs(60);

/// How many workers are given a file to fill until none is any more: kernels that say nothing of
/// their text, or cannot be shared on this processor, never do.
const TRIES_MAX: u8 = 3;

/// Longest kernel whose text is kept, in bytes: as long as it is the file is at first.
const KERNEL_BYTES_MAX: u64 = 64 << 20;

/// The texts of one kernel: for machines of one vCPU, which need no locks, and for all others.
#[derive(Debug, Clone, Default)]
pub struct KernelTexts(Arc<Mutex<[Option<Text>; 2]>>);

/// One file.
#[derive(Debug)]
struct Text {
    file: Arc<File>,
    kernel: KernelId,
    handed: Instant,
    /// Whether it is full: it was seen sealed.
    sealed: bool,
    /// Which it is of those for this kernel.
    tries: u8,
}

/// Tells the file of one kernel from that of another: device, inode, bytes, and when it changed.
type KernelId = (u64, u64, u64, i64, i64);

impl KernelTexts {
    /// The file for a worker with so many `vcpus` to start `kernel` from, or to fill. None while
    /// another worker is at it, or if there is no memory for one: the worker does without.
    pub(super) fn find(&self, kernel: &File, vcpus: u8) -> Option<Arc<File>> {
        let id = id(kernel).ok()?;
        let mut texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let text = &mut texts[usize::from(vcpus > 1)];
        let mut tries = 1;
        if let Some(text) = text.as_mut().filter(|text| text.kernel == id) {
            if !text.sealed && is_sealed(&text.file) {
                text.sealed = true;
                tracing::info!(vcpus, "The kernel's text is patched for later guests");
                gather_aside(Arc::clone(&text.file));
            }
            if text.sealed {
                return Some(Arc::clone(&text.file));
            }
            if text.handed.elapsed() < FILL_TIMEOUT || text.tries >= TRIES_MAX {
                return None;
            }
            tracing::debug!(vcpus, "The kernel's text was not kept by its first guest");
            tries = text.tries + 1;
        }
        if id.2 > KERNEL_BYTES_MAX {
            return None;
        }
        let file = blank(id.2).inspect_err(|error| {
            tracing::warn!(%error, "No memory to keep the kernel's text in");
        });
        let file = Arc::new(file.ok()?);
        let handed = Instant::now();
        *text = Some(Text { file: Arc::clone(&file), kernel: id, handed, sealed: false, tries });
        Some(file)
    }
}

fn id(kernel: &File) -> io::Result<KernelId> {
    let data = kernel.metadata()?;
    Ok((data.dev(), data.ino(), data.size(), data.ctime(), data.ctime_nsec()))
}

/// A file of `bytes`, whose memory is this process's: not that of the worker that fills it, which
/// has no room for more than its guest.
fn blank(bytes: u64) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create(c"kernel-text", flags)?);
    fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    Ok(file)
}

fn is_sealed(file: &File) -> bool {
    fcntl_get_seals(file).is_ok_and(|seals| seals.contains(SEALS))
}

/// Nobody waits for it: it takes a while on a host that has to look for huge pages, and a guest
/// that starts meanwhile has small ones.
fn gather_aside(file: Arc<File>) {
    let gathering = thread::Builder::new().name("kernel-text".to_owned()).spawn(move || {
        if let Err(error) = gather(&file) {
            tracing::info!(%error, "No huge pages for the kernel's text");
        }
    });
    if let Err(error) = gathering {
        tracing::warn!(%error, "No thread to find huge pages for the kernel's text");
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use rustix::fs::fcntl_add_seals;

    use super::*;

    fn kernel() -> File {
        let mut kernel = tempfile::tempfile().unwrap();
        kernel.write_all(b"kernel").unwrap();
        kernel
    }

    /// A worker fills a file.
    fn seal(file: &File) {
        fcntl_add_seals(file, SEALS).unwrap();
    }

    #[test]
    fn a_file_is_for_one_worker_until_it_is_sealed_and_then_for_all() {
        let (texts, kernel) = (KernelTexts::default(), kernel());

        let first = texts.find(&kernel, 1).unwrap();
        assert_eq!(first.metadata().unwrap().len(), 6);
        assert!(texts.find(&kernel, 1).is_none());

        seal(&first);
        for _ in 0..2 {
            assert!(Arc::ptr_eq(&texts.find(&kernel, 1).unwrap(), &first));
        }
    }

    #[test]
    fn machines_of_one_vcpu_have_another_than_those_of_more() {
        let (texts, kernel) = (KernelTexts::default(), kernel());

        seal(&texts.find(&kernel, 2).unwrap());

        assert!(!is_sealed(&texts.find(&kernel, 1).unwrap()));
        assert!(is_sealed(&texts.find(&kernel, 8).unwrap()));
    }

    #[test]
    fn another_kernel_has_another_text() {
        // Both open, or the other could be given the number of the one.
        let (texts, one, other) = (KernelTexts::default(), kernel(), kernel());
        seal(&texts.find(&one, 1).unwrap());

        assert!(!is_sealed(&texts.find(&other, 1).unwrap()));
    }
}
