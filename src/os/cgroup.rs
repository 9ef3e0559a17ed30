//! Control groups (version 2): how much of the host each worker may have.
//!
//! ```text
//! /sys/fs/cgroup/ovum/DATA-FOLDER/INSTANCE
//! ```
//!
//! A worker outlives the server, so its group is not below the server's: whoever ends that one,
//! systemd for instance, would end the workers too. A host whose groups cannot be written to works
//! without: then guests share the host as its processes do.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::pread;
use sha2::{Digest, Sha256};
use tokio::io::Interest;
use tokio::runtime::Handle;

use crate::os::readable::notified;

/// Where the kernel has them, on any host of this decade.
pub const ROOT: &str = "/sys/fs/cgroup";

/// Ours, under the root.
const OURS: &str = "ovum";

/// What is divided.
const CONTROLLERS: [&str; 2] = ["cpu", "memory"];

/// Share of a vCPU; 100 is what a process without a group has (cgroup-v2, "cpu.weight").
const WEIGHT_OF_VCPU: u64 = 100;

/// Largest share the kernel takes.
const WEIGHT_MAX: u64 = 10_000;

/// Memory of a worker beside its guest's: the program, and page tables of the guest's memory, of
/// which the kernel has two sets.
const OVERHEAD_BYTES: u64 = 128 << 20;
const OVERHEAD_PART: u64 = 64;

/// The groups of the workers of one data folder.
#[derive(Debug, Clone)]
pub struct Cgroups {
    folder: PathBuf,
    left: Left,
}

/// Groups that could not go because a process was still on its way out. Each goes with its last
/// process, unless a new worker was given it before.
#[derive(Debug, Clone, Default)]
struct Left(Arc<Mutex<BTreeSet<PathBuf>>>);

/// The group of one worker. It stays when this is dropped, as the worker does.
#[derive(Debug)]
pub struct Cgroup {
    folder: PathBuf,
    left: Left,
}

/// What a worker may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// vCPUs, for its weight against others.
    pub vcpus: u8,
    /// Memory of the guest, at its most.
    pub memory_bytes: u64,
}

impl Cgroups {
    /// For workers of the server of `data_dir`, under the `root` of all groups. Those of an earlier
    /// server go as soon as they have no process.
    ///
    /// # Errors
    ///
    /// Why there are none: `root` is not of version 2, or not ours to write to.
    pub fn open(root: &Path, data_dir: &Path) -> io::Result<Self> {
        let ours = root.join(OURS);
        // Two servers of one host tell their groups apart by this.
        let name = hex::encode(&Sha256::digest(data_dir.as_os_str().as_bytes())[..4]);
        let folder = ours.join(name);
        divide(root)?;
        fs::create_dir_all(&folder)?;
        divide(&ours)?;
        divide(&folder)?;
        let groups = Self { folder, left: Left::default() };
        for entry in fs::read_dir(&groups.folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                groups.left.remove(entry.path());
            }
        }
        Ok(groups)
    }

    /// Makes the group of the worker of `id`, which has none that lives.
    ///
    /// # Errors
    ///
    /// What the kernel says; no group is left.
    pub fn create(&self, id: &str, share: Share) -> io::Result<Cgroup> {
        let group = self.group(id);
        self.left.lock().remove(&group.folder);
        match fs::create_dir(&group.folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let Share { vcpus, memory_bytes } = share;
        let weight = (u64::from(vcpus) * WEIGHT_OF_VCPU).clamp(1, WEIGHT_MAX);
        group.set("cpu.weight", weight)?;
        let overhead_bytes = OVERHEAD_BYTES + memory_bytes / OVERHEAD_PART;
        group.set("memory.max", memory_bytes.saturating_add(overhead_bytes))?;
        // A worker that is killed for memory goes whole.
        group.set("memory.oom.group", 1)?;
        Ok(group)
    }

    /// The group of `id`, if there is one, to be removed when its worker is gone.
    pub fn find(&self, id: &str) -> Option<Cgroup> {
        Some(self.group(id)).filter(|group| group.folder.is_dir())
    }

    fn group(&self, id: &str) -> Cgroup {
        Cgroup { folder: self.folder.join(id), left: self.left.clone() }
    }
}

impl Cgroup {
    /// Takes the process `pid` in; what it has taken of the host before is not counted.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn take(&self, pid: u32) -> io::Result<()> {
        self.set("cgroup.procs", pid.into())
    }

    /// Whether the kernel killed a process of it for want of memory (cgroup-v2, "memory.events").
    pub fn ran_out_of_memory(&self) -> bool {
        let events = fs::read_to_string(self.folder.join("memory.events")).unwrap_or_default();
        let kills = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.is_some_and(|kills| kills != "0")
    }

    /// Removes the group, now or, if a process of it has not quite ended, when it has.
    pub fn remove(self) {
        self.left.remove(self.folder);
    }

    fn set(&self, name: &str, value: u64) -> io::Result<()> {
        let path = self.folder.join(name);
        // Of an open file, not a new one: in a folder that is no group nothing is made.
        let mut file = File::options().write(true).open(path)?;
        file.write_all(value.to_string().as_bytes())
    }
}

impl Left {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<PathBuf>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the group in `folder`, or has it removed when it is empty.
    fn remove(&self, folder: PathBuf) {
        match fs::remove_dir(&folder) {
            Ok(()) => drop(self.lock().remove(&folder)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => self.watch(folder),
            // The next server removes it.
            Err(error) => tracing::warn!(folder = %folder.display(), %error, "A group is left"),
        }
    }

    fn watch(&self, folder: PathBuf) {
        // Without a runtime the server is at its end, and the next one finds the group.
        let Ok(runtime) = Handle::try_current() else { return };
        self.lock().insert(folder.clone());
        let left = self.clone();
        runtime.spawn(async move {
            match emptied(&folder).await {
                Ok(()) => left.remove_empty(&folder),
                // Gone already, or not to be watched: then the next server removes it.
                Err(error) => {
                    tracing::debug!(folder = %folder.display(), %error, "Group unwatched")
                }
            }
        });
    }

    fn remove_empty(&self, folder: &Path) {
        // Held meanwhile, so that nobody is given the group between the look and the removal.
        let mut left = self.lock();
        if left.remove(folder) {
            let _gone_or_found_by_the_next_server = fs::remove_dir(folder);
        }
    }
}

/// Waits until the group in `folder` has no process (cgroup-v2, "cgroup.events").
async fn emptied(folder: &Path) -> io::Result<()> {
    let events = notified(OwnedFd::from(File::open(folder.join("cgroup.events"))?))?;
    let mut text = [0; 256];
    loop {
        let read = pread(events.get_ref().as_fd(), &mut text, 0)?;
        if text[..read].split(|&byte| byte == b'\n').any(|line| line == b"populated 0") {
            return Ok(());
        }
        events.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

/// Lets the groups in `folder` have controllers of their own.
fn divide(folder: &Path) -> io::Result<()> {
    let path = folder.join("cgroup.subtree_control");
    let has = fs::read_to_string(&path)?;
    for controller in CONTROLLERS {
        if has.split_whitespace().all(|one| one != controller) {
            let mut file = File::options().write(true).open(&path)?;
            file.write_all(format!("+{controller}").as_bytes())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel puts into each group, as far as it is used here.
    fn make_group(folder: &Path) {
        fs::create_dir_all(folder).unwrap();
        for name in ["cgroup.procs", "cpu.weight", "memory.max", "memory.oom.group"] {
            fs::write(folder.join(name), "").unwrap();
        }
    }

    #[test]
    fn a_folder_that_is_no_group_is_not_written_to() {
        let dir = tempfile::tempdir().unwrap();

        assert!(Cgroups::open(dir.path(), Path::new("/data")).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_share_is_by_vcpus_and_memory() {
        let dir = tempfile::tempdir().unwrap();
        let groups = Cgroups { folder: dir.path().to_owned(), left: Left::default() };
        make_group(&dir.path().join("i"));

        let group = groups.create("i", Share { vcpus: 3, memory_bytes: 1 << 30 }).unwrap();

        let read = |name| fs::read_to_string(dir.path().join("i").join(name)).unwrap();
        assert_eq!(read("cpu.weight"), "300");
        let memory: u64 = read("memory.max").parse().unwrap();
        assert!(memory > 1 << 30 && memory < (1 << 30) + (256 << 20), "{memory}");
        group.remove();
    }

    #[test]
    fn a_group_says_whether_a_process_was_killed_for_memory() {
        let dir = tempfile::tempdir().unwrap();
        let group = Cgroup { folder: dir.path().to_owned(), left: Left::default() };
        assert!(!group.ran_out_of_memory());

        for (kills, is_so) in [("0", false), ("1", true), ("27", true)] {
            let events = format!("low 0\nmax 12\noom 3\noom_kill {kills}\noom_group_kill 0\n");
            fs::write(dir.path().join("memory.events"), events).unwrap();
            assert_eq!(group.ran_out_of_memory(), is_so, "{kills}");
        }
    }
}
