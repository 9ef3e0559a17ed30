//! A WebSocket of the server, as a client holds it.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

/// How long the server may be silent.
const PATIENCE: Duration = Duration::from_secs(100);

/// An open WebSocket.
#[derive(Debug)]
pub struct Socket {
    stream: WebSocketStream<MaybeTlsStream<TcpStream>>,
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// Bytes.
    Binary(Vec<u8>),
    /// A text.
    Text(String),
    /// Goodbye, with a code if there was one.
    Close(Option<u16>),
}

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ran {
    /// All of its output.
    pub output: Vec<u8>,
    /// Its exit status.
    pub code: i64,
}

impl Socket {
    /// Opens one; what the server says if it does not want to.
    pub async fn open(url: &str, token: &str) -> Result<Self, (u16, Value)> {
        let mut request = url.into_client_request().expect("the address is one");
        let bearer = format!("Bearer {token}").parse().expect("a token is a header");
        request.headers_mut().insert("authorization", bearer);
        // Without Nagle's algorithm, as the SDKs do it.
        match connect_async_with_config(request, None, true).await {
            Ok((stream, _)) => Ok(Self { stream }),
            Err(Error::Http(response)) => {
                let status = response.status().as_u16();
                let body = response.body().clone().unwrap_or_default();
                Err((status, serde_json::from_slice(&body).unwrap_or_default()))
            }
            Err(error) => panic!("{url}: {error}"),
        }
    }

    /// Sends a text.
    pub async fn say(&mut self, text: &str) {
        self.stream.send(Message::text(text)).await.expect("the server listens");
    }

    /// Sends bytes.
    pub async fn send(&mut self, bytes: &[u8]) {
        let sent = self.stream.send(Message::binary(bytes.to_vec())).await;
        sent.expect("the server listens");
    }

    /// What the server says next.
    pub async fn next(&mut self) -> Frame {
        loop {
            let next = time::timeout(PATIENCE, self.stream.next()).await;
            match next.expect("the server is silent") {
                Some(Ok(Message::Binary(bytes))) => return Frame::Binary(bytes.to_vec()),
                Some(Ok(Message::Text(text))) => return Frame::Text(text.as_str().to_owned()),
                Some(Ok(Message::Close(frame))) => {
                    return Frame::Close(frame.map(|frame| frame.code.into()));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => panic!("the connection broke: {error}"),
                None => return Frame::Close(None),
            }
        }
    }

    /// The next text, which is JSON.
    pub async fn json(&mut self) -> Value {
        match self.next().await {
            Frame::Text(text) => serde_json::from_str(&text).expect("a text is JSON"),
            other => panic!("not a text: {other:?}"),
        }
    }

    /// Reads output until it has `marker`.
    pub async fn until(&mut self, marker: &str) -> String {
        let mut output = String::new();
        while !output.contains(marker) {
            match self.next().await {
                Frame::Binary(bytes) => output.push_str(&String::from_utf8_lossy(&bytes)),
                other => panic!("{other:?} before {marker:?}, after {output:?}"),
            }
        }
        output
    }

    /// Reads output until the command has ended. Nothing but the exit status may be a text, and it
    /// comes last.
    pub async fn until_exit(&mut self) -> Ran {
        let mut output = Vec::new();
        let last = loop {
            match self.next().await {
                Frame::Binary(bytes) => {
                    assert!(bytes.len() <= 32 << 10, "a message of {} bytes", bytes.len());
                    output.extend(bytes);
                }
                Frame::Text(text) => break text,
                Frame::Close(code) => panic!("closed with {code:?} after {} bytes", output.len()),
            }
        };
        let value: Value = serde_json::from_str(&last).expect("the last text is JSON");
        let code = value["exitCode"].as_i64().expect("it has a whole number");
        assert_eq!(value, json!({ "exitCode": code }), "and nothing else");
        assert_eq!(self.next().await, Frame::Close(Some(1000)));
        Ran { output, code }
    }
}

impl Ran {
    /// Its output as text.
    pub fn text(&self) -> &str {
        str::from_utf8(&self.output).expect("output is text")
    }
}
