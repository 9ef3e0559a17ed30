//! Files that the server puts into the guest: one entry per stream.
//!
//! Writing goes to the kernel's page cache at once, so nothing is kept here. Blocks of zeroes are
//! left out: what is sparse stays so. A file that is not brought to its end stays as it is.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};

use ovum_agent_proto::files::{PutKind, PutSpec};
use ovum_agent_proto::message::{ErrorCode, ToServer};
use rustix::fs::{AtFlags, CWD, Mode, Timespec, Timestamps, UTIME_OMIT, chmodat, utimensat};

use crate::command::NotStarted;
use crate::jobs::Progress;
use crate::outbox::{Outbox, Taken};

/// Fewest zeroes that are left out: a block of the file systems here.
const HOLE_BYTES_MIN: usize = 4 << 10;

/// Mode of directories above the entry, if they are missing.
const PARENT_MODE: u32 = 0o755;

/// An entry on its way.
#[derive(Debug)]
pub(crate) struct Put {
    spec: PutSpec,
    path: PathBuf,
    /// Nothing if it has no bytes.
    file: Option<File>,
    written_bytes: u64,
    taken: Taken,
}

/// A path of the guest: relative ones count from the root.
pub(crate) fn absolute(path: &str) -> PathBuf {
    Path::new("/").join(path)
}

impl Put {
    /// Makes the entry, still empty.
    pub(crate) fn open(spec: PutSpec) -> Result<Self, NotStarted> {
        let path = absolute(&spec.path);
        let file = make(&path, &spec).map_err(|error| {
            let code = match error.kind() {
                ErrorKind::NotFound => ErrorCode::NotFound,
                _ => ErrorCode::System,
            };
            NotStarted { code, message: format!("{}: {error}", spec.path) }
        })?;
        Ok(Self { spec, path, file, written_bytes: 0, taken: Taken::default() })
    }

    /// Takes the next bytes.
    pub(crate) fn write(&mut self, bytes: &[u8], outbox: &mut Outbox<'_>) -> Progress {
        let Some(file) = &mut self.file else {
            return self.fail(&io::Error::other("only a file has bytes"), outbox);
        };
        if let Err(error) = write_or_skip(file, bytes) {
            return self.fail(&error, outbox);
        }
        self.written_bytes += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.taken.add(bytes.len(), false, outbox);
        Progress::GoesOn
    }

    /// All bytes are there.
    pub(crate) fn finish(&mut self, outbox: &mut Outbox<'_>) {
        // The last block may have been left out.
        let sized = self.file.as_ref().map_or(Ok(()), |file| file.set_len(self.written_bytes));
        match sized.and_then(|()| furnish(&self.path, &self.spec)) {
            Ok(()) => outbox.say(&ToServer::Stored { bytes: self.written_bytes }),
            Err(error) => drop(self.fail(&error, outbox)),
        }
    }

    fn fail(&self, error: &io::Error, outbox: &mut Outbox<'_>) -> Progress {
        let message = format!("{}: {error}", self.spec.path);
        outbox.say(&ToServer::Error { code: ErrorCode::System, message });
        Progress::Over
    }
}

fn make(path: &Path, spec: &PutSpec) -> io::Result<Option<File>> {
    if let Some(parent) = path.parent() {
        DirBuilder::new().recursive(true).mode(PARENT_MODE).create(parent)?;
    }
    match &spec.kind {
        PutKind::File => file(path, spec.mode).map(Some),
        PutKind::Directory => directory(path).map(|()| None),
        PutKind::Link(target) => link(path, target).map(|()| None),
    }
}

/// The file at `path`, empty. Whatever else is there stays: a pipe or a device would make us wait.
fn file(path: &Path, mode: u32) -> io::Result<File> {
    if fs::metadata(path).is_ok_and(|found| found.is_dir()) {
        return Err(io::Error::other("is a directory"));
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file =
        OpenOptions::new().write(true).create(true).mode(mode).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    file.set_len(0)?;
    Ok(file)
}

fn directory(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Ok(()),
        Ok(_) => Err(io::Error::other("is a file")),
        Err(_) => fs::create_dir(path),
    }
}

/// A link, in place of whatever is no directory.
fn link(path: &Path, target: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => return Err(io::Error::other("is a directory")),
        Ok(_) => fs::remove_file(path)?,
        Err(_) => {}
    }
    symlink(target, path)
}

/// Owner, then mode, which a change of the owner would change, then time.
fn furnish(path: &Path, spec: &PutSpec) -> io::Result<()> {
    let is_link = matches!(spec.kind, PutKind::Link(_));
    if let Some((uid, gid)) = spec.owner {
        let change = if is_link { lchown } else { chown };
        change(path, Some(uid), Some(gid))?;
    }
    if !is_link {
        chmodat(CWD, path, Mode::from_raw_mode(spec.mode), AtFlags::empty())?;
    }
    if let Some(seconds) = spec.mtime {
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: 0 },
        };
        let flags = if is_link { AtFlags::SYMLINK_NOFOLLOW } else { AtFlags::empty() };
        utimensat(CWD, path, &times, flags)?;
    }
    Ok(())
}

fn write_or_skip(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() >= HOLE_BYTES_MIN && bytes.iter().all(|&byte| byte == 0) {
        let bytes = i64::try_from(bytes.len()).map_err(io::Error::other)?;
        return file.seek(SeekFrom::Current(bytes)).map(drop);
    }
    file.write_all(bytes)
}
