//! `ovum boot`: a bare kernel in the foreground, for people who develop one.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, value_parser};

use crate::config::KVM;
use crate::worker::foreground::{
    self, ForegroundSpec, MEMORY_MIB_MAX, MEMORY_MIB_MIN, MEMORY_MIB_STEP, VCPUS_MAX,
};

/// What can be typed after `ovum boot`.
#[derive(Debug, Args)]
pub(super) struct BootArgs {
    /// The kernel: an uncompressed x86-64 ELF (vmlinux)
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs archive; may be repeated, the later over the earlier
    #[arg(long)]
    initrd: Vec<PathBuf>,
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
    let BootArgs { kernel, initrd, vcpus, memory_mib, cmdline } = args;
    let kernel = open("kernel", &kernel)?;
    let initramfs = initrd.iter().map(|path| open("initrd", path)).collect::<Result<_, _>>()?;
    let kvm = File::options().read(true).write(true).open(KVM);
    let kvm = kvm.with_context(|| format!("Failed to open {KVM}: `ovum doctor` says more"))?;
    let console = io::stdout().as_fd().try_clone_to_owned().context("Failed to use stdout")?;
    foreground::run(ForegroundSpec { kvm, kernel, initramfs, console, vcpus, memory_mib, cmdline })
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
