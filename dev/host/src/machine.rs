//! The emulated host as a process: QEMU, from start to the command's exit status.
//!
//! TCG emulates SVM with nested paging, so that `kvm-amd` loads inside and `/dev/kvm` there is the
//! real thing. All that the process needs is given to it as fds without names: whatever kills us,
//! no file stays behind, and no process, since QEMU dies with us.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use crate::channel::{self, Event, Exit, Milestone, Port, Stream};
use crate::files;
use crate::hardware::Hardware;

/// Many times what a boot takes on an idle machine; busy ones exist.
const BOOT_MAX: Duration = Duration::from_secs(180);
/// What of the kernel's messages is shown when the host dies.
const CONSOLE_TAIL_BYTES: usize = 8 << 10;
/// QEMU names each processor feature that it does not emulate, on every start.
const TCG_CHATTER: &str = "TCG doesn't support requested feature";
/// What a shell says of a program that SIGPIPE killed.
const STATUS_UNHEARD: u8 = 128 + 13;

/// What one run brings to the hardware.
#[derive(Debug)]
pub struct Supplies<'a> {
    pub initramfs: &'a File,
    /// The scratch disk, formatted if it is going to be used.
    pub disk: &'a File,
    /// What the NVMe controller keeps, if there is one.
    pub nvme: Option<&'a File>,
    /// A saved state to go on from, instead of booting.
    pub state: Option<&'a File>,
    /// TCP ports of the host to offer outside.
    pub forwards: &'a [u16],
    /// What PID 1 runs. None leaves it waiting.
    pub job: Option<Vec<u8>>,
    /// Where QEMU takes orders, if anyone is going to give some.
    pub monitor: Option<&'a Port>,
}

/// A running emulated host.
#[derive(Debug)]
pub struct Machine {
    qemu: Child,
    events: Receiver<Event>,
    console: File,
    heard: Heard,
}

/// What the host has told so far.
#[derive(Debug, Default)]
struct Heard {
    reached: Option<Milestone>,
    stdout_bytes: u64,
    stderr_bytes: u64,
    exit: Option<Exit>,
}

impl Machine {
    /// Starts `emulator`; the host boots while the caller waits for it.
    ///
    /// # Errors
    ///
    /// If a file cannot be made or QEMU cannot be started. Nothing is left running.
    pub fn start(emulator: &Path, hardware: &Hardware, supplies: Supplies<'_>) -> Result<Self> {
        let console = files::console()?;
        let port = Port::new;
        let ports = [port()?, port()?, port()?, port()?, port()?, port()?];
        let mut command = Command::new(emulator);
        command.args(hardware.arguments());
        for (nr, port) in (1..).zip(&ports) {
            command.args(["-chardev", &format!("socket,id=port{nr},fd={}", port.fd())]);
        }
        command.args(supplies.arguments()?);
        let console_path = files::share(&console)?;
        command.args(["-chardev", &format!("file,id=console,append=on,path={console_path}")]);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(console.try_clone().context("Failed to share the console")?);
        // SAFETY: between fork and exec this makes one system call and touches no lock or memory
        // that another thread could have held at the fork.
        unsafe {
            command.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?)
            });
        }
        let qemu = command.spawn();
        let qemu = qemu.with_context(|| format!("Failed to start {}", emulator.display()))?;
        let [stdout, stderr, stdin, status, job, beat] = ports.map(Port::started);
        let (sender, events) = mpsc::channel();
        channel::pass(Stream::Stdout, stdout, sender.clone());
        channel::pass(Stream::Stderr, stderr, sender.clone());
        channel::listen(status, sender);
        match supplies.job {
            Some(script) => {
                channel::order(job, script);
                channel::feed(stdin);
            }
            None => channel::hold([job, stdin]),
        }
        if hardware.counts() {
            channel::hold([beat])
        } else {
            channel::beat(beat)
        }
        Ok(Self { qemu, events, console, heard: Heard::default() })
    }

    /// Waits until PID 1 inside asks for a job, or has begun one.
    ///
    /// # Errors
    ///
    /// If it does not boot in time or dies; the kernel's last messages are in the error.
    pub fn wait_for(&mut self, milestone: Milestone) -> Result<()> {
        let end = Instant::now() + BOOT_MAX;
        while self.heard.reached < Some(milestone) {
            let event = self.events.recv_timeout(end.saturating_duration_since(Instant::now()));
            if matches!(event, Err(RecvTimeoutError::Timeout)) {
                let seconds = BOOT_MAX.as_secs();
                let tail = self.console_tail();
                bail!("The emulated host did not boot in {seconds} s; its last messages:\n{tail}");
            }
            self.hear(event.unwrap_or(Event::Gone))?;
        }
        Ok(())
    }

    /// Waits for the job to end and for all its output; returns its exit status.
    ///
    /// # Errors
    ///
    /// If the host dies without a status; the kernel's last messages are in the error.
    pub fn wait(mut self) -> Result<u8> {
        loop {
            if let Some(status) = self.heard.status() {
                return Ok(status);
            }
            let event = self.events.recv();
            self.hear(event.unwrap_or(Event::Gone))?;
        }
    }

    /// Notes one event. They come from several threads, so any can overtake another.
    fn hear(&mut self, event: Event) -> Result<()> {
        let heard = &mut self.heard;
        match event {
            Event::Reached(milestone) => heard.reached = Some(milestone),
            Event::Passed { stream: Stream::Stdout, bytes } => heard.stdout_bytes += bytes,
            Event::Passed { stream: Stream::Stderr, bytes } => heard.stderr_bytes += bytes,
            Event::Exited(exit) => heard.exit = Some(exit),
            Event::Unheard => {
                heard.exit =
                    Some(Exit { status: STATUS_UNHEARD, stdout_bytes: 0, stderr_bytes: 0 });
            }
            Event::Gone => {
                bail!("The emulated host died; its last messages:\n{}", self.console_tail())
            }
        }
        Ok(())
    }

    fn console_tail(&mut self) -> String {
        let mut text = Vec::new();
        let start = self.console.seek(SeekFrom::Start(0));
        if let Err(error) = start.and_then(|_| self.console.read_to_end(&mut text)) {
            return format!("(unreadable: {error})");
        }
        let tail = &text[text.len().saturating_sub(CONSOLE_TAIL_BYTES)..];
        let tail = String::from_utf8_lossy(tail);
        let lines = tail.lines().filter(|line| !line.contains(TCG_CHATTER));
        lines.collect::<Vec<_>>().join("\n")
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

impl Heard {
    /// The exit status, once all that was written before it has passed.
    fn status(&self) -> Option<u8> {
        let exit = self.exit.as_ref()?;
        let is_all =
            self.stdout_bytes >= exit.stdout_bytes && self.stderr_bytes >= exit.stderr_bytes;
        is_all.then_some(exit.status)
    }
}

impl Supplies<'_> {
    fn arguments(&self) -> Result<Vec<String>> {
        let mut network = String::from("user,id=net");
        for port in self.forwards {
            network += &format!(",hostfwd=tcp:127.0.0.1:{port}-:{port}");
        }
        let mut arguments = vec!["-netdev".into(), network];
        arguments.extend(["-initrd".into(), files::share(self.initramfs)?]);
        for (id, file) in [("disk", Some(self.disk)), ("nvme", self.nvme)] {
            if let Some(file) = file {
                let file = files::share(file)?;
                let drive = "if=none,format=raw,discard=unmap,cache=unsafe";
                arguments.extend(["-drive".into(), format!("{drive},id={id},file={file}")]);
            }
        }
        if let Some(state) = self.state {
            files::share(state)?;
            arguments.extend(["-incoming".into(), format!("fd:{}", state.as_raw_fd())]);
        }
        if let Some(monitor) = self.monitor {
            let chardev = format!("socket,id=monitor,fd={}", monitor.fd());
            arguments.extend(["-chardev".into(), chardev]);
            arguments.extend(["-mon".into(), "chardev=monitor,mode=control".into()]);
        }
        Ok(arguments)
    }
}
