//! Tokens: who may use the API, and for what.
//!
//! A token is a JWT signed with the server's secret (HMAC). Its `permissions` are scopes; a token
//! without that claim may do everything. Tokens that were made for a registry or for a build VM
//! are signed with the same secret and are refused here.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jsonwebtoken::errors::Error as JwtError;
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, EncodingKey, Header, Validation, decode, encode,
    get_current_timestamp,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Random bytes in a secret that the server makes for itself.
const SECRET_BYTES: usize = 32;

/// Longest secret file that is read.
const SECRET_FILE_BYTES_MAX: u64 = 4 << 10;

/// A name that stands for all scopes.
const EVERYTHING: &str = "*";

/// Subjects of tokens that build VMs carry.
const BUILDER_PREFIX: &str = "builder-";

/// The key that tokens are signed with.
#[derive(Clone)]
pub struct Secret(Vec<u8>);

/// What a valid token says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Who, for the log.
    pub user: String,
    permissions: Option<Vec<String>>,
}

/// One thing that a token can allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope(&'static str);

impl Scope {
    /// List and read instances, their logs and states.
    pub const INSTANCE_READ: Self = Self("instance:read");
    /// Create and change instances.
    pub const INSTANCE_WRITE: Self = Self("instance:write");
    /// Delete instances.
    pub const INSTANCE_DELETE: Self = Self("instance:delete");
    /// List and read images.
    pub const IMAGE_READ: Self = Self("image:read");
    /// Pull, load and tag images.
    pub const IMAGE_WRITE: Self = Self("image:write");
    /// Delete images.
    pub const IMAGE_DELETE: Self = Self("image:delete");
    /// List and read volumes.
    pub const VOLUME_READ: Self = Self("volume:read");
    /// Make volumes, and give them to and take them from instances.
    pub const VOLUME_WRITE: Self = Self("volume:write");
    /// Delete volumes.
    pub const VOLUME_DELETE: Self = Self("volume:delete");
    /// List and read devices of the host.
    pub const DEVICE_READ: Self = Self("device:read");
    /// Register devices.
    pub const DEVICE_WRITE: Self = Self("device:write");
    /// Forget devices.
    pub const DEVICE_DELETE: Self = Self("device:delete");
    /// Read what the server and its host have and can do.
    pub const RESOURCE_READ: Self = Self("resource:read");

    /// Every scope a token can carry, those of later parts of the API included.
    pub const NAMES: [&str; 24] = [
        "instance:read",
        "instance:write",
        "instance:delete",
        "image:read",
        "image:write",
        "image:delete",
        "volume:read",
        "volume:write",
        "volume:delete",
        "snapshot:read",
        "snapshot:write",
        "snapshot:delete",
        "build:read",
        "build:write",
        "build:delete",
        "build:admin",
        "device:read",
        "device:write",
        "device:delete",
        "ingress:read",
        "ingress:write",
        "ingress:delete",
        "resource:read",
        EVERYTHING,
    ];
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl Identity {
    /// Whether the token allows `scope`.
    pub fn may(&self, scope: Scope) -> bool {
        let Some(permissions) = &self.permissions else { return true };
        permissions.iter().any(|name| name == scope.0 || name == EVERYTHING)
    }
}

/// The claims we write and read. Those of other kinds of token only matter by being there.
#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    #[serde(default)]
    sub: String,
    #[serde(default)]
    iat: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    exp: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    permissions: Option<Vec<String>>,
    #[serde(skip_serializing)]
    repos: Option<Value>,
    #[serde(skip_serializing)]
    scope: Option<Value>,
    #[serde(skip_serializing)]
    build_id: Option<Value>,
}

impl Secret {
    /// A secret that was chosen elsewhere.
    pub fn new(text: &str) -> Self {
        Self(text.as_bytes().to_vec())
    }

    /// Reads the secret of the server whose data is in `data_dir`.
    ///
    /// # Errors
    ///
    /// [`SecretError`]; `NotFound` inside it if no server has run there.
    pub fn load(data_dir: &Path) -> Result<Self, SecretError> {
        let path = data_dir.join("jwt_secret");
        let failed = |source| SecretError { path: path.clone(), source };
        let mut text = String::new();
        File::open(&path)
            .and_then(|file| file.take(SECRET_FILE_BYTES_MAX).read_to_string(&mut text))
            .map_err(failed)?;
        match text.trim() {
            "" => Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it is empty"))),
            text => Ok(Self::new(text)),
        }
    }

    /// As [`Self::load`]; makes a secret first if there is none, readable by its owner only.
    ///
    /// The caller holds the data folder's lock, so that only one secret is ever made.
    ///
    /// # Errors
    ///
    /// [`SecretError`]; there is a whole secret or none.
    pub fn load_or_create(data_dir: &Path) -> Result<Self, SecretError> {
        match Self::load(data_dir) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => {
                Self::create(data_dir)?;
                Self::load(data_dir)
            }
            loaded => loaded,
        }
    }

    fn create(data_dir: &Path) -> Result<(), SecretError> {
        let path = data_dir.join("jwt_secret");
        let partial = data_dir.join("jwt_secret.partial");
        let write = || {
            let mut random = [0; SECRET_BYTES];
            File::open("/dev/urandom")?.read_exact(&mut random)?;
            let mut options = File::options();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.open(&partial)?;
            file.write_all(hex::encode(random).as_bytes())?;
            file.sync_all()?;
            fs::rename(&partial, &path)?;
            File::open(data_dir)?.sync_all()
        };
        write().map_err(|source| SecretError { path: path.clone(), source })
    }

    /// Makes a token for `user` that is valid for `lifetime`, for everything or for `scopes` only.
    pub fn mint(&self, user: &str, lifetime: Duration, scopes: Option<Vec<String>>) -> String {
        let now = get_current_timestamp();
        let claims = Claims {
            sub: user.to_owned(),
            iat: now,
            exp: Some(now.saturating_add(lifetime.as_secs())),
            permissions: scopes,
            repos: None,
            scope: None,
            build_id: None,
        };
        let key = EncodingKey::from_secret(&self.0);
        encode(&Header::new(Algorithm::HS256), &claims, &key)
            .expect("HMAC takes a key of any length and the claims are plain JSON")
    }

    /// Checks a token and says whose it is.
    ///
    /// # Errors
    ///
    /// [`TokenError`].
    pub fn verify(&self, token: &str) -> Result<Identity, TokenError> {
        let mut validation = Validation::new_for_family(AlgorithmFamily::Hmac);
        validation.required_spec_claims.clear();
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.leeway = 0;
        let key = DecodingKey::from_secret(&self.0);
        let claims =
            decode::<Claims>(token, &key, &validation).map_err(TokenError::Invalid)?.claims;
        let Claims { sub, iat: _, exp: _, permissions, repos, scope, build_id } = claims;
        let is_foreign = repos.is_some() || scope.is_some() || build_id.is_some();
        if is_foreign || sub.starts_with(BUILDER_PREFIX) {
            return Err(TokenError::OtherKind);
        }
        Ok(Identity { user: sub, permissions })
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Why a token is not accepted.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Malformed, expired, or signed with another secret.
    #[error("Invalid token")]
    Invalid(#[source] JwtError),
    /// Valid, but for a registry or a build VM.
    #[error("Invalid token type")]
    OtherKind,
}

/// Why there is no secret.
#[derive(Debug, thiserror::Error)]
#[error("Failed to use secret file {path}", path = path.display())]
pub struct SecretError {
    /// Which.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn secret() -> Secret {
        Secret::new("a secret of tests")
    }

    fn signed(claims: &Value) -> String {
        let key = EncodingKey::from_secret(&secret().0);
        encode(&Header::new(Algorithm::HS512), claims, &key).unwrap()
    }

    #[test]
    fn a_token_without_permissions_may_do_everything() {
        let identity = secret().verify(&secret().mint("ada", HOUR, None)).unwrap();

        assert_eq!(identity.user, "ada");
        assert!(identity.may(Scope::INSTANCE_DELETE));
    }

    #[test]
    fn a_token_with_permissions_may_do_those_only() {
        let token = secret().mint("ada", HOUR, Some(vec!["image:read".into()]));
        let all = secret().mint("ada", HOUR, Some(vec!["*".into()]));

        let identity = secret().verify(&token).unwrap();

        assert!(identity.may(Scope::IMAGE_READ));
        assert!(!identity.may(Scope::IMAGE_WRITE));
        assert!(secret().verify(&all).unwrap().may(Scope::IMAGE_WRITE));
    }

    #[test]
    fn another_secret_an_old_token_and_nonsense_are_invalid() {
        let foreign = Secret::new("another").mint("ada", HOUR, None);
        let expired = signed(&json!({ "sub": "ada", "exp": 1_000_000_000 }));
        let early = signed(&json!({ "sub": "ada", "nbf": 10_000_000_000_u64 }));
        let unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.";

        for token in [foreign.as_str(), &expired, &early, unsigned, "", "a.b.c"] {
            assert!(matches!(secret().verify(token), Err(TokenError::Invalid(_))), "{token}");
        }
    }

    #[test]
    fn tokens_of_registries_and_builds_are_of_another_kind() {
        for claims in [
            json!({ "sub": "ada", "repos": ["a"] }),
            json!({ "sub": "ada", "scope": "push" }),
            json!({ "sub": "ada", "build_id": "b1" }),
            json!({ "sub": "builder-7" }),
        ] {
            assert!(matches!(secret().verify(&signed(&claims)), Err(TokenError::OtherKind)));
        }
        assert_eq!(secret().verify(&signed(&json!({ "sub": "ada" }))).unwrap().user, "ada");
    }

    #[test]
    fn a_secret_is_made_once_and_is_the_owners() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Secret::load(dir.path()).is_err());

        let made = Secret::load_or_create(dir.path()).unwrap();
        let again = Secret::load_or_create(dir.path()).unwrap();

        assert_eq!(made.0, again.0);
        assert_eq!(made.0.len(), 64);
        let mode = fs::metadata(dir.path().join("jwt_secret")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
