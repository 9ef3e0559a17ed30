//! Files and folders from here into an instance, parents first.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use serde_json::json;

use super::put::put;
use super::{CHUNK_BYTES, Guest, Moved, Ways, base_name, is_content};

/// Permission bits of a mode.
const MODE_BITS: u32 = 0o7777;

/// Something to copy.
struct Item {
    from: PathBuf,
    to: String,
    found: Metadata,
}

/// Copies `from` to `to`.
pub(super) async fn upload(
    guest: &Guest,
    from: &Path,
    to: &str,
    ways: Ways,
) -> anyhow::Result<Moved> {
    let is_content = from.to_str().is_some_and(is_content);
    let found = look(from, ways.follow_links || is_content)?;
    ensure!(!is_content || found.is_dir(), "{} is not a folder", from.display());
    let place = guest.stat(to).await?;
    let to = place.target(to, &base_name(from)?, found.is_dir(), is_content)?;
    let mut moved = Moved::default();
    let mut folders = Vec::new();
    let mut items = vec![Item { from: from.to_owned(), to, found }];
    while let Some(item) = items.pop() {
        if item.found.is_dir() {
            items.extend(children(&item, ways)?);
        }
        moved.bytes += send(guest, &item, ways).await?;
        moved.entries += 1;
        folders.extend(item.found.is_dir().then_some(item));
    }
    // Once more, innermost first: what was put into them has changed their time.
    for folder in folders.iter().rev() {
        send(guest, folder, ways).await?;
    }
    Ok(moved)
}

fn children(folder: &Item, ways: Ways) -> anyhow::Result<Vec<Item>> {
    let failed = || format!("Failed to read {}", folder.from.display());
    let mut children = Vec::new();
    for entry in fs::read_dir(&folder.from).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        let (from, name) = (entry.path(), entry.file_name());
        let name = name.to_str().with_context(|| format!("{name:?} is not UTF-8"))?;
        let to = format!("{}/{name}", folder.to.trim_end_matches('/'));
        let found = look(&from, ways.follow_links)?;
        children.push(Item { from, to, found });
    }
    Ok(children)
}

fn look(path: &Path, follow_links: bool) -> anyhow::Result<Metadata> {
    let found = if follow_links { fs::metadata(path) } else { fs::symlink_metadata(path) };
    found.with_context(|| format!("Failed to look at {}", path.display()))
}

/// Makes one thing in the instance; returns how many bytes it has.
async fn send(guest: &Guest, item: &Item, ways: Ways) -> anyhow::Result<u64> {
    let Item { from, to, found } = item;
    let mut request = json!({
        "direction": "to", "guest_path": to, "is_dir": found.is_dir(),
        "mode": found.mode() & MODE_BITS, "mtime": found.mtime(),
    });
    if ways.archive {
        request["uid"] = found.uid().into();
        request["gid"] = found.gid().into();
    }
    let mut file = None;
    if found.is_symlink() {
        let target = fs::read_link(from)?;
        let target = target.to_str().with_context(|| format!("{target:?} is not UTF-8"))?;
        request["link_target"] = target.into();
    } else if found.is_file() {
        let opened = File::open(from);
        file = Some(opened.with_context(|| format!("Failed to open {}", from.display()))?);
    } else if !found.is_dir() {
        bail!("{} is neither a file, a folder nor a link", from.display());
    }
    let read = async || {
        let Some(file) = &mut file else { return Ok(None) };
        let mut chunk = vec![0; CHUNK_BYTES];
        let read = file.read(&mut chunk)?;
        chunk.truncate(read);
        Ok((read > 0).then_some(chunk))
    };
    let sent = put(guest, &request, read).await;
    sent.with_context(|| format!("Failed to copy {} to {to}", from.display()))
}
