//! A client of the API, for the command line.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use reqwest::{Body, ClientBuilder, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_tungstenite::tungstenite::Error as WebSocketError;

use crate::loopback::is_loopback;
use crate::token::Secret;

pub mod websocket;

/// How long the token lives that the command line makes for itself. Commands can follow a log.
const TOKEN_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Who that token is for.
const TOKEN_USER: &str = "local";

/// Longest event of a log: a line of 64 KiB, each byte of it escaped.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// How long it may take to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A server, and the right to use it.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base_url: String,
    /// Where that is, for people.
    place: String,
    token: Option<String>,
}

impl Client {
    /// For the server at `base_url`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Setup`].
    pub fn new(base_url: &str, token: Option<String>) -> Result<Self, ClientError> {
        let http = builder(base_url).connect_timeout(CONNECT_TIMEOUT).build();
        let base_url = base_url.trim_end_matches('/').to_owned();
        let place = base_url.clone();
        Ok(Self { http: http.map_err(ClientError::Setup)?, base_url, place, token })
    }

    /// For the server that listens at `socket`.
    ///
    /// # Errors
    ///
    /// [`ClientError::Setup`].
    pub fn at_socket(socket: &Path, token: Option<String>) -> Result<Self, ClientError> {
        let base_url = "http://localhost".to_owned();
        let http = builder(&base_url).unix_socket(socket).build();
        let http = http.map_err(ClientError::Setup)?;
        Ok(Self { http, base_url, place: socket.display().to_string(), token })
    }

    /// What `GET path` answers.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.send(Method::GET, path, None).await?).await
    }

    /// What `GET path` answers; `None` if there is no such thing.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn find<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>, ClientError> {
        match self.get(path).await {
            Ok(found) => Ok(Some(found)),
            Err(ClientError::Refused { status: StatusCode::NOT_FOUND, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What `POST path` answers.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Request)?;
        self.json(self.send(Method::POST, path, Some(body.into())).await?).await
    }

    /// What `PATCH path` answers.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Request)?;
        self.json(self.send(Method::PATCH, path, Some(body.into())).await?).await
    }

    /// What `POST path` answers to a stream of bytes.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn upload<T, S>(&self, path: &str, body: S) -> Result<T, ClientError>
    where
        T: DeserializeOwned,
        S: Stream<Item = io::Result<Bytes>> + Send + 'static,
    {
        let body = Body::wrap_stream(body);
        self.json(self.send(Method::POST, path, Some(body)).await?).await
    }

    /// `DELETE path`.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(Method::DELETE, path, None).await.map(drop)
    }

    /// The lines of a log. A line that is no event is skipped.
    ///
    /// # Errors
    ///
    /// [`ClientError`], also later, if the connection breaks.
    pub async fn lines(
        &self,
        path: &str,
    ) -> Result<impl Stream<Item = Result<String, ClientError>> + use<>, ClientError> {
        let response = self.send(Method::GET, path, None).await?;
        let place = self.place.clone();
        let broken = move |source| ClientError::Broken { place: place.clone(), source };
        let mut events = Events::default();
        let chunks = response.bytes_stream().map_err(broken);
        Ok(chunks.flat_map(move |chunk| {
            let lines = match chunk {
                Ok(chunk) => events.take(&chunk).into_iter().map(Ok).collect(),
                Err(error) => vec![Err(error)],
            };
            stream::iter(lines)
        }))
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<Body>,
    ) -> Result<Response, ClientError> {
        let mut request = self.request(method, path);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body);
        }
        let response = request
            .send()
            .await
            .map_err(|source| ClientError::Unreachable { place: self.place.clone(), source })?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.refusal(response).await)
        }
    }

    /// A request with the right to make it.
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base_url));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Why the server said no.
    async fn refusal(&self, response: Response) -> ClientError {
        let status = response.status();
        let text = response.text().await.unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(&text)
            .ok()
            .and_then(|body| body["message"].as_str().map(str::to_owned))
            .unwrap_or(text);
        let without_token = self.token.is_none() && status == StatusCode::UNAUTHORIZED;
        ClientError::Refused {
            status,
            message: if without_token { NO_TOKEN.into() } else { message },
        }
    }

    async fn json<T: DeserializeOwned>(&self, response: Response) -> Result<T, ClientError> {
        let place = || self.place.clone();
        let bytes = response
            .bytes()
            .await
            .map_err(|source| ClientError::Broken { place: place(), source })?;
        serde_json::from_slice(&bytes)
            .map_err(|source| ClientError::Foreign { place: place(), source })
    }
}

/// Of a client for `base_url`. To a plain server of this host no proxy leads, nor is there anything
/// for the host's certificates to prove: to read those, hundreds of files, took longer than a guest
/// boots.
fn builder(base_url: &str) -> ClientBuilder {
    let builder = reqwest::Client::builder();
    if is_plain_and_local(base_url) { builder.no_proxy().tls_certs_only([]) } else { builder }
}

/// Whether it is HTTP to an address of loopback.
fn is_plain_and_local(base_url: &str) -> bool {
    let Ok(url) = Url::parse(base_url) else { return false };
    url.scheme() == "http" && url.host_str().is_some_and(is_loopback)
}

/// A token that this host's commands make for themselves.
pub fn own_token(secret: &Secret) -> String {
    secret.mint(TOKEN_USER, TOKEN_LIFETIME, None)
}

/// What to do about a missing token.
const NO_TOKEN: &str = "a token is needed: give one with --token or OVUM_API_KEY (`ovum token` on \
                        the server's host makes one), or run this as the server's user";

/// A name in one segment of a path, whatever is in it.
pub fn segment(name: &str) -> String {
    utf8_percent_encode(name, NON_ALPHANUMERIC).to_string()
}

/// Server-sent events, put together from the pieces in which they arrive.
#[derive(Debug, Default)]
struct Events {
    pending: Vec<u8>,
}

impl Events {
    /// The lines that are whole now.
    fn take(&mut self, chunk: &[u8]) -> Vec<String> {
        self.pending.extend_from_slice(chunk);
        let Some(end) = self.pending.iter().rposition(|&byte| byte == b'\n') else {
            if self.pending.len() > EVENT_BYTES_MAX {
                self.pending.clear();
            }
            return Vec::new();
        };
        let whole: Vec<u8> = self.pending.drain(..=end).collect();
        whole
            .split(|&byte| byte == b'\n')
            .filter_map(|line| line.strip_prefix(b"data: "))
            .filter_map(|data| serde_json::from_slice(data).ok())
            .collect()
    }
}

impl ClientError {
    /// Whether the server went away, so that another may answer.
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Broken { .. })
    }
}

/// Why a server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The HTTP client cannot be made.
    #[error("Failed to set up the HTTP client")]
    Setup(#[source] reqwest::Error),
    /// The request cannot be written.
    #[error("Failed to write the request")]
    Request(#[source] serde_json::Error),
    /// Nobody answers.
    #[error("No server answers at {place} (`ovum serve` starts one)")]
    Unreachable {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// A WebSocket ended before it was through.
    #[error("The server at {place} closed the connection")]
    Closed {
        /// Where.
        place: String,
        /// How.
        #[source]
        source: Box<WebSocketError>,
    },
    /// It said no.
    #[error("{message}")]
    Refused {
        /// What kind of no.
        status: StatusCode,
        /// Why, as it says.
        message: String,
    },
    /// The connection broke.
    #[error("The connection to {place} broke")]
    Broken {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It is another kind of server.
    #[error("{place} does not answer like this program")]
    Foreign {
        /// Where.
        place: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plain_server_of_this_host_needs_no_certificates() {
        for url in ["http://127.0.0.1:8080", "http://[::1]:80/api", "http://localhost"] {
            assert!(is_plain_and_local(url), "{url}");
        }
        for url in ["https://127.0.0.1", "http://192.0.2.1", "http://localhost.example", "nothing"]
        {
            assert!(!is_plain_and_local(url), "{url}");
        }
    }

    #[test]
    fn events_arrive_however_the_bytes_are_cut() {
        let bytes = b"data: \"one\"\n\ndata: \"t\\u00fc\"\n\ndata: \"\"\n\n";

        for cut in 1..bytes.len() {
            let mut events = Events::default();
            let lines: Vec<_> = bytes.chunks(cut).flat_map(|chunk| events.take(chunk)).collect();
            assert_eq!(lines, ["one", "tü", ""], "cut every {cut}");
        }
    }

    #[test]
    fn an_image_name_is_one_segment() {
        assert_eq!(segment("docker.io/a:b"), "docker%2Eio%2Fa%3Ab");
    }
}
