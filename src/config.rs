//! Configuration: flags and environment, made into a [`Config`] once, at start.
//!
//! [`ConfigArgs`] is what was typed; [`Config`] is what is meant, checked. Nothing else in the
//! server reads the environment.

use std::env;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf, absolute};

use clap::{Args, value_parser};

use crate::size::ByteSize;

/// Where a server keeps its data unless told otherwise.
pub const DATA_DIR: &str = "/var/lib/ovum";

/// Where a server listens unless told otherwise.
pub const LISTEN: &str = "127.0.0.1:8080";

/// Where the KVM device is.
pub const KVM: &str = "/dev/kvm";

/// Where a package puts the kernel and the agent.
const LIBRARY_DIR: &str = "/usr/lib/ovum";

/// Longest path of a data folder: its sockets, 48 bytes longer, must fit an address (107 bytes).
const DATA_DIR_BYTES_MAX: usize = 59;

/// What can be typed after `ovum serve`.
#[derive(Debug, Clone, Args)]
pub struct ConfigArgs {
    /// Folder of everything the server keeps
    #[arg(long, env = "OVUM_DATA_DIR", default_value = DATA_DIR)]
    pub data_dir: PathBuf,
    /// Address to listen at; may be repeated
    #[arg(long, env = "OVUM_LISTEN", value_delimiter = ',', default_value = LISTEN)]
    pub listen: Vec<SocketAddr>,
    /// Guest kernel: an uncompressed x86-64 ELF
    #[arg(long, env = "OVUM_KERNEL")]
    pub kernel: Option<PathBuf>,
    /// Guest agent: a static x86-64 ELF
    #[arg(long, env = "OVUM_AGENT")]
    pub agent: Option<PathBuf>,
    /// Registry (host or host:port) spoken to in plain HTTP; may be repeated
    #[arg(long, env = "OVUM_INSECURE_REGISTRIES", value_delimiter = ',')]
    pub insecure_registry: Vec<String>,
    /// Images pulled or converted at the same time
    #[arg(long, env = "OVUM_IMAGE_JOBS", default_value_t = 2)]
    #[arg(value_parser = value_parser!(u8).range(1..=16))]
    pub image_jobs: u8,
    /// Most vCPUs of an instance
    #[arg(long, env = "OVUM_MAX_VCPUS", default_value_t = 32)]
    #[arg(value_parser = value_parser!(u8).range(1..=32))]
    pub max_vcpus: u8,
    /// Most memory of an instance
    #[arg(long, env = "OVUM_MAX_MEMORY", default_value_t = ByteSize(32 << 30))]
    pub max_memory: ByteSize,
    /// Largest writable layer of an instance
    #[arg(long, env = "OVUM_MAX_OVERLAY", default_value_t = ByteSize(100 << 30))]
    pub max_overlay: ByteSize,
    /// Largest image, as it is stored in the registry
    #[arg(long, env = "OVUM_MAX_IMAGE_PACKED", default_value_t = ByteSize(32 << 30))]
    pub max_image_packed: ByteSize,
    /// Largest image, unpacked
    #[arg(long, env = "OVUM_MAX_IMAGE_UNPACKED", default_value_t = ByteSize(64 << 30))]
    pub max_image_unpacked: ByteSize,
    /// Free space that images leave on the data folder's file system
    #[arg(long, env = "OVUM_MIN_FREE", default_value_t = ByteSize(1 << 30))]
    pub min_free: ByteSize,
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
    /// The guest agent.
    pub agent: PathBuf,
    /// The KVM device.
    pub kvm: PathBuf,
    /// What a request may ask for.
    pub limits: Limits,
    /// How images are had.
    pub images: ImagesConfig,
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
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            vcpus_max: 32,
            memory_bytes_max: 32 << 30,
            overlay_bytes_max: 100 << 30,
            body_bytes_max: 2 << 20,
        }
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

impl TryFrom<ConfigArgs> for Config {
    type Error = ConfigError;

    fn try_from(args: ConfigArgs) -> Result<Self, ConfigError> {
        let ConfigArgs {
            data_dir,
            listen,
            kernel,
            agent,
            insecure_registry,
            image_jobs,
            max_vcpus,
            max_memory,
            max_overlay,
            max_image_packed,
            max_image_unpacked,
            min_free,
        } = args;
        Ok(Self {
            data_dir: checked_data_dir(&data_dir)?,
            listen,
            jwt_secret: jwt_secret(),
            kernel: kernel.unwrap_or_else(|| beside_executable("kernel/vmlinux", "vmlinux")),
            agent: agent.unwrap_or_else(|| beside_executable("agent/ovum-agent", "ovum-agent")),
            kvm: PathBuf::from(KVM),
            limits: Limits {
                vcpus_max: max_vcpus,
                memory_bytes_max: max_memory.0,
                overlay_bytes_max: max_overlay.0,
                ..Limits::default()
            },
            images: ImagesConfig {
                insecure_registries: insecure_registry,
                jobs_max: usize::from(image_jobs),
                packed_bytes_max: max_image_packed.0,
                unpacked_bytes_max: max_image_unpacked.0,
                free_bytes_min: min_free.0,
            },
        })
    }
}

/// The secret of tokens, if the environment has one.
pub fn jwt_secret() -> Option<String> {
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
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ConfigArgs,
    }

    fn config(line: &[&str]) -> Config {
        let line = ["serve"].iter().chain(line);
        Config::try_from(Line::parse_from(line).args).unwrap()
    }

    #[test]
    fn without_flags_everything_has_a_value() {
        let config = config(&[]);

        assert_eq!(config.data_dir, Path::new("/var/lib/ovum"));
        assert_eq!(config.listen, ["127.0.0.1:8080".parse().unwrap()]);
        assert_eq!(config.limits, Limits::default());
    }

    #[test]
    fn addresses_add_up_and_sizes_have_units() {
        let config = config(&[
            "--listen=127.0.0.1:8080",
            "--listen=127.0.0.1:4973",
            "--max-memory=2GB",
            "--insecure-registry=a:1,b",
        ]);

        assert_eq!(config.listen.len(), 2);
        assert_eq!(config.limits.memory_bytes_max, 2 << 30);
        assert_eq!(config.images.insecure_registries, ["a:1", "b"]);
    }

    #[test]
    fn a_folder_whose_sockets_could_not_be_named_is_refused() {
        let deep = format!("/{}", "d".repeat(DATA_DIR_BYTES_MAX));

        let error = Config::try_from(Line::parse_from(["serve", "--data-dir", &deep]).args);

        assert!(matches!(error, Err(ConfigError::DataDirTooLong { bytes: 60, .. })));
    }
}
