//! HTTP to one repository of one registry: scheme, login, bounded answers.

use std::net::IpAddr;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Client, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::images::reference::Reference;
use crate::images::registry::challenge::Challenge;
use crate::images::registry::{Auth, Credentials, RegistryError};

/// Longest time until a connection stands.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest silence within an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest answer of a token service.
const TOKEN_BYTES_MAX: u64 = 256 << 10;

/// Documents we understand, in one header.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
                        application/vnd.oci.image.manifest.v1+json, \
                        application/vnd.docker.distribution.manifest.list.v2+json, \
                        application/vnd.docker.distribution.manifest.v2+json, */*;q=0.1";

/// A repository, and our login there.
#[derive(Debug)]
pub(super) struct Connection {
    client: Client,
    host: String,
    repository: String,
    /// `http://host/v2/repository/`
    base: String,
    auth: Auth,
    /// What was seen to be accepted; asked for at the first 401.
    authorization: Mutex<Option<HeaderValue>>,
}

impl Connection {
    pub(super) fn new(
        name: &Reference,
        auth: Auth,
        insecure_registries: &[String],
    ) -> Result<Self, RegistryError> {
        let host = name.host().to_owned();
        let loopback = is_loopback(&host);
        let plain = loopback || insecure_registries.contains(&host);
        let mut builder = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .user_agent(concat!("ovum/", env!("CARGO_PKG_VERSION")));
        if loopback {
            // No proxy leads back here.
            builder = builder.no_proxy();
        }
        let scheme = if plain { "http" } else { "https" };
        Ok(Self {
            client: builder.build().map_err(RegistryError::Setup)?,
            base: format!("{scheme}://{host}/v2/{}/", name.repository()),
            repository: name.repository().to_owned(),
            host,
            auth,
            authorization: Mutex::new(None),
        })
    }

    /// Gets a document of at most `bytes_max` bytes.
    pub(super) async fn get_small(
        &self,
        path: &str,
        bytes_max: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        self.bounded_body(self.get(path).await?, bytes_max).await
    }

    /// Asks for `path` in the repository, logging in if the registry wants that.
    ///
    /// Redirects are followed; the client drops our login on the way to another host.
    pub(super) async fn get(&self, path: &str) -> Result<Response, RegistryError> {
        let known = self.authorization.lock().await.clone();
        let response = self.send(self.request(path, known.clone())).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return self.success(response, path);
        }
        // Somebody else may have logged in meanwhile, and tokens expire: one login at a time.
        let mut authorization = self.authorization.lock().await;
        if *authorization == known {
            *authorization = self.log_in(&response, path).await?;
        }
        let fresh = authorization.clone();
        drop(authorization);
        self.success(self.send(self.request(path, fresh)).await?, path)
    }

    fn request(&self, path: &str, authorization: Option<HeaderValue>) -> RequestBuilder {
        let request = self.client.get(format!("{}{path}", self.base)).header(ACCEPT, ACCEPTED);
        match authorization {
            Some(authorization) => request.header(AUTHORIZATION, authorization),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, RegistryError> {
        request.send().await.map_err(|source| self.unreachable(source))
    }

    fn unreachable(&self, source: reqwest::Error) -> RegistryError {
        let host = self.host.clone();
        if source.is_timeout() && !source.is_connect() {
            RegistryError::TimedOut { host }
        } else {
            RegistryError::Unreachable { host, source }
        }
    }

    fn success(&self, response: Response, path: &str) -> Result<Response, RegistryError> {
        let host = self.host.clone();
        let what = format!("{}/{path}", self.repository);
        match response.status() {
            StatusCode::OK => Ok(response),
            StatusCode::NOT_FOUND => Err(RegistryError::NotFound { host, what }),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Err(RegistryError::Unauthorised { host, what })
            }
            StatusCode::TOO_MANY_REQUESTS => {
                let seconds = response.headers().get(RETRY_AFTER);
                let seconds = seconds.and_then(|value| value.to_str().ok()?.parse().ok());
                let retry_after = seconds.map(Duration::from_secs);
                Err(RegistryError::RateLimited { host, retry_after })
            }
            status => Err(RegistryError::Unexpected {
                host,
                what: format!("{status} to {what}"),
                is_fault: status.is_server_error(),
            }),
        }
    }

    /// Answers the challenge of a 401.
    async fn log_in(
        &self,
        refused: &Response,
        path: &str,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let unauthorised = || RegistryError::Unauthorised {
            host: self.host.clone(),
            what: format!("{}/{path}", self.repository),
        };
        let headers = refused.headers().get_all(WWW_AUTHENTICATE);
        let challenges =
            headers.iter().filter_map(|header| Challenge::parse(header.to_str().ok()?));
        let bearer_first = |challenge: &Challenge| *challenge == Challenge::Basic;
        let challenge = challenges.min_by_key(bearer_first);
        let request = match (challenge.ok_or_else(unauthorised)?, &self.auth) {
            (Challenge::Basic, Auth::As(Credentials::Password { username, password })) => {
                self.client.get(&self.base).basic_auth(username, Some(password))
            }
            (Challenge::Bearer { .. }, Auth::As(Credentials::Token(token))) => {
                self.client.get(&self.base).bearer_auth(token)
            }
            (Challenge::Bearer { realm, service }, auth) => {
                let token = self.token(&realm, service.as_deref(), auth, unauthorised).await?;
                self.client.get(&self.base).bearer_auth(token)
            }
            (Challenge::Basic, Auth::Anonymous | Auth::As(Credentials::Token(_))) => {
                return Err(unauthorised());
            }
        };
        // Only the header is of interest: the client knows how to write it, and to hide it.
        let request = request.build().map_err(RegistryError::Setup)?;
        Ok(request.headers().get(AUTHORIZATION).cloned())
    }

    /// Gets a token to pull from this repository.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        auth: &Auth,
        unauthorised: impl Fn() -> RegistryError,
    ) -> Result<String, RegistryError> {
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let unexpected = |what: String| RegistryError::Unexpected {
            host: self.host.clone(),
            what,
            is_fault: false,
        };
        let scope = format!("repository:{}:pull", self.repository);
        let mut parameters = vec![("scope", scope.as_str())];
        parameters.extend(service.map(|service| ("service", service)));
        let url = Url::parse_with_params(realm, parameters)
            .map_err(|_| unexpected(format!("token service {realm:?}")))?;
        // A password does not leave the encryption it came for.
        if url.scheme() != "https" && self.base.starts_with("https:") {
            return Err(unexpected(format!("token service {realm:?} without TLS")));
        }
        let mut request = self.client.get(url);
        if let Auth::As(Credentials::Password { username, password }) = auth {
            request = request.basic_auth(username, Some(password));
        }
        let response = self.send(request).await?;
        match response.status() {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(unauthorised()),
            StatusCode::OK | StatusCode::TOO_MANY_REQUESTS => {}
            status if status.is_server_error() => {}
            status => return Err(unexpected(format!("{status} to a token request"))),
        }
        let body = self.bounded_body(self.success(response, "token")?, TOKEN_BYTES_MAX).await?;
        let answer: Answer = serde_json::from_slice(&body)
            .map_err(|_| unexpected("a token that is none".to_owned()))?;
        let token = answer.token.or(answer.access_token);
        token.ok_or_else(|| unexpected("no token".to_owned()))
    }

    async fn bounded_body(
        &self,
        mut response: Response,
        bytes_max: u64,
    ) -> Result<Vec<u8>, RegistryError> {
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.unreachable(error))? {
            body.extend(chunk);
            if body.len() as u64 > bytes_max {
                return Err(RegistryError::TooLarge { limit_bytes: bytes_max });
            }
        }
        Ok(body)
    }
}

/// Whether a `host` or `host:port` is this machine.
fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        assert!(is_loopback("localhost"));
        assert!(is_loopback("localhost:5000"));
        assert!(is_loopback("127.0.0.1:5000"));
        assert!(!is_loopback("localhost.example.org"));
        assert!(!is_loopback("10.0.0.1:5000"));
        assert!(!is_loopback("127.0.0.1.example.org:80"));
    }

    #[test]
    fn plain_http_is_for_loopback_and_listed_hosts() {
        let base = |name: &str, insecure: &[&str]| {
            let insecure: Vec<String> = insecure.iter().map(ToString::to_string).collect();
            Connection::new(&name.parse().unwrap(), Auth::Anonymous, &insecure).unwrap().base
        };

        assert_eq!(base("127.0.0.1:5000/a", &[]), "http://127.0.0.1:5000/v2/a/");
        assert_eq!(base("host.test:5000/a", &["host.test:5000"]), "http://host.test:5000/v2/a/");
        assert_eq!(base("host.test:5000/a", &["host.test"]), "https://host.test:5000/v2/a/");
        assert!(base("alpine", &[]).starts_with("https://"));
        assert!(base("alpine", &[]).ends_with("/v2/library/alpine/"));
    }
}
