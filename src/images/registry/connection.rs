//! One repository of one registry, through oci-client: scheme, login, and what its errors mean.
//!
//! oci-client logs in and streams blobs. Only manifests are asked for here, with its login: it
//! would hold an answer of any length in memory, and a registry may be an enemy.

use std::fmt;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::BoxStream;
use oci_client::RegistryOperation;
use oci_client::client::{Client, ClientConfig, ClientProtocol};
use oci_client::errors::{OciDistributionError, OciErrorCode};
use oci_client::secrets::RegistryAuth;
use reqwest::header::ACCEPT;
use reqwest::{Client as HttpClient, Response, StatusCode};

use crate::images::digest::Digest;
use crate::images::reference::Reference;
use crate::images::registry::{Auth, Credentials, RegistryError};
use crate::loopback::is_loopback;

/// Longest time until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest silence within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Documents we understand, in one header.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
                        application/vnd.oci.image.manifest.v1+json, \
                        application/vnd.docker.distribution.manifest.list.v2+json, \
                        application/vnd.docker.distribution.manifest.v2+json";

const USER_AGENT: &str = concat!("ovum/", env!("CARGO_PKG_VERSION"));

/// A repository, and our login there. The client is made for one pull: it keeps what it was given
/// to log in with, and another pull may come with other credentials.
pub(super) struct Connection {
    client: Client,
    /// For manifests.
    http: HttpClient,
    scheme: &'static str,
    auth: RegistryAuth,
    name: Reference,
}

impl fmt::Debug for Connection {
    /// Tells nothing that must not be in a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connection({})", self.name)
    }
}

impl Connection {
    pub(super) fn new(
        name: &Reference,
        auth: Auth,
        insecure_registries: &[String],
    ) -> Result<Self, RegistryError> {
        let plain = is_plain(name.host(), insecure_registries);
        let config = ClientConfig {
            protocol: if plain { ClientProtocol::Http } else { ClientProtocol::Https },
            platform_resolver: None,
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: USER_AGENT,
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).map_err(RegistryError::Setup)?;
        let http = HttpClient::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(USER_AGENT)
            .build()
            .map_err(|error| RegistryError::Setup(error.into()))?;
        let auth = match auth {
            Auth::Anonymous => RegistryAuth::Anonymous,
            Auth::As(Credentials::Password { username, password }) => {
                RegistryAuth::Basic(username, password)
            }
            Auth::As(Credentials::Token(token)) => RegistryAuth::Bearer(token),
        };
        let scheme = if plain { "http" } else { "https" };
        Ok(Self { client, http, scheme, auth, name: name.clone() })
    }

    /// Gets the manifest `wanted`, a tag or a digest, of at most `bytes_max` bytes.
    pub(super) async fn manifest(
        &self,
        wanted: &str,
        bytes_max: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let what = || format!("manifest {wanted} in {}", self.name.repository());
        let token = self.log_in().await.map_err(|error| self.meaning(error, what()))?;
        let (scheme, host) = (self.scheme, self.name.host());
        let url = format!("{scheme}://{host}/v2/{}/manifests/{wanted}", self.name.repository());
        let request = self.http.get(url).header(ACCEPT, ACCEPTED);
        let request = match (token, &self.auth) {
            (Some(token), _) => request.bearer_auth(token),
            (None, RegistryAuth::Basic(user, password)) => request.basic_auth(user, Some(password)),
            (None, _) => request,
        };
        let asked = request.send().await.and_then(Response::error_for_status);
        let mut response = asked.map_err(|error| self.meaning(error.into(), what()))?;
        let mut body = Vec::new();
        loop {
            let chunk = response.chunk().await;
            let chunk = chunk.map_err(|error| self.meaning(error.into(), what()))?;
            let Some(chunk) = chunk else { return Ok(body) };
            body.extend_from_slice(&chunk);
            if body.len() as u64 > bytes_max {
                return Err(RegistryError::TooLarge { limit_bytes: bytes_max });
            }
        }
    }

    /// Gets a fresh token, if the registry wants one; the client keeps it for blobs.
    async fn log_in(&self) -> Result<Option<String>, OciDistributionError> {
        self.client.auth(self.name.as_oci(), &self.auth, RegistryOperation::Pull).await
    }

    /// Starts to get a blob. Its end is an error if the content does not have the digest.
    pub(super) async fn blob(
        &self,
        digest: &Digest,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, RegistryError> {
        let text = digest.to_string();
        let what = || format!("blob {digest} in {}", self.name.repository());
        let pull = || self.client.pull_blob_stream(self.name.as_oci(), text.as_str());
        let pulled = pull().await.map_err(|error| self.meaning(error, what()));
        let blob = match pulled {
            // The token may have expired meanwhile.
            Err(RegistryError::Unauthorised { .. }) => {
                self.log_in().await.map_err(|error| self.meaning(error, what()))?;
                pull().await.map_err(|error| self.meaning(error, what()))?
            }
            other => other?,
        };
        Ok(blob.stream)
    }

    /// What an error of the client means to whoever asked for `what`.
    fn meaning(&self, error: OciDistributionError, what: String) -> RegistryError {
        let host = self.name.host().to_owned();
        match error {
            OciDistributionError::ImageManifestNotFoundError(_) => {
                RegistryError::NotFound { host, what }
            }
            OciDistributionError::AuthenticationFailure(_)
            | OciDistributionError::UnauthorizedError { .. } => {
                RegistryError::Unauthorised { host, what }
            }
            OciDistributionError::RegistryError { envelope, .. } => {
                let code = envelope.errors.first().map(|error| &error.code);
                match code {
                    Some(
                        OciErrorCode::BlobUnknown
                        | OciErrorCode::ManifestUnknown
                        | OciErrorCode::NameUnknown
                        | OciErrorCode::NotFound,
                    ) => RegistryError::NotFound { host, what },
                    Some(OciErrorCode::Unauthorized | OciErrorCode::Denied) => {
                        RegistryError::Unauthorised { host, what }
                    }
                    Some(OciErrorCode::Toomanyrequests) => RegistryError::RateLimited { host },
                    _ => RegistryError::Unexpected {
                        host,
                        what: format!("{envelope} to {what}"),
                        is_fault: false,
                    },
                }
            }
            OciDistributionError::ServerError { code, message, .. } => {
                answered(StatusCode::from_u16(code).ok(), host, what, &message)
            }
            OciDistributionError::RequestError(source) => match source.status() {
                Some(status) => answered(Some(status), host, what, ""),
                None if source.is_timeout() && !source.is_connect() => {
                    RegistryError::TimedOut { host }
                }
                None => RegistryError::Unreachable { host, source },
            },
            other => RegistryError::Unexpected { host, what: other.to_string(), is_fault: false },
        }
    }
}

/// What a bare status means.
fn answered(
    status: Option<StatusCode>,
    host: String,
    what: String,
    message: &str,
) -> RegistryError {
    match status {
        Some(StatusCode::NOT_FOUND) => RegistryError::NotFound { host, what },
        Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
            RegistryError::Unauthorised { host, what }
        }
        Some(StatusCode::TOO_MANY_REQUESTS) => RegistryError::RateLimited { host },
        status => RegistryError::Unexpected {
            host,
            what: match status {
                Some(status) => format!("{status} {message} to {what}"),
                None => format!("{message} to {what}"),
            },
            is_fault: status.is_none_or(|status| status.is_server_error()),
        },
    }
}

/// Plain HTTP is for this machine and for the hosts that were listed.
fn is_plain(host: &str, insecure_registries: &[String]) -> bool {
    is_loopback(host) || insecure_registries.iter().any(|listed| listed == host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_and_listed_hosts() {
        let plain = |host: &str, listed: &[&str]| {
            let listed: Vec<String> = listed.iter().map(ToString::to_string).collect();
            is_plain(host, &listed)
        };

        assert!(plain("127.0.0.1:5000", &[]));
        assert!(plain("host.test:5000", &["host.test:5000"]));
        assert!(!plain("host.test:5000", &["host.test"]));
        assert!(!plain("index.docker.io", &[]));
    }
}
