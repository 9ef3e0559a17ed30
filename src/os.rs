//! Everything the server and the worker ask of the kernel that the standard library does not offer.

pub mod log;
pub mod packets;
pub mod process;
pub mod readable;
pub mod spawn;
pub mod tool;
pub mod usage;
