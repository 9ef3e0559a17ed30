//! The files a run makes: nameless, so that none stays behind, and inherited by QEMU.

use std::env;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use rustix::io::FdFlags;

/// What is kept of an NVMe controller's disk: enough for a partition or two.
const NVME_BYTES: u64 = 64 << 20;

/// Makes `file` survive into child processes and returns the path under which they open it.
///
/// # Errors
///
/// If the fd is bad, which an owned one is not.
pub fn share(file: &impl AsFd) -> Result<String> {
    let fd = file.as_fd();
    rustix::io::fcntl_setfd(fd, FdFlags::empty()).context("Failed to share a file")?;
    Ok(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Finds a program where the shell would.
///
/// # Errors
///
/// If it is nowhere.
pub fn program(name: &str) -> Result<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&folders).map(|folder| folder.join(name)).find(|p| p.is_file());
    found.with_context(|| {
        format!("{name} is not installed; `dev/in-host --packages` names what to install")
    })
}

/// Where the kernel's messages go: `OVUM_HOST_CONSOLE`, or a file that nobody else sees.
///
/// # Errors
///
/// If it cannot be made.
pub fn console() -> Result<File> {
    let Some(path) = env::var_os("OVUM_HOST_CONSOLE") else { return nameless() };
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    options.open(&path).with_context(|| format!("Failed to make {}", Path::new(&path).display()))
}

/// A disk with nothing on it and no room taken.
///
/// # Errors
///
/// If it cannot be made.
pub fn blank_disk(gib: u32) -> Result<File> {
    let disk = nameless()?;
    disk.set_len(u64::from(gib) << 30).context("Failed to size the disk")?;
    Ok(disk)
}

/// A disk with a fresh file system of kind `kind`.
///
/// # Errors
///
/// If it cannot be made, or there is no `mkfs` for it.
pub fn formatted_disk(gib: u32, kind: &str) -> Result<File> {
    let disk = blank_disk(gib)?;
    let options: &[&str] = match kind {
        "ext4" => &["-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"],
        "xfs" => &["-q", "-f", "-K", "-m", "reflink=1"],
        other => bail!("OVUM_DISK_FS is {other:?}; it can be ext4 or xfs"),
    };
    let mkfs = format!("mkfs.{kind}");
    let output = Command::new(&mkfs).args(options).arg(share(&disk)?).output();
    let output = output.with_context(|| format!("Failed to run {mkfs}; is it installed?"))?;
    if !output.status.success() {
        bail!("{mkfs} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(disk)
}

/// What the NVMe controller keeps.
///
/// # Errors
///
/// If it cannot be made.
pub fn nvme() -> Result<File> {
    let file = nameless()?;
    file.set_len(NVME_BYTES).context("Failed to size the NVMe disk")?;
    Ok(file)
}

/// A file without a name in the temporary folder: gone with its last fd.
fn nameless() -> Result<File> {
    let folder = env::temp_dir();
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlags::TMPFILE.bits().cast_signed())
        .open(&folder)
        .with_context(|| format!("Failed to make a file in {}", folder.display()))
}
