//! ovum: argv becomes a command; everything else lives elsewhere.

#![expect(unreachable_pub, reason = "a program has no outside: `pub` means for other modules")]

#[cfg_attr(not(test), expect(dead_code, reason = "its callers are on their way"))]
mod disks;
#[cfg_attr(not(test), expect(dead_code, reason = "its callers are on their way"))]
mod images;
#[cfg_attr(not(test), expect(dead_code, reason = "its callers are on their way"))]
mod os;

fn main() {}
