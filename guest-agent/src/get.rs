//! Trees that the server gets from the guest: entries as the walk meets them, each file's bytes
//! behind it.
//!
//! Parents come before their children. What is neither file, directory nor link is left out, for
//! there is no way to send it; so is what vanishes during the walk.

use std::fs::{self, File, OpenOptions, ReadDir};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use ovum_agent_proto::files::{Entry, EntryKind, GetSpec};
use ovum_agent_proto::message::{ErrorCode, ToServer};
use rustix::buffer::spare_capacity;
use rustix::io::read;

use crate::command::NotStarted;
use crate::jobs::Progress;
use crate::outbox::{Credit, Outbox};
use crate::put::absolute;
use crate::stat::MODE_BITS;

/// What a tree is called whose root is the root of all.
const ROOT_NAME: &str = "root";

/// A tree on its way.
#[derive(Debug)]
pub(crate) struct Get {
    follow_links: bool,
    credit: Credit,
    /// Directories that are being read, the innermost last.
    levels: Vec<Level>,
    /// An entry that waits for credit, with its file.
    next: Option<(Entry, Option<File>)>,
    /// The file that is being sent.
    file: Option<Sending>,
}

#[derive(Debug)]
struct Level {
    /// Relative, as the server knows it.
    name: String,
    entries: ReadDir,
    /// Device and number: one that is its own ancestor by way of links is not entered.
    identity: (u64, u64),
}

#[derive(Debug)]
struct Sending {
    file: File,
    name: String,
    left_bytes: u64,
}

/// Something that was met on the walk.
struct Found {
    entry: Entry,
    file: Option<File>,
    level: Option<Level>,
}

impl Get {
    /// Looks at the root of the tree.
    pub(crate) fn open(spec: &GetSpec) -> Result<Self, NotStarted> {
        let not_started = |error: &io::Error| {
            let code = match error.kind() {
                ErrorKind::NotFound | ErrorKind::NotADirectory => ErrorCode::NotFound,
                _ => ErrorCode::System,
            };
            NotStarted { code, message: format!("{}: {error}", spec.path) }
        };
        let path = absolute(&spec.path);
        let name = base_name(&path).map_err(|error| not_started(&error))?;
        let mut get = Self {
            follow_links: spec.follow_links,
            credit: Credit::new(),
            levels: Vec::new(),
            next: None,
            file: None,
        };
        let found = get.look(&path, name).map_err(|error| not_started(&error))?;
        let Found { entry, file, level } = found.ok_or_else(|| {
            not_started(&io::Error::other("is neither a file, a directory nor a link"))
        })?;
        get.next = Some((entry, file));
        get.levels.extend(level);
        Ok(get)
    }

    /// The server took some.
    pub(crate) fn add_credit(&mut self, bytes: u32) {
        self.credit.add(bytes);
    }

    /// Whether there is something to send, and credit for it.
    pub(crate) fn is_restless(&self) -> bool {
        match &self.next {
            Some((entry, _)) => {
                let mut credit = self.credit;
                credit.spend(&ToServer::Entry(entry.clone()))
            }
            None => self.credit.chunk_bytes() > 0,
        }
    }

    /// Sends as much as there is room for.
    pub(crate) fn work(&mut self, outbox: &mut Outbox<'_>) -> Progress {
        while outbox.has_room() && self.is_restless() {
            match self.step(outbox) {
                Ok(Progress::GoesOn) => {}
                Ok(Progress::Over) => {
                    outbox.say(&ToServer::End);
                    return Progress::Over;
                }
                Err((name, error)) => {
                    let message = format!("{name}: {error}");
                    outbox.say(&ToServer::Error { code: ErrorCode::System, message });
                    return Progress::Over;
                }
            }
        }
        Progress::GoesOn
    }

    /// The next frame, or the next directory entry looked at.
    fn step(&mut self, outbox: &mut Outbox<'_>) -> Result<Progress, (String, io::Error)> {
        if let Some(mut sending) = self.file.take() {
            let chunk = sending.read(self.credit.chunk_bytes());
            let message = ToServer::Data(chunk.map_err(|error| (sending.name.clone(), error))?);
            self.credit.spend(&message);
            outbox.say(&message);
            self.file = (sending.left_bytes > 0).then_some(sending);
            return Ok(Progress::GoesOn);
        }
        if let Some((entry, file)) = self.next.take() {
            let (name, left_bytes) = (entry.path.clone(), entry.size);
            let message = ToServer::Entry(entry);
            self.credit.spend(&message);
            outbox.say(&message);
            let file = file.filter(|_| left_bytes > 0);
            self.file = file.map(|file| Sending { file, name, left_bytes });
            return Ok(Progress::GoesOn);
        }
        let Some(level) = self.levels.last_mut() else { return Ok(Progress::Over) };
        match level.entries.next() {
            None => drop(self.levels.pop()),
            Some(Err(error)) => return Err((level.name.clone(), error)),
            Some(Ok(found)) => {
                let name = format!("{}/{}", level.name, found.file_name().to_string_lossy());
                match self.look(&found.path(), name.clone()) {
                    Ok(Some(Found { entry, file, level })) => {
                        self.next = Some((entry, file));
                        self.levels.extend(level);
                    }
                    Ok(None) => {}
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    Err(error) => return Err((name, error)),
                }
            }
        }
        Ok(Progress::GoesOn)
    }

    /// What lies at `path`; nothing if it cannot be sent.
    fn look(&self, path: &Path, name: String) -> io::Result<Option<Found>> {
        let mut found = fs::symlink_metadata(path)?;
        if found.is_symlink() && self.follow_links {
            // One that leads nowhere, or in a circle, is sent as the link it is.
            found =
                fs::metadata(path).ok().filter(|target| !self.is_inside(target)).unwrap_or(found);
        }
        let (mut file, mut level) = (None, None);
        let kind = if found.is_file() {
            let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
            let opened = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
            // As large as what was opened, which may be newer than what was looked at.
            found = opened.metadata()?;
            if !found.is_file() {
                return Ok(None);
            }
            file = Some(opened);
            EntryKind::File
        } else if found.is_dir() {
            let (name, entries) = (name.clone(), fs::read_dir(path)?);
            level = Some(Level { name, entries, identity: (found.dev(), found.ino()) });
            EntryKind::Directory
        } else if found.is_symlink() {
            EntryKind::Link(fs::read_link(path)?.to_string_lossy().into_owned())
        } else {
            return Ok(None);
        };
        let entry = Entry {
            path: name,
            size: if file.is_some() { found.len() } else { 0 },
            kind,
            mode: found.mode() & MODE_BITS,
            mtime: found.mtime(),
            uid: found.uid(),
            gid: found.gid(),
        };
        Ok(Some(Found { entry, file, level }))
    }

    fn is_inside(&self, target: &fs::Metadata) -> bool {
        let identity = (target.dev(), target.ino());
        self.levels.iter().any(|level| level.identity == identity)
    }
}

impl Sending {
    /// The next chunk, never empty. The server was told how many bytes there are.
    fn read(&mut self, bytes_max: usize) -> io::Result<Vec<u8>> {
        let bytes_max = bytes_max.min(usize::try_from(self.left_bytes).unwrap_or(usize::MAX));
        let mut chunk = Vec::with_capacity(bytes_max);
        let read_bytes = read(&self.file, spare_capacity(&mut chunk))?;
        if read_bytes == 0 {
            return Err(io::Error::other("became shorter while it was read"));
        }
        chunk.truncate(bytes_max);
        self.left_bytes -= u64::try_from(chunk.len()).unwrap_or(self.left_bytes);
        Ok(chunk)
    }
}

/// The last part of a path, however it is written.
fn base_name(path: &Path) -> io::Result<String> {
    let whole = match path.file_name() {
        Some(_) => path.to_owned(),
        None => fs::canonicalize(path)?,
    };
    Ok(whole.file_name().map_or(ROOT_NAME.into(), |name| name.to_string_lossy().into_owned()))
}
