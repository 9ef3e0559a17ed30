//! What instances cost the host at this moment.

use std::io;
use std::sync::Arc;

use crate::fleet::Usage;
use crate::instances::{FindError, Instance, Instances};
use crate::network::Traffic;
use crate::subnet::Subnet;

/// What one instance costs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// The instance.
    pub instance: Arc<Instance>,
    /// What its worker costs; nothing, if there is none.
    pub usage: Usage,
    /// What has passed through its network; nothing, if it has none.
    pub traffic: Traffic,
}

/// Why that is not known.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// /proc.
    #[error("Failed to look at the worker of instance {id}")]
    Worker {
        /// Which instance.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Instances {
    /// What the instance costs.
    ///
    /// # Errors
    ///
    /// [`StatsError`].
    pub fn stats(&self, key: &str) -> Result<Stats, StatsError> {
        let instance = self.find(key)?;
        let dir = self.shared.dir_of(&instance.id);
        let usage = self.shared.fleet.usage(&dir);
        let usage = usage
            .map_err(|source| StatsError::Worker { id: instance.id.clone(), source })?
            .unwrap_or_default();
        let traffic = self.shared.network.traffic(&instance.id);
        Ok(Stats { instance, usage, traffic })
    }

    /// The addresses of instances, if they can have any.
    pub fn subnet(&self) -> Option<Subnet> {
        self.shared.network.subnet()
    }

    /// Whether machines can be started on this host, as far as can be told.
    pub fn can_run(&self) -> bool {
        self.shared.fleet.is_able()
    }
}
