//! Runs a command on a KVM host: this machine if it can, an emulated one otherwise.
//!
//! `options` reads what was asked and `host` decides where the command runs. If this machine
//! cannot, `kernel`, `modules` and `initramfs` make what the emulated one boots and `emulator` what
//! it boots in, kept by `cache`. `template` boots it once and saves it, `machine` goes on from
//! there with the command as a `job`, and `channel` carries its streams.

mod cache;
mod channel;
mod cpio;
mod emulator;
mod files;
mod hardware;
mod host;
mod initramfs;
mod job;
mod kernel;
mod machine;
mod modules;
mod options;
mod template;

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::cache::Cache;
use crate::channel::Milestone;
use crate::hardware::Hardware;
use crate::host::Host;
use crate::kernel::Kernel;
use crate::machine::{Machine, Supplies};
use crate::options::{Options, Request, USAGE};
use crate::template::Template;

/// What Debian calls the things that the emulated host is made with.
const PACKAGES: &[&str] = &["busybox-static", "e2fsprogs", "qemu-system-x86", "xz-utils"];
/// Our own failure, as `ssh` and `chroot` have one apart from the command's.
const STATUS_FAILED: u8 = 125;

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("in-host: {error:#}");
            ExitCode::from(STATUS_FAILED)
        }
    }
}

fn run() -> Result<u8> {
    let options = Options::parse(env::args_os().skip(1))?;
    match &options.request {
        Request::Help => print!("{USAGE}"),
        Request::Packages => println!("{}", PACKAGES.join(" ")),
        Request::Run(command) => {
            let choice = host::choose(options.virtue())?;
            eprintln!("in-host: {}", choice.reason);
            return match choice.host {
                Host::Native => native(command),
                Host::Emulated => emulated(&options, command),
            };
        }
    }
    Ok(0)
}

/// Becomes the command; returns only if that fails.
fn native(command: &[OsString]) -> Result<u8> {
    let (program, arguments) = command.split_first().context("No command given")?;
    let error = Command::new(program).args(arguments).exec();
    Err(error).with_context(|| format!("Failed to run {}", program.display()))
}

fn emulated(options: &Options, command: &[OsString]) -> Result<u8> {
    let disk_kind = env::var("OVUM_DISK_FS").unwrap_or_else(|_| "ext4".into());
    check_free(&options.forwards)?;
    let cache = Cache::open()?;
    let kernel = Kernel::ready(&cache)?;
    let initramfs = initramfs::ready(&cache, &kernel)?;
    let emulator = emulator::ready(&cache)?;
    let hardware = Hardware::new(options, &kernel.image);
    // QEMU can save neither an NVMe controller nor an edu device.
    let nvme = options.vfio.then(files::nvme).transpose()?;
    let cold = options.vfio || env::var_os("OVUM_HOST_BOOT").is_some_and(|boot| boot == "cold");
    let template = if cold {
        None
    } else {
        Some(Template::ready(&cache, &emulator, &hardware, &initramfs, options.disk_gib)?)
    };
    let mut machine = Machine::start(
        &emulator,
        &hardware,
        Supplies {
            initramfs: &File::open(&initramfs).context("Failed to open the initramfs")?,
            disk: &files::formatted_disk(options.disk_gib, &disk_kind)?,
            nvme: nvme.as_ref(),
            state: template.as_ref().map(Template::state).transpose()?.as_ref(),
            forwards: &options.forwards,
            job: Some(job::script(command, &disk_kind)?),
            monitor: None,
        },
    )?;
    if let Err(error) = machine.wait_for(Milestone::Started) {
        if let Some(template) = template {
            template.discard();
        }
        return Err(error);
    }
    machine.wait()
}

/// QEMU would say this less clearly.
fn check_free(ports: &[u16]) -> Result<()> {
    for port in ports {
        TcpListener::bind((Ipv4Addr::LOCALHOST, *port))
            .with_context(|| format!("Failed to take port {port} of this machine"))?;
    }
    Ok(())
}
