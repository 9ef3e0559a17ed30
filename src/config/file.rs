//! The configuration file: TOML, one key for each setting, named as its flag.
//!
//! ```toml
//! listen = ["127.0.0.1:8080"]
//! data_dir = "/var/lib/ovum"
//! max_memory = "8GB"
//! ```
//!
//! A key that nobody knows is an error, and so is a value of another kind: a typing mistake must
//! not pass for a setting.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use toml::de::Error as TomlError;
use toml::{Table, Value};

use super::{CONFIG_FILE, IMAGE_JOBS, Settings, VCPUS};
use crate::ratio::{Ratio, RatioError};
use crate::size::{ByteRate, ByteSize, SizeError};

/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// All keys there are.
pub(super) const KEYS: [&str; 28] = [
    "agent",
    "data_dir",
    "disk_capacity",
    "disk_io_capacity",
    "dns",
    "hotplug_policy",
    "hotplug_quiet",
    "image_jobs",
    "insecure_registries",
    "jwt_secret",
    "kernel",
    "listen",
    "max_image_packed",
    "max_image_unpacked",
    "max_memory",
    "max_overlay",
    "max_vcpus",
    "max_volumes",
    "min_free",
    "network",
    "network_capacity",
    "overcommit_cpu",
    "overcommit_disk",
    "overcommit_disk_io",
    "overcommit_memory",
    "overcommit_network",
    "share_kernel",
    "subnet",
];

/// Why a file says nothing.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("Failed to read configuration file {path}", path = path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It never ends, or nearly so.
    #[error("Configuration file {path} has over {FILE_BYTES_MAX} bytes", path = path.display())]
    TooLong {
        /// Which.
        path: PathBuf,
    },
    /// It is no TOML.
    #[error("Configuration file {path} is no TOML: {message}", path = path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and what, in several lines.
        message: String,
    },
    /// Nobody knows this key.
    #[error(
        "Unknown key {key:?} in configuration file {path}: there are {}", KEYS.join(", "),
        path = path.display()
    )]
    UnknownKey {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: String,
    },
    /// The key is known; its value is something else than it should be.
    #[error("Key {key} in configuration file {path}: {message}", path = path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// Which key.
        key: String,
        /// What it should be.
        message: String,
    },
}

impl FileError {
    /// Whether the file is not for this user.
    pub(super) fn is_denied(&self) -> bool {
        matches!(self, Self::Read { source, .. }
            if source.kind() == io::ErrorKind::PermissionDenied)
    }
}

/// What the file at `path` sets, or the default one if it is there.
pub(super) fn load(path: Option<&Path>) -> Result<Settings, FileError> {
    let given = path.is_some();
    let path = path.unwrap_or(Path::new(CONFIG_FILE));
    let mut text = String::new();
    let read =
        File::open(path).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text));
    match read {
        Err(error) if !given && error.kind() == io::ErrorKind::NotFound => Ok(Settings::default()),
        Err(source) => Err(FileError::Read { path: path.to_owned(), source }),
        Ok(_) if text.len() as u64 > FILE_BYTES_MAX => {
            Err(FileError::TooLong { path: path.to_owned() })
        }
        Ok(_) => parse(path, &text),
    }
}

fn parse(path: &Path, text: &str) -> Result<Settings, FileError> {
    let table: Table = text.parse().map_err(|error: TomlError| FileError::Syntax {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })?;
    let mut settings = Settings::default();
    for (key, value) in &table {
        if !KEYS.contains(&key.as_str()) {
            return Err(FileError::UnknownKey { path: path.to_owned(), key: key.clone() });
        }
        set(&mut settings, key, value).map_err(|message| FileError::Value {
            path: path.to_owned(),
            key: key.clone(),
            message,
        })?;
    }
    Ok(settings)
}

fn set(settings: &mut Settings, key: &str, value: &Value) -> Result<(), String> {
    match key {
        "agent" => settings.agent = Some(word(value)?),
        "data_dir" => settings.data_dir = Some(word(value)?),
        "disk_capacity" => settings.disk_capacity = Some(size(value)?),
        "disk_io_capacity" => settings.disk_io_capacity = Some(rate(value, ByteRate::from_disk)?),
        "dns" => settings.dns = Some(words(value)?),
        "hotplug_policy" => settings.hotplug_policy = Some(word(value)?),
        "hotplug_quiet" => settings.hotplug_quiet = Some(word(value)?),
        "image_jobs" => settings.image_jobs = Some(number(value, IMAGE_JOBS)?),
        "insecure_registries" => settings.insecure_registries = Some(words(value)?),
        "jwt_secret" => settings.jwt_secret = Some(word(value)?),
        "kernel" => settings.kernel = Some(word(value)?),
        "listen" => settings.listen = Some(words(value)?),
        "max_image_packed" => settings.max_image_packed = Some(size(value)?),
        "max_image_unpacked" => settings.max_image_unpacked = Some(size(value)?),
        "max_memory" => settings.max_memory = Some(size(value)?),
        "max_overlay" => settings.max_overlay = Some(size(value)?),
        "max_vcpus" => settings.max_vcpus = Some(number(value, VCPUS)?),
        "max_volumes" => settings.max_volumes = Some(size(value)?),
        "min_free" => settings.min_free = Some(size(value)?),
        "network_capacity" => {
            settings.network_capacity = Some(rate(value, ByteRate::from_network)?);
        }
        "overcommit_cpu" => settings.overcommit_cpu = Some(ratio(value)?),
        "overcommit_disk" => settings.overcommit_disk = Some(ratio(value)?),
        "overcommit_disk_io" => settings.overcommit_disk_io = Some(ratio(value)?),
        "overcommit_memory" => settings.overcommit_memory = Some(ratio(value)?),
        "overcommit_network" => settings.overcommit_network = Some(ratio(value)?),
        "network" => settings.network = Some(flag(value)?),
        "share_kernel" => settings.share_kernel = Some(flag(value)?),
        "subnet" => settings.subnet = Some(word(value)?),
        _ => return Err("nobody reads it".to_owned()),
    }
    Ok(())
}

/// A text that is not empty.
fn word<T: FromStr<Err: Display>>(value: &Value) -> Result<T, String> {
    let text = value.as_str().ok_or_else(|| not("a text in quotes", value))?;
    if text.is_empty() {
        return Err("it is empty".to_owned());
    }
    text.parse().map_err(|error: T::Err| format!("{text:?}: {error}"))
}

/// A list of texts; one alone needs no brackets.
fn words<T: FromStr<Err: Display>>(value: &Value) -> Result<Vec<T>, String> {
    match value {
        Value::Array(values) => values.iter().map(word).collect(),
        Value::String(_) => Ok(vec![word(value)?]),
        _ => Err(not("a list of texts", value)),
    }
}

/// A size with its unit, or plain bytes.
fn size(value: &Value) -> Result<ByteSize, String> {
    match value {
        Value::Integer(bytes) => u64::try_from(*bytes)
            .map(ByteSize)
            .map_err(|_| format!("{bytes}: a size is not less than nothing")),
        Value::String(_) => word(value),
        _ => Err(not("a size like \"8GB\"", value)),
    }
}

/// A rate with its unit.
fn rate(value: &Value, parse: fn(&str) -> Result<ByteRate, SizeError>) -> Result<ByteRate, String> {
    let text = value.as_str().ok_or_else(|| not("a rate like \"100MB/s\"", value))?;
    parse(text).map_err(|error| error.to_string())
}

/// A number of times over, as a number or as text.
fn ratio(value: &Value) -> Result<Ratio, String> {
    let text = match value {
        Value::Integer(number) => number.to_string(),
        Value::Float(number) => number.to_string(),
        Value::String(text) => text.clone(),
        _ => return Err(not("a number like 1.5", value)),
    };
    text.parse().map_err(|error: RatioError| error.to_string())
}

fn number(value: &Value, range: RangeInclusive<u8>) -> Result<u8, String> {
    let number = value.as_integer().ok_or_else(|| not("a whole number", value))?;
    u8::try_from(number)
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(|| format!("{number}: it has to be {} to {}", range.start(), range.end()))
}

fn flag(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| not("true or false", value))
}

fn not(expected: &str, value: &Value) -> String {
    format!("it has to be {expected}, and is of type {}", value.type_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        parse(Path::new("/etc/c.toml"), text).unwrap_err().to_string()
    }

    #[test]
    fn each_mistake_names_its_key_and_the_file() {
        for (key, value, told) in [
            ("listne", "\"127.0.0.1:1\"", "there are agent, "),
            ("listen", "8080", "list of texts, and is of type integer"),
            ("listen", "[\"127.0.0.1\"]", "invalid socket address"),
            ("data_dir", "\"\"", "empty"),
            ("data_dir", "1", "text in quotes"),
            ("max_vcpus", "0", "1 to 32"),
            ("max_vcpus", "300", "1 to 32"),
            ("max_vcpus", "\"4\"", "whole number"),
            ("image_jobs", "17", "1 to 16"),
            ("max_memory", "\"lots\"", "lots"),
            ("max_memory", "-1", "less than nothing"),
            ("max_memory", "1.5", "a size like"),
            ("network", "\"no\"", "true or false"),
            ("subnet", "\"10.0.0.0/31\"", "/8 to /30"),
            ("dns", "\"localhost\"", "IPv4"),
            ("hotplug_policy", "\"later\"", "boot or demand"),
            ("hotplug_quiet", "\"1ms\"", "1s to 1h"),
            ("disk_io_capacity", "1", "a rate like"),
            ("disk_io_capacity", "\"fast\"", "fast"),
        ] {
            let message = refused(&format!("{key} = {value}"));
            assert!(message.contains(key) && message.contains("/etc/c.toml"), "{message}");
            assert!(message.contains(told), "{message}");
        }
    }

    #[test]
    fn what_is_no_toml_is_shown() {
        let message = refused("data_dir = /var");

        assert!(message.contains("/etc/c.toml") && message.contains("line 1"), "{message}");
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        let dir = tempfile::tempdir().unwrap();

        let error = load(Some(&dir.path().join("none"))).unwrap_err();

        assert!(matches!(error, FileError::Read { .. }), "{error}");
    }
}
