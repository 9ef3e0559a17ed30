//! Whether another packet filter of the host drops what guests send and get.
//!
//! Filters are asked one after the other and each may drop, so that no rule of ours can allow what
//! a table of somebody else's refuses (Docker's has the policy to drop what is forwarded). What is
//! others' is not changed, only looked at.

use std::time::Duration;

use serde::Deserialize;

use crate::os::tool::{NFT, ToolError};
use crate::subnet::Subnet;

/// How long `nft` may take to list what there is.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why it is not known whether packets of guests pass.
#[derive(Debug, thiserror::Error)]
pub enum ForwardingError {
    /// The tool.
    #[error("Failed to list the packet filters")]
    Tool(#[from] ToolError),
    /// What it printed.
    #[error("Failed to read the list of packet filters")]
    List(#[source] serde_json::Error),
}

/// A chain that drops what it does not know, as `nft --json` has it (libnftables-json(5)).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Chain {
    /// The protocols: `ip`, `inet`.
    pub family: String,
    /// The table it is in.
    pub table: String,
    /// Its name.
    pub name: String,
    #[serde(default)]
    hook: String,
    #[serde(default)]
    policy: String,
}

#[derive(Deserialize)]
struct List {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    chain: Option<Chain>,
}

/// The first chain that drops forwarded packets and has no rules that let those of `subnet` pass.
///
/// # Errors
///
/// [`ForwardingError`], mostly for want of the right to look.
pub fn obstacle(subnet: Subnet) -> Result<Option<Chain>, ForwardingError> {
    let list = NFT.run(&["--json", "list", "chains"].map(AsRef::as_ref), &[], TIMEOUT)?;
    for chain in dropping(&list.stdout)? {
        let table = ["list", "table", &chain.family, &chain.table].map(AsRef::as_ref);
        let rules = NFT.run(&table, &[], TIMEOUT)?;
        if !lets_pass(&String::from_utf8_lossy(&rules.stdout), subnet) {
            return Ok(Some(chain));
        }
    }
    Ok(None)
}

fn dropping(list: &[u8]) -> Result<Vec<Chain>, ForwardingError> {
    let List { nftables } = serde_json::from_slice(list).map_err(ForwardingError::List)?;
    let chains = nftables.into_iter().filter_map(|item| item.chain);
    let drops = |chain: &Chain| {
        let is_for_us = chain.family == "ip" || chain.family == "inet";
        is_for_us && chain.hook == "forward" && chain.policy == "drop"
    };
    Ok(chains.filter(drops).collect())
}

/// Whether a table says of what comes from `subnet` and of what goes there that it may.
fn lets_pass(rules: &str, subnet: Subnet) -> bool {
    ["saddr", "daddr"].iter().all(|end| {
        let matched = format!("ip {end} {subnet} ");
        rules.lines().any(|rule| rule.contains(&matched) && rule.trim_end().ends_with("accept"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nftables 1.0.6 prints it beside Docker.
    const LIST: &[u8] = br#"{"nftables": [{"metainfo": {"version": "1.0.6",
        "json_schema_version": 1}}, {"chain": {"family": "ip", "table": "filter", "name":
        "DOCKER-USER", "handle": 1}}, {"chain": {"family": "ip", "table": "filter", "name":
        "FORWARD", "handle": 2, "type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}},
        {"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", "handle": 1, "type":
        "filter", "hook": "forward", "prio": 0, "policy": "drop"}}, {"chain": {"family": "inet",
        "table": "ovum-1a2b", "name": "through", "handle": 4, "type": "filter", "hook": "forward",
        "prio": 0, "policy": "accept"}}]}"#;

    #[test]
    fn a_policy_to_drop_is_found() {
        let found = dropping(LIST).unwrap();

        let names: Vec<_> = found.iter().map(|chain| (&*chain.family, &*chain.name)).collect();
        assert_eq!(names, [("ip", "FORWARD")]);
        assert!(dropping(b"none").is_err());
        assert_eq!(dropping(br#"{"nftables": []}"#).unwrap(), []);
    }

    #[test]
    fn both_ways_have_to_be_allowed() {
        let subnet = Subnet::DEFAULT;
        let rule = |end| format!("\t\tip {end} {subnet} counter packets 0 bytes 0 accept\n");
        let refused = format!("\t\tip daddr {subnet} counter packets 0 bytes 0 drop\n");

        assert!(lets_pass(&(rule("saddr") + &rule("daddr")), subnet));
        assert!(!lets_pass(&rule("saddr"), subnet));
        assert!(!lets_pass(&(rule("saddr") + &refused), subnet));
        assert!(!lets_pass("", subnet));
    }
}
