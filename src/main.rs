//! ovum: argv becomes a command; everything else lives elsewhere.

#![expect(unreachable_pub, reason = "a program has no outside: `pub` means for other modules")]

mod agent;
mod api;
mod config;
mod control;
mod disks;
mod duration;
mod fleet;
mod images;
mod initramfs;
mod instances;
mod logs;
mod os;
mod size;
mod store;
mod token;

fn main() {}
