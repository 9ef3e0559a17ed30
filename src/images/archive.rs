//! wip
/// Why.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {}
