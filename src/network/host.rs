//! What all guests of a server have in common on its host: the bridge with the gateway's address,
//! forwarding, and the packet filter.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::{Mac, NetworkError, NetworkSpec, rules};
use crate::os::netlink::{Message, Netlink};
use crate::os::tap::NAME_BYTES_MAX;
use crate::os::tool::NFT;
use crate::subnet::Subnet;

/// What the names of all bridges begin with.
const BRIDGE_PREFIX: &str = "ovum-";

/// Whether the host forwards packets at all.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// The host's routes (proc_pid_net(5)).
const ROUTES: &str = "/proc/net/route";

/// The host's interfaces.
const LINKS: &str = "/sys/class/net";

/// How long the packet filter may take: it waits for others who change theirs.
const FILTER_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of the data folder's digest that are part of our names.
const DIGEST_BYTES: usize = 2;

/// Names of what a server has on its host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Names {
    /// The bridge, and the table of the packet filter.
    pub(super) bridge: String,
    /// What the names of all TAPs begin with.
    pub(super) tap_prefix: String,
    /// What is written beside the bridge, so that nobody takes another's for theirs.
    owner: String,
}

impl Names {
    /// Those of the server with the data folder `owner`.
    pub(super) fn of(owner: &Path) -> Self {
        let digest = Sha256::digest(owner.as_os_str().as_encoded_bytes());
        let digest = hex::encode(&digest[..DIGEST_BYTES]);
        let owner = format!("ovum {}", owner.display());
        Self {
            bridge: format!("{BRIDGE_PREFIX}{digest}"),
            tap_prefix: format!("ov{digest}-"),
            owner,
        }
    }

    /// The TAP of the instance `id`: as much of that as there is room for.
    pub(super) fn tap(&self, id: &str) -> String {
        let room = NAME_BYTES_MAX - self.tap_prefix.len();
        format!("{}{}", self.tap_prefix, id.get(..room).unwrap_or(id))
    }
}

/// Sets up, or anew, what guests need. Blocks.
pub(super) fn set_up(names: &Names, spec: &NetworkSpec) -> Result<(), NetworkError> {
    check_routes(names, spec.subnet)?;
    set_up_bridge(names, spec.subnet)?;
    forward().map_err(|source| NetworkError::host("let the host forward packets", source))?;
    let rules = rules::of(names, spec);
    NFT.feed(&["-f".as_ref(), "-".as_ref()], rules.as_bytes(), FILTER_TIMEOUT)
        .map(drop)
        .map_err(NetworkError::Filter)
}

/// Takes everything back, unless there are TAPs. The host goes on forwarding: who else relies on
/// that is not known.
pub(super) fn tear_down(names: &Names) -> Result<(), NetworkError> {
    let failed = |source| NetworkError::host("look at the host's interfaces", source);
    let mut links = fs::read_dir(LINKS).map_err(failed)?.flatten();
    let is_ours = |name: &[u8]| name.starts_with(names.tap_prefix.as_bytes());
    if links.any(|link| is_ours(link.file_name().as_encoded_bytes())) {
        return Ok(());
    }
    let remove = || {
        let netlink = Netlink::open()?;
        let index = netlink.index(&names.bridge)?;
        index.map_or(Ok(()), |index| netlink.change([Message::remove(index)]))
    };
    remove().map_err(|source| NetworkError::host("remove a bridge", source))?;
    NFT.feed(&["-f".as_ref(), "-".as_ref()], rules::none(names).as_bytes(), FILTER_TIMEOUT)
        .map(drop)
        .map_err(NetworkError::Filter)
}

/// The bridge with the gateway's address. It has no ports; it is there so that the address is,
/// whether there are guests or not, and so that what is for none of them goes nowhere.
fn set_up_bridge(names: &Names, subnet: Subnet) -> Result<(), NetworkError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::PermissionDenied => NetworkError::Denied,
        _ => NetworkError::host("set up a bridge", error),
    };
    let name = &names.bridge;
    let netlink = Netlink::open().map_err(failed)?;
    if let Some(index) = netlink.index(name).map_err(failed)? {
        let alias = fs::read_to_string(Path::new(LINKS).join(name).join("ifalias"));
        let alias = alias.unwrap_or_default();
        // One without a word is ours: a server that was killed had not come to it.
        if !alias.trim().is_empty() && alias.trim() != names.owner {
            return Err(NetworkError::Foreign { name: name.clone() });
        }
        // It may have the address of another subnet.
        netlink.change([Message::remove(index)]).map_err(failed)?;
    }
    netlink.change([Message::add_bridge(name)]).map_err(failed)?;
    let index = netlink.index(name).map_err(failed)?;
    let index = index.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    // A kernel without IPv6 has no such setting, and needs none.
    let _ = netlink.change([Message::without_ipv6_address(index)]);
    let gateway = subnet.gateway();
    netlink
        .change([
            Message::describe(index, &names.owner),
            Message::set_up(index, Mac::of(gateway).octets(), super::PACKETS_WAITING),
            Message::add_address(index, gateway, subnet.prefix()),
        ])
        .map_err(failed)
}

fn forward() -> io::Result<()> {
    if fs::read_to_string(FORWARDING)?.trim() == "1" {
        return Ok(());
    }
    fs::write(FORWARDING, "1")?;
    tracing::info!("The host forwards packets from now on (net.ipv4.ip_forward)");
    Ok(())
}

/// Whether no route of others leads to where guests are.
pub(super) fn check_routes(names: &Names, subnet: Subnet) -> Result<(), NetworkError> {
    let routes = fs::read_to_string(ROUTES)
        .map_err(|source| NetworkError::host("read the host's routes", source))?;
    match collision(&routes, subnet, names) {
        Some(route) => Err(NetworkError::Collision { subnet, route }),
        None => Ok(()),
    }
}

/// The first route in `routes`, not ours and not to everywhere, that leads to where guests are.
fn collision(routes: &str, subnet: Subnet, names: &Names) -> Option<String> {
    routes.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (link, to, mask) =
            (fields.first()?, address(fields.get(1)?)?, address(fields.get(7)?)?);
        let is_ours = *link == names.bridge || link.starts_with(&names.tap_prefix);
        let is_default = mask.is_unspecified();
        let bits = mask.to_bits().leading_ones();
        let collides = !is_ours && !is_default && subnet.overlaps(to, mask);
        collides.then(|| format!("{to}/{bits} by {link}{}", hint(link)))
    })
}

/// What a killed server leaves is taken back by the next one of its data folder, if there is one.
fn hint(link: &str) -> String {
    if !link.starts_with(BRIDGE_PREFIX) {
        return String::new();
    }
    format!(" (of another ovum server; if that is gone for good: `ip link delete {link}`)")
}

/// An address as /proc has it: hex, in the order of memory.
fn address(hex: &str) -> Option<Ipv4Addr> {
    u32::from_str_radix(hex, 16).ok().map(|bits| Ipv4Addr::from(bits.to_le_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_servers_apart_and_fit() {
        let [one, other] = ["/var/lib/ovum", "/home/me/ovum"].map(|dir| Names::of(Path::new(dir)));

        assert_ne!(one.bridge, other.bridge);
        let tap = one.tap("k3x8f0a1b2c3d4e5f6g7h8i9");
        assert_eq!(tap.len(), NAME_BYTES_MAX);
        assert!(tap.starts_with(&one.tap_prefix) && tap.ends_with("-k3x8f0a1"), "{tap}");
        assert!(!tap.starts_with(&other.tap_prefix));
    }

    #[test]
    fn a_route_into_the_subnet_collides_unless_it_is_ours_or_leads_everywhere() {
        let names = Names::of(Path::new("/data"));
        let subnet: Subnet = "10.100.0.0/16".parse().unwrap();
        let head = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\n";
        let route = |link: &str, to: &str, mask: &str| {
            let routes = format!("{head}{link}\t{to}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n");
            collision(&routes, subnet, &names)
        };

        let found = route("eth1", "0007640A", "00FFFFFF");
        assert_eq!(found.as_deref(), Some("10.100.7.0/24 by eth1"));
        assert_eq!(route("tun0", "0000000A", "000000FF").as_deref(), Some("10.0.0.0/8 by tun0"));
        let left = route("ovum-0000", "0000640A", "0000FFFF").unwrap();
        assert!(left.contains("`ip link delete ovum-0000`"), "{left}");
        assert_eq!(route("eth0", "00000000", "00000000"), None);
        assert_eq!(route("eth0", "0002000A", "00FFFFFF"), None);
        assert_eq!(route(&names.bridge, "0000640A", "0000FFFF"), None);
        assert_eq!(route(&names.tap("abc"), "0500640A", "FFFFFFFF"), None);
        assert_eq!(collision(head, subnet, &names), None);
        assert_eq!(collision("", subnet, &names), None);
    }
}
