//! What the caller asked for: flags, then the command, from argv.

use std::ffi::OsString;

use anyhow::{Context, Result, bail};

pub const USAGE: &str = "\
Runs a command as root on a KVM host: this machine if it has usable KVM, otherwise an emulated one.

Usage: in-host [OPTIONS] [--] COMMAND [ARG...]
       in-host --packages

  --memory MIB    Memory of the emulated host [default: 4096]
  --cpus N        CPUs of the emulated host [default: 1; with more it may die, rarely]
  --disk GIB      Size of the scratch disk at /var/lib/ovum [default: 16]
  --forward PORT  Reach PORT inside at 127.0.0.1:PORT outside; may be given again
  --count         Let its clocks count instructions, each a nanosecond: how long something takes is
                  then the same however busy this machine is; one CPU
  --vfio          Add an IOMMU with an NVMe controller, an e1000e and an edu device to pass through
  --packages      Print the Debian packages the emulated host needs, and stop
  --help          Print this, and stop

Environment:
  OVUM_HOST=native|emulated   Take this kind of host, whatever the machine offers
  OVUM_CACHE=DIR              Keep the unpacked kernel here [default: ~/.cache/ovum]
  OVUM_DISK_FS=ext4|xfs       File system of the scratch disk [default: ext4]
  OVUM_HOST_BOOT=cold         Boot instead of going on from a saved host
  OVUM_HOST_CONSOLE=FILE      Keep the emulated host's kernel messages
  OVUM_HOST_KERNEL=PACKAGE    Boot this Debian package's kernel
";

/// Everything the command line can say.
#[derive(Debug)]
pub struct Options {
    pub vfio: bool,
    pub count: bool,
    pub memory_mib: u32,
    pub disk_gib: u32,
    pub cpus: u32,
    pub forwards: Vec<u16>,
    pub request: Request,
}

/// What to do, whatever the machine looks like.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    Help,
    Packages,
    /// A program and its arguments; never empty.
    Run(Vec<OsString>),
}

impl Options {
    /// Reads arguments up to `--` or the first word that is no flag; the rest is the command.
    ///
    /// # Errors
    ///
    /// Says which argument cannot be used and why.
    pub fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut options = Self {
            vfio: false,
            count: false,
            memory_mib: 4096,
            disk_gib: 16,
            cpus: 1,
            forwards: Vec::new(),
            request: Request::Help,
        };
        let mut command = Vec::new();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.to_str().filter(|flag| flag.starts_with('-')) else {
                command.push(arg);
                break;
            };
            let (flag, mut value) = match flag.split_once('=') {
                Some((flag, value)) => (flag, Some(OsString::from(value))),
                None => (flag, None),
            };
            let mut value = || value.take().or_else(|| args.next());
            match flag {
                "--" => break,
                "--help" | "-h" => return Ok(options),
                "--packages" => return Ok(Self { request: Request::Packages, ..options }),
                "--vfio" if arg == "--vfio" => options.vfio = true,
                "--count" if arg == "--count" => options.count = true,
                "--memory" => options.memory_mib = number(flag, value())?,
                "--disk" => options.disk_gib = number(flag, value())?,
                "--cpus" => options.cpus = number(flag, value())?,
                "--forward" => options.forwards.push(number(flag, value())?),
                other => bail!("Unknown option {other}; see --help"),
            }
        }
        command.extend(args);
        if command.is_empty() {
            bail!("No command given; see --help");
        }
        Ok(Self { request: Request::Run(command), ..options })
    }
}

impl Options {
    /// What only an emulated host can do, if it was asked for: no machine gives away its own
    /// devices for a test, or has clocks that count.
    pub fn virtue(&self) -> Option<&'static str> {
        let devices = self.vfio.then_some("it has devices to lend");
        devices.or_else(|| self.count.then_some("its clocks count instructions"))
    }
}

fn number<T: TryFrom<u32>>(flag: &str, value: Option<OsString>) -> Result<T> {
    let value = value.with_context(|| format!("{flag} needs a number"))?;
    let parsed = value.to_str().and_then(|text| text.parse::<u32>().ok()).filter(|&n| n > 0);
    parsed
        .and_then(|n| T::try_from(n).ok())
        .with_context(|| format!("{flag} cannot be {}", value.display()))
}
