//! WebSockets: how one begins and how it ends.
//!
//! Whatever can be refused is refused before the upgrade, as a plain answer. The first message says
//! what the client wants; everything after it is the business of the route.

use std::future;
use std::time::Duration;

use axum::extract::FromRequestParts;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::Response;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time;

use crate::api::App;
use crate::api::error::ApiError;
use crate::api::key::Key;
use crate::instances::inside::Inside;

/// Most bytes of one message. Some clients send a whole input as one.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// Most bytes of the first message.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// How long a client may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a client may take to hear that it is over.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a client that was refused may go on sending.
const SKIP_TIMEOUT: Duration = Duration::from_secs(30);

/// What goes to the client.
pub(super) type Sink = SplitSink<WebSocket, Message>;

/// The client went away.
#[derive(Debug)]
pub(super) struct Gone;

/// What comes from the client.
#[derive(Debug)]
pub(super) struct Source {
    stream: SplitStream<WebSocket>,
    /// Came before it was wanted.
    early: Option<Input>,
}

/// Something that a client says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Input {
    Binary(Vec<u8>),
    Text(String),
}

/// A client that wants to the inside of an instance, and may.
#[derive(Debug)]
pub(super) struct Visit {
    inside: Inside,
    upgrade: WebSocketUpgrade,
}

impl FromRequestParts<App> for Visit {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        let Key(key) = Key::from_request_parts(parts, app).await?;
        let inside = app.instances.inside(&key)?;
        let upgrade =
            WebSocketUpgrade::from_request_parts(parts, app).await.map_err(|rejection| {
                ApiError::of_status(StatusCode::UPGRADE_REQUIRED, rejection.body_text())
            })?;
        Ok(Self { inside, upgrade })
    }
}

impl Visit {
    /// Upgrades, and serves the client from then on.
    pub(super) fn begin<F, S>(self, serve: S) -> Response
    where
        S: FnOnce(Inside, Sink, Source) -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let Self { inside, upgrade } = self;
        let upgrade = upgrade.max_message_size(MESSAGE_BYTES_MAX).max_frame_size(MESSAGE_BYTES_MAX);
        upgrade.on_upgrade(|socket| {
            let (sink, stream) = socket.split();
            serve(inside, sink, Source { stream, early: None })
        })
    }
}

impl Source {
    /// The first message, which is JSON; why it is none, as a text for people.
    pub(super) async fn request<T: DeserializeOwned>(&mut self) -> Result<T, String> {
        let first = time::timeout(REQUEST_TIMEOUT, self.next()).await;
        match first {
            Ok(Ok(Input::Text(text))) if text.len() > REQUEST_BYTES_MAX => {
                Err(format!("first message is longer than {REQUEST_BYTES_MAX} bytes"))
            }
            Ok(Ok(Input::Text(text))) => {
                serde_json::from_str(&text).map_err(|error| format!("invalid JSON: {error}"))
            }
            Ok(Ok(Input::Binary(_))) => Err("first message must be JSON text".to_owned()),
            Ok(Err(Gone)) => Err("there is no first message".to_owned()),
            Err(_) => Err(format!("no message within {} s", REQUEST_TIMEOUT.as_secs())),
        }
    }

    /// What the client says next. Pings are answered on the way. Nothing is lost if this is dropped
    /// before it is ready.
    pub(super) async fn next(&mut self) -> Result<Input, Gone> {
        if let Some(input) = self.early.take() {
            return Ok(input);
        }
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Binary(bytes))) => return Ok(Input::Binary(bytes.into())),
                Some(Ok(Message::Text(text))) => {
                    return Ok(Input::Text(text.as_str().to_owned()));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Gone),
            }
        }
    }

    /// Waits until the client has gone; what it says before that is kept as far as it is one
    /// message, and left unread beyond that.
    pub(super) async fn gone(&mut self) {
        if self.early.is_none() {
            match self.next().await {
                Ok(input) => self.early = Some(input),
                Err(Gone) => return,
            }
        }
        future::pending().await
    }

    /// Throws bytes away until the client says a word, goes away, or has had its time.
    pub(super) async fn skip_bytes(&mut self) {
        let skipping = async { while let Ok(Input::Binary(_)) = self.next().await {} };
        let _late = time::timeout(SKIP_TIMEOUT, skipping).await;
    }

    /// Says goodbye and waits until the client has heard it: what it still sends is thrown away,
    /// for a connection closed over unread bytes takes what was sent last with it.
    pub(super) async fn close(mut self, mut sink: Sink, reason: &'static str) {
        let code = if reason.is_empty() { close_code::NORMAL } else { close_code::INVALID };
        let frame = CloseFrame { code, reason: reason.into() };
        let closing = time::timeout(CLOSE_TIMEOUT, async {
            sink.send(Message::Close(Some(frame))).await.map_err(|_| Gone)?;
            loop {
                self.next().await?;
            }
            #[expect(unreachable_code, reason = "names the type of the errors")]
            Ok::<(), Gone>(())
        });
        // Either way there is nothing more to do.
        let _ = closing.await;
    }
}

/// Sends bytes.
pub(super) async fn send_bytes(sink: &mut Sink, bytes: Vec<u8>) -> Result<(), Gone> {
    sink.send(Message::Binary(bytes.into())).await.map_err(|_| Gone)
}

/// Sends a JSON text.
pub(super) async fn send_json(sink: &mut Sink, value: &impl Serialize) -> Result<(), Gone> {
    let text = serde_json::to_string(value).expect("strings and numbers become JSON");
    sink.send(Message::Text(text.into())).await.map_err(|_| Gone)
}

#[cfg(test)]
mod tests;
