//! Everything the server and the worker ask of the kernel that the standard library does not offer.

pub mod capacity;
pub mod cgroup;
pub mod log;
pub mod netlink;
pub mod packets;
pub mod process;
pub mod program;
pub mod readable;
pub mod room;
pub mod spawn;
#[expect(unsafe_code, reason = "calls of the TAP driver, which rustix does not have")]
pub mod tap;
pub mod tool;
pub mod usage;

/// Page of x86-64: what is mapped, and what /proc counts in.
const PAGE_BYTES: u64 = 4096;
