//! Firecracker and Cloud Hypervisor, where they are named: guests up to the first user instruction.
//!
//! They have no device at which a guest could end. But KVM sees where it writes: the agent's first
//! report goes to a port that nobody has there, and the host's kernel tells of it (event `kvm_pio`,
//! Documentation/trace/events.rst).

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use ovum::os::readable::readable;
use ovum_agent_proto::report::REPORT_PORT;
use ovum_test_host::root;
use rustix::fs::OFlags;
use rustix::io::read;
use serde_json::json;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::process::Command;
use tokio::select;

use crate::Shape;

/// Of which kind, the name in tables, and the variable that names the program.
const KNOWN: [(Kind, &str, &str); 2] = [
    (Kind::Firecracker, "Firecracker", "OVUM_BENCH_FIRECRACKER"),
    (Kind::CloudHypervisor, "Cloud Hypervisor", "OVUM_BENCH_CLOUD_HYPERVISOR"),
];

/// Where the host's kernel tells of events, to us alone.
const TRACE: &str = "/sys/kernel/debug/tracing/instances/ovum-bench";

#[derive(Debug, Clone, Copy)]
enum Kind {
    Firecracker,
    CloudHypervisor,
}

/// One of them.
pub(crate) struct Peer {
    kind: Kind,
    pub(crate) name: &'static str,
    program: PathBuf,
    initramfs: PathBuf,
}

impl Peer {
    /// Those that are named, with what guests of ours start from.
    pub(crate) fn all(initramfs: &Path) -> Vec<Self> {
        let named = |variable| env::var_os(variable).filter(|program| !program.is_empty());
        let peer = |(kind, name, variable)| {
            let program = PathBuf::from(named(variable)?);
            Some(Self { kind, name, program, initramfs: initramfs.to_owned() })
        };
        KNOWN.into_iter().filter_map(peer).collect()
    }

    /// Boots one; returns how many milliseconds it took to its first user instruction.
    pub(crate) async fn boot(&self, shape: Shape) -> f64 {
        let mut command = self.command(shape);
        command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let watch = Watch::begin().unwrap();
        let started = Instant::now();
        let mut guest = command.spawn().unwrap();
        select! {
            begun = watch.next() => begun.unwrap(),
            ended = guest.wait() => panic!("{} ended before the agent began: {ended:?}", self.name),
        }
        let took_ms = started.elapsed().as_secs_f64() * 1e3;
        guest.kill().await.unwrap();
        took_ms
    }

    /// As their documentation has it; neither has more than it must.
    fn command(&self, Shape { vcpus, memory_mib }: Shape) -> Command {
        let kernel = root().join("target/kernel/vmlinux");
        let mut command = Command::new(&self.program);
        match self.kind {
            Kind::Firecracker => {
                let config = json!({
                    "boot-source": {
                        "kernel_image_path": kernel,
                        "initrd_path": self.initramfs,
                        "boot_args": "quiet panic=-1 8250.nr_uarts=0 pci=off",
                    },
                    "drives": [],
                    "machine-config": { "vcpu_count": vcpus, "mem_size_mib": memory_mib },
                });
                let path = self.initramfs.with_extension("firecracker.json");
                fs::write(&path, config.to_string()).unwrap();
                command.args(["--no-api", "--config-file"]).arg(path);
            }
            Kind::CloudHypervisor => {
                command.arg("--kernel").arg(kernel).arg("--initramfs").arg(&self.initramfs);
                command.args(["--cmdline", "quiet panic=-1 8250.nr_uarts=0"]);
                command.args(["--cpus", &format!("boot={vcpus}")]);
                command.args(["--memory", &format!("size={memory_mib}M")]);
                command.args(["--serial", "off", "--console", "off"]);
            }
        }
        command
    }
}

/// Tells when any guest writes to the report port, until it is dropped.
struct Watch(AsyncFd<OwnedFd>);

impl Watch {
    fn begin() -> io::Result<Self> {
        let trace = Path::new(TRACE);
        fs::create_dir_all(trace)?;
        // Heard of at once, not when the buffer is half full.
        fs::write(trace.join("buffer_percent"), "0")?;
        let event = trace.join("events/kvm/kvm_pio");
        // What one that was killed has left is not about this guest.
        fs::write(event.join("enable"), "0")?;
        fs::write(trace.join("trace"), "")?;
        fs::write(event.join("filter"), format!("port == {REPORT_PORT} && rw == 1"))?;
        fs::write(event.join("enable"), "1")?;
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let pipe = File::options().read(true).custom_flags(flags).open(trace.join("trace_pipe"))?;
        Ok(Self(readable(OwnedFd::from(pipe))?))
    }

    async fn next(&self) -> io::Result<()> {
        let mut line = [0; 512];
        let told = self.0.async_io(Interest::READABLE, |pipe| Ok(read(pipe.as_fd(), &mut line)?));
        told.await.map(drop)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // The next one does so, too, before it begins.
        let _ = fs::write(Path::new(TRACE).join("events/kvm/kvm_pio/enable"), "0");
    }
}
