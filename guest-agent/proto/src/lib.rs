//! What a server and the agent in a guest say to each other.
//!
//! Three ways lead across: the server hands the agent a [`config::GuestConfig`] inside the
//! initramfs; the agent writes [`report::Report`]s, one 32-bit word each, to an I/O port of the
//! machine; and both exchange [`message`]s, as [`frame`]s of a vsock stream. Neither side trusts
//! the other: whatever arrives is checked here, and everything has a named bound.

mod body;
pub mod config;
pub mod exec;
pub mod files;
pub mod frame;
pub mod message;
pub mod report;
pub mod volumes;

/// Version of everything in this crate. Both sides come from one build; a guest that was started
/// by an older server says so in its hello.
pub const VERSION: u32 = 1;

/// The vsock port on which the agent listens for the host.
pub const AGENT_PORT: u32 = 1024;
