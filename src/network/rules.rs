//! The packet filter: what guests may reach, and who may reach them.
//!
//! One table of our own, the same whatever guests there are, so that nothing has to be changed when
//! one comes or goes. It is told from which guest a packet is by its interface, and whether its
//! source is that guest's by the host's routes: the only one that leads to an address through that
//! interface is that of the guest at its end.

use std::fmt::Write as _;

use super::NetworkSpec;
use super::host::Names;

/// Removes the table if it is there.
pub(super) fn none(Names { bridge: table, .. }: &Names) -> String {
    // `delete` alone fails if there is none.
    format!("table inet {table}\ndelete table inet {table}\n")
}

/// The whole table, in place of the one that is there: all of it or, on an error, nothing changes.
pub(super) fn of(names: &Names, spec: &NetworkSpec) -> String {
    let Names { bridge: table, tap_prefix, .. } = names;
    let NetworkSpec { subnet, dns, .. } = spec;
    let (gateway, taps) = (subnet.gateway(), format!("\"{tap_prefix}*\""));
    // A resolver on this host is meant for guests if they are told to ask it.
    let resolver = if dns.contains(&gateway) {
        format!("ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept")
    } else {
        String::new()
    };
    let mut rules = none(names);
    let _ = write!(
        rules,
        r#"table inet {table} {{
    # Before anything else is known of a packet.
    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
        iifname {taps} jump from_guest
        iifname {taps} return
        iifname "lo" return
        ip saddr {subnet} drop
    }}
    chain from_guest {{
        meta nfproto != ipv4 drop
        fib saddr . iif oif missing drop
    }}

    # To this host itself: answers, and what is meant for guests.
    chain to_host {{
        type filter hook input priority filter; policy accept;
        iifname {taps} jump host_services
    }}
    chain host_services {{
        ct state established,related accept
        ip daddr {gateway} icmp type echo-request accept
        {resolver}
        meta l4proto tcp reject with tcp reset
        reject with icmp type admin-prohibited
    }}

    # Through this host: to guests only answers, wherever from, and never to what hosts tell of
    # themselves on links of their own.
    chain through {{
        type filter hook forward priority filter; policy accept;
        oifname {taps} ct state established,related accept
        oifname {taps} drop
        iifname {taps} ip daddr 169.254.0.0/16 reject with icmp type admin-prohibited
    }}

    chain leaving {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname {taps} return
        oifname "lo" return
        ip saddr {subnet} masquerade
    }}
}}
"#
    );
    rules
}
