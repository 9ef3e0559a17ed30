//! ovum runs OCI images as virtual machines, in a KVM VMM of its own, behind a REST API.
//!
//! One binary is three things: the server ([`server`]), the worker it starts once per instance,
//! and the command line that speaks to the server ([`cli`]). ARCHITECTURE.md has the map.

pub mod agent;
pub mod api;
pub mod causes;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod devices;
pub mod disks;
pub mod doctor;
pub mod duration;
pub mod fleet;
pub mod images;
pub mod initramfs;
pub mod instances;
pub mod logs;
mod loopback;
pub mod network;
pub mod os;
pub mod ratio;
pub mod resources;
pub mod server;
pub mod size;
pub mod store;
pub mod subnet;
pub mod tar;
mod text;
pub mod timeline;
pub mod token;
pub mod volumes;
pub mod worker;
