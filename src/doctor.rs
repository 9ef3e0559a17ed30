//! `ovum doctor`: what this host lacks to run instances, and the mend for each.

use std::fs::{self, File};
use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Access, access, statvfs};

use crate::causes::chain;
use crate::config::{Config, NetworkConfig};
use crate::devices;
use crate::instances::HEADERS;
use crate::network;
use crate::network::forwarding::{self, Chain};
use crate::network::resolvers::{self, Resolvers};
use crate::os::cgroup::ROOT;
use crate::os::tap;
use crate::os::tool::TOOLS;
use crate::server;
use crate::size::ByteSize;
use crate::subnet::Subnet;

/// What helps where KVM is not that of a processor.
const SOFTWARE_KVM_MEND: &str = "use a host with VT-x or AMD-V, or a virtual machine to which they \
                                 are passed on; `dev/in-host` emulates one for development";

/// What networks need (capabilities(7)).
const CAP_NET_ADMIN: u32 = 12;

/// Free space with which a first image and instance fit, above what images leave free.
const FREE_BYTES_MIN: u64 = 2 << 30;

/// Bytes of an ELF file that are looked at: its header, and the program headers behind it.
const ELF_BYTES: u64 = 4 << 10;

/// x86-64, as the ELF header has it at [`ELF_MACHINE_AT`].
const ELF_X86_64: &[u8] = &[62, 0];

const ELF_MACHINE_AT: usize = 18;

/// Where program headers begin, and their size, in a 64-bit ELF as every linker lays it out.
const ELF_HEADERS_AT: usize = 64;
const ELF_HEADER_BYTES: usize = 56;

/// Where the number of program headers is.
const ELF_HEADER_COUNT_AT: usize = 56;

/// Type of the program header that names a dynamic loader (ELF-64 Object File Format, "Program
/// header table").
const ELF_INTERPRETER: &[u8] = &[3, 0, 0, 0];

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
        Finding { subject: "KVM".to_owned(), outcome: kvm(&config.kvm, Path::new("/")) },
        Finding {
            subject: "guest kernel".to_owned(),
            outcome: program(&config.kernel, "`make kernel` builds it; --kernel names another"),
        },
        Finding {
            subject: "guest agent".to_owned(),
            outcome: program(&config.agent, "`make agent` builds it; --agent names another"),
        },
        Finding { subject: "kernel headers".to_owned(), outcome: headers(&config.kernel) },
        Finding { subject: "data folder".to_owned(), outcome: data_dir(&config.data_dir) },
        Finding { subject: "disk space".to_owned(), outcome: space(config) },
        Finding { subject: "control groups".to_owned(), outcome: Ok(groups(Path::new(ROOT))) },
        Finding { subject: "devices".to_owned(), outcome: Ok(devices_to_lend(Path::new("/"))) },
    ];
    if let Some(NetworkConfig { subnet, dns }) = &config.network {
        let outcome = network(*subnet, &config.data_dir);
        findings.push(Finding { subject: "network".to_owned(), outcome });
        let outcome = forwarding(*subnet);
        findings.push(Finding { subject: "other packet filters".to_owned(), outcome });
        let outcome = name_servers(dns, Path::new("/"));
        findings.push(Finding { subject: "name servers".to_owned(), outcome });
    }
    findings.extend(config.listen.iter().map(|&address| Finding {
        subject: format!("address {address}"),
        outcome: listen(address, &config.data_dir),
    }));
    findings.extend(TOOLS.iter().map(|tool| Finding {
        subject: tool.name.to_owned(),
        outcome: tool.find().map(|path| path.display().to_string()).ok_or_else(|| Problem {
            what: format!("it is missing, and needed for {}", tool.needed_for),
            mend: format!("apt-get install {}", tool.package),
        }),
    }));
    findings
}

/// The device opens, and what is behind it is a processor's virtualisation. `root` is where the
/// kernel's own folders are.
fn kvm(device: &Path, root: &Path) -> Result<String, Problem> {
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
    let loaded = |module: &&str| root.join("sys/module").join(module).exists();
    let vendor = ["kvm_intel", "kvm_amd"].into_iter().find(loaded);
    if vendor.is_none() && loaded(&"kvm_pvm") {
        return problem(
            format!(
                "{name} is software only: it is served by kvm_pvm, on which a guest kernel like \
                 ours does not boot"
            ),
            SOFTWARE_KVM_MEND,
        );
    }
    if !has_virtualisation(&root.join("proc/cpuinfo")) {
        return problem(
            format!(
                "{name} is there, but /proc/cpuinfo shows neither vmx nor svm: what is behind it \
                 is software only, and guests do not boot or crawl"
            ),
            SOFTWARE_KVM_MEND,
        );
    }
    // Compiled into the kernel, a vendor's module can have no folder.
    Ok(vendor.map_or_else(|| name.to_string(), |module| format!("{name}, {module}")))
}

/// Whether a processor says that it can virtualise; one that does not say anything may.
fn has_virtualisation(cpuinfo: &Path) -> bool {
    let Ok(text) = fs::read_to_string(cpuinfo) else { return true };
    let mut flags = text.lines().filter(|line| line.starts_with("flags"));
    flags.any(|line| line.split_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// The file is a program or kernel for x86-64.
fn program(path: &Path, mend: &str) -> Result<String, Problem> {
    let problem = |what: String| Problem { what, mend: mend.to_owned() };
    let mut start = Vec::new();
    File::open(path)
        .and_then(|file| file.take(ELF_BYTES).read_to_end(&mut start))
        .map_err(|error| problem(format!("{} cannot be read: {error}", path.display())))?;
    let is_x86_64 = start.get(ELF_MACHINE_AT..).is_some_and(|at| at.starts_with(ELF_X86_64));
    if !start.starts_with(b"\x7fELF\x02") || !is_x86_64 {
        return Err(problem(format!("{} is not an x86-64 ELF", path.display())));
    }
    let mut headers = start.get(ELF_HEADERS_AT..).unwrap_or_default().chunks(ELF_HEADER_BYTES);
    let count = match start.get(ELF_HEADER_COUNT_AT..) {
        Some(&[low, high, ..]) => u16::from_le_bytes([low, high]),
        _ => 0,
    };
    if headers.by_ref().take(count.into()).any(|header| header.starts_with(ELF_INTERPRETER)) {
        let what = "needs a dynamic loader, and a guest has none before its root is there";
        return Err(problem(format!("{} {what}", path.display())));
    }
    Ok(path.display().to_string())
}

/// What modules for the kernel are built with lies beside it.
fn headers(kernel: &Path) -> Result<String, Problem> {
    let path = kernel.with_file_name(HEADERS);
    match File::open(&path) {
        Ok(_) => Ok(path.display().to_string()),
        Err(error) => Err(Problem {
            what: format!("{} cannot be read: {error}; instances build no modules", path.display()),
            mend: "`make kernel` builds it, of the same build as the kernel".to_owned(),
        }),
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

/// Nobody listens at the address but, at most, the server of this data folder.
fn listen(address: SocketAddr, data_dir: &Path) -> Result<String, Problem> {
    match TcpListener::bind(address) {
        Ok(_free_again) => Ok("free".to_owned()),
        Err(_) if UnixStream::connect(server::socket(data_dir)).is_ok() => {
            Ok("the server of this data folder runs".to_owned())
        }
        Err(error) => Err(Problem {
            what: format!("a server could not listen there: {error}"),
            mend: "end the program that does, or name another address with --listen".to_owned(),
        }),
    }
}

/// Guests can have TAPs, and addresses that are nobody's here.
fn network(subnet: Subnet, data_dir: &Path) -> Result<String, Problem> {
    let denied =
        "run as root: networks need CAP_NET_ADMIN; or start the server with --network false";
    let device = File::options().read(true).write(true).open(tap::DEVICE);
    if let Err(error) = device {
        let mend = match error.kind() {
            io::ErrorKind::PermissionDenied => denied,
            _ => "modprobe tun; or start the server with --network false",
        };
        let what = format!("{} cannot be opened: {error}", tap::DEVICE);
        return Err(Problem { what, mend: mend.to_owned() });
    }
    if !has_capability(CAP_NET_ADMIN) {
        let what = "this user may not set up networks".to_owned();
        return Err(Problem { what, mend: denied.to_owned() });
    }
    match network::check(subnet, data_dir) {
        Ok(()) => Ok(format!("{subnet}, gateway {}", subnet.gateway())),
        Err(error) => {
            let mend = "name another with --subnet".to_owned();
            Err(Problem { what: error.to_string(), mend })
        }
    }
}

/// No other packet filter drops what guests send and get.
fn forwarding(subnet: Subnet) -> Result<String, Problem> {
    match forwarding::obstacle(subnet) {
        Ok(None) => Ok("none drops what is forwarded".to_owned()),
        Ok(Some(Chain { family, table, name, .. })) => Err(Problem {
            what: format!(
                "chain {name} of table {family} {table} drops what is forwarded: instances reach \
                 this host and nothing beyond it"
            ),
            mend: format!(
                "nft insert rule {family} {table} {name} ip saddr {subnet} accept, and the same \
                 with daddr; beside Docker insert both into DOCKER-USER, which it keeps"
            ),
        }),
        Err(error) => Err(Problem {
            what: format!("they are not known: {}", chain(&error)),
            mend: "run as root".to_owned(),
        }),
    }
}

/// Guests are told of name servers that they can reach.
fn name_servers(chosen: &[Ipv4Addr], root: &Path) -> Result<String, Problem> {
    let list = |servers: &[Ipv4Addr]| {
        let servers: Vec<String> = servers.iter().map(Ipv4Addr::to_string).collect();
        servers.join(", ")
    };
    if !chosen.is_empty() {
        return Ok(list(chosen));
    }
    match resolvers::of_host(root) {
        Some(Resolvers { servers, path }) => {
            Ok(format!("{}, as {} says", list(&servers), path.display()))
        }
        None => Err(Problem {
            what: format!(
                "this host names no server that an instance could ask, so that they ask {}",
                resolvers::FALLBACK
            ),
            mend: "name one with --dns: the gateway's address is a resolver on this host"
                .to_owned(),
        }),
    }
}

/// Whether this process may do what `capability` is for (proc_pid_status(5)).
fn has_capability(capability: u32) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let bits = effective.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok());
    bits.is_some_and(|bits| bits & 1 << capability != 0)
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

/// Whether workers get a share of the host each. It is no problem if not.
fn groups(root: &Path) -> String {
    let shown = root.display();
    let Ok(controllers) = fs::read_to_string(root.join("cgroup.controllers")) else {
        return format!("none: {shown} is not of version 2; guests share the host unbounded");
    };
    let has = |name| controllers.split_whitespace().any(|one| one == name);
    if !has("cpu") || !has("memory") {
        return format!("none: {shown} has no cpu and memory; guests share the host unbounded");
    }
    match access(root, Access::WRITE_OK) {
        Ok(()) => format!("a share of processors and memory for each guest, in {shown}"),
        Err(_) => format!("none: {shown} is root's to write to; guests share the host unbounded"),
    }
}

/// Whether instances can have devices of the host. It is no problem if not.
fn devices_to_lend(root: &Path) -> String {
    match devices::lack(root) {
        None => "can be given to instances".to_owned(),
        Some(lack) => format!("none for instances: {lack}"),
    }
}

fn nearest(dir: &Path) -> &Path {
    dir.ancestors().find(|dir| fs::metadata(dir).is_ok()).unwrap_or(Path::new("/"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn each_kind_of_kvm_is_told_apart() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let device = root.join("kvm");
        let what = || kvm(&device, root).unwrap_err().what;

        assert!(what().ends_with("does not exist"));
        fs::write(&device, b"").unwrap();
        assert!(kvm(&device, root).is_ok());
        fs::create_dir_all(root.join("proc")).unwrap();
        fs::write(root.join("proc/cpuinfo"), "model name\t: vmx\nflags\t\t: fpu sse\n").unwrap();
        assert!(what().contains("neither vmx nor svm"));
        fs::create_dir_all(root.join("sys/module/kvm_pvm")).unwrap();
        assert!(what().contains("kvm_pvm"));
        fs::create_dir_all(root.join("sys/module/kvm_amd")).unwrap();
        fs::write(root.join("proc/cpuinfo"), "flags\t\t: fpu svm sse\n").unwrap();
        assert!(kvm(&device, root).unwrap().ends_with("kvm_amd"));
    }

    #[test]
    fn an_address_that_is_taken_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let other = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = other.local_addr().unwrap();

        assert!(listen(address, dir.path()).unwrap_err().mend.contains("--listen"));
        let _ours = UnixListener::bind(server::socket(dir.path())).unwrap();
        assert!(listen(address, dir.path()).is_ok());
        drop(other);
        // A program that another test is starting may have a copy of the socket for a moment.
        let deadline = Instant::now() + Duration::from_secs(20);
        while listen(address, dir.path()) != Ok("free".to_owned()) {
            assert!(Instant::now() < deadline, "{address} is never free");
            thread::yield_now();
        }
    }

    #[test]
    fn a_kernel_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        let what = |path: &Path| program(path, "build it").unwrap_err().what;

        assert!(what(&path).contains("cannot be read"));
        fs::write(&path, [b'x'; 64]).unwrap();
        assert!(what(&path).ends_with("is not an x86-64 ELF"));
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0".to_vec();
        elf.resize(64 + 2 * 56, 0);
        elf[56] = 2;
        elf[64] = 1;
        fs::write(&path, &elf).unwrap();
        assert!(program(&path, "build it").is_ok());
        elf[64 + 56] = 3;
        fs::write(&path, &elf).unwrap();
        assert!(what(&path).contains("dynamic loader"));
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_judged_by_the_one_above() {
        let dir = tempfile::tempdir().unwrap();

        assert_eq!(nearest(&dir.path().join("a/b/c")), dir.path());
        assert!(data_dir(&dir.path().join("a/b")).is_ok());
    }
}
