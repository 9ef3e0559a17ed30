//! The body of `POST /instances/{id}/start`, which may be missing.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::create::{SpecError, checked_words};
use crate::instances::spec::Command;

/// What to run from now on.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct StartInstance {
    /// Instead of the entrypoint so far; empty is as if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Instead of the arguments so far; empty is as if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmd: Option<Vec<String>>,
}

impl StartInstance {
    /// Checks everything.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub fn into_command(self) -> Result<Command, SpecError> {
        let entrypoint = checked_words("entrypoint", self.entrypoint)?;
        let cmd = checked_words("cmd", self.cmd)?;
        Ok(Command { entrypoint, cmd })
    }
}
