//! Whom guests ask for names if the server's settings do not say: whom the host asks.
//!
//! A host with a resolver of its own has a loopback address in /etc/resolv.conf, which in a guest
//! would be the guest. If that resolver is systemd's, a second file says whom it asks in turn.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

/// Where hosts say whom they ask, the first with an address of use being meant: resolv.conf(5),
/// systemd-resolved.service(8).
const FILES: [&str; 2] = ["etc/resolv.conf", "run/systemd/resolve/resolv.conf"];

/// Most servers that a C library looks at (resolv.conf(5), MAXNS).
const SERVERS_MAX: usize = 3;

/// Most bytes of such a file.
const FILE_BYTES_MAX: usize = 64 << 10;

/// Whom guests ask if the host asks nobody that they can reach.
pub const FALLBACK: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);

/// Name servers of a host, and where it says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolvers {
    /// Their addresses, 1 to [`SERVERS_MAX`].
    pub servers: Vec<Ipv4Addr>,
    /// The file.
    pub path: PathBuf,
}

/// The name servers that the host below `root` asks and guests can, too, if there are any.
pub fn of_host(root: &Path) -> Option<Resolvers> {
    FILES.iter().map(|file| root.join(file)).find_map(|path| {
        let text = fs::read(&path).ok()?;
        let text = String::from_utf8_lossy(text.get(..FILE_BYTES_MAX).unwrap_or(&text));
        let servers: Vec<_> = servers(&text).take(SERVERS_MAX).collect();
        (!servers.is_empty()).then_some(Resolvers { servers, path })
    })
}

fn servers(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = (words.next()? == "nameserver").then(|| words.next())??;
        let address: Ipv4Addr = address.parse().ok()?;
        let is_elsewhere = !address.is_loopback() && !address.is_unspecified();
        (is_elsewhere && !address.is_link_local()).then_some(address)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(own: &str, systemds: &str) -> Option<Vec<Ipv4Addr>> {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::create_dir_all(root.path().join("run/systemd/resolve")).unwrap();
        fs::write(root.path().join(FILES[0]), own).unwrap();
        fs::write(root.path().join(FILES[1]), systemds).unwrap();
        of_host(root.path()).map(|resolvers| resolvers.servers)
    }

    fn addresses(texts: &[&str]) -> Option<Vec<Ipv4Addr>> {
        Some(texts.iter().map(|text| text.parse().unwrap()).collect())
    }

    #[test]
    fn guests_ask_whom_the_host_asks() {
        let four = "# x\nsearch a\nnameserver 10.0.0.2\nnameserver 9.9.9.9\nnameserver 10.0.0.3\n\
                    nameserver 10.0.0.4\n";

        assert_eq!(
            host(four, "nameserver 8.8.8.8"),
            addresses(&["10.0.0.2", "9.9.9.9", "10.0.0.3"])
        );
        assert_eq!(host("nameserver 127.0.0.1\nnameserver 10.0.0.2", ""), addresses(&["10.0.0.2"]));
    }

    /// Its address means the guest itself there.
    #[test]
    fn a_resolver_of_the_hosts_own_is_asked_whom_it_asks() {
        let stub = "nameserver 127.0.0.53\noptions edns0 trust-ad\n";

        assert_eq!(host(stub, "nameserver 192.168.1.1\n"), addresses(&["192.168.1.1"]));
    }

    #[test]
    fn what_a_guest_cannot_ask_is_no_server() {
        let none = "nameserver 0.0.0.0\nnameserver fe80::1\nnameserver\nnameserver x\n\
                    nameserver 169.254.169.253\nnameserver127.0.0.1\n";

        assert_eq!(host(none, "nameserver 127.0.0.1"), None);
        assert_eq!(of_host(Path::new("/nonexistent")), None);
    }
}
