//! What is common to all virtio devices, whatever carries them.
//!
//! Status, feature negotiation, queue addresses, interrupts and reset belong to the transport,
//! being the same for every device. A [`Device`] says what it is and serves a queue when told to.
//! Section numbers are those of "Virtual I/O Device (VIRTIO) Version 1.3".

pub mod balloon;
pub mod blk;
#[expect(unsafe_code, reason = "hands guest memory to the kernel as iovecs")]
pub mod buffers;
pub mod config_space;
pub mod console;
pub mod entropy;
mod host_signal;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod ring;
pub mod shown;
pub mod task;
pub mod vsock;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::memory::Mem;
use blk::BlkState;
use mem::MemState;
use net::NetState;
use ring::Ring;
use vsock::VsockState;

/// One kind of virtio device, without its transport.
///
/// All calls come from the device thread and must not block. Between two calls a device holds
/// neither guest memory nor a queue, except for requests it has in flight, which it must be able
/// to finish or forget in [`Device::reset`]. Virtio 1.3, 3.2 "Device Operation".
pub trait Device: Debug + Send {
    /// Device type number (virtio 1.3, chapter 5).
    fn kind(&self) -> u32;

    /// Feature bits of this kind only; the transport adds VERSION_1, EVENT_IDX and INDIRECT_DESC.
    fn features(&self) -> u64;

    /// Size of each queue, in descriptors: a power of two, at most 32768.
    fn queue_sizes(&self) -> &'static [u16];

    /// Configuration space, little-endian. Empty if the kind has none.
    fn config(&self) -> &[u8] {
        &[]
    }

    /// Whether [`Device::config`] is not always the same.
    fn has_variable_config(&self) -> bool {
        false
    }

    /// The driver is ready: `features` were accepted. A device with files of its own to wait for
    /// registers them in `io.watch` here.
    ///
    /// # Errors
    ///
    /// As for [`Device::service`].
    fn activate(&mut self, features: u64, io: &mut DeviceIo<'_>) -> Result<(), Fault> {
        let _ = (features, io);
        Ok(())
    }

    /// The driver kicked queue `index`: serves at most one queue's worth of requests, so that a
    /// guest which keeps adding them cannot starve the other devices. With [`Served::again`] the
    /// thread comes back after the others had their turn.
    ///
    /// # Errors
    ///
    /// On a [`Fault`] the transport sets DEVICE_NEEDS_RESET and stops serving this device, and the
    /// machine runs on: a guest can break its own device, never the VMM.
    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault>;

    /// A file registered in [`Watch`] with `token` is ready. Same duties as [`Device::service`].
    ///
    /// # Errors
    ///
    /// As for [`Device::service`].
    fn wake(&mut self, token: u32, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let _ = (token, io);
        Ok(Served::NOTHING)
    }

    /// Back to the state before `activate`: files unregistered, requests in flight waited for or
    /// cancelled so that none can touch guest memory afterwards.
    fn reset(&mut self, watch: &mut dyn Watch);

    /// Brings requests in flight to an end, so that [`Device::save`] says all there is to say.
    /// vCPUs are paused.
    ///
    /// # Errors
    ///
    /// As for [`Device::service`].
    fn drain(&mut self, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let _ = io;
        Ok(Served::NOTHING)
    }

    /// What this device would need to go on elsewhere, apart from its queues.
    fn save(&self) -> DeviceState;
}

/// What a device may touch while it serves.
#[derive(Debug)]
pub struct DeviceIo<'a> {
    /// Guest memory. A device that adds memory or removes it leaves the new one here.
    pub mem: &'a mut Arc<Mem>,
    /// The device's queues, in order; those the driver left out are not ready.
    pub rings: &'a mut [Ring],
    /// Where it says which files it waits for.
    pub watch: &'a mut dyn Watch,
}

/// Where a device says which of its files the device thread shall wait for.
///
/// `token` is the device's own, below [`TOKEN_MAX`]; it comes back in [`Device::wake`].
/// Level-triggered: the file is reported until it is no longer ready.
pub trait Watch: Debug {
    /// Starts to wait for `file`.
    ///
    /// # Errors
    ///
    /// What epoll_ctl says.
    fn add(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()>;

    /// Changes what is waited for.
    ///
    /// # Errors
    ///
    /// What epoll_ctl says.
    fn change(&mut self, file: BorrowedFd<'_>, token: u32, interest: Interest) -> io::Result<()>;

    /// Stops waiting for `file`; call it before the file is closed.
    ///
    /// # Errors
    ///
    /// What epoll_ctl says.
    fn remove(&mut self, file: BorrowedFd<'_>) -> io::Result<()>;
}

/// Device tokens are below this; the rest are the transport's.
pub const TOKEN_MAX: u32 = 1 << 24;

/// What to wait for in a file. Errors and hang-ups are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Only errors and hang-ups.
    Nothing,
    /// There is something to read.
    Read,
    /// There is room to write.
    Write,
    /// Either.
    ReadWrite,
}

/// What a device did in one call.
#[must_use = "used buffers want an interrupt"]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Served {
    /// Bit n: queue n has used buffers for the driver to see.
    pub used: u32,
    /// Bit n: queue n has more to serve; call `service(n)` again soon.
    pub again: u32,
    /// The configuration changed in a way that the driver has to look at.
    pub config: bool,
}

impl Served {
    /// Nothing happened.
    pub const NOTHING: Self = Self { used: 0, again: 0, config: false };

    /// The driver has to look at the configuration.
    pub const CONFIG: Self = Self { config: true, ..Self::NOTHING };

    /// Queue `index` has used buffers.
    pub fn used(index: u16) -> Self {
        Self { used: 1 << index, ..Self::NOTHING }
    }

    /// Queue `index` has more to serve.
    pub fn again(index: u16) -> Self {
        Self { again: 1 << index, ..Self::NOTHING }
    }

    /// Both.
    pub fn and(self, other: Self) -> Self {
        Self {
            used: self.used | other.used,
            again: self.again | other.again,
            config: self.config | other.config,
        }
    }
}

/// The driver broke the rules, or the host failed in a way the device cannot report in-band.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The rings or a descriptor chain make no sense.
    #[error("Queue {index} is malformed")]
    Queue {
        /// Which queue.
        index: u16,
        /// What virtio-queue says.
        #[source]
        source: virtio_queue::Error,
    },
    /// A request that the device type forbids.
    #[error("Driver broke the protocol of queue {index}: {what}")]
    Protocol {
        /// Which queue.
        index: u16,
        /// The rule that was broken.
        what: &'static str,
    },
    /// A host call failed.
    #[error("Host failed to {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
}

/// What each kind of device would need to go on elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum DeviceState {
    /// A device with nothing to remember beside its queues.
    Stateless,
    /// A disk.
    Blk(BlkState),
    /// A memory device.
    Mem(MemState),
    /// A network interface.
    Net(NetState),
    /// A vsock device.
    Vsock(VsockState),
}
