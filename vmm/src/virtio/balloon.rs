//! Balloon device: memory that the guest does not need goes back to the host (virtio 1.3, 5.5).
//!
//! It does so in two ways. The driver reports ranges of pages that are free, whenever there are
//! new ones; the host takes the pages away and the guest may use the range again at any time, so
//! nothing is to be controlled. And the host can ask for pages that are in use
//! ([`BalloonHandle::inflate`]): the driver empties caches and gives up what it finds, until it
//! needs it more than the host does.
//!
//! What the driver says is no more than advice about its own pages: a wrong address gives nothing
//! back, a wrong page is the guest's loss.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vm_memory::GuestAddress;
use zerocopy::byteorder::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use super::buffers::Span;
use super::host_signal::HostSignal;
use super::ring::Answer;
use super::{Device, DeviceIo, DeviceState, Fault, Served, Watch};
use crate::memory::{Mem, give_back};

/// A page as the balloon counts them, whatever the guest's pages are (5.5.6).
pub const PAGE_BYTES: u64 = 4096;

/// Most pages named in one request: Linux names 256. Those behind are not given back.
const PAGES_PER_REQUEST_MAX: usize = 256;

/// Reports taken in one turn have at most about so many bytes: taking pages away is work that the
/// guest orders and the other devices wait for.
const BYTES_PER_TURN_MAX: usize = 256 << 20;

const KIND: u32 = 5;

/// Queues for pages given up, pages taken again, and, whatever number a driver counts for it when
/// it leaves out those of features it does not have, free pages.
const QUEUE_SIZES: [u16; 5] = [32; 5];
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;

const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;

/// The host's side of the balloon, for other threads. Clones are the same.
#[derive(Debug, Clone)]
pub struct BalloonHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Pages that the host would like to have.
    wanted_pages: AtomicU32,
    /// Pages that it has, as the driver says.
    given_pages: AtomicU32,
    signal: HostSignal,
}

impl BalloonHandle {
    /// Asks the guest to give up `bytes` of its memory, in all; what it has given up beyond that it
    /// takes again. It does so when it can, as far as it can.
    pub fn inflate(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.0.wanted_pages.store(pages, Ordering::SeqCst);
        self.0.signal.raise();
    }

    /// What the host has asked for.
    pub fn wanted_bytes(&self) -> u64 {
        u64::from(self.0.wanted_pages.load(Ordering::SeqCst)).saturating_mul(PAGE_BYTES)
    }

    /// What the guest has given up, as its driver says.
    pub fn given_bytes(&self) -> u64 {
        u64::from(self.0.given_pages.load(Ordering::SeqCst)).saturating_mul(PAGE_BYTES)
    }
}

/// struct virtio_balloon_config up to the fields of the features that are offered. What the driver
/// writes into `actual` is counted on its queues.
#[derive(Debug, Default, IntoBytes, Immutable)]
#[repr(C)]
struct Config {
    num_pages: U32,
    actual: U32,
}

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    config: Config,
    shared: Arc<Shared>,
}

impl Balloon {
    /// An empty one.
    ///
    /// # Errors
    ///
    /// What eventfd(2) says.
    pub fn new() -> io::Result<Self> {
        let (wanted_pages, given_pages) = (AtomicU32::new(0), AtomicU32::new(0));
        let shared = Arc::new(Shared { wanted_pages, given_pages, signal: HostSignal::new()? });
        Ok(Self { config: Config::default(), shared })
    }

    /// The host's side of it.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(Arc::clone(&self.shared))
    }

    /// Takes note of what the host would like; true if it is something else than before.
    fn follow_host(&mut self) -> bool {
        let wanted = self.shared.wanted_pages.load(Ordering::SeqCst);
        let changes = wanted != self.config.num_pages.get();
        self.config.num_pages = U32::new(wanted);
        changes
    }

    /// The driver gives up pages.
    fn inflate(&self, pages: &mut Span<'_>, mem: &Mem) {
        let mut run = Run::default();
        let mut count = 0;
        while let Some(page) = next_page(pages).filter(|_| count < PAGES_PER_REQUEST_MAX) {
            count = count.saturating_add(1);
            if let Some(complete) = run.add(page) {
                complete.give_back(mem);
            }
        }
        run.give_back(mem);
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let given = self.shared.given_pages.load(Ordering::SeqCst);
        self.shared.given_pages.store(given.saturating_add(count), Ordering::SeqCst);
    }

    /// The driver takes pages again; the host gives them when they are touched.
    fn deflate(&self, pages: &Span<'_>) {
        let count = (pages.len() / size_of::<u32>()).min(PAGES_PER_REQUEST_MAX);
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        let given = self.shared.given_pages.load(Ordering::SeqCst);
        self.shared.given_pages.store(given.saturating_sub(count), Ordering::SeqCst);
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> &[u8] {
        self.config.as_bytes()
    }

    fn has_variable_config(&self) -> bool {
        true
    }

    fn activate(&mut self, _features: u64, io: &mut DeviceIo<'_>) -> Result<(), Fault> {
        self.shared.signal.watch(io.watch)?;
        self.follow_host();
        Ok(())
    }

    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(index)) else { return Ok(Served::NOTHING) };
        let mem = &**io.mem;
        let mut left = BYTES_PER_TURN_MAX;
        let served = ring.serve(mem, |_, mut buffers| {
            match index {
                INFLATE => self.inflate(&mut buffers.readable, mem),
                DEFLATE => self.deflate(&buffers.readable),
                _ if left == 0 => return Ok(Answer::Blocked),
                _ => left = left.saturating_sub(buffers.writable.give_back(left)),
            }
            Ok(Answer::Used { written_bytes: 0 })
        })?;
        Ok(if left == 0 { served.and(Served::again(index)) } else { served })
    }

    fn wake(&mut self, _token: u32, _io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        self.shared.signal.clear();
        Ok(if self.follow_host() { Served::CONFIG } else { Served::NOTHING })
    }

    /// A driver that begins anew begins with an empty balloon.
    fn reset(&mut self, watch: &mut dyn Watch) {
        self.shared.signal.forget(watch);
        self.shared.given_pages.store(0, Ordering::SeqCst);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }
}

/// The next page number of a list.
fn next_page(list: &mut Span<'_>) -> Option<u32> {
    let mut page = [0; size_of::<u32>()];
    list.read(&mut page).then(|| u32::from_le_bytes(page))
}

/// Pages next to each other, in either direction: given back together.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    first: u32,
    count: u32,
}

impl Run {
    /// Adds a page, or returns what was complete before it.
    fn add(&mut self, page: u32) -> Option<Self> {
        let end = self.first.checked_add(self.count);
        if self.count > 0 && end == Some(page) {
            self.count = self.count.saturating_add(1);
            None
        } else if self.count > 0 && page.checked_add(1) == Some(self.first) {
            self.first = page;
            self.count = self.count.saturating_add(1);
            None
        } else {
            let complete = *self;
            *self = Self { first: page, count: 1 };
            (complete.count > 0).then_some(complete)
        }
    }

    fn give_back(self, mem: &Mem) {
        let bytes = |pages: u32| u64::from(pages).saturating_mul(PAGE_BYTES);
        let length = usize::try_from(bytes(self.count)).unwrap_or(0);
        if length > 0 {
            give_back(mem, GuestAddress(bytes(self.first)), length);
        }
    }
}

#[cfg(test)]
mod tests;
