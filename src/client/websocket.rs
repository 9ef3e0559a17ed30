//! WebSockets, over the same connections as everything else: a port, a socket, or TLS.

use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use reqwest::header::{CONNECTION, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_VERSION, UPGRADE};
use reqwest::{Method, StatusCode, Upgraded};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::protocol::Role;
use tokio_tungstenite::tungstenite::{Error, Message};

use crate::client::{Client, ClientError};

/// The half of an open WebSocket that sends. The two are independent: a server may stop reading
/// until it has been read.
#[derive(Debug)]
pub struct Sender {
    sink: SplitSink<WebSocketStream<Upgraded>, Message>,
    place: String,
}

/// The half that receives.
#[derive(Debug)]
pub struct Receiver {
    stream: SplitStream<WebSocketStream<Upgraded>>,
    place: String,
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// Bytes.
    Binary(Vec<u8>),
    /// A text.
    Text(String),
}

impl Client {
    /// Opens a WebSocket at `path`.
    ///
    /// # Errors
    ///
    /// [`ClientError`].
    pub async fn websocket(&self, path: &str) -> Result<(Sender, Receiver), ClientError> {
        let request = self
            .request(Method::GET, path)
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, "websocket")
            .header(SEC_WEBSOCKET_VERSION, "13")
            .header(SEC_WEBSOCKET_KEY, generate_key());
        let response = request
            .send()
            .await
            .map_err(|source| ClientError::Unreachable { place: self.place.clone(), source })?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.refusal(response).await);
        }
        let upgraded = response
            .upgrade()
            .await
            .map_err(|source| ClientError::Broken { place: self.place.clone(), source })?;
        let stream = WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await;
        let (sink, stream) = stream.split();
        let sender = Sender { sink, place: self.place.clone() };
        Ok((sender, Receiver { stream, place: self.place.clone() }))
    }
}

impl Sender {
    /// Sends bytes.
    ///
    /// # Errors
    ///
    /// [`ClientError::Closed`].
    pub async fn send(&mut self, bytes: Vec<u8>) -> Result<(), ClientError> {
        self.sink.send(Message::binary(bytes)).await.map_err(|error| closed(&self.place, error))
    }

    /// Sends a text.
    ///
    /// # Errors
    ///
    /// [`ClientError::Closed`].
    pub async fn say(&mut self, text: String) -> Result<(), ClientError> {
        self.sink.send(Message::text(text)).await.map_err(|error| closed(&self.place, error))
    }
}

impl Receiver {
    /// What the server says next. Nothing is lost if this is dropped before it is ready.
    ///
    /// # Errors
    ///
    /// [`ClientError::Closed`].
    pub async fn next(&mut self) -> Result<Said, ClientError> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Binary(bytes))) => return Ok(Said::Binary(bytes.into())),
                Some(Ok(Message::Text(text))) => {
                    return Ok(Said::Text(text.as_str().to_owned()));
                }
                Some(Ok(Message::Close(_))) | None => {
                    return Err(closed(&self.place, Error::ConnectionClosed));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(closed(&self.place, error)),
            }
        }
    }
}

fn closed(place: &str, source: Error) -> ClientError {
    ClientError::Closed { place: place.to_owned(), source: Box::new(source) }
}
