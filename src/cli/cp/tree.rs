//! A tree that comes out of an instance, over one connection. What it says is not trusted: paths
//! stay below where they start, and a file has as many bytes as it was said to have.

use std::path::{Component, Path};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::json;

use super::{Guest, Ways, is_content};
use crate::client::websocket::{Receiver, Said};

/// A tree on its way.
#[derive(Debug)]
pub(super) struct Tree {
    receiver: Receiver,
    /// The file whose bytes are coming, and how many of them are missing.
    file: Option<(String, u64)>,
    is_over: bool,
}

/// What comes next.
#[derive(Debug)]
pub(super) enum Step {
    /// Something begins; a file's bytes follow.
    Entry(Header),
    /// Bytes of the file that began last.
    Data(Vec<u8>),
    /// What began last is whole.
    Whole,
}

/// What is known of something before its bytes.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Header {
    /// From the root of the tree on, whose name is its first part.
    pub(super) path: String,
    pub(super) mode: u32,
    pub(super) is_dir: bool,
    pub(super) link_target: Option<String>,
    pub(super) size: u64,
    pub(super) mtime: u64,
    #[serde(default)]
    pub(super) uid: u32,
    #[serde(default)]
    pub(super) gid: u32,
}

/// What the server says beside bytes.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum Word {
    Header(Header),
    End {
        #[serde(rename = "final")]
        is_final: bool,
    },
    Error {
        message: String,
    },
}

impl Tree {
    /// Asks for what lies at `from`.
    pub(super) async fn open(guest: &Guest, from: &str, ways: Ways) -> anyhow::Result<Self> {
        let folder = from.trim_end_matches('.');
        let path = if is_content(from) && !folder.is_empty() { folder } else { from };
        let request =
            json!({ "direction": "from", "guest_path": path, "follow_links": ways.follow_links });
        let (mut sender, receiver) = guest.client.websocket(&format!("{}/cp", guest.route)).await?;
        sender.say(request.to_string()).await?;
        Ok(Self { receiver, file: None, is_over: false })
    }

    /// What comes next; nothing after the last is whole.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Step>> {
        if self.is_over {
            return Ok(None);
        }
        match self.receiver.next().await? {
            Said::Binary(bytes) => {
                let (_, missing) =
                    self.file.as_mut().context("The server sent bytes of no file")?;
                let left = missing.checked_sub(u64::try_from(bytes.len())?);
                *missing = left.context("The server sent too many bytes")?;
                Ok(Some(Step::Data(bytes)))
            }
            Said::Text(text) => match serde_json::from_str(&text)? {
                Word::Header(header) => {
                    header.check()?;
                    let is_file = !header.is_dir && header.link_target.is_none();
                    self.file = is_file.then(|| (header.path.clone(), header.size));
                    Ok(Some(Step::Entry(header)))
                }
                Word::End { is_final } => {
                    if let Some((path, 1..)) = self.file.take() {
                        bail!("The server sent too few bytes of {path}");
                    }
                    self.is_over = is_final;
                    Ok(Some(Step::Whole))
                }
                Word::Error { message } => bail!("{message}"),
            },
        }
    }
}

impl Header {
    fn check(&self) -> anyhow::Result<()> {
        let mut parts = Path::new(&self.path).components().peekable();
        ensure!(parts.peek().is_some(), "The server sent an empty path");
        let is_inside = parts.all(|part| matches!(part, Component::Normal(_)));
        ensure!(is_inside, "The server sent a path that leads out: {}", self.path);
        Ok(())
    }

    /// Its path without the name of the tree's root; empty for the root itself.
    pub(super) fn below_root(&self) -> &Path {
        let mut parts = Path::new(&self.path).components();
        parts.next();
        parts.as_path()
    }

    /// The name of the tree's root.
    pub(super) fn root_name(&self) -> &str {
        self.path.split('/').next().unwrap_or_default()
    }
}
