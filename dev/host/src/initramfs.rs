//! What the emulated host's kernel finds at boot: busybox, modules, PID 1 and the job.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::MemfdFlags;

use crate::cache::Cache;
use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::modules::{Modules, WANTED};

const INIT: &str = include_str!("init.sh");
/// Static, so that it runs where there is no libc; from Debian's busybox-static.
const BUSYBOX: &str = "/usr/bin/busybox";

/// Returns the part that is the same for every run, made when kernel, modules or PID 1 change.
///
/// # Errors
///
/// If busybox or a module cannot be read, or the archive cannot be written.
pub fn ready(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (&kernel.id, INIT, WANTED).hash(&mut hasher);
    let key = format!("initramfs-{:016x}", hasher.finish());
    let folder = cache.folder(&key, |folder| write(kernel, &folder.join("initramfs")))?;
    Ok(folder.join("initramfs"))
}

fn write(kernel: &Kernel, path: &Path) -> Result<()> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("Failed to read {BUSYBOX}"))?;
    let mut archive = Archive::default();
    for directory in ["dev", "host", "host/modules"] {
        archive.directory(directory);
    }
    archive.file("init", INIT.as_bytes());
    archive.file("host/init", INIT.as_bytes());
    archive.file("host/busybox", &busybox);
    let mut order = String::new();
    for module in Modules::load(&kernel.modules)? {
        order += &format!("{} {}\n", module.name, module.arguments);
        archive.file(&format!("host/modules/{}.ko", module.name), &module.object);
    }
    archive.file("host/modules/order", order.as_bytes());
    fs::write(path, archive.finish()).with_context(|| format!("Failed to write {}", path.display()))
}

/// Returns the cached part with the job of one run behind it, in memory only.
///
/// # Errors
///
/// If the cached part cannot be read or memory is short.
pub fn with_job(cached: &Path, job: &[u8]) -> Result<File> {
    let mut archive = Archive::default();
    archive.file("job", job);
    let mut base =
        File::open(cached).with_context(|| format!("Failed to open {}", cached.display()))?;
    let memory = rustix::fs::memfd_create("initramfs", MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.context("Failed to make a memory file")?);
    std::io::copy(&mut base, &mut file).context("Failed to copy the initramfs")?;
    file.write_all(&archive.finish()).context("Failed to add the job to the initramfs")?;
    file.rewind().context("Failed to rewind the initramfs")?;
    Ok(file)
}
