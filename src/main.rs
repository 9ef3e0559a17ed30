//! ovum: argv becomes a command; everything else lives elsewhere.

#[expect(dead_code, reason = "its callers are on their way")]
mod disks;
#[expect(dead_code, reason = "its callers are on their way")]
mod images;

fn main() {}
