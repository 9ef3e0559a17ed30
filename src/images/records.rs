//! wip
/// Records.
#[derive(Debug)]
pub struct Records {}
