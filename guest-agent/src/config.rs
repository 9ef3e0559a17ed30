//! The configuration, as the server left it in the initramfs.

use std::fs::File;
use std::io;
use std::io::Read;

use ovum_agent_proto::VERSION;
use ovum_agent_proto::config::{CONFIG_BYTES_MAX, CONFIG_PATH, GuestConfig};

/// Why there is no configuration to go by.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("Failed to read {CONFIG_PATH}")]
    Read(#[source] io::Error),
    #[error("{CONFIG_PATH} is longer than {CONFIG_BYTES_MAX} bytes")]
    TooLong,
    #[error("{CONFIG_PATH} is no configuration")]
    Malformed(#[source] serde_json::Error),
    #[error("{CONFIG_PATH} is of version {version}, this agent of version {VERSION}")]
    Version { version: u32 },
}

/// Reads the configuration.
pub(crate) fn read() -> Result<GuestConfig, ConfigError> {
    let mut text = Vec::new();
    let most = u64::try_from(CONFIG_BYTES_MAX + 1).unwrap_or(u64::MAX);
    File::open(CONFIG_PATH)
        .and_then(|file| file.take(most).read_to_end(&mut text))
        .map_err(ConfigError::Read)?;
    parse(&text)
}

fn parse(text: &[u8]) -> Result<GuestConfig, ConfigError> {
    if text.len() > CONFIG_BYTES_MAX {
        return Err(ConfigError::TooLong);
    }
    let config: GuestConfig = serde_json::from_slice(text).map_err(ConfigError::Malformed)?;
    match config.version {
        VERSION => Ok(config),
        version => Err(ConfigError::Version { version }),
    }
}
