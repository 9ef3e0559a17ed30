//! Out of an instance, as a tar archive on standard output.

use std::io::{self, BufWriter, IsTerminal, Write};

use anyhow::{Context, ensure};

use super::tree::{Header, Step, Tree};
use super::{Guest, Moved, Ways, is_content};
use crate::tar::{Entry, EntryKind, TarWriter};

/// Writes `from` as an archive.
pub(super) async fn pack(guest: &Guest, from: &str, ways: Ways) -> anyhow::Result<Moved> {
    let out = io::stdout();
    ensure!(!out.is_terminal(), "Refused to write an archive to a terminal: redirect it");
    let mut tree = Tree::open(guest, from, ways).await?;
    let mut archive = TarWriter::new(BufWriter::new(out.lock()));
    let mut moved = Moved::default();
    while let Some(step) = tree.next().await? {
        match step {
            Step::Entry(header) => {
                archive.begin(&entry(&header, is_content(from))?)?;
                moved.entries += 1;
            }
            Step::Data(bytes) => {
                archive.write_all(&bytes)?;
                moved.bytes += u64::try_from(bytes.len())?;
            }
            Step::Whole => {}
        }
    }
    archive.finish()?;
    Ok(moved)
}

/// As it stands in an archive. If the content of a folder was asked for, that is `.`.
fn entry(header: &Header, is_content: bool) -> anyhow::Result<Entry> {
    let mut path = if is_content {
        let below = header.below_root().to_str().context("The server sent no text")?;
        if below.is_empty() { ".".to_owned() } else { format!("./{below}") }
    } else {
        header.path.clone()
    };
    let (kind, link) = match (&header.link_target, header.is_dir) {
        (Some(target), _) => (EntryKind::Symlink, target.as_str()),
        (None, true) => (EntryKind::Directory, ""),
        (None, false) => (EntryKind::File, ""),
    };
    if kind == EntryKind::Directory {
        path.push('/');
    }
    Ok(Entry {
        path: path.into(),
        kind,
        link: link.into(),
        mode: u16::try_from(header.mode).context("The server sent a mode that is none")?,
        uid: header.uid,
        gid: header.gid,
        mtime_s: i64::try_from(header.mtime).context("The server sent a time that is none")?,
        mtime_ns: 0,
        size_bytes: if kind == EntryKind::File { header.size } else { 0 },
        device: (0, 0),
        xattrs: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(path: &str, is_dir: bool, is_content: bool) -> String {
        let header = Header {
            path: path.into(),
            mode: 0o755,
            is_dir,
            link_target: None,
            size: 0,
            mtime: 1,
            uid: 0,
            gid: 0,
        };
        String::from_utf8(entry(&header, is_content).unwrap().path).unwrap()
    }

    #[test]
    fn the_name_of_a_folder_is_in_front_unless_its_content_was_asked_for() {
        assert_eq!(path("conf", true, false), "conf/");
        assert_eq!(path("conf/a/b", false, false), "conf/a/b");
        assert_eq!(path("conf", true, true), "./");
        assert_eq!(path("conf/a", true, true), "./a/");
        assert_eq!(path("conf/a/b", false, true), "./a/b");
    }
}
