//! Where made things are kept between runs, each whole or absent.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

/// How long something is kept that nobody uses.
const UNUSED_MAX: Duration = Duration::from_hours(7 * 24);

/// The folder of this tool's artefacts.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Takes `OVUM_CACHE`, or `ovum` in the user's cache folder.
    ///
    /// # Errors
    ///
    /// If no variable says where that is, or it cannot be made.
    pub fn open() -> Result<Self> {
        let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let root = path("OVUM_CACHE")
            .or_else(|| path("XDG_CACHE_HOME").map(|dir| dir.join("ovum")))
            .or_else(|| path("HOME").map(|dir| dir.join(".cache/ovum")))
            .context("Cannot place the cache: set OVUM_CACHE or HOME")?
            .join("host");
        fs::create_dir_all(&root).with_context(|| format!("Failed to make {}", root.display()))?;
        Ok(Self { root })
    }

    /// Returns the folder `name`, calling `make` to fill it if it is not there.
    ///
    /// `make` fills a folder beside it that is renamed when done, under a lock: what another run
    /// sees is complete, and two runs at once make it once.
    ///
    /// # Errors
    ///
    /// Those of `make`, and of files; the half-made folder is removed.
    pub fn folder(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let done = self.root.join(name);
        if done.is_dir() {
            // Says that it is in use, which is all that a failure here would cost.
            let _ = File::open(&done).and_then(|folder| folder.set_modified(SystemTime::now()));
            return Ok(done);
        }
        let lock = File::create(self.root.join("lock")).context("Failed to open the cache lock")?;
        lock.lock().context("Failed to lock the cache")?;
        if done.is_dir() {
            return Ok(done);
        }
        self.sweep()?;
        let half = self.root.join(format!("{name}.{}", process::id()));
        fs::create_dir_all(&half).with_context(|| format!("Failed to make {}", half.display()))?;
        let made = make(&half).and_then(|()| {
            fs::rename(&half, &done).with_context(|| format!("Failed to name {}", done.display()))
        });
        if made.is_err() {
            // Best effort: the error that brought us here is the one to report.
            let _ = fs::remove_dir_all(&half);
        }
        made.map(|()| done)
    }

    /// Removes what nobody has used for long, and what a run that was killed left half made: the
    /// lock is ours, so nobody is making it now.
    fn sweep(&self) -> Result<()> {
        let entries = fs::read_dir(&self.root).context("Failed to list the cache")?;
        for entry in entries.filter_map(Result::ok) {
            let name = entry.file_name();
            let kept = name == "lock" || name.to_string_lossy().starts_with("kernel-");
            let is_half = name.to_string_lossy().contains('.');
            let age = entry.metadata().and_then(|metadata| metadata.modified());
            let is_old = age.is_ok_and(|time| time.elapsed().is_ok_and(|age| age > UNUSED_MAX));
            if is_half || (is_old && !kept) {
                fs::remove_dir_all(entry.path()).context("Failed to sweep the cache")?;
            }
        }
        Ok(())
    }
}
