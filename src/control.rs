//! The wire between the server and a worker: one message per packet, JSON, with open files beside.
//!
//! Workers come from a nursery, which is started with one end of a SOCK_SEQPACKET pair as its
//! standard input: each packet that has a worker's own two files beside it, its launch socket and
//! its log, is answered by a [`Birth`], with the new process (pidfd) beside that.
//!
//! A worker is born with one end of such a pair as file descriptor [`LAUNCH_FD`] and reads exactly
//! one [`Launch`] from it, whose files arrive in the same packet in the order of
//! [`Launch::files`]. It answers one [`Reply`]. Afterwards it listens on the control socket it was
//! handed: each connection gets every [`Event`] from then on and may send [`Order`]s, each answered
//! by a [`Reply`]. One order has a file beside it ([`Order::files`]).
//!
//! The worker also appends each event, as one line of JSON, to the events file. That file is what
//! a server trusts after it was away.

use std::ffi::CStr;

pub use ovum_vmm::rate_limiter::{RateLimitSpec, RateSpec};
pub use ovum_vmm::spec::{
    DEVICES_MAX, DISKS_MAX, DiskSpec, HostDeviceSpec, MEMORY_BYTES_MIN, MEMORY_BYTES_STEP,
    MachineSpec, NetSpec,
};
use rustix::time::{self, ClockId};
use serde::{Deserialize, Serialize};

/// The only argument of a nursery, and so of its workers. Not for people.
pub const WORKER_COMMAND: &str = "worker";

/// What a nursery is called where processes are listed (15 bytes at most, prctl(2)).
pub const NURSERY_NAME: &CStr = c"ovum-nursery";

/// What a worker is called there.
pub const WORKER_NAME: &CStr = c"ovum-worker";

/// Most workers that come from one nursery, and share its layout of addresses.
pub const SIBLINGS_MAX: u32 = 8;

/// Where a nursery finds its socket, and a worker its launch socket: it is its standard input.
pub const LAUNCH_FD: i32 = 0;

/// What a packet says with which a worker is asked for: its files say the rest.
pub const BIRTH: &[u8] = b"birth";

/// What a nursery answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Birth {
    /// There is one more worker, which waits for its [`Launch`].
    Born {
        /// Its process id.
        pid: u32,
    },
    /// There is not.
    Failed {
        /// Why.
        message: String,
    },
}

/// The machine a worker shall be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// The machine.
    pub machine: MachineSpec,
    /// When the guest gets the memory beyond what it boots with.
    pub hotplug: HotplugPolicy,
    /// What each of the files beside this message is.
    pub files: Vec<FileRole>,
}

/// When a guest gets the memory beyond what it boots with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HotplugPolicy {
    /// All of it, once its workload runs.
    Boot,
    /// When it is short of memory. It goes again when the guest does not need it.
    Demand {
        /// How long nobody has to wait for memory before some goes, in milliseconds.
        quiet_ms: u32,
    },
}

/// What a file beside a [`Launch`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileRole {
    /// /dev/kvm.
    Kvm,
    /// The guest kernel.
    Kernel,
    /// Where its text is kept, or is to be.
    KernelText,
    /// One initramfs archive; several are loaded in order.
    Initramfs,
    /// The file behind the next disk.
    Disk,
    /// The next queue of the TAP.
    Tap,
    /// The console log, opened for append.
    Console,
    /// The events file, opened for append.
    Events,
    /// The listening control socket (SOCK_SEQPACKET).
    Control,
    /// The listening vsock socket (SOCK_STREAM).
    Vsock,
    /// A process with whose end the machine shall end, too (pidfd_open(2)).
    Lifeline,
}

/// What the server tells a worker to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case", deny_unknown_fields)]
pub enum Order {
    /// Say who you are and how the machine is.
    Status,
    /// Stop the vCPUs where they are.
    Pause,
    /// Let them go on.
    Resume,
    /// Limit all disks together to something else.
    LimitDisks {
        /// To what.
        limit: RateLimitSpec,
    },
    /// Have the guest give up so much of its memory, in all. It follows when it can.
    Inflate {
        /// In bytes.
        bytes: u64,
    },
    /// Have one more disk. The file behind it comes beside this.
    AttachDisk {
        /// Which; its id is that of no other.
        disk: DiskSpec,
    },
    /// Have this disk no more, if it is there.
    DetachDisk {
        /// Which.
        id: String,
    },
    /// End the machine now, as if its power was cut.
    Stop,
}

impl Order {
    /// How many files come beside it.
    pub fn files(&self) -> usize {
        match self {
            Self::AttachDisk { .. } => 1,
            Self::Status
            | Self::Pause
            | Self::Resume
            | Self::LimitDisks { .. }
            | Self::Inflate { .. }
            | Self::DetachDisk { .. }
            | Self::Stop => 0,
        }
    }
}

/// What a worker sends: answers to launch and orders, and events as they happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    /// Done; this is how the machine is now.
    Done(Status),
    /// Not done, and why: the whole chain of causes.
    Failed {
        /// For people.
        message: String,
    },
    /// Something happened in the machine.
    Event(Event),
}

/// How a machine is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The worker's process id.
    pub pid: u32,
    /// Whether vCPUs run.
    pub running: bool,
    /// Memory that was plugged after the boot, in bytes.
    #[serde(default)]
    pub plugged_bytes: u64,
    /// Memory that the guest gave up, in bytes.
    #[serde(default)]
    pub given_bytes: u64,
    /// Disks that can be attached. A worker that knows nothing of this has no room for any.
    #[serde(default)]
    pub vacant_slots: usize,
}

/// CLOCK_MONOTONIC in nanoseconds: the clock of all events, the same in every process of a host.
pub fn now_ns() -> u64 {
    let now = time::clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned());
    seconds * 1_000_000_000 + nanoseconds
}

/// Something that happened in a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Counts up from 0 within one worker, without gaps.
    pub seq: u64,
    /// CLOCK_MONOTONIC, in nanoseconds.
    pub at_ns: u64,
    /// What.
    pub what: Happening,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "what", rename_all = "snake_case")]
pub enum Happening {
    /// The worker has its launch message.
    Launched,
    /// The machine is built: memory, kernel and devices are in place.
    Built,
    /// The vCPUs run for the first time.
    Booted,
    /// The guest wrote this word to the report port.
    Reported {
        /// As the agent encoded it.
        word: u32,
    },
    /// The machine ended, and the worker with it.
    Stopped {
        /// Why.
        cause: StopCause,
        /// For people: what failed, empty if nothing did.
        detail: String,
    },
}

/// Why a machine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reboot; a machine of ours ends instead.
    Reboot,
    /// The guest kernel panicked.
    Panic,
    /// The server ordered it.
    Ordered,
    /// The machine itself failed.
    Fault,
}
