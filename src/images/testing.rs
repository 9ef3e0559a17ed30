//! What the tests of images share: layers, mounts and listings of their trees.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};

use rustix::fs::{lgetxattr, llistxattr};

use crate::images::digest::Digest;
use crate::images::layers::Layer;

pub(crate) use crate::tar::testing::{TarBuilder, header};

pub(crate) mod layout;
pub(crate) mod server;

impl TarBuilder {
    /// As the only layer of an image.
    pub(crate) fn layer(self) -> Layer {
        layer(&self.build())
    }
}

/// A layer of these plain bytes.
pub(crate) fn layer(tar: &[u8]) -> Layer {
    Layer { blob: file_of(tar), diff_id: Digest::of(tar) }
}

/// A nameless file with `content`, at its start.
pub(crate) fn file_of(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

/// Runs a tool that the tests need, and says which package has it if it is missing.
#[expect(clippy::disallowed_methods, reason = "an oracle of a test, not a tool of the product")]
pub(crate) fn run(package: &str, tool: &str, args: &[&str]) -> Output {
    match Command::new(tool).args(args).output() {
        Ok(output) => output,
        Err(error) => panic!("this test needs {tool} (Debian package {package}): {error}"),
    }
}

/// An EROFS image mounted by the kernel. Unmounted on drop.
#[derive(Debug)]
pub(crate) struct Mount {
    dir: tempfile::TempDir,
}

impl Mount {
    pub(crate) fn new(image: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (image.to_str().unwrap(), dir.path().to_str().unwrap());
        let output = run("mount", "mount", &["-t", "erofs", "-o", "ro,loop", from, to]);
        assert!(
            output.status.success(),
            "this test needs root, a loop device and a kernel with EROFS: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        run("mount", "umount", &[self.dir.path().to_str().unwrap()]);
    }
}

/// Every file below `dir`, one line each, with all that stat(2), readlink(2), listxattr(2) and its
/// bytes say.
pub(crate) fn listing(dir: &Path) -> Vec<String> {
    let mut todo = vec![dir.to_owned()];
    let mut lines = Vec::new();
    while let Some(path) = todo.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let kind = stat.file_type();
        let content = if kind.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().as_os_str().as_bytes().escape_ascii())
        } else if kind.is_file() {
            let content = fs::read(&path).unwrap();
            assert_eq!(content.len() as u64, stat.len());
            format!("{} {}", content.len(), &Digest::of(&content).hex()[..8])
        } else if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            "/".to_owned()
        } else {
            format!("dev {:x}", stat.rdev())
        };
        let name = path.strip_prefix(dir).unwrap().as_os_str().as_bytes().escape_ascii();
        lines.push(format!(
            "/{name} {:o} {}:{} {}.{} x{} {content}{}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.mtime(),
            stat.mtime_nsec(),
            stat.nlink(),
            xattrs(&path),
        ));
    }
    lines.sort();
    lines
}

fn xattrs(path: &Path) -> String {
    let mut names = vec![0_u8; 64 << 10];
    let length = llistxattr(path, &mut names[..]).unwrap_or(0);
    let mut all: Vec<String> = names[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let mut value = vec![0_u8; 65_536];
            let length = lgetxattr(path, name, &mut value[..]).unwrap();
            let shown = match &value[..length] {
                long if long.len() > 100 => format!("{} {}", long.len(), Digest::of(long).hex()),
                short => short.escape_ascii().to_string(),
            };
            format!(" {}={shown}", name.escape_ascii())
        })
        .collect();
    all.sort();
    all.concat()
}
