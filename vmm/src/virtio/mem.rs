//! Memory device: memory that is added to a running guest and taken away again (virtio 1.3, 5.15).
//!
//! A region of guest addresses is set aside behind the guest's RAM. The host says how much of it
//! it would like to be plugged ([`MemHandle::resize`]), and the driver asks, block by block, for as
//! much as it can use. What is not plugged does not exist: the region is cut into a few chunks, and
//! a chunk is mapped, and known to KVM and to other devices, only while a block in it is plugged.
//! Blocks that are unplugged next to plugged ones have their pages taken away; a guest that touches
//! them all the same gets no more than the host said it would like, rounded up to whole chunks.
//!
//! Only this device changes guest memory after the start, which is why it owns [`Memory`].

mod blocks;
mod config;
mod request;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;
use zerocopy::IntoBytes;

use super::host_signal::HostSignal;
use super::ring::Answer;
use super::{Device, DeviceIo, DeviceState, Fault, Served, Watch};
use crate::memory::Memory;
use blocks::{Blocks, Holding};
use config::Config;
use request::{Reply, Request};

/// What is plugged and unplugged at a time: a huge page.
pub const BLOCK_BYTES: u64 = 2 << 20;

/// A chunk has at least this many bytes: as much as Linux adds to its memory at a time.
const CHUNK_BYTES_MIN: u64 = 128 << 20;

/// Most chunks: each can be a slot of KVM's, and a range that every look-up has to consider.
const CHUNKS_MAX: u64 = 32;

const KIND: u32 = 24;
const QUEUE_SIZES: [u16; 1] = [64];

const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// The host's side of the device, for other threads. Clones are the same.
#[derive(Debug, Clone)]
pub struct MemHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// What the host would like to be plugged.
    wanted_bytes: AtomicU64,
    /// What is plugged.
    plugged_bytes: AtomicU64,
    region_bytes: u64,
    signal: HostSignal,
}

impl MemHandle {
    /// Asks the guest to have `bytes` plugged, a multiple of [`BLOCK_BYTES`] and within the region.
    /// It does so when it can, as far as it can. Asked once more for what it has not done yet, it
    /// tries at once: by itself a driver waits for a minute.
    ///
    /// # Errors
    ///
    /// [`MemError::Size`], and nothing has changed.
    pub fn resize(&self, bytes: u64) -> Result<(), MemError> {
        let max = self.0.region_bytes;
        if bytes > max || !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(MemError::Size { bytes, max });
        }
        self.0.wanted_bytes.store(bytes, Ordering::SeqCst);
        self.0.signal.raise();
        Ok(())
    }

    /// How much is plugged now.
    pub fn plugged_bytes(&self) -> u64 {
        self.0.plugged_bytes.load(Ordering::SeqCst)
    }
}

/// Why there is no memory device, or not as wished.
#[derive(Debug, thiserror::Error)]
pub enum MemError {
    /// Not whole blocks, or more than there is.
    #[error("{bytes} bytes cannot be plugged: at most {max}, in blocks of {BLOCK_BYTES}")]
    Size {
        /// What was asked for.
        bytes: u64,
        /// The region's size.
        max: u64,
    },
    /// No file to wake it by.
    #[error("Failed to get an eventfd")]
    Signal(#[source] io::Error),
}

/// A memory device.
#[derive(Debug)]
pub struct MemDevice {
    memory: Memory,
    /// Where the region begins in the guest.
    start: u64,
    chunk_bytes: u64,
    blocks: Blocks,
    config: Config,
    shared: Arc<Shared>,
}

/// What a memory device needs to go on elsewhere, beside the memory that is plugged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemState {
    /// Size of the region, in bytes.
    pub region_bytes: u64,
    /// How much of it the driver may use.
    pub usable_bytes: u64,
    /// How much of it the host would like to be plugged.
    pub requested_bytes: u64,
    /// What is plugged: first block and number of blocks.
    pub plugged: Vec<(u64, u64)>,
}

impl MemDevice {
    /// A device with nothing plugged. Its region begins at `start`, where `memory` has nothing, and
    /// has `bytes`, a multiple of [`BLOCK_BYTES`].
    ///
    /// # Errors
    ///
    /// [`MemError`].
    pub fn new(memory: Memory, start: u64, bytes: u64) -> Result<Self, MemError> {
        if bytes == 0 || !bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(MemError::Size { bytes, max: u64::MAX });
        }
        let shared = Shared {
            wanted_bytes: AtomicU64::new(0),
            plugged_bytes: AtomicU64::new(0),
            region_bytes: bytes,
            signal: HostSignal::new().map_err(MemError::Signal)?,
        };
        let share = bytes.div_ceil(CHUNKS_MAX).max(CHUNK_BYTES_MIN);
        Ok(Self {
            memory,
            start,
            chunk_bytes: share.checked_next_power_of_two().unwrap_or(bytes),
            blocks: Blocks::new(usize::try_from(bytes / BLOCK_BYTES).unwrap_or(0)),
            config: Config::new(BLOCK_BYTES, start, bytes),
            shared: Arc::new(shared),
        })
    }

    /// The host's side of it.
    pub fn handle(&self) -> MemHandle {
        MemHandle(Arc::clone(&self.shared))
    }

    /// Takes note of what the host would like; true if it is something else than before, or not
    /// done yet.
    ///
    /// The driver may use the chunks that it needs for it. That never becomes less while something
    /// may lie there.
    fn follow_host(&mut self) -> bool {
        let wanted = self.shared.wanted_bytes.load(Ordering::SeqCst);
        let is_new = wanted != self.config.requested_bytes();
        self.config.request(wanted);
        self.config.grow_usable(self.whole_chunks(wanted));
        is_new || wanted != self.config.plugged_bytes()
    }

    fn whole_chunks(&self, bytes: u64) -> u64 {
        bytes.next_multiple_of(self.chunk_bytes).min(self.shared.region_bytes)
    }

    /// Carries out what the driver asks for.
    fn answer(&mut self, request: Request) -> Reply {
        match request {
            Request::Plug(range) => self.checked(range).map_or(Reply::Error, |r| self.plug(r)),
            Request::Unplug(range) => self.checked(range).map_or(Reply::Error, |r| self.unplug(r)),
            Request::UnplugAll => self.unplug_all(),
            Request::State(range) => match self.checked(range) {
                Some(range) => Reply::State(self.blocks.holding(range)),
                None => Reply::Error,
            },
            Request::Unknown => Reply::Error,
        }
    }

    /// The blocks that a request is about, if they are some, whole, and usable.
    fn checked(&self, request::Blocks { address, count }: request::Blocks) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        let bytes = u64::from(count).checked_mul(BLOCK_BYTES)?;
        let end = offset.checked_add(bytes)?;
        let fits =
            count > 0 && offset.is_multiple_of(BLOCK_BYTES) && end <= self.config.usable_bytes();
        let block = |bytes: u64| usize::try_from(bytes / BLOCK_BYTES).ok();
        if fits { Some(block(offset)?..block(end)?) } else { None }
    }

    fn plug(&mut self, range: Range<usize>) -> Reply {
        if self.blocks.holding(range.clone()) != Holding::Unplugged {
            return Reply::Error;
        }
        let bytes = (range.len() as u64).saturating_mul(BLOCK_BYTES);
        let plugged = self.config.plugged_bytes().saturating_add(bytes);
        if plugged > self.config.requested_bytes() {
            return Reply::Nack;
        }
        let mut added = Vec::new();
        for chunk in self.chunks(range.clone()) {
            if self.blocks.holding(chunk.clone()) != Holding::Unplugged {
                continue;
            }
            let (start, bytes) = self.addresses(&chunk);
            if self.memory.add(start, bytes).is_err() {
                // The host is short of something; what was added meanwhile goes again.
                for (start, bytes) in added {
                    let _ = self.memory.remove(start, bytes);
                }
                return Reply::Busy;
            }
            added.push((start, bytes));
        }
        self.blocks.set(range, true);
        self.count();
        Reply::Ack
    }

    fn unplug(&mut self, range: Range<usize>) -> Reply {
        if self.blocks.holding(range.clone()) != Holding::Plugged {
            return Reply::Error;
        }
        self.blocks.set(range.clone(), false);
        for chunk in self.chunks(range.clone()) {
            if self.blocks.holding(chunk.clone()) == Holding::Unplugged {
                let (start, bytes) = self.addresses(&chunk);
                // It was added when its first block was plugged.
                let _ = self.memory.remove(start, bytes);
            } else {
                let part = chunk.start.max(range.start)..chunk.end.min(range.end);
                let (start, bytes) = self.addresses(&part);
                let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
                self.memory.give_back(GuestAddress(start), bytes);
            }
        }
        self.count();
        Reply::Ack
    }

    fn unplug_all(&mut self) -> Reply {
        for chunk in self.chunks(0..self.blocks.count()) {
            if self.blocks.holding(chunk.clone()) != Holding::Unplugged {
                let (start, bytes) = self.addresses(&chunk);
                let _ = self.memory.remove(start, bytes);
            }
        }
        self.blocks.set(0..self.blocks.count(), false);
        self.config.set_usable(self.whole_chunks(self.config.requested_bytes()));
        self.count();
        Reply::Ack
    }

    fn count(&mut self) {
        let bytes = (self.blocks.plugged() as u64).saturating_mul(BLOCK_BYTES);
        self.config.plug(bytes);
        self.shared.plugged_bytes.store(bytes, Ordering::SeqCst);
    }

    /// The chunks that `range` touches, each as its blocks.
    fn chunks(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        let step = usize::try_from(self.chunk_bytes / BLOCK_BYTES).unwrap_or(usize::MAX);
        let count = self.blocks.count();
        let first = range.start.checked_div(step).unwrap_or(0).saturating_mul(step);
        (first..range.end)
            .step_by(step)
            .map(move |start| start..start.saturating_add(step).min(count))
    }

    /// Where blocks are in the guest, and how many bytes they have.
    fn addresses(&self, blocks: &Range<usize>) -> (u64, u64) {
        let bytes = |blocks: usize| (blocks as u64).saturating_mul(BLOCK_BYTES);
        (self.start.saturating_add(bytes(blocks.start)), bytes(blocks.len()))
    }
}

impl Device for MemDevice {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
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

    fn activate(&mut self, features: u64, io: &mut DeviceIo<'_>) -> Result<(), Fault> {
        // A driver that would touch what is not plugged would find nothing there.
        if features & F_UNPLUGGED_INACCESSIBLE == 0 {
            let what = "unplugged memory would be touched";
            return Err(Fault::Protocol { index: 0, what });
        }
        self.shared.signal.watch(io.watch)?;
        self.follow_host();
        Ok(())
    }

    /// A request that changes memory ends the turn: the next may lie in memory that is new.
    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(index)) else { return Ok(Served::NOTHING) };
        let before = Arc::clone(self.memory.mem());
        let served = ring.serve(io.mem, |_, mut buffers| {
            if !Arc::ptr_eq(&before, self.memory.mem()) {
                return Ok(Answer::Blocked);
            }
            let request = Request::read(&mut buffers.readable, index)?;
            let written_bytes = self.answer(request).write(&mut buffers.writable, index)?;
            Ok(Answer::Used { written_bytes })
        })?;
        if Arc::ptr_eq(&before, self.memory.mem()) {
            return Ok(served);
        }
        *io.mem = Arc::clone(self.memory.mem());
        Ok(served.and(Served::again(index)))
    }

    fn wake(&mut self, _token: u32, _io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        self.shared.signal.clear();
        Ok(if self.follow_host() { Served::CONFIG } else { Served::NOTHING })
    }

    /// What is plugged stays plugged: the guest may use it without a driver (5.15.6.2).
    fn reset(&mut self, watch: &mut dyn Watch) {
        self.shared.signal.forget(watch);
    }

    fn save(&self) -> DeviceState {
        let blocks = |range: &Range<usize>| (range.start as u64, range.len() as u64);
        DeviceState::Mem(MemState {
            region_bytes: self.shared.region_bytes,
            usable_bytes: self.config.usable_bytes(),
            requested_bytes: self.config.requested_bytes(),
            plugged: self.blocks.runs().iter().map(blocks).collect(),
        })
    }
}

#[cfg(test)]
mod tests;
