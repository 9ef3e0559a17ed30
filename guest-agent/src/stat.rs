//! What lies at a path.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use ovum_agent_proto::files::{PathInfo, PathKind, StatSpec};
use ovum_agent_proto::message::{ErrorCode, ToServer};

use crate::put::absolute;

/// Permission bits of a mode.
pub(crate) const MODE_BITS: u32 = 0o7777;

/// Looks.
pub(crate) fn answer(spec: &StatSpec) -> ToServer {
    let path = absolute(&spec.path);
    let found = if spec.follow_links { fs::metadata(&path) } else { fs::symlink_metadata(&path) };
    match found {
        Ok(found) => ToServer::PathInfo(PathInfo {
            kind: kind(&path, &found),
            mode: found.permissions().mode() & MODE_BITS,
            size: found.len(),
        }),
        // A file where a directory is expected: there is nothing behind it.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            ToServer::PathInfo(PathInfo { kind: PathKind::Missing, mode: 0, size: 0 })
        }
        Err(error) => {
            let message = format!("{}: {error}", spec.path);
            ToServer::Error { code: ErrorCode::System, message }
        }
    }
}

fn kind(path: &Path, found: &Metadata) -> PathKind {
    if found.is_file() {
        PathKind::File
    } else if found.is_dir() {
        PathKind::Directory
    } else if found.is_symlink() {
        let target = fs::read_link(path).unwrap_or_default();
        PathKind::Link(target.to_string_lossy().into_owned())
    } else {
        PathKind::Special
    }
}
