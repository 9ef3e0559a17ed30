//! wip
/// Credentials.
#[derive(Debug, Clone)]
pub struct Credentials {}
/// Why.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {}
