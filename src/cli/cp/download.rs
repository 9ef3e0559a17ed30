//! Out of an instance, into files here: nothing is written outside of where the tree goes.

use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};

use super::tree::{Header, Step, Tree};
use super::{Guest, Moved, Place, Ways, is_content};

/// A tree that arrives.
struct Arrival<'a> {
    to: &'a str,
    is_content: bool,
    ways: Ways,
    /// Where its root goes, once that is known.
    root: Option<PathBuf>,
    /// The file that is being written.
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
    let mut tree = Tree::open(guest, from, ways).await?;
    let mut arrival = Arrival {
        to,
        is_content: is_content(from),
        ways,
        root: None,
        file: None,
        folders: Vec::new(),
        moved: Moved::default(),
    };
    while let Some(step) = tree.next().await? {
        match step {
            Step::Entry(header) => arrival.begin(header)?,
            Step::Data(bytes) => arrival.write(&bytes)?,
            Step::Whole => arrival.end_file()?,
        }
    }
    arrival.finish()
}

impl Arrival<'_> {
    fn begin(&mut self, header: Header) -> anyhow::Result<()> {
        let root = match &self.root {
            Some(root) => root,
            None => {
                let place = Place::here(Path::new(self.to))?;
                let name = header.root_name();
                let root = place.target(self.to, name, header.is_dir, self.is_content)?;
                self.root.insert(root.into())
            }
        };
        let path = below(root, header.below_root())?;
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
        let (file, path, _) = self.file.as_mut().context("The server sent bytes of no file")?;
        self.moved.bytes += u64::try_from(bytes.len())?;
        file.write_all(bytes).with_context(|| format!("Failed to write {}", path.display()))
    }

    fn end_file(&mut self) -> anyhow::Result<()> {
        let Some((file, path, header)) = self.file.take() else { return Ok(()) };
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

/// A path from an instance, below `root`: it must not lead out, not even by way of a link that
/// came before it.
fn below(root: &Path, parts: &Path) -> anyhow::Result<PathBuf> {
    let mut path = root.to_owned();
    let mut parts = parts.components().peekable();
    while let Some(part) = parts.next() {
        path.push(part);
        let is_link = fs::symlink_metadata(&path).is_ok_and(|found| found.is_symlink());
        ensure!(parts.peek().is_none() || !is_link, "Refused to write through the link {path:?}");
    }
    Ok(path)
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
