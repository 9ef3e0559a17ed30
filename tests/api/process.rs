//! A server in a process of its own, asked over its socket byte by byte: what it costs can be seen
//! from outside, and clients can be as rude as they like.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use ovum::server;
use ovum::token::Secret;
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time;

use crate::{HOUR, SECRET};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server on the folder of a [`crate::Server`] that was stopped.
pub(crate) struct Process {
    child: Child,
    data_dir: PathBuf,
    token: String,
    _dir: TempDir,
}

/// A connection with an answer on it.
pub(crate) struct Conversation {
    pub(crate) stream: UnixStream,
    pub(crate) status: StatusCode,
    pub(crate) head: String,
    /// What has come of the body.
    pub(crate) body: Vec<u8>,
}

impl Process {
    #[expect(clippy::disallowed_methods, reason = "programs are started as a user would")]
    pub(crate) async fn start(dir: TempDir) -> Self {
        let data_dir = dir.path().join("data");
        let child = Command::new(env!("CARGO_BIN_EXE_ovum"))
            .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
            .arg(&data_dir)
            .env("OVUM_JWT_SECRET", SECRET)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let token = Secret::new(SECRET).mint("test", HOUR, None);
        let process = Self { child, data_dir, token, _dir: dir };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(process.socket()).await.is_err() {
            assert!(Instant::now() < deadline, "the server does not listen");
            time::sleep(Duration::from_millis(20)).await;
        }
        process
    }

    /// Asks on a connection of its own; returns once the head of the answer is there.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: &[u8]) -> Conversation {
        let mut stream = UnixStream::connect(self.socket()).await.unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\n\
             content-length: {}\r\n\r\n",
            self.token,
            body.len()
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(body).await.unwrap();
        let mut bytes = Vec::new();
        let end = loop {
            let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
            match end {
                Some(end) => break end + 4,
                None => more(&mut stream, &mut bytes).await,
            }
        };
        let body = bytes.split_off(end);
        let head = String::from_utf8(bytes).unwrap().to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Conversation { stream, status, head, body }
    }

    /// Bytes of memory that the server has.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }

    /// How many files the server has open.
    pub(crate) fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    fn socket(&self) -> PathBuf {
        server::socket(&self.data_dir)
    }
}

impl Conversation {
    /// Reads until the body has `part`.
    pub(crate) async fn until(&mut self, part: &str) {
        while !String::from_utf8_lossy(&self.body).contains(part) {
            more(&mut self.stream, &mut self.body).await;
        }
    }

    /// The body, which is JSON of a known length.
    pub(crate) async fn json(&mut self) -> Value {
        let length = self.head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.unwrap().parse().unwrap();
        while self.body.len() < length {
            more(&mut self.stream, &mut self.body).await;
        }
        serde_json::from_slice(&self.body).unwrap()
    }
}

async fn more(stream: &mut UnixStream, bytes: &mut Vec<u8>) {
    let read = time::timeout(PATIENCE, stream.read_buf(bytes)).await;
    let read = read.expect("the server is silent").unwrap();
    assert!(read > 0, "the server hung up after {:?}", String::from_utf8_lossy(bytes));
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
