//! What a guest shall become: written by the server, read once by the agent at boot.

use std::net::Ipv4Addr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the agent finds its configuration in the initramfs.
pub const CONFIG_PATH: &str = "/ovum/config.json";

/// Most bytes the configuration may take: arguments and environment of an image are far smaller.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// Serial number of the disk with the kernel headers: an EROFS.
pub const HEADERS_SERIAL: &str = "headers";

/// Programs that only work as PID 1, and end the guest themselves.
pub const INIT_SYSTEMS: [&str; 3] =
    ["/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd"];

/// Everything the agent has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// [`crate::VERSION`] of the server.
    pub version: u32,
    /// The guest's host name.
    pub hostname: String,
    /// Block device with the image: a read-only EROFS.
    pub root_device: String,
    /// Block device with the writable layer: an ext4. Without one it is a tmpfs.
    pub overlay_device: Option<String>,
    /// Its network, if it has one.
    #[serde(default)]
    pub network: Option<GuestNetwork>,
    /// Program and arguments of the workload. Never empty.
    pub argv: Vec<String>,
    /// Environment of the workload.
    pub env: Vec<(String, String)>,
    /// Working directory of the workload, absolute; made if it is missing.
    pub working_dir: String,
    /// Whether the agent listens on vsock; without it there is no exec, copy or graceful stop.
    pub listen: bool,
    /// Host's CLOCK_REALTIME in nanoseconds when the guest was started, in case the guest kernel
    /// finds no clock of its own.
    pub realtime_ns: u64,
    /// Volumes, none of them below one that comes later.
    #[serde(default)]
    pub volumes: Vec<VolumeMount>,
    /// Whether it has a disk with the headers of its kernel.
    #[serde(default)]
    pub kernel_headers: bool,
    /// Whether the machine wants to know how the guest is off for memory.
    #[serde(default)]
    pub memory_watch: Option<MemoryWatchSpec>,
}

/// How the guest's memory is watched, for a machine that adds some and takes it away again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryWatchSpec {
    /// What the guest boots with, in bytes.
    pub boot_bytes: u64,
    /// How long nobody has to wait for memory before that is worth a report, in milliseconds.
    pub quiet_ms: u32,
}

impl MemoryWatchSpec {
    /// The same as a duration.
    pub fn quiet(self) -> Duration {
        Duration::from_millis(self.quiet_ms.into())
    }
}

/// A volume in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Block device with an ext4.
    pub device: String,
    /// Where it is mounted, absolute; made if it is missing.
    pub path: String,
    /// How.
    pub mode: VolumeMode,
}

/// How a volume is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeMode {
    /// For this guest alone.
    ReadWrite,
    /// Maybe beside others.
    ReadOnly,
    /// As read only, with a writable layer above.
    Overlay {
        /// Block device with an ext4 for that layer.
        device: String,
    },
}

/// How the guest reaches others, by way of its only network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNetwork {
    /// Its address.
    pub address: Ipv4Addr,
    /// How many bits of that its subnet has.
    pub prefix: u8,
    /// Where what is for others goes.
    pub gateway: Ipv4Addr,
    /// Whom to ask for names.
    pub dns: Vec<Ipv4Addr>,
}
