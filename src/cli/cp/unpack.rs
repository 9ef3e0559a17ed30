//! A tar archive from standard input into a folder of an instance.
//!
//! A hard link becomes a copy, for the agent makes none; what is neither file, folder nor link is
//! left out and named. The archive is read by a thread of its own: a pipe cannot be awaited.

use std::io::{self, BufReader, IsTerminal, Read};
use std::thread;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::put::put;
use super::tree::{Step, Tree};
use super::{CHUNK_BYTES, Guest, Moved, Place, Ways};
use crate::cli::output;
use crate::tar::{Entry, EntryKind, TarReader};

/// Pieces of the archive that wait to be sent, before no more is read.
const PIECES_MAX: usize = 4;

/// What an archive consists of.
#[derive(Debug)]
enum Piece {
    /// Something begins; a file's bytes follow.
    Entry(Box<Entry>),
    /// Bytes of the file that began last.
    Data(Vec<u8>),
}

/// An archive on its way.
struct Pieces {
    pieces: mpsc::Receiver<anyhow::Result<Piece>>,
    /// Came before it was wanted.
    early: Option<Box<Entry>>,
}

/// Unpacks standard input below `to`, which has to be a folder.
pub(super) async fn unpack(guest: &Guest, to: &str, ways: Ways) -> anyhow::Result<Moved> {
    ensure!(!io::stdin().is_terminal(), "There is no archive on standard input: redirect one");
    ensure!(guest.stat(to).await? == Place::Directory, "{to} is not a folder");
    let mut archive = Pieces::read(io::stdin());
    let mut moved = Moved::default();
    let mut folders = Vec::new();
    while let Some(entry) = archive.entry().await? {
        let path = below(to, &entry.path)?;
        let Some(request) = request(&entry, &path, ways)? else {
            let kind = entry.kind;
            output::note(&format!("Left out {path}: a {kind:?} cannot be copied"));
            continue;
        };
        let put = if entry.kind == EntryKind::HardLink {
            copy(guest, &request, &below(to, &entry.link)?, ways).await
        } else {
            put(guest, &request, async || archive.data().await).await
        };
        moved.bytes += put.with_context(|| format!("Failed to copy to {path}"))?;
        moved.entries += 1;
        if entry.kind == EntryKind::Directory {
            folders.push(request);
        }
    }
    // Once more, innermost first: what was put into them has changed their time.
    for request in folders.iter().rev() {
        put(guest, request, async || Ok(None)).await?;
    }
    Ok(moved)
}

/// What is asked of the instance for an entry; nothing if it cannot have one like it.
fn request(entry: &Entry, path: &str, ways: Ways) -> anyhow::Result<Option<Value>> {
    let mut request = json!({
        "direction": "to", "guest_path": path, "is_dir": entry.kind == EntryKind::Directory,
        "mode": entry.mode, "mtime": entry.mtime_s,
    });
    if ways.archive {
        request["uid"] = entry.uid.into();
        request["gid"] = entry.gid.into();
    }
    match entry.kind {
        EntryKind::File | EntryKind::Directory | EntryKind::HardLink => {}
        EntryKind::Symlink => {
            let target = str::from_utf8(&entry.link);
            request["link_target"] = target.context("A link of the archive is not UTF-8")?.into();
        }
        EntryKind::CharDevice | EntryKind::BlockDevice | EntryKind::Fifo => return Ok(None),
    }
    Ok(Some(request))
}

/// Makes a copy of the file at `from`.
async fn copy(guest: &Guest, request: &Value, from: &str, ways: Ways) -> anyhow::Result<u64> {
    let mut tree = Tree::open(guest, from, ways).await?;
    let Some(Step::Entry(header)) = tree.next().await? else { bail!("{from} is nothing") };
    ensure!(!header.is_dir && header.link_target.is_none(), "{from} is not a file");
    let data = async || match tree.next().await? {
        Some(Step::Data(bytes)) => Ok(Some(bytes)),
        Some(Step::Entry(_) | Step::Whole) | None => Ok(None),
    };
    put(guest, request, data).await
}

/// Where something of the archive goes: below `root`, and nowhere else.
fn below(root: &str, path: &[u8]) -> anyhow::Result<String> {
    let shown = String::from_utf8_lossy(path);
    let path = str::from_utf8(path).with_context(|| format!("{shown:?} is not UTF-8"))?;
    let mut place = root.trim_end_matches('/').to_owned();
    for part in path.split('/').filter(|part| !matches!(*part, "" | ".")) {
        ensure!(part != "..", "The archive has a path that leads out: {path}");
        place = format!("{place}/{part}");
    }
    Ok(if place.is_empty() { "/".to_owned() } else { place })
}

impl Pieces {
    fn read(source: impl Read + Send + 'static) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES_MAX);
        thread::spawn(move || {
            let mut archive = TarReader::new(BufReader::new(source));
            loop {
                let piece = match archive.next_entry() {
                    Ok(Some(entry)) => Ok(Piece::Entry(Box::new(entry))),
                    // Who writes the archive shall not be told that nobody reads its end.
                    Ok(None) => return drop(archive.drain()),
                    Err(error) => Err(error.into()),
                };
                let is_over = piece.is_err();
                if sender.blocking_send(piece).is_err() || is_over {
                    return;
                }
                loop {
                    let mut chunk = vec![0; CHUNK_BYTES];
                    let piece = match archive.read(&mut chunk) {
                        Ok(0) => break,
                        Ok(read) => {
                            chunk.truncate(read);
                            Ok(Piece::Data(chunk))
                        }
                        Err(error) => Err(error.into()),
                    };
                    let is_over = piece.is_err();
                    if sender.blocking_send(piece).is_err() || is_over {
                        return;
                    }
                }
            }
        });
        Self { pieces, early: None }
    }

    /// The next entry; what is left of the one before is passed over.
    async fn entry(&mut self) -> anyhow::Result<Option<Box<Entry>>> {
        if let Some(entry) = self.early.take() {
            return Ok(Some(entry));
        }
        while let Some(piece) = self.pieces.recv().await {
            if let Piece::Entry(entry) = piece.context("Failed to read the archive")? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    /// The next bytes of the current entry; nothing after the last of them.
    async fn data(&mut self) -> anyhow::Result<Option<Vec<u8>>> {
        if self.early.is_some() {
            return Ok(None);
        }
        match self.pieces.recv().await.transpose().context("Failed to read the archive")? {
            Some(Piece::Data(bytes)) => Ok(Some(bytes)),
            Some(Piece::Entry(entry)) => {
                self.early = Some(entry);
                Ok(None)
            }
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_an_archive_leads_out_of_its_folder() {
        let at = |root, path: &str| below(root, path.as_bytes()).ok();

        assert_eq!(at("/srv", "a/b").as_deref(), Some("/srv/a/b"));
        assert_eq!(at("/srv/", "./a//b/").as_deref(), Some("/srv/a/b"));
        assert_eq!(at("/", "/etc/hosts").as_deref(), Some("/etc/hosts"));
        assert_eq!(at("/srv", "./").as_deref(), Some("/srv"));
        assert_eq!(at("/", ".").as_deref(), Some("/"));
        assert_eq!((at("/srv", "../a"), at("/srv", "a/../../b")), (None, None));
        assert!(below("/srv", b"\xff").is_err());
    }

    #[tokio::test]
    async fn an_archive_comes_entry_by_entry() {
        let mut archive = tar::Builder::new(Vec::new());
        for (path, content) in [("a", &b"one"[..]), ("b", b""), ("c", &[7; 100_000])] {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            archive.append_data(&mut header, path, content).unwrap();
        }
        let mut pieces = Pieces::read(io::Cursor::new(archive.into_inner().unwrap()));

        assert_eq!(pieces.entry().await.unwrap().unwrap().path, b"a");
        assert_eq!(pieces.data().await.unwrap().unwrap(), b"one");
        assert_eq!(pieces.data().await.unwrap(), None);
        assert_eq!(pieces.data().await.unwrap(), None, "as often as it is asked");
        assert_eq!(pieces.entry().await.unwrap().unwrap().path, b"b");
        assert_eq!(pieces.entry().await.unwrap().unwrap().path, b"c");
        let mut bytes = 0;
        while let Some(chunk) = pieces.data().await.unwrap() {
            bytes += chunk.len();
        }
        assert_eq!(bytes, 100_000);
        assert!(pieces.entry().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_archive_is_an_error() {
        let mut pieces = Pieces::read(io::Cursor::new(vec![b'x'; 1024]));

        let error = pieces.entry().await.unwrap_err();

        assert!(format!("{error:#}").contains("Malformed tar archive"), "{error:#}");
    }
}
