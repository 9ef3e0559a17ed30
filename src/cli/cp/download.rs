//! Out of an instance: a whole tree over one connection. What it says is not trusted: nothing is
//! written outside of where the tree goes.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use serde_json::json;

use super::{Guest, Moved, Place, Ways, below, is_content};
use crate::client::websocket::Said;

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

#[derive(Debug, Deserialize)]
struct Header {
    path: PathBuf,
    mode: u32,
    is_dir: bool,
    link_target: Option<String>,
    size: u64,
    mtime: u64,
    #[serde(default)]
    uid: u32,
    #[serde(default)]
    gid: u32,
}

/// A tree that arrives.
struct Arrival<'a> {
    to: &'a str,
    is_content: bool,
    ways: Ways,
    /// Where its root goes, once that is known.
    root: Option<PathBuf>,
    /// The file that is being written, and what is missing of it.
    file: Option<(File, PathBuf, Header)>,
    /// Folders get their mode and time when everything is in them.
    folders: Vec<(PathBuf, Header)>,
    moved: Moved,
}

/// Copies `from` to `to`.
pub(super) async fn download(
    guest: &Guest,
    from: &str,
    to: &Path,
    ways: Ways,
) -> anyhow::Result<Moved> {
    let to = to.to_str().context("The destination is not UTF-8")?;
    let (folder, is_content) = (from.trim_end_matches('.'), is_content(from));
    let path = if is_content && !folder.is_empty() { folder } else { from };
    let request =
        json!({ "direction": "from", "guest_path": path, "follow_links": ways.follow_links });
    let (mut sender, mut receiver) = guest.client.websocket(&format!("{}/cp", guest.route)).await?;
    sender.say(request.to_string()).await?;
    let mut arrival = Arrival {
        to,
        is_content,
        ways,
        root: None,
        file: None,
        folders: Vec::new(),
        moved: Moved::default(),
    };
    loop {
        match receiver.next().await? {
            Said::Binary(bytes) => arrival.write(&bytes)?,
            Said::Text(text) => match serde_json::from_str(&text)? {
                Word::Header(header) => arrival.begin(header)?,
                Word::End { is_final } => {
                    arrival.end_file()?;
                    if is_final {
                        return arrival.finish();
                    }
                }
                Word::Error { message } => bail!("{message}"),
            },
        }
    }
}

impl Arrival<'_> {
    fn begin(&mut self, header: Header) -> anyhow::Result<()> {
        let mut parts = header.path.components();
        let first = parts.next();
        let Some(Component::Normal(name)) = first else { bail!("The server sent a bad path") };
        let is_inside = parts.clone().all(|part| matches!(part, Component::Normal(_)));
        ensure!(is_inside, "The server sent a path that leads out: {}", header.path.display());
        let root = match &self.root {
            Some(root) => root,
            None => {
                let place = Place::here(Path::new(self.to))?;
                let name = name.to_string_lossy();
                let root = place.target(self.to, &name, header.is_dir, self.is_content)?;
                self.root.insert(root.into())
            }
        };
        let path = below(root, parts.as_path())?;
        self.moved.entries += 1;
        let failed = || format!("Failed to write {}", path.display());
        if header.is_dir {
            match fs::create_dir(&path) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => {}
                made => made.with_context(failed)?,
            }
            self.folders.push((path, header));
            return Ok(());
        }
        if fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink()) {
            fs::remove_file(&path).with_context(failed)?;
        }
        if let Some(target) = &header.link_target {
            symlink(target, &path).with_context(failed)?;
            if self.ways.archive {
                lchown(&path, Some(header.uid), Some(header.gid)).with_context(failed)?;
            }
            return Ok(());
        }
        let file = File::create(&path).with_context(failed)?;
        self.file = Some((file, path, header));
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let (file, path, header) =
            self.file.as_mut().context("The server sent bytes of no file")?;
        let count = u64::try_from(bytes.len())?;
        header.size = header.size.checked_sub(count).context("The server sent too many bytes")?;
        self.moved.bytes += count;
        file.write_all(bytes).with_context(|| format!("Failed to write {}", path.display()))
    }

    fn end_file(&mut self) -> anyhow::Result<()> {
        let Some((file, path, header)) = self.file.take() else { return Ok(()) };
        ensure!(header.size == 0, "The server sent too few bytes of {}", path.display());
        furnish(&file, &path, &header, self.ways)
    }

    fn finish(self) -> anyhow::Result<Moved> {
        for (path, header) in self.folders.iter().rev() {
            let folder = File::open(path)?;
            furnish(&folder, path, header, self.ways)?;
        }
        Ok(self.moved)
    }
}

/// Owner, mode, time.
fn furnish(file: &File, path: &Path, header: &Header, ways: Ways) -> anyhow::Result<()> {
    let failed = || format!("Failed to set owner, mode and time of {}", path.display());
    if ways.archive {
        chown(path, Some(header.uid), Some(header.gid)).with_context(failed)?;
    }
    file.set_permissions(Permissions::from_mode(header.mode)).with_context(failed)?;
    let mtime = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(header.mtime));
    file.set_modified(mtime.unwrap_or_else(SystemTime::now)).with_context(failed)
}
