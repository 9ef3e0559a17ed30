//! `ovum boot`: a kernel in the foreground, bare or with an agent and a root, for people who
//! develop one of them.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use clap::{Args, value_parser};
use ovum_agent_proto::VERSION;
use ovum_agent_proto::config::GuestConfig;

use super::waterfall;
use crate::config::KVM;
use crate::initramfs::Archive;
use crate::timeline::Timeline;
use crate::worker::foreground::{
    self, ForegroundSpec, MEMORY_MIB_MAX, MEMORY_MIB_MIN, MEMORY_MIB_STEP, VCPUS_MAX,
};

/// The first of a guest's disks.
const ROOT_DEVICE: &str = "/dev/vda";

/// Where an agent's command is looked for.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What can be typed after `ovum boot`.
#[derive(Debug, Args)]
pub(super) struct BootArgs {
    /// The kernel: an uncompressed x86-64 ELF (vmlinux)
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs archive; may be repeated, the later over the earlier
    #[arg(long)]
    initrd: Vec<PathBuf>,
    /// A guest agent as the first process, in an initramfs made for it
    #[arg(long, requires = "root", conflicts_with = "initrd")]
    agent: Option<PathBuf>,
    /// The agent's root: an image of EROFS (`mkfs.erofs ROOT DIRECTORY`)
    #[arg(long)]
    root: Option<PathBuf>,
    /// What the agent runs, /bin/true if omitted
    #[arg(last = true, requires = "agent")]
    command: Vec<String>,
    /// Show afterwards where the time of the boot went
    #[arg(long)]
    trace: bool,
    /// vCPUs
    #[arg(long, default_value_t = 1)]
    #[arg(value_parser = value_parser!(u8).range(1..=i64::from(VCPUS_MAX)))]
    vcpus: u8,
    /// Memory in MiB
    #[arg(long, default_value_t = 256, value_parser = memory_mib)]
    memory_mib: u64,
    /// Words for the kernel, after those that the machine needs
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    cmdline: String,
}

fn memory_mib(text: &str) -> Result<u64, String> {
    let mib: u64 = text.parse().map_err(|_| "it has to be a whole number".to_owned())?;
    if (MEMORY_MIB_MIN..=MEMORY_MIB_MAX).contains(&mib) && mib.is_multiple_of(MEMORY_MIB_STEP) {
        Ok(mib)
    } else {
        Err(format!(
            "it has to be {MEMORY_MIB_MIN} to {MEMORY_MIB_MAX}, a multiple of {MEMORY_MIB_STEP}"
        ))
    }
}

/// Boots what was named. The guest's console is stdout.
pub(super) fn boot(args: BootArgs) -> anyhow::Result<()> {
    let mut timeline = Timeline::begin();
    let initramfs = match &args.agent {
        Some(agent) => vec![agent_archive(agent)?, config_archive(&args.command)?],
        None => args.initrd.iter().map(|path| open("initrd", path)).collect::<Result<_, _>>()?,
    };
    let root = args.root.as_ref().map(|path| open("root", path)).transpose()?;
    let kvm = File::options().read(true).write(true).open(KVM);
    let spec = ForegroundSpec {
        kvm: kvm.with_context(|| format!("Failed to open {KVM}: `ovum doctor` says more"))?,
        kernel: open("kernel", &args.kernel)?,
        initramfs,
        root,
        console: io::stdout().as_fd().try_clone_to_owned().context("Failed to use stdout")?,
        vcpus: args.vcpus,
        memory_mib: args.memory_mib,
        cmdline: args.cmdline,
        // With an agent it is a boot as instances have it.
        serial: args.agent.is_none(),
    };
    let ended = foreground::run(spec, |event| timeline.add(event));
    if args.trace {
        waterfall::show("boot", &timeline.phases());
    }
    ended
}

/// The part of an initramfs that is the same for all guests of an agent.
fn agent_archive(path: &Path) -> anyhow::Result<File> {
    let agent = fs::read(path);
    let agent = agent.with_context(|| format!("Failed to read agent {}", path.display()))?;
    Ok(Archive::base(&agent)?.to_file()?)
}

/// What the agent is to do: run `command` in a copy of the root that is forgotten.
fn config_archive(command: &[String]) -> anyhow::Result<File> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let argv = if command.is_empty() { &["/bin/true".to_owned()] } else { command };
    let config = GuestConfig {
        version: VERSION,
        hostname: "ovum".to_owned(),
        root_device: ROOT_DEVICE.to_owned(),
        overlay_device: None,
        network: None,
        argv: argv.to_vec(),
        env: vec![("PATH".to_owned(), PATH.to_owned())],
        working_dir: "/".to_owned(),
        listen: false,
        realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
        volumes: Vec::new(),
        kernel_headers: false,
        memory_watch: None,
    };
    Ok(Archive::config(&config)?.to_file()?)
}

fn open(what: &str, path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("Failed to open {what} {}", path.display()))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use clap::error::ErrorKind;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: BootArgs,
    }

    fn parse(line: &[&str]) -> Result<BootArgs, clap::Error> {
        Line::try_parse_from(["boot"].iter().chain(line)).map(|line| line.args)
    }

    #[test]
    fn a_kernel_is_enough() {
        let args = parse(&["--kernel", "vmlinux"]).unwrap();

        assert_eq!((args.vcpus, args.memory_mib, args.cmdline.as_str()), (1, 256, ""));
        assert!(args.initrd.is_empty());
        assert_eq!(parse(&[]).unwrap_err().kind(), ErrorKind::MissingRequiredArgument);
    }

    #[test]
    fn archives_add_up_and_words_may_have_dashes() {
        let line = ["--kernel=k", "--initrd=a", "--initrd=b", "--cmdline", "-- -x", "--vcpus=32"];

        let args = parse(&line).unwrap();

        assert_eq!(args.initrd, [Path::new("a"), Path::new("b")]);
        assert_eq!((args.cmdline.as_str(), args.vcpus), ("-- -x", 32));
    }

    #[test]
    fn an_agent_needs_a_root_and_brings_its_own_initramfs() {
        let args = parse(&["--kernel=k", "--agent=a", "--root=r", "--trace", "--", "ls", "-l"]);

        let args = args.unwrap();
        assert_eq!((args.command, args.trace), (vec!["ls".to_owned(), "-l".to_owned()], true));
        for line in [
            &["--kernel=k", "--agent=a"][..],
            &["--kernel=k", "--agent=a", "--root=r", "--initrd=i"],
            &["--kernel=k", "--", "ls"],
        ] {
            assert!(parse(line).is_err(), "{line:?}");
        }
    }

    #[test]
    fn what_no_machine_can_be_is_refused_by_its_flag() {
        for (flag, values) in
            [("--vcpus", ["0", "33", "two"]), ("--memory-mib", ["0", "65", "10485760"])]
        {
            for value in values {
                let error = parse(&["--kernel=k", flag, value]).unwrap_err().to_string();
                assert!(error.contains(flag) && error.contains(value), "{error}");
            }
        }
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let error = open("kernel", Path::new("/nowhere/vmlinux")).unwrap_err();

        assert_eq!(error.to_string(), "Failed to open kernel /nowhere/vmlinux");
    }
}
