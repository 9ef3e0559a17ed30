//! Which hosts are this machine: what goes to them crosses no wire.

use std::net::IpAddr;

/// Whether a host, as URLs (`[::1]`) and references (`localhost`, `127.0.0.1:5000`) have it, is
/// this machine.
pub fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let inner = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let address = inner.unwrap_or(name).parse::<IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "[::1]", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example.org",
            "10.0.0.1:5000",
            "127.0.0.1.example.org:80",
            "[::2]:1",
            "[localhost]",
            "",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
