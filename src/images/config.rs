//! What an image says about its processes: the part of its configuration we obey.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Entrypoint, arguments, environment and the like; empty where the image says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// First words of the command line.
    #[serde(default)]
    pub entrypoint: Vec<String>,
    /// Words after the entrypoint, unless the instance gives its own.
    #[serde(default)]
    pub cmd: Vec<String>,
    /// Environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Working folder; empty is `/`.
    #[serde(default)]
    pub working_dir: String,
    /// `user`, `uid`, `user:group` or `uid:gid`; empty is root.
    #[serde(default)]
    pub user: String,
    /// Signal that asks the workload to end, for example `SIGTERM`; empty if not said.
    #[serde(default)]
    pub stop_signal: String,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}
