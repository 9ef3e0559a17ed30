//! The emulated host's kernel: a Debian package, downloaded and unpacked, never installed.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;

/// Packages that depend on the newest image of a kernel, the best first: Debian 12 offers both,
/// later ones the second. `OVUM_HOST_KERNEL` names another one.
const PACKAGES: &[&str] = &["linux-image-6.12-amd64", "linux-image-amd64"];

/// An unpacked kernel package.
#[derive(Debug)]
pub struct Kernel {
    /// Package name and version: what made this content.
    pub id: String,
    pub image: PathBuf,
    pub modules: PathBuf,
}

impl Kernel {
    /// Takes the kernel unpacked before, or fetches the newest one that apt knows.
    ///
    /// # Errors
    ///
    /// Says which step failed and, where there is one, what mends it.
    pub fn ready(cache: &Cache) -> Result<Self> {
        let wanted = env::var("OVUM_HOST_KERNEL").ok();
        let name = format!("kernel-{}", wanted.as_deref().unwrap_or("default"));
        let folder = cache.folder(&name, |folder| fetch(wanted.as_deref(), folder))?;
        let version = fs::read_to_string(folder.join("version"))
            .with_context(|| format!("Failed to read the version in {}", folder.display()))?;
        let image = file(&folder.join("boot"), "vmlinuz-")?;
        Ok(Self { id: version, image, modules: folder.join("lib/modules") })
    }
}

fn fetch(wanted: Option<&str>, folder: &Path) -> Result<()> {
    let image = match wanted {
        Some(package) => image_package(package),
        None => PACKAGES.iter().find_map(|package| image_package(package)),
    };
    let image = image.context("apt knows no kernel to fetch; `apt-get update` mends that")?;
    eprintln!("in-host: fetching {image} (once)");
    run(Command::new("apt-get")
        .current_dir(folder)
        .args(["-qq", "-o", "APT::Sandbox::User=root", "download"])
        .arg(&image))?;
    let archive = file(folder, "linux-image-")?;
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(folder))?;
    fs::remove_file(&archive).context("Failed to remove the kernel's package")?;
    let version = archive.file_stem().and_then(|stem| stem.to_str()).unwrap_or(&image);
    fs::write(folder.join("version"), version).context("Failed to note the kernel's version")
}

/// Follows a meta-package to the package that holds the kernel itself; none if apt knows neither.
fn image_package(package: &str) -> Option<String> {
    let depends = run(Command::new("apt-cache").args(["depends", "--important", package])).ok()?;
    let image = depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"));
    Some(image.unwrap_or(package).to_string())
}

fn file(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder);
    let entries = entries.with_context(|| format!("Failed to list {}", folder.display()))?;
    entries
        .filter_map(Result::ok)
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .with_context(|| format!("No {prefix}* in {}", folder.display()))
}

fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("Failed to run {program}"))?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
