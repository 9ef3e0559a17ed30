//! The configuration, as the server left it in the initramfs.

use std::fs::File;
use std::io;
use std::io::Read;

use ovum_agent_proto::VERSION;
use ovum_agent_proto::config::{CONFIG_BYTES_MAX, GuestConfig};

/// Room for most configurations, so that one is read at once.
const USUAL_BYTES: usize = 8 << 10;

/// Why there is no configuration to go by.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("Failed to read the configuration")]
    Read(#[source] io::Error),
    #[error("The configuration is longer than {CONFIG_BYTES_MAX} bytes")]
    TooLong,
    #[error("The configuration is malformed")]
    Malformed(#[source] serde_json::Error),
    #[error("The configuration is of version {version}, this agent of version {VERSION}")]
    Version { version: u32 },
}

/// Reads the configuration at `path`.
pub(crate) fn read(path: &str) -> Result<GuestConfig, ConfigError> {
    let mut text = Vec::with_capacity(USUAL_BYTES);
    let most = u64::try_from(CONFIG_BYTES_MAX + 1).unwrap_or(u64::MAX);
    File::open(path)
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

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: &str = r#"{
        "version": 1, "hostname": "guest", "root_device": "/dev/vda", "overlay_device": "/dev/vdb",
        "argv": ["/bin/true"], "env": [["A", "b"]], "working_dir": "/", "listen": true,
        "realtime_ns": 1767225600000000000, "word_of_a_later_server": 5
    }"#;

    #[test]
    fn a_configuration_is_read_with_words_that_came_later() {
        let config = parse(WHOLE.as_bytes()).unwrap();

        assert_eq!(config.overlay_device.as_deref(), Some("/dev/vdb"));
        assert_eq!(config.env, [("A".to_owned(), "b".to_owned())]);
        assert_eq!(config.realtime_ns, 1_767_225_600_000_000_000);
    }

    #[test]
    fn what_is_no_configuration_of_ours_is_refused() {
        let other = WHOLE.replace("\"version\": 1", "\"version\": 2");
        let long = format!("{WHOLE}{}", " ".repeat(CONFIG_BYTES_MAX));

        assert!(matches!(parse(other.as_bytes()), Err(ConfigError::Version { version: 2 })));
        assert!(matches!(parse(long.as_bytes()), Err(ConfigError::TooLong)));
        assert!(matches!(parse(&WHOLE.as_bytes()[..50]), Err(ConfigError::Malformed(_))));
        assert!(matches!(parse(b""), Err(ConfigError::Malformed(_))));
    }
}
