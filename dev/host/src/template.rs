//! A host that has booted, saved: a run goes on from there instead of booting.
//!
//! It is saved at the moment PID 1 asks for a job, before it has seen the outer machine's file
//! system. QEMU writes it as it would migrate it, to a socket in the cache folder; a run that goes
//! on from it adds its own disk, sockets and job.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process;
use std::thread;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::channel::{Milestone, Port};
use crate::files;
use crate::hardware::Hardware;
use crate::machine::{Machine, Supplies};

/// The file in a template's folder.
const STATE: &str = "state";

/// A saved host.
#[derive(Debug)]
pub struct Template {
    folder: PathBuf,
}

impl Template {
    /// Finds the saved state of `hardware`, booting and saving it if there is none.
    ///
    /// It is as good as its makings: `emulator`, the initramfs, and this boot of this machine,
    /// since the kernel inside has measured our clock.
    ///
    /// # Errors
    ///
    /// If the host does not boot, or the state cannot be kept.
    pub fn ready(
        cache: &Cache,
        emulator: &Path,
        hardware: &Hardware,
        initramfs: &Path,
        disk_gib: u32,
    ) -> Result<Self> {
        let mut hasher = DefaultHasher::new();
        (emulator, hardware, initramfs, disk_gib).hash(&mut hasher);
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id");
        boot.context("Failed to tell this boot from others")?.hash(&mut hasher);
        let folder = cache.folder(&format!("state-{:016x}", hasher.finish()), |folder| {
            eprintln!("in-host: booting a host to start from (once)");
            save(emulator, hardware, initramfs, disk_gib, folder)
        })?;
        Ok(Self { folder })
    }

    /// Opens the state for one run.
    ///
    /// # Errors
    ///
    /// If it is gone, or no fd is left.
    pub fn state(&self) -> Result<File> {
        open(&self.folder.join(STATE))
    }

    /// Removes the state, so that the next run makes it anew.
    pub fn discard(self) {
        // If that fails the next run fails as this one did, and says so.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("Failed to open {}", path.display()))
}

fn save(
    emulator: &Path,
    hardware: &Hardware,
    initramfs: &Path,
    disk_gib: u32,
    folder: &Path,
) -> Result<()> {
    let monitor = Port::new()?;
    let mut machine = Machine::start(
        emulator,
        hardware,
        Supplies {
            initramfs: &open(initramfs)?,
            disk: &files::blank_disk(disk_gib)?,
            nvme: None,
            state: None,
            forwards: &[],
            job: None,
            monitor: Some(&monitor),
        },
    )?;
    machine.wait_for(Milestone::Ready)?;
    // By fd, because a socket's path may have no more than 107 bytes.
    let folder_fd = open(folder)?;
    let socket = format!("/proc/{}/fd/{}/socket", process::id(), folder_fd.as_raw_fd());
    let listener = UnixListener::bind(&socket).context("Failed to listen for the state")?;
    let mut file = File::create(folder.join(STATE)).context("Failed to make the state file")?;
    let copy = thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        io::copy(&mut stream, &mut file)
    });
    migrate(monitor.started(), &socket)?;
    // QEMU ends the stream when it is done with it, at the latest when it dies.
    drop(machine);
    let copied = copy.join().ok().context("The thread that keeps the state died")?;
    copied.context("Failed to keep the state")?;
    fs::remove_file(folder.join("socket")).context("Failed to remove the state's socket")
}

/// Has QEMU write its state to `socket`, as fast as that goes.
fn migrate(mut monitor: UnixStream, socket: &str) -> Result<()> {
    let orders = format!(
        r#"{{"execute":"qmp_capabilities"}}
{{"execute":"migrate-set-parameters","arguments":{{"max-bandwidth":1099511627776}}}}
{{"execute":"migrate-set-capabilities","arguments":{{"capabilities":
    [{{"capability":"events","state":true}}]}}}}
{{"execute":"migrate","arguments":{{"uri":"unix:{socket}"}}}}
"#
    );
    monitor.write_all(orders.as_bytes()).context("Failed to give QEMU its orders")?;
    for line in BufReader::new(monitor).lines() {
        let line = line.context("Failed to hear from QEMU")?;
        if line.contains(r#""status": "completed""#) {
            return Ok(());
        }
        if line.contains(r#""error""#) || line.contains(r#""status": "failed""#) {
            bail!("QEMU could not save the host: {line}");
        }
    }
    bail!("QEMU went away while it saved the host")
}
