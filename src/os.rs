//! What the server asks of the operating system beyond the standard library.

pub mod tool;
