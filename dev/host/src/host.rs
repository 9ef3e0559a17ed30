//! Where the command runs: on this machine's own KVM or on an emulated one.

use std::env;
use std::fs::{self, OpenOptions};
use std::path::Path;

use anyhow::{Result, bail};

/// The two places a command can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    Native,
    Emulated,
}

/// The decision, with one line saying why for whoever reads the log.
#[derive(Debug)]
pub struct Choice {
    pub host: Host,
    pub reason: String,
}

/// Obeys `OVUM_HOST`, and otherwise looks for KVM that can run an unmodified kernel, unless only an
/// emulated host has what is needed: `virtue` says what.
///
/// # Errors
///
/// If `OVUM_HOST` is no known word.
pub fn choose(virtue: Option<&str>) -> Result<Choice> {
    let forced = env::var("OVUM_HOST").unwrap_or_default();
    if let ("", Some(virtue)) = (forced.as_str(), virtue) {
        return Ok(Choice { host: Host::Emulated, reason: format!("emulated: {virtue}") });
    }
    let (host, reason) = match (forced.as_str(), unusable()) {
        ("", None) => (Host::Native, "native: KVM is usable".into()),
        ("", Some(why)) => (Host::Emulated, format!("emulated: {why}")),
        ("native", None) => (Host::Native, "native, by OVUM_HOST".into()),
        ("native", Some(why)) => (Host::Native, format!("native, by OVUM_HOST, although {why}")),
        ("emulated", _) => (Host::Emulated, "emulated, by OVUM_HOST".into()),
        (other, _) => bail!("OVUM_HOST is {other:?}; it can be native or emulated"),
    };
    Ok(Choice { host, reason })
}

/// Says why this machine's own KVM will not do, if so.
fn unusable() -> Option<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    if !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return Some("the processor offers neither vmx nor svm".into());
    }
    // A para-virtual KVM opens like the real one and then runs no stock kernel.
    if Path::new("/sys/module/kvm_pvm").exists() {
        return Some("/dev/kvm is kvm_pvm's, which boots no unmodified kernel".into());
    }
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.err().map(|error| format!("/dev/kvm does not open: {error}"))
}
