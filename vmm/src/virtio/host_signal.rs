//! How another thread tells a device that the host would like something else than before.
//!
//! What it would like lies beside the signal, in memory that both see; this only wakes the device,
//! which then looks. Several wishes before it does are one.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};

use super::{Fault, Interest, Watch};

/// The token of its file, for a device that waits for no other.
const TOKEN: u32 = 0;

/// A signal from the host to a device.
#[derive(Debug)]
pub(super) struct HostSignal {
    file: OwnedFd,
    /// The device waits for it. Only the device thread asks.
    is_watched: AtomicBool,
}

impl HostSignal {
    /// One that nobody waits for yet.
    ///
    /// # Errors
    ///
    /// What eventfd(2) says.
    pub(super) fn new() -> io::Result<Self> {
        let file = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { file, is_watched: AtomicBool::new(false) })
    }

    /// Wakes the device, now or once it waits.
    pub(super) fn raise(&self) {
        // An eventfd refuses only when its counter is full: then the device is told already.
        let _ = write(&self.file, &1_u64.to_ne_bytes());
    }

    /// Has the device wait for it.
    ///
    /// # Errors
    ///
    /// [`Fault::Host`].
    pub(super) fn watch(&self, watch: &mut dyn Watch) -> Result<(), Fault> {
        self.is_watched.store(true, Ordering::Relaxed);
        watch
            .add(self.file.as_fd(), TOKEN, Interest::Read)
            .map_err(|source| Fault::Host { what: "wait for a wish of the host", source })
    }

    /// The device has been woken, and looks.
    pub(super) fn clear(&self) {
        let mut count = [0; 8];
        // It fails if nobody asked, and then there is nothing to do.
        let _ = read(&self.file, &mut count);
    }

    /// Has the device not wait any more, if it did.
    pub(super) fn forget(&self, watch: &mut dyn Watch) {
        if self.is_watched.swap(false, Ordering::Relaxed) {
            // It fails if the file is not there, which is what is wanted.
            let _ = watch.remove(self.file.as_fd());
        }
    }
}
