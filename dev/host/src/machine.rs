//! The emulated host as a process: QEMU emulating a machine with AMD's virtualisation.
//!
//! TCG emulates SVM with nested paging, so that `kvm-amd` loads inside and `/dev/kvm` there is the
//! real thing. All that the process needs is given to it as fds without names: whatever kills us,
//! no file stays behind, and no process, since QEMU dies with us.

use std::env;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::OFlags;
use rustix::io::FdFlags;
use rustix::process::Signal;

use crate::channel::{self, Event, Port, Stream};
use crate::kernel::Kernel;
use crate::options::Options;

const QEMU: &str = "qemu-system-x86_64";
/// Ten times what a boot takes on an idle machine.
const BOOT_MAX: Duration = Duration::from_secs(60);
/// What of the kernel's messages is shown when the host dies.
const CONSOLE_TAIL_BYTES: usize = 8 << 10;
/// What a shell says of a program that SIGPIPE killed.
const STATUS_UNHEARD: u8 = 128 + 13;

/// A running emulated host.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    events: Receiver<Event>,
    console: File,
}

impl Machine {
    /// Starts the host; it boots while the caller waits in [`Machine::wait`].
    ///
    /// # Errors
    ///
    /// If a file cannot be made or QEMU cannot be started. Nothing is left running.
    pub fn start(options: &Options, kernel: &Kernel, initramfs: &File) -> Result<Self> {
        let [stdout, stderr, stdin, status] =
            [Port::new()?, Port::new()?, Port::new()?, Port::new()?];
        let console = console()?;
        let disk = disk(options.disk_gib)?;
        let mut command = Command::new(QEMU);
        command
            .args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"])
            .args(["-M", "q35", "-m", &options.memory_mib.to_string()])
            .args(["-smp", &options.cpus.to_string()])
            .args(["-display", "none", "-nodefaults", "-no-user-config", "-no-reboot"])
            .arg("-kernel")
            .arg(&kernel.image)
            .args(["-initrd", &share(initramfs)?])
            .args(["-append", APPEND])
            .args(["-chardev", &format!("file,id=console,path={},append=on", share(&console)?)])
            .args(["-serial", "chardev:console"])
            .args(["-fsdev", FSDEV, "-device", "virtio-9p-pci,fsdev=outer,mount_tag=outer"])
            .args([
                "-drive",
                &format!(
                    "if=none,id=disk,format=raw,discard=unmap,cache=unsafe,file={}",
                    share(&disk)?
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .args(["-netdev", &netdev(options)])
            .args(["-device", "virtio-net-pci,netdev=net,romfile="])
            .args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        for (port, nr) in [(&stdout, 1), (&stderr, 2), (&stdin, 3), (&status, 4)] {
            command
                .args(["-chardev", &format!("socket,id=port{nr},fd={}", port.fd())])
                .args(["-device", &format!("virtserialport,nr={nr},chardev=port{nr}")]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(console.try_clone().context("Failed to share the console")?);
        // SAFETY: between fork and exec this makes one system call and touches no lock or memory
        // that another thread could have held at the fork.
        unsafe {
            command.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
            });
        }
        let qemu = command.spawn().with_context(|| {
            format!("Failed to start {QEMU}; `in-host --packages` names what to install")
        })?;
        let (sender, events) = mpsc::channel();
        channel::pass(Stream::Stdout, stdout.started(), sender.clone());
        channel::pass(Stream::Stderr, stderr.started(), sender.clone());
        channel::feed(stdin.started());
        channel::listen(status.started(), sender);
        Ok(Self { qemu, events, console })
    }

    /// Waits for the command inside to end and for all its output; returns its exit status.
    ///
    /// # Errors
    ///
    /// If the host does not boot in time or dies without a status; the kernel's last messages
    /// are in the error.
    pub fn wait(mut self) -> Result<u8> {
        let boot_end = Instant::now() + BOOT_MAX;
        let (mut started, mut exited) = (false, None);
        let (mut stdout_passed, mut stderr_passed) = (0, 0);
        loop {
            let event = if started {
                self.events.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                self.events.recv_timeout(boot_end.saturating_duration_since(Instant::now()))
            };
            match event {
                Ok(Event::Started) => started = true,
                Ok(Event::Exited { status, stdout_bytes, stderr_bytes }) => {
                    exited = Some((status, stdout_bytes, stderr_bytes));
                }
                Ok(Event::Passed { stream: Stream::Stdout, bytes }) => stdout_passed += bytes,
                Ok(Event::Passed { stream: Stream::Stderr, bytes }) => stderr_passed += bytes,
                Ok(Event::Unheard) => return Ok(STATUS_UNHEARD),
                Ok(Event::Gone) if exited.is_some() => {}
                Ok(Event::Gone) | Err(RecvTimeoutError::Disconnected) => {
                    bail!("The emulated host died; its last messages:\n{}", self.console_tail())
                }
                Err(RecvTimeoutError::Timeout) => bail!(
                    "The emulated host did not boot in {} s; its last messages:\n{}",
                    BOOT_MAX.as_secs(),
                    self.console_tail()
                ),
            }
            if let Some((status, stdout_bytes, stderr_bytes)) = exited
                && stdout_passed >= stdout_bytes
                && stderr_passed >= stderr_bytes
            {
                return Ok(status);
            }
        }
    }

    fn console_tail(&mut self) -> String {
        let mut text = Vec::new();
        let read = self.console.seek(SeekFrom::Start(0));
        if let Err(error) = read.and_then(|_| self.console.read_to_end(&mut text)) {
            return format!("(unreadable: {error})");
        }
        let tail = &text[text.len().saturating_sub(CONSOLE_TAIL_BYTES)..];
        String::from_utf8_lossy(tail).into_owned()
    }
}

impl Drop for Machine {
    /// The command is over or nobody waits for it, and nothing in the machine outlives it.
    fn drop(&mut self) {
        // Fails only if QEMU is gone already, which is what we want.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

const APPEND: &str = "console=ttyS0 panic=-1 reboot=t quiet loglevel=4 nokaslr mitigations=off \
                      tsc=reliable no_timer_check random.trust_cpu=on rdinit=/init";
/// Read-only: what is inside can change its overlay, never the outer machine.
const FSDEV: &str = "local,id=outer,path=/,security_model=none,readonly=on,multidevs=remap";

fn netdev(options: &Options) -> String {
    let mut netdev = String::from("user,id=net");
    for port in &options.forwards {
        netdev += &format!(",hostfwd=tcp:127.0.0.1:{port}-:{port}");
    }
    netdev
}

/// Makes `file` survive into QEMU and returns the path under which it opens it.
fn share(file: &File) -> Result<String> {
    rustix::io::fcntl_setfd(file, FdFlags::empty()).context("Failed to share a file")?;
    Ok(format!("/proc/self/fd/{}", file.as_raw_fd()))
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

fn console() -> Result<File> {
    match env::var_os("OVUM_HOST_CONSOLE") {
        Some(path) => OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .with_context(|| format!("Failed to make {}", Path::new(&path).display())),
        None => nameless(),
    }
}

/// A sparse disk with a fresh file system.
fn disk(gib: u32) -> Result<File> {
    let disk = nameless()?;
    disk.set_len(u64::from(gib) << 30).context("Failed to size the disk")?;
    let path = share(&disk)?;
    let output = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard"])
        .arg(&path)
        .output()
        .context("Failed to run mkfs.ext4")?;
    if !output.status.success() {
        bail!("mkfs.ext4 failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(disk)
}
