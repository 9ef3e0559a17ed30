//! What targets have in common: an enemy to play.

pub mod guest;
pub mod witness;
