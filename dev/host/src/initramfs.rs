//! What the emulated host's kernel finds at boot: busybox, modules and PID 1.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::cpio::Archive;
use crate::kernel::Kernel;
use crate::modules::{Modules, WANTED};

const INIT: &str = include_str!("init.sh");
/// Where PID 1 mounts things, and what it starts from.
const FOLDERS: &[&str] =
    &["dev", "host", "host/modules", "layer", "outer", "proc", "root", "run", "sys", "tmp"];
/// Static, so that it runs where there is no libc; from Debian's busybox-static.
const BUSYBOX: &str = "/usr/bin/busybox";

/// Returns the archive, made anew when kernel, modules or PID 1 have changed.
///
/// # Errors
///
/// If busybox or a module cannot be read, or the archive cannot be written.
pub fn ready(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let mut hasher = DefaultHasher::new();
    (&kernel.id, INIT, WANTED, FOLDERS).hash(&mut hasher);
    let key = format!("initramfs-{:016x}", hasher.finish());
    let folder = cache.folder(&key, |folder| write(kernel, &folder.join("initramfs")))?;
    Ok(folder.join("initramfs"))
}

fn write(kernel: &Kernel, path: &Path) -> Result<()> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("Failed to read {BUSYBOX}"))?;
    let mut archive = Archive::default();
    for directory in FOLDERS {
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
