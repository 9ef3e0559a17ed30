//! ovum: argv becomes a command; everything else lives elsewhere.

fn main() {}
