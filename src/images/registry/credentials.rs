//! Who we are to a registry.

use std::fmt;

use docker_credential::{CredentialRetrievalError, DockerCredential};

use crate::images::reference::Reference;
use crate::images::registry::RegistryError;

/// Credentials that came with a request.
#[derive(Clone, PartialEq, Eq)]
pub enum Credentials {
    /// A user of the registry; also exchanged for a token if the registry wants one.
    Password {
        /// Name.
        username: String,
        /// Password.
        password: String,
    },
    /// A token the registry takes as it is.
    Token(String),
}

impl fmt::Debug for Credentials {
    /// Tells nothing that must not be in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { username, .. } => write!(f, "Password({username:?})"),
            Self::Token(_) => f.write_str("Token"),
        }
    }
}

/// How to appear at a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Auth {
    /// As nobody.
    Anonymous,
    /// As somebody.
    As(Credentials),
}

impl Auth {
    /// What the docker configuration of this process's user says for the registry of `name`.
    ///
    /// Reads files and may run a credential helper: not for an async task.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Credentials`] if it says something that cannot be used.
    pub fn of_docker_config(name: &Reference) -> Result<Self, RegistryError> {
        // Docker keeps its own registry under the address of an older protocol.
        let key = match name.registry() {
            "docker.io" => "https://index.docker.io/v1/",
            other => other,
        };
        let failed = |why: String| RegistryError::Credentials { host: key.to_owned(), why };
        match docker_credential::get_credential(key) {
            Ok(DockerCredential::UsernamePassword(username, password)) => {
                Ok(Self::As(Credentials::Password { username, password }))
            }
            Ok(DockerCredential::IdentityToken(_)) => {
                Err(failed("identity tokens are not supported".to_owned()))
            }
            Err(
                CredentialRetrievalError::NoCredentialConfigured
                | CredentialRetrievalError::ConfigNotFound
                | CredentialRetrievalError::ConfigReadError,
            ) => Ok(Self::Anonymous),
            // The helper's output may hold secrets.
            Err(CredentialRetrievalError::HelperFailure { helper, .. }) => {
                Err(failed(format!("helper {helper} failed")))
            }
            Err(error) => Err(failed(error.to_string())),
        }
    }
}
