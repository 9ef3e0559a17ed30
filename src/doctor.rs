//! `ovum doctor`: what this host lacks to run instances, and the mend for each.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Access, access, statvfs};

use crate::config::Config;
use crate::os::tool::TOOLS;
use crate::size::ByteSize;

/// Free space with which a first image and instance fit, above what images leave free.
const FREE_BYTES_MIN: u64 = 2 << 30;

/// Bytes of an ELF header up to and with the machine.
const ELF_BYTES: usize = 20;

/// x86-64, as the ELF header has it.
const ELF_X86_64: [u8; 2] = [62, 0];

/// What one look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// At what.
    pub subject: String,
    /// What is there, or what is wrong.
    pub outcome: Result<String, Problem>,
}

/// Something wrong, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What is wrong.
    pub what: String,
    /// The mend.
    pub mend: String,
}

/// Looks at everything that `config` needs of this host. Changes nothing.
pub fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        Finding { subject: "KVM".to_owned(), outcome: kvm(&config.kvm, Path::new("/sys/module")) },
        Finding {
            subject: "guest kernel".to_owned(),
            outcome: program(&config.kernel, "`make kernel` builds it; --kernel names another"),
        },
        Finding {
            subject: "guest agent".to_owned(),
            outcome: program(&config.agent, "`make agent` builds it; --agent names another"),
        },
        Finding { subject: "data folder".to_owned(), outcome: data_dir(&config.data_dir) },
        Finding { subject: "disk space".to_owned(), outcome: space(config) },
    ];
    findings.extend(TOOLS.iter().map(|tool| Finding {
        subject: tool.name.to_owned(),
        outcome: tool.find().map(|path| path.display().to_string()).ok_or_else(|| Problem {
            what: format!("it is missing, and needed for {}", tool.needed_for),
            mend: format!("apt-get install {}", tool.package),
        }),
    }));
    findings
}

/// The device opens, and what is behind it is a processor's virtualisation.
fn kvm(device: &Path, modules: &Path) -> Result<String, Problem> {
    let problem = |what: String, mend: &str| Err(Problem { what, mend: mend.to_owned() });
    let name = device.display();
    if let Err(error) = File::options().read(true).write(true).open(device) {
        return match error.kind() {
            io::ErrorKind::NotFound => problem(
                format!("{name} does not exist"),
                "turn on virtualisation (VT-x, AMD-V) in the firmware or for this virtual \
                 machine, then modprobe kvm_intel or kvm_amd",
            ),
            io::ErrorKind::PermissionDenied => problem(
                format!("{name} is not for this user"),
                "run as root, or add the user to the group kvm",
            ),
            _ => problem(format!("{name} cannot be opened: {error}"), "see the kernel's log"),
        };
    }
    let loaded = |module: &&str| modules.join(module).exists();
    match ["kvm_intel", "kvm_amd"].iter().find(|module| loaded(module)) {
        Some(module) => Ok(format!("{name}, {module}")),
        None if loaded(&"kvm_pvm") => problem(
            format!("{name} is served by kvm_pvm, on which a guest kernel like ours does not boot"),
            "use a host with VT-x or AMD-V; `dev/in-host` emulates one for development",
        ),
        // Compiled into the kernel, a vendor's module can have no folder.
        None => Ok(name.to_string()),
    }
}

/// The file is a program or kernel for x86-64.
fn program(path: &Path, mend: &str) -> Result<String, Problem> {
    let problem = |what: String| Problem { what, mend: mend.to_owned() };
    let mut header = [0; ELF_BYTES];
    File::open(path)
        .and_then(|mut file| file.read_exact(&mut header))
        .map_err(|error| problem(format!("{} cannot be read: {error}", path.display())))?;
    if header.starts_with(b"\x7fELF\x02") && header.ends_with(&ELF_X86_64) {
        Ok(path.display().to_string())
    } else {
        Err(problem(format!("{} is not an x86-64 ELF", path.display())))
    }
}

/// The folder, or the nearest above it that exists, can be written to.
fn data_dir(dir: &Path) -> Result<String, Problem> {
    let existing = nearest(dir);
    match access(existing, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Ok(dir.display().to_string()),
        Err(error) => Err(Problem {
            what: format!("{} cannot be written to: {error}", existing.display()),
            mend: "run as root, or name another with --data-dir".to_owned(),
        }),
    }
}

fn space(config: &Config) -> Result<String, Problem> {
    let existing = nearest(&config.data_dir);
    let free = match statvfs(existing) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => {
            return Err(Problem {
                what: format!("{} does not say: {error}", existing.display()),
                mend: "name another folder with --data-dir".to_owned(),
            });
        }
    };
    let needed = config.images.free_bytes_min.saturating_add(FREE_BYTES_MIN);
    let (free_mib, needed) = (ByteSize(free >> 20 << 20), ByteSize(needed));
    if free >= needed.0 {
        Ok(format!("{free_mib} free"))
    } else {
        Err(Problem {
            what: format!("{free_mib} free under {}, {needed} needed", existing.display()),
            mend: "make room, or name another folder with --data-dir".to_owned(),
        })
    }
}

fn nearest(dir: &Path) -> &Path {
    dir.ancestors().find(|dir| fs::metadata(dir).is_ok()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_kvm_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("kvm");
        let modules = dir.path().join("modules");
        let what = |outcome: Result<String, Problem>| outcome.unwrap_err().what;

        assert!(what(kvm(&device, &modules)).ends_with("does not exist"));
        fs::write(&device, b"").unwrap();
        assert!(kvm(&device, &modules).is_ok());
        fs::create_dir_all(modules.join("kvm_pvm")).unwrap();
        assert!(what(kvm(&device, &modules)).contains("kvm_pvm"));
        fs::create_dir_all(modules.join("kvm_amd")).unwrap();
        assert!(kvm(&device, &modules).unwrap().ends_with("kvm_amd"));
    }

    #[test]
    fn a_kernel_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        let what = |path: &Path| program(path, "build it").unwrap_err().what;

        assert!(what(&path).contains("cannot be read"));
        fs::write(&path, [b'x'; 64]).unwrap();
        assert!(what(&path).ends_with("is not an x86-64 ELF"));
        fs::write(&path, b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0rest").unwrap();
        assert!(program(&path, "build it").is_ok());
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_judged_by_the_one_above() {
        let dir = tempfile::tempdir().unwrap();

        assert_eq!(nearest(&dir.path().join("a/b/c")), dir.path());
        assert!(data_dir(&dir.path().join("a/b")).is_ok());
    }
}
