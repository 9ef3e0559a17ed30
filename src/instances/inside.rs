//! What clients do inside a running instance: run commands, copy, look.
//!
//! All of it is the agent's work; here it is found out which one, and whether it can be asked.

use std::path::PathBuf;
use std::time::Duration;

use tokio::time;

use crate::agent::copy::{Get, Put};
use crate::agent::exec::Exec;
use crate::agent::files::{GetSpec, PathInfo, PutSpec, StatSpec};
use crate::agent::{AgentError, Agents, ExecSpec};
use crate::fleet::files;
use crate::instances::state::State;
use crate::instances::{FindError, Instances};

pub use crate::agent;

/// The inside of an instance that ran when it was asked for.
#[derive(Debug, Clone)]
pub struct Inside {
    agents: Agents,
    socket: PathBuf,
}

/// Why nobody can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InsideError {
    /// Which one?
    #[error(transparent)]
    Find(#[from] FindError),
    /// There is nobody inside.
    #[error("instance must be running (current state: {state})")]
    NotRunning {
        /// How it is.
        state: State,
    },
}

impl Instances {
    /// The inside of the instance that `key` means.
    ///
    /// # Errors
    ///
    /// [`InsideError`].
    pub fn inside(&self, key: &str) -> Result<Inside, InsideError> {
        let instance = self.find(key)?;
        if instance.state != State::Running {
            return Err(InsideError::NotRunning { state: instance.state });
        }
        let socket = self.shared.dir_of(&instance.id).join(files::VSOCK);
        Ok(Inside { agents: self.shared.agents.clone(), socket })
    }
}

impl Inside {
    /// Waits until the agent can be reached, at most `timeout`. Whether it can, the next request
    /// finds out.
    pub async fn wait_for_agent(&self, timeout: Duration) {
        let _ = time::timeout(timeout, self.agents.wait_until_it_listens(&self.socket)).await;
    }

    /// Runs a command. Returns once it runs.
    ///
    /// # Errors
    ///
    /// [`AgentError`]; [`AgentError::exit_code`] is what a shell would say.
    pub async fn exec(&self, spec: ExecSpec) -> Result<Exec, AgentError> {
        self.agents.exec(&self.socket, spec).await
    }

    /// Puts a file, a directory or a link there.
    ///
    /// # Errors
    ///
    /// [`AgentError`].
    pub async fn put(&self, spec: PutSpec) -> Result<Put, AgentError> {
        self.agents.put(&self.socket, spec).await
    }

    /// Reads a tree.
    ///
    /// # Errors
    ///
    /// [`AgentError`], also if there is no such path.
    pub async fn get(&self, spec: GetSpec) -> Result<Get, AgentError> {
        self.agents.get(&self.socket, spec).await
    }

    /// What lies at a path.
    ///
    /// # Errors
    ///
    /// [`AgentError`]. That nothing lies there is none.
    pub async fn stat(&self, spec: StatSpec) -> Result<PathInfo, AgentError> {
        self.agents.stat(&self.socket, spec).await
    }
}
