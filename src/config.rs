//! Configuration: flags, environment and a file, made into a [`Config`] once, at start.
//!
//! [`Settings`] are what was asked for, somewhere; a flag goes before the environment, the
//! environment before the file, the file before what is built in. [`Config`] is what is meant,
//! checked. Nothing else in the server reads the environment.

use std::env;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU64, NonZeroUsize};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf, absolute};
use std::thread::available_parallelism;

use clap::builder::RangedI64ValueParser;
use clap::{Args, Command, FromArgMatches, value_parser};

use crate::ratio::Ratio;
use crate::size::{ByteRate, ByteSize};
use crate::subnet::Subnet;
use file::FileError;
use hotplug::{Policy, Quiet};

pub use hotplug::HotplugConfig;

mod file;
mod hotplug;

/// Where a server keeps its data unless told otherwise.
const DATA_DIR: &str = "/var/lib/ovum";

/// Where a server listens unless told otherwise.
const LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// The configuration file unless told otherwise. It need not be there.
const CONFIG_FILE: &str = "/etc/ovum/config.toml";

/// Where the KVM device is.
pub const KVM: &str = "/dev/kvm";

/// Where a package puts the kernel and the agent.
const LIBRARY_DIR: &str = "/usr/lib/ovum";

/// Longest path of a data folder: its sockets, 48 bytes longer, must fit an address (107 bytes).
const DATA_DIR_BYTES_MAX: usize = 59;

/// Images that can be pulled or converted at the same time.
const IMAGE_JOBS: RangeInclusive<u8> = 1..=16;

/// Images pulled or converted at the same time unless told otherwise.
const IMAGE_JOBS_DEFAULT: u8 = 2;

/// vCPUs an instance can have.
const VCPUS: RangeInclusive<u8> = 1..=32;

/// What can be typed after `ovum serve`.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// File with settings [default: /etc/ovum/config.toml if it is there]
    #[arg(long, env = "OVUM_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Everything that can be set, each of it by a flag, by the environment or in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args)]
struct Settings {
    /// Folder of everything the server keeps [default: /var/lib/ovum]
    #[arg(long, env = "OVUM_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Address to listen at; may be repeated [default: 127.0.0.1:8080]
    #[arg(long, env = "OVUM_LISTEN", value_name = "ADDRESS", value_delimiter = ',')]
    listen: Option<Vec<SocketAddr>>,
    /// Guest kernel: an uncompressed x86-64 ELF
    #[arg(long, env = "OVUM_KERNEL", value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Whether guests share the pages of their kernel's code, patched once; what one runs can then
    /// be guessed by another that measures its cache [default: true]
    #[arg(long, env = "OVUM_SHARE_KERNEL", value_name = "BOOL")]
    share_kernel: Option<bool>,
    /// Guest agent: a static x86-64 ELF
    #[arg(long, env = "OVUM_AGENT", value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Registry (host or host:port) spoken to in plain HTTP; may be repeated
    #[arg(long = "insecure-registry", env = "OVUM_INSECURE_REGISTRIES", value_delimiter = ',')]
    #[arg(value_name = "REGISTRY")]
    insecure_registries: Option<Vec<String>>,
    /// Images pulled or converted at the same time [default: 2]
    #[arg(long, env = "OVUM_IMAGE_JOBS", value_name = "N", value_parser = within(IMAGE_JOBS))]
    image_jobs: Option<u8>,
    /// Most vCPUs of an instance [default: 32]
    #[arg(long, env = "OVUM_MAX_VCPUS", value_name = "N", value_parser = within(VCPUS))]
    max_vcpus: Option<u8>,
    /// Most memory of an instance [default: 32GB]
    #[arg(long, env = "OVUM_MAX_MEMORY", value_name = "SIZE")]
    max_memory: Option<ByteSize>,
    /// Largest writable layer of an instance [default: 100GB]
    #[arg(long, env = "OVUM_MAX_OVERLAY", value_name = "SIZE")]
    max_overlay: Option<ByteSize>,
    /// Largest image, as it is stored in the registry [default: 32GB]
    #[arg(long, env = "OVUM_MAX_IMAGE_PACKED", value_name = "SIZE")]
    max_image_packed: Option<ByteSize>,
    /// Largest image, unpacked [default: 64GB]
    #[arg(long, env = "OVUM_MAX_IMAGE_UNPACKED", value_name = "SIZE")]
    max_image_unpacked: Option<ByteSize>,
    /// Free space that images leave on the data folder's file system [default: 1GB]
    #[arg(long, env = "OVUM_MIN_FREE", value_name = "SIZE")]
    min_free: Option<ByteSize>,
    /// Size of all volumes together [default: no limit but the disk's]
    #[arg(long, env = "OVUM_MAX_VOLUMES", value_name = "SIZE")]
    max_volumes: Option<ByteSize>,
    /// Disk that may be promised [default: the file system of the data folder]
    #[arg(long, env = "OVUM_DISK_CAPACITY", value_name = "SIZE")]
    disk_capacity: Option<ByteSize>,
    /// What the host's network gives, each way; instances get a share by vCPUs [default: not
    /// looked after]
    #[arg(long, env = "OVUM_NETWORK_CAPACITY", value_name = "RATE")]
    #[arg(value_parser = ByteRate::from_network)]
    network_capacity: Option<ByteRate>,
    /// How many times over processors are promised [default: 4]
    #[arg(long, env = "OVUM_OVERCOMMIT_CPU", value_name = "RATIO")]
    overcommit_cpu: Option<Ratio>,
    /// How many times over memory is promised [default: 1]
    #[arg(long, env = "OVUM_OVERCOMMIT_MEMORY", value_name = "RATIO")]
    overcommit_memory: Option<Ratio>,
    /// How many times over disk is promised [default: 1]
    #[arg(long, env = "OVUM_OVERCOMMIT_DISK", value_name = "RATIO")]
    overcommit_disk: Option<Ratio>,
    /// How many times over the network rate is promised [default: 2]
    #[arg(long, env = "OVUM_OVERCOMMIT_NETWORK", value_name = "RATIO")]
    overcommit_network: Option<Ratio>,
    /// How many times over the disk rate is promised [default: 2]
    #[arg(long, env = "OVUM_OVERCOMMIT_DISK_IO", value_name = "RATIO")]
    overcommit_disk_io: Option<Ratio>,
    /// Whether instances can have a network [default: true]
    #[arg(long, env = "OVUM_NETWORK", value_name = "BOOL")]
    network: Option<bool>,
    /// Addresses of instances, their gateway's being the first [default: 10.100.0.0/16]
    #[arg(long, env = "OVUM_SUBNET", value_name = "CIDR")]
    subnet: Option<Subnet>,
    /// Name server of instances; may be repeated. One on this host has the gateway's address
    /// [default: those that this host asks]
    #[arg(long, env = "OVUM_DNS", value_name = "ADDRESS", value_delimiter = ',')]
    dns: Option<Vec<Ipv4Addr>>,
    /// Bytes per second that the host's disks give: an instance that names no limit of its own gets
    /// twice the share of its vCPUs [default: no limit]
    #[arg(long, env = "OVUM_DISK_IO_CAPACITY", value_name = "RATE")]
    #[arg(value_parser = ByteRate::from_disk)]
    disk_io_capacity: Option<ByteRate>,
    /// When instances get the memory of their hotplug_size: all of it at boot, or on demand and
    /// only while they need it [default: boot]
    #[arg(long, env = "OVUM_HOTPLUG_POLICY", value_name = "boot|demand")]
    hotplug_policy: Option<Policy>,
    /// How long nobody in a guest waits for memory before it gives up what it got on demand
    /// [default: 60s]
    #[arg(long, env = "OVUM_HOTPLUG_QUIET", value_name = "DURATION")]
    hotplug_quiet: Option<Quiet>,
    /// What tokens are signed with: in the environment or the file, where no list of processes
    /// shows it.
    #[arg(skip)]
    jwt_secret: Option<String>,
}

fn within(range: RangeInclusive<u8>) -> RangedI64ValueParser<u8> {
    value_parser!(u8).range(i64::from(*range.start())..=i64::from(*range.end()))
}

impl Settings {
    /// These, and where they say nothing those of `below`.
    fn over(self, below: Self) -> Self {
        Self {
            data_dir: self.data_dir.or(below.data_dir),
            listen: self.listen.or(below.listen),
            kernel: self.kernel.or(below.kernel),
            share_kernel: self.share_kernel.or(below.share_kernel),
            agent: self.agent.or(below.agent),
            insecure_registries: self.insecure_registries.or(below.insecure_registries),
            image_jobs: self.image_jobs.or(below.image_jobs),
            max_vcpus: self.max_vcpus.or(below.max_vcpus),
            max_memory: self.max_memory.or(below.max_memory),
            max_overlay: self.max_overlay.or(below.max_overlay),
            max_image_packed: self.max_image_packed.or(below.max_image_packed),
            max_image_unpacked: self.max_image_unpacked.or(below.max_image_unpacked),
            min_free: self.min_free.or(below.min_free),
            max_volumes: self.max_volumes.or(below.max_volumes),
            disk_capacity: self.disk_capacity.or(below.disk_capacity),
            network_capacity: self.network_capacity.or(below.network_capacity),
            overcommit_cpu: self.overcommit_cpu.or(below.overcommit_cpu),
            overcommit_memory: self.overcommit_memory.or(below.overcommit_memory),
            overcommit_disk: self.overcommit_disk.or(below.overcommit_disk),
            overcommit_network: self.overcommit_network.or(below.overcommit_network),
            overcommit_disk_io: self.overcommit_disk_io.or(below.overcommit_disk_io),
            network: self.network.or(below.network),
            subnet: self.subnet.or(below.subnet),
            dns: self.dns.or(below.dns),
            disk_io_capacity: self.disk_io_capacity.or(below.disk_io_capacity),
            hotplug_policy: self.hotplug_policy.or(below.hotplug_policy),
            hotplug_quiet: self.hotplug_quiet.or(below.hotplug_quiet),
            jwt_secret: self.jwt_secret.or(below.jwt_secret),
        }
    }
}

/// What a client on the server's host has to know of the server's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct HomeArgs {
    /// The server's file with settings, if it is on this host
    #[arg(long, env = "OVUM_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// The server's data folder, if it is on this host [default: /var/lib/ovum]
    #[arg(long, env = "OVUM_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

/// The server of this host, as its clients know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Home {
    /// The data folder.
    pub data_dir: PathBuf,
    /// An address at which it should answer.
    pub address: SocketAddr,
    /// The secret of tokens, if it was chosen outside.
    pub jwt_secret: Option<String>,
}

impl HomeArgs {
    /// Looks up what was not typed.
    ///
    /// # Errors
    ///
    /// [`ConfigError`]. A default file that is not for this user counts as none: only the server
    /// needs all that is in it.
    pub fn find(&self) -> Result<Home, ConfigError> {
        let path = self.config.as_deref();
        let file = match file::load(path) {
            Err(error) if path.is_none() && error.is_denied() => Settings::default(),
            loaded => loaded?,
        };
        let listen = file.listen.and_then(|addresses| addresses.first().copied());
        Ok(Home {
            data_dir: self.data_dir.clone().or(file.data_dir).unwrap_or_else(|| DATA_DIR.into()),
            address: reachable(listen.unwrap_or(LISTEN)),
            jwt_secret: jwt_secret().or(file.jwt_secret),
        })
    }

    /// What a server that is started here is configured to be.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn into_config(self) -> Result<Config, ConfigError> {
        let nothing_typed = Settings::augment_args(Command::new("ovum").no_binary_name(true))
            .try_get_matches_from([""; 0])
            .and_then(|matches| Settings::from_arg_matches(&matches))?;
        let typed = Settings { data_dir: self.data_dir, ..Settings::default() };
        ConfigArgs { config: self.config, settings: typed.over(nothing_typed) }.load()
    }
}

/// Where a client on this host reaches who listens at `address`.
pub fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

/// A server's configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// Folder of everything the server keeps, absolute.
    pub data_dir: PathBuf,
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// The secret of tokens if it was chosen outside; else it is in the data folder.
    pub jwt_secret: Option<String>,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// Whether guests share the pages of its text.
    pub shares_kernel: bool,
    /// The guest agent.
    pub agent: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// What a request may ask for.
    pub limits: Limits,
    /// How images are had.
    pub images: ImagesConfig,
    /// What may be promised to instances and volumes.
    pub capacity: CapacityConfig,
    /// How instances have networks, if they may.
    pub network: Option<NetworkConfig>,
    /// When instances get the memory beyond what they boot with.
    pub hotplug: HotplugConfig,
}

/// How instances have networks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Their addresses.
    pub subnet: Subnet,
    /// Whom they ask for names; nobody: whom the host asks.
    pub dns: Vec<Ipv4Addr>,
}

/// What a request may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most vCPUs of an instance.
    pub vcpus_max: u8,
    /// Most memory of an instance, in bytes.
    pub memory_bytes_max: u64,
    /// Largest writable layer of an instance, in bytes.
    pub overlay_bytes_max: u64,
    /// Largest JSON body, in bytes.
    pub body_bytes_max: usize,
    /// Whether an instance has a network if nothing is said of it.
    pub has_network: bool,
    /// Bytes per second of the host's disks that may be promised, if it was said what they give.
    pub disk_io_bps: Option<NonZeroU64>,
    /// Bytes per second of the host's network that may be promised, if it was said what it gives.
    pub network_bps: Option<NonZeroU64>,
    /// CPUs of the host.
    pub host_cpus: NonZeroUsize,
}

impl Limits {
    /// Bytes per second for the disks of an instance with so many vCPUs that asks for no limit.
    pub fn disk_io_share(&self, vcpus: u8) -> Option<NonZeroU64> {
        self.share(self.disk_io_bps?, vcpus)
    }

    /// Bytes per second, each way, for the network of an instance with so many vCPUs that asks for
    /// no limit.
    pub fn network_share(&self, vcpus: u8) -> Option<NonZeroU64> {
        self.share(self.network_bps?, vcpus)
    }

    /// The part of `all` that so many vCPUs are of the host's processors: never more than all.
    fn share(&self, all: NonZeroU64, vcpus: u8) -> Option<NonZeroU64> {
        let all = all.get();
        let share = u128::from(all) * u128::from(vcpus) / self.host_cpus.get() as u128;
        NonZeroU64::new(u64::try_from(share).unwrap_or(u64::MAX).clamp(1, all))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vcpus_max: 32,
            memory_bytes_max: 32 << 30,
            overlay_bytes_max: 100 << 30,
            body_bytes_max: 2 << 20,
            has_network: true,
            disk_io_bps: None,
            network_bps: None,
            host_cpus: available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// What may be promised to instances and volumes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CapacityConfig {
    /// Bytes of all volumes together, if they have a limit of their own.
    pub volumes_bytes_max: Option<u64>,
    /// Bytes of disk, if not the file system's.
    pub disk_bytes: Option<u64>,
    /// Bytes per second of network, if that is looked after.
    pub network_bps: Option<u64>,
    /// Bytes per second of disk, if that is looked after.
    pub disk_io_bps: Option<u64>,
    /// How many times over processors are promised.
    pub cpu_ratio: Ratio,
    /// How many times over memory is promised.
    pub memory_ratio: Ratio,
    /// How many times over disk is promised.
    pub disk_ratio: Ratio,
    /// How many times over the network rate is promised.
    pub network_ratio: Ratio,
    /// How many times over the disk rate is promised.
    pub disk_io_ratio: Ratio,
}

impl Default for CapacityConfig {
    fn default() -> Self {
        Self {
            volumes_bytes_max: None,
            disk_bytes: None,
            network_bps: None,
            disk_io_bps: None,
            cpu_ratio: Ratio::whole(4),
            memory_ratio: Ratio::whole(1),
            disk_ratio: Ratio::whole(1),
            network_ratio: Ratio::whole(2),
            disk_io_ratio: Ratio::whole(2),
        }
    }
}

impl CapacityConfig {
    fn new(settings: &Settings) -> Self {
        let usual = Self::default();
        let bytes = |size: Option<ByteSize>| size.map(|ByteSize(bytes)| bytes);
        let rate = |rate: Option<ByteRate>| rate.map(|ByteRate(bps)| bps);
        Self {
            volumes_bytes_max: bytes(settings.max_volumes),
            disk_bytes: bytes(settings.disk_capacity),
            network_bps: rate(settings.network_capacity),
            disk_io_bps: rate(settings.disk_io_capacity),
            cpu_ratio: settings.overcommit_cpu.unwrap_or(usual.cpu_ratio),
            memory_ratio: settings.overcommit_memory.unwrap_or(usual.memory_ratio),
            disk_ratio: settings.overcommit_disk.unwrap_or(usual.disk_ratio),
            network_ratio: settings.overcommit_network.unwrap_or(usual.network_ratio),
            disk_io_ratio: settings.overcommit_disk_io.unwrap_or(usual.disk_io_ratio),
        }
    }

    fn disk_io_promised(&self) -> Option<NonZeroU64> {
        self.disk_io_bps.and_then(|bps| NonZeroU64::new(self.disk_io_ratio.of(bps)))
    }

    fn network_promised(&self) -> Option<NonZeroU64> {
        self.network_bps.and_then(|bps| NonZeroU64::new(self.network_ratio.of(bps)))
    }
}

/// How images are had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagesConfig {
    /// Registries spoken to in plain HTTP.
    pub insecure_registries: Vec<String>,
    /// Images pulled or converted at the same time.
    pub jobs_max: usize,
    /// Most bytes of an image's layers as they are stored in the registry.
    pub packed_bytes_max: u64,
    /// Most bytes of an image's layers unpacked.
    pub unpacked_bytes_max: u64,
    /// Free bytes left on the data folder's file system whatever an image needs.
    pub free_bytes_min: u64,
}

impl ConfigArgs {
    /// Reads the file and checks everything.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn load(self) -> Result<Config, ConfigError> {
        let file = file::load(self.config.as_deref())?;
        let environment = Settings { jwt_secret: jwt_secret(), ..Settings::default() };
        Config::new(self.settings.over(environment).over(file))
    }
}

impl Config {
    fn new(settings: Settings) -> Result<Self, ConfigError> {
        let capacity = CapacityConfig::new(&settings);
        let Settings {
            data_dir,
            listen,
            kernel,
            share_kernel,
            agent,
            insecure_registries,
            image_jobs,
            max_vcpus,
            max_memory,
            max_overlay,
            max_image_packed,
            max_image_unpacked,
            min_free,
            network,
            subnet,
            dns,
            hotplug_policy,
            hotplug_quiet,
            jwt_secret,
            ..
        } = settings;
        let bytes = |size: Option<ByteSize>, default| size.map_or(default, |ByteSize(bytes)| bytes);
        let limits = Limits::default();
        let has_network = network.unwrap_or(limits.has_network);
        Ok(Self {
            data_dir: checked_data_dir(data_dir.as_deref().unwrap_or(Path::new(DATA_DIR)))?,
            listen: listen.unwrap_or_else(|| vec![LISTEN]),
            jwt_secret,
            kernel: kernel.unwrap_or_else(|| beside_executable("kernel/vmlinux", "vmlinux")),
            shares_kernel: share_kernel.unwrap_or(true),
            agent: agent.unwrap_or_else(|| beside_executable("agent/ovum-agent", "ovum-agent")),
            kvm: PathBuf::from(KVM),
            limits: Limits {
                vcpus_max: max_vcpus.unwrap_or(limits.vcpus_max),
                memory_bytes_max: bytes(max_memory, limits.memory_bytes_max),
                overlay_bytes_max: bytes(max_overlay, limits.overlay_bytes_max),
                body_bytes_max: limits.body_bytes_max,
                has_network,
                disk_io_bps: capacity.disk_io_promised(),
                network_bps: capacity.network_promised(),
                host_cpus: limits.host_cpus,
            },
            images: ImagesConfig {
                insecure_registries: insecure_registries.unwrap_or_default(),
                jobs_max: usize::from(image_jobs.unwrap_or(IMAGE_JOBS_DEFAULT)),
                packed_bytes_max: bytes(max_image_packed, 32 << 30),
                unpacked_bytes_max: bytes(max_image_unpacked, 64 << 30),
                free_bytes_min: bytes(min_free, 1 << 30),
            },
            capacity,
            network: has_network.then(|| NetworkConfig {
                subnet: subnet.unwrap_or(Subnet::DEFAULT),
                dns: dns.unwrap_or_default(),
            }),
            hotplug: HotplugConfig::new(hotplug_policy, hotplug_quiet),
        })
    }
}

/// The secret of tokens, if the environment has one.
fn jwt_secret() -> Option<String> {
    ["OVUM_JWT_SECRET", "JWT_SECRET"]
        .into_iter()
        .find_map(|name| env::var(name).ok().filter(|secret| !secret.is_empty()))
}

fn checked_data_dir(dir: &Path) -> Result<PathBuf, ConfigError> {
    let dir =
        absolute(dir).map_err(|source| ConfigError::DataDir { path: dir.to_owned(), source })?;
    match dir.as_os_str().len() {
        ..=DATA_DIR_BYTES_MAX => Ok(dir),
        bytes => Err(ConfigError::DataDirTooLong { path: dir, bytes }),
    }
}

/// Where a file of ours is: in the folder beside the executable's (as in a checkout, where what
/// lies right beside the executable can be a build of the agent that no guest starts), beside the
/// executable, or where a package puts it. The last is named if it is nowhere.
fn beside_executable(in_checkout: &str, name: &str) -> PathBuf {
    let packaged = Path::new(LIBRARY_DIR).join(name);
    let executable = env::current_exe().ok();
    let folder = executable.as_deref().and_then(Path::parent);
    let above = folder.and_then(Path::parent);
    let candidates = [above.map(|dir| dir.join(in_checkout)), folder.map(|dir| dir.join(name))];
    candidates.into_iter().flatten().find(|path| path.is_file()).unwrap_or(packaged)
}

/// Why a configuration is none.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// The environment, where no flag was typed.
    #[error(transparent)]
    Environment(#[from] clap::Error),
    /// A relative path, and no current folder.
    #[error("Failed to find data folder {path}", path = path.display())]
    DataDir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Sockets in it would not fit an address.
    #[error(
        "Path of data folder {path} has {bytes} bytes, of which {DATA_DIR_BYTES_MAX} leave room \
         for the sockets in it",
        path = path.display()
    )]
    DataDirTooLong {
        /// Which.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
}

#[cfg(test)]
mod tests;
