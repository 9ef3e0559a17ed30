//! Wake-ups when files grow: one inotify instance for all readers (inotify(7)), of which a user
//! may have only 128.

use std::collections::HashMap;
use std::future;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::os::readable::readable;

/// Bytes of events read at a time; one takes 16 if the file is watched by itself.
const BUFFER_BYTES: usize = 4 << 10;

/// Everything that is watched. Clones are the same.
#[derive(Debug, Clone)]
pub struct FileWatch {
    shared: Arc<Shared>,
    _task: Arc<AbortOnDropHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    inotify: AsyncFd<OwnedFd>,
    /// By watch descriptor.
    watched: Mutex<HashMap<i32, watch::Sender<()>>>,
}

/// One who waits for a file to grow.
#[derive(Debug)]
pub struct Growth {
    shared: Arc<Shared>,
    descriptor: i32,
    grown: watch::Receiver<()>,
}

impl FileWatch {
    /// Watches nothing yet.
    ///
    /// # Errors
    ///
    /// What `inotify_init1(2)` says.
    pub fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        let inotify = readable(inotify)?;
        let shared = Arc::new(Shared { inotify, watched: Mutex::default() });
        let task = tokio::spawn(Arc::clone(&shared).run());
        Ok(Self { shared, _task: Arc::new(AbortOnDropHandle::new(task)) })
    }

    /// Watches `path`: whatever is written to it from now on is not missed.
    ///
    /// # Errors
    ///
    /// What `inotify_add_watch(2)` says.
    pub fn growth(&self, path: &Path) -> io::Result<Growth> {
        let mut watched = self.shared.lock();
        let descriptor = inotify::add_watch(&self.shared.inotify, path, WatchFlags::MODIFY)?;
        let grown = watched.entry(descriptor).or_insert_with(|| watch::Sender::new(())).subscribe();
        Ok(Growth { shared: Arc::clone(&self.shared), descriptor, grown })
    }
}

impl Growth {
    /// Waits until the file has grown since the last return.
    pub async fn wait(&mut self) {
        if self.grown.changed().await.is_err() {
            // The file is gone, and with it what could grow.
            future::pending::<()>().await;
        }
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        let mut watched = self.shared.lock();
        if watched.get(&self.descriptor).is_some_and(|sender| sender.receiver_count() <= 1) {
            watched.remove(&self.descriptor);
            if let Err(error) = inotify::remove_watch(&self.shared.inotify, self.descriptor) {
                tracing::debug!(%error, "Watch of a log had already ended");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<i32, watch::Sender<()>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>) {
        loop {
            match self.inotify.async_io(Interest::READABLE, |inotify| self.deliver(inotify)).await {
                Ok(()) => {}
                Err(error) => {
                    tracing::error!(%error, "Failed to watch logs: following them stands still");
                    return;
                }
            }
        }
    }

    /// Passes on what there is.
    fn deliver(&self, inotify: &OwnedFd) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); BUFFER_BYTES];
        let mut events = Reader::new(inotify, &mut buffer);
        loop {
            match events.next() {
                Ok(event) => {
                    if let Some(sender) = self.lock().get(&event.wd()) {
                        sender.send_replace(());
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::time::Duration;

    use tokio::time;

    use super::*;

    #[tokio::test]
    async fn every_reader_of_a_file_wakes_up_when_it_grows() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().join("one"), dir.path().join("other")];
        let mut files = [&paths[0], &paths[1]].map(|path| File::create(path).unwrap());
        let watch = FileWatch::new().unwrap();
        let mut readers = [&paths[0], &paths[0], &paths[1]].map(|path| watch.growth(path).unwrap());

        files[0].write_all(b"x").unwrap();

        readers[0].wait().await;
        readers[1].wait().await;
        let silent = time::timeout(Duration::from_millis(20), readers[2].wait()).await;
        assert!(silent.is_err(), "the other file did not grow");
    }

    #[tokio::test]
    async fn a_watch_ends_with_its_last_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, b"").unwrap();
        let watch = FileWatch::new().unwrap();

        let first = watch.growth(&path).unwrap();
        let second = watch.growth(&path).unwrap();
        drop(first);
        assert_eq!(watch.shared.lock().len(), 1);
        drop(second);

        assert_eq!(watch.shared.lock().len(), 0);
    }
}
