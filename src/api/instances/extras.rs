//! Fields of `POST /instances` whose features are not there yet: read, checked, and refused by
//! name if they ask for anything.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::create::{CreateInstance, SpecError};
use crate::duration::GoDuration;
use crate::instances::spec::InterfaceSpec;
use crate::size::ByteRate;

/// The network of an instance.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Whether it has one.
    pub enabled: Option<bool>,
    /// Rate to the guest.
    pub bandwidth_download: Option<String>,
    /// Rate from the guest.
    pub bandwidth_upload: Option<String>,
    /// What the guest may reach.
    pub egress: Option<Egress>,
}

/// What a guest may reach.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Egress {
    /// Whether its traffic goes through the host's proxy.
    pub enabled: Option<bool>,
    /// How that is enforced.
    pub enforcement: Option<Enforcement>,
}

/// How egress is enforced.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Enforcement {
    /// What goes through the proxy.
    pub mode: Option<EnforcementMode>,
}

/// What goes through the proxy.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EnforcementMode {
    /// All of TCP.
    All,
    /// Ports 80 and 443.
    HttpHttpsOnly,
}

/// A secret that never enters the guest.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Credential {
    /// Where its value is.
    pub source: CredentialSource,
    /// Where it goes.
    pub inject: Vec<CredentialRule>,
}

/// Where the value of a credential is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CredentialSource {
    /// A key of `env`.
    pub env: String,
}

/// Where a credential goes.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CredentialRule {
    /// To which hosts; all if omitted.
    pub hosts: Option<Vec<String>>,
    /// In which header.
    #[serde(rename = "as")]
    pub header: CredentialHeader,
}

/// The header a credential goes in.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CredentialHeader {
    /// Its name.
    pub header: String,
    /// Its value, with `${value}` where the credential goes.
    pub format: String,
}

/// How snapshots are kept.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapshotPolicy {
    /// Whether and how they are compressed.
    pub compression: Option<Compression>,
    /// How long after a standby.
    pub standby_compression_delay: Option<String>,
}

/// Compression of a snapshot.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Compression {
    /// Whether.
    pub enabled: bool,
    /// How.
    pub algorithm: Option<CompressionAlgorithm>,
    /// How much: zstd 1 to 19, lz4 0 to 9.
    pub level: Option<i64>,
}

/// How a snapshot is compressed.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CompressionAlgorithm {
    /// Small.
    Zstd,
    /// Fast.
    Lz4,
}

/// When an instance goes to standby.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AutoStandby {
    /// Whether.
    pub enabled: Option<bool>,
    /// After how long without connections.
    pub idle_timeout: Option<String>,
    /// Whose connections do not count.
    pub ignore_source_cidrs: Option<Vec<String>>,
    /// Connections to which ports do not count.
    pub ignore_destination_ports: Option<Vec<i64>>,
}

impl CreateInstance {
    /// Checks the fields of this file; returns the first that asks for something.
    pub(super) fn check_extras(&self) -> Result<Option<&'static str>, SpecError> {
        let asks = [
            ("network.egress", self.network.as_ref().is_some_and(Network::asks_egress)),
            ("credentials", self.credentials_ask()?),
            (
                "snapshot_policy",
                self.snapshot_policy.as_ref().map_or(Ok(false), SnapshotPolicy::asks)?,
            ),
            ("auto_standby", self.upkeep.asks_standby()?),
        ];
        Ok(asks.into_iter().find_map(|(field, asks)| asks.then_some(field)))
    }

    fn credentials_ask(&self) -> Result<bool, SpecError> {
        let invalid = |why: String| SpecError::invalid("credentials", why);
        let Some(credentials) = &self.credentials else { return Ok(false) };
        for (name, Credential { source, inject }) in credentials {
            let value = self.env.as_ref().and_then(|env| env.get(&source.env));
            if value.is_none_or(String::is_empty) {
                return Err(invalid(format!("{name:?} has no value in env {:?}", source.env)));
            }
            if inject.is_empty() {
                return Err(invalid(format!("{name:?} goes nowhere")));
            }
            let mut seen = BTreeSet::new();
            for CredentialRule { hosts, header: CredentialHeader { header, format } } in inject {
                let hosts: Vec<_> = hosts.iter().flatten().map(|host| host.trim()).collect();
                let bad_host = hosts.iter().find(|host| !is_host_pattern(host));
                if let Some(host) = bad_host {
                    return Err(invalid(format!("{host:?} is no host")));
                }
                if header.trim().is_empty() || !format.contains("${value}") {
                    return Err(invalid(format!("{name:?} needs a header and ${{value}} in it")));
                }
                if !seen.insert((hosts, header.trim(), format.trim())) {
                    return Err(invalid(format!("{name:?} has a rule twice")));
                }
            }
        }
        let network = self.network.as_ref();
        let egress = network.and_then(|network| network.egress.as_ref());
        if !credentials.is_empty() && egress.and_then(|egress| egress.enabled) != Some(true) {
            return Err(invalid("they need network.egress.enabled".to_owned()));
        }
        Ok(!credentials.is_empty())
    }
}

impl Network {
    /// The network that is asked for, if any is; `by_default` if nothing is said of it, and of
    /// rates that nothing is said of, `share`.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub(super) fn parsed(
        &self,
        by_default: bool,
        share: Option<NonZeroU64>,
    ) -> Result<Option<InterfaceSpec>, SpecError> {
        let enabled = self.enabled.unwrap_or(by_default);
        let rate =
            |field, text: Option<&String>| match text.map(|text| ByteRate::from_network(text)) {
                None => Ok(share),
                Some(Ok(ByteRate(rate))) => Ok(NonZeroU64::new(rate)),
                Some(Err(error)) => Err(SpecError::invalid(field, error)),
            };
        let download = rate("network.bandwidth_download", self.bandwidth_download.as_ref())?;
        let upload = rate("network.bandwidth_upload", self.bandwidth_upload.as_ref())?;
        if self.asks_egress() && self.enabled == Some(false) {
            let why = "it needs network.enabled";
            return Err(SpecError::invalid("network.egress", why));
        }
        let interface = InterfaceSpec { download_bps: download, upload_bps: upload };
        Ok(enabled.then_some(interface))
    }

    fn asks_egress(&self) -> bool {
        self.egress.as_ref().and_then(|egress| egress.enabled) == Some(true)
    }
}

impl SnapshotPolicy {
    fn asks(&self) -> Result<bool, SpecError> {
        let delay = self.standby_compression_delay.as_deref();
        duration_asks("snapshot_policy.standby_compression_delay", delay)?;
        if let Some(Compression { algorithm, level: Some(level), .. }) = self.compression {
            let levels = match algorithm.unwrap_or(CompressionAlgorithm::Zstd) {
                CompressionAlgorithm::Zstd => 1..=19,
                CompressionAlgorithm::Lz4 => 0..=9,
            };
            if !levels.contains(&level) {
                let why = format!("{level} is not within {levels:?}");
                return Err(SpecError::invalid("snapshot_policy.compression.level", why));
            }
        }
        Ok(true)
    }
}

impl AutoStandby {
    /// Checks it; whether it asks for anything.
    pub(super) fn asks(&self) -> Result<bool, SpecError> {
        let timeout = duration_asks("auto_standby.idle_timeout", self.idle_timeout.as_deref())?;
        let enabled = self.enabled.unwrap_or_default();
        if enabled && !timeout {
            return Err(SpecError::invalid("auto_standby.idle_timeout", "it is needed"));
        }
        if let Some(cidr) = self.ignore_source_cidrs.iter().flatten().find(|cidr| !is_cidr(cidr)) {
            let why = format!("{cidr:?} is no network");
            return Err(SpecError::invalid("auto_standby.ignore_source_cidrs", why));
        }
        for &port in self.ignore_destination_ports.iter().flatten() {
            checked_port("auto_standby.ignore_destination_ports", port)?;
        }
        Ok(enabled)
    }
}

/// Whether a duration is longer than nothing. A negative one is invalid.
pub(super) fn duration_asks(field: &'static str, text: Option<&str>) -> Result<bool, SpecError> {
    let Some(text) = text else { return Ok(false) };
    let duration = parsed_duration(field, text)?;
    match duration.positive() {
        Some(_) => Ok(true),
        None if duration.is_zero() => Ok(false),
        None => Err(SpecError::invalid(field, "it is negative")),
    }
}

pub(super) fn parsed_duration(field: &'static str, text: &str) -> Result<GoDuration, SpecError> {
    text.parse().map_err(|error| SpecError::invalid(field, error))
}

pub(super) fn checked_port(field: &'static str, port: i64) -> Result<u16, SpecError> {
    let checked = u16::try_from(port).ok().filter(|&port| port > 0);
    checked.ok_or_else(|| SpecError::invalid(field, format!("{port} is no port")))
}

fn is_cidr(text: &str) -> bool {
    let Some((address, bits)) = text.split_once('/') else { return false };
    let bits_max = match address.parse() {
        Ok(IpAddr::V4(_)) => Ipv4Addr::BITS,
        Ok(IpAddr::V6(_)) => Ipv6Addr::BITS,
        Err(_) => return false,
    };
    bits.parse::<u32>().is_ok_and(|bits| bits <= bits_max)
}

/// A host name, or `*.` and one.
fn is_host_pattern(text: &str) -> bool {
    let name = text.strip_prefix("*.").unwrap_or(text);
    !name.is_empty()
        && name.split('.').all(|label| {
            !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
}
