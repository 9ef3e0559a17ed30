//! A range of IPv4 addresses as people write it: `10.100.0.0/16`.

use std::fmt;
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// Prefixes a subnet of guests can have. The longest leaves room for a gateway and one guest; the
/// shortest, 24 bits by which the hosts in it differ, which is what an Ethernet address of ours
/// has room for.
const PREFIXES: RangeInclusive<u8> = 8..=30;

/// Addresses of guests and of their gateway, the first of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// Where guests are unless told otherwise.
    pub const DEFAULT: Self = Self { network: Ipv4Addr::new(10, 100, 0, 0), prefix: 16 };

    /// Bits that all of its addresses have in common.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Where guests send what is for others.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() + 1)
    }

    /// Addresses that guests can have: all but those of the network, its gateway and everybody.
    pub fn guests(self) -> RangeInclusive<u32> {
        self.network.to_bits() + 2..=self.network.to_bits() + (self.size() - 2)
    }

    /// Whether `address` lies in it.
    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.network.to_bits()
    }

    /// Whether it has addresses in common with the network `address` is in, by `mask`.
    pub fn overlaps(self, address: Ipv4Addr, mask: Ipv4Addr) -> bool {
        let mask = mask.to_bits() & self.mask();
        address.to_bits() & mask == self.network.to_bits() & mask
    }

    fn size(self) -> u32 {
        1 << (u32::BITS - u32::from(self.prefix))
    }

    fn mask(self) -> u32 {
        !(self.size() - 1)
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let (address, prefix) = text.split_once('/').ok_or(SubnetError::Malformed)?;
        let network: Ipv4Addr = address.parse().map_err(|_| SubnetError::Malformed)?;
        let prefix = prefix.parse().map_err(|_| SubnetError::Malformed)?;
        if !PREFIXES.contains(&prefix) {
            return Err(SubnetError::Prefix { prefix });
        }
        let subnet = Self { network, prefix };
        let first = Ipv4Addr::from_bits(network.to_bits() & subnet.mask());
        if first != network {
            return Err(SubnetError::Bits { right: Self { network: first, prefix } });
        }
        let [first, ..] = network.octets();
        if matches!(first, 0 | 127 | 224..) {
            return Err(SubnetError::Reserved);
        }
        Ok(subnet)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// Why a text is no subnet for guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Not even one for others.
    #[error("a subnet is written as 10.100.0.0/16")]
    Malformed,
    /// Too small or too large.
    #[error("/{prefix} is not within /{} to /{}", PREFIXES.start(), PREFIXES.end())]
    Prefix {
        /// What it has.
        prefix: u8,
    },
    /// An address in a subnet.
    #[error("it has bits set beyond its prefix: {right} is meant?")]
    Bits {
        /// The subnet that the address is in.
        right: Subnet,
    },
    /// Addresses of this network, of this host, or of groups.
    #[error("hosts have no such addresses")]
    Reserved,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(text: &str) -> Subnet {
        text.parse().unwrap()
    }

    #[test]
    fn a_subnet_has_a_gateway_and_guests() {
        for (text, gateway, first, last) in [
            ("10.100.0.0/16", "10.100.0.1", "10.100.0.2", "10.100.255.254"),
            ("192.168.7.4/30", "192.168.7.5", "192.168.7.6", "192.168.7.6"),
            ("10.0.0.0/8", "10.0.0.1", "10.0.0.2", "10.255.255.254"),
        ] {
            let subnet = subnet(text);
            let guests = subnet.guests();

            assert_eq!(subnet.to_string(), text);
            assert_eq!(subnet.gateway().to_string(), gateway);
            let [from, to] = [*guests.start(), *guests.end()].map(Ipv4Addr::from_bits);
            assert_eq!((from.to_string(), to.to_string()), (first.to_owned(), last.to_owned()));
            assert!(subnet.contains(from) && subnet.contains(to));
            assert!(!subnet.contains(Ipv4Addr::from_bits(guests.end() + 2)));
        }
    }

    #[test]
    fn what_is_no_subnet_for_guests_says_why() {
        for text in ["", "10.100.0.0", "10.100.0/16", "10.100.0.0/", "10.100.0.0/x", "::1/64"] {
            assert_eq!(text.parse::<Subnet>(), Err(SubnetError::Malformed), "{text}");
        }
        for prefix in [0, 7, 31, 32, 200] {
            let text = format!("10.0.0.0/{prefix}");
            assert_eq!(text.parse::<Subnet>(), Err(SubnetError::Prefix { prefix }));
        }
        let error = "10.100.0.1/16".parse::<Subnet>().unwrap_err();
        assert!(error.to_string().contains("10.100.0.0/16"), "{error}");
        for text in ["0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/16", "255.255.255.0/24"] {
            assert_eq!(text.parse::<Subnet>(), Err(SubnetError::Reserved), "{text}");
        }
    }

    #[test]
    fn networks_overlap_if_one_contains_the_other() {
        let ours = subnet("10.100.0.0/16");
        for (address, mask, overlaps) in [
            ("10.100.0.0", "255.255.0.0", true),
            ("10.100.7.0", "255.255.255.0", true),
            ("10.100.7.1", "255.255.255.255", true),
            ("10.0.0.0", "255.0.0.0", true),
            ("10.101.0.0", "255.255.0.0", false),
            ("10.99.255.255", "255.255.255.255", false),
            ("192.168.0.0", "255.255.0.0", false),
        ] {
            let (address, mask) = (address.parse().unwrap(), mask.parse().unwrap());
            assert_eq!(ours.overlaps(address, mask), overlaps, "{address} {mask}");
        }
    }
}
