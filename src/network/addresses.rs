//! Who has which address: leases of one subnet.
//!
//! A lease lasts as long as its guard; an instance holds it while its machine runs. Across servers
//! the records of instances say who had what: a server that finds a running one takes its address
//! before it gives any away.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::rand::{GetRandomFlags, getrandom};

use crate::subnet::Subnet;

/// The first bytes of each Ethernet address we give: locally administered, one interface (IEEE 802,
/// 8.2 "Universal and local addresses").
const MAC_PREFIX: [u8; 3] = [0x02, 0, 0];

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mac([u8; 6]);

impl Mac {
    /// Its bytes, in the order in which they are sent.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// That of whoever has `address`: the part of it by which hosts of a subnet differ is part of
    /// both, so that one is as unique as the other, and nothing has to be kept of it.
    pub fn of(address: Ipv4Addr) -> Self {
        let ([a, b, c], [_, x, y, z]) = (MAC_PREFIX, address.octets());
        Self([a, b, c, x, y, z])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, x, y, z] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{x:02x}:{y:02x}:{z:02x}")
    }
}

/// The addresses of one subnet. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Addresses {
    subnet: Subnet,
    taken: Arc<Mutex<BTreeSet<u32>>>,
}

/// An address that nobody else gets; free again when dropped.
#[derive(Debug)]
pub struct Lease {
    address: Ipv4Addr,
    addresses: Addresses,
}

impl Lease {
    /// The address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.addresses.taken().remove(&self.address.to_bits());
    }
}

impl Addresses {
    pub(super) fn new(subnet: Subnet) -> Self {
        Self { subnet, taken: Arc::default() }
    }

    /// An address that is free, another than `last` if there is any; `None` if none is.
    ///
    /// Somewhere in the subnet, so that one that was given back is not another's a moment later.
    pub(super) fn lease(&self, last: Option<Ipv4Addr>) -> Option<Lease> {
        let guests = self.subnet.guests();
        let (first, count) = (*guests.start(), guests.end() - guests.start() + 1);
        let begin = random() % count;
        let last = last.map(Ipv4Addr::to_bits);
        let mut taken = self.taken();
        let free = || {
            let each = (0..count).map(|step| first + (begin + step) % count);
            each.filter(|address| !taken.contains(address))
        };
        // The last one is better than none.
        let address = free().find(|&address| Some(address) != last).or_else(|| free().next())?;
        taken.insert(address);
        Some(Lease { address: Ipv4Addr::from_bits(address), addresses: self.clone() })
    }

    /// A lease of `address`, whoever has it: it belongs to a machine that runs.
    pub(super) fn hold(&self, address: Ipv4Addr) -> Lease {
        self.taken().insert(address.to_bits());
        Lease { address, addresses: self.clone() }
    }

    /// How many are leased.
    pub(super) fn count(&self) -> usize {
        self.taken().len()
    }

    fn taken(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        // A set is never half changed.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A number to begin at. If the kernel has none yet, any will do.
fn random() -> u32 {
    let mut bytes = [0; 4];
    let _ = getrandom(&mut bytes, GetRandomFlags::empty());
    u32::from_ne_bytes(bytes) >> 1
}

#[cfg(test)]
mod tests {
    use std::iter;

    use super::*;

    fn addresses(subnet: &str) -> Addresses {
        Addresses::new(subnet.parse().unwrap())
    }

    #[test]
    fn each_guest_has_an_address_of_its_own_until_there_are_none() {
        let addresses = addresses("10.1.0.0/28");

        let leases: Vec<Lease> = iter::from_fn(|| addresses.lease(None)).collect();

        let all: BTreeSet<u32> = leases.iter().map(|lease| lease.address.to_bits()).collect();
        assert_eq!(all.len(), 13, "16 but for network, gateway and broadcast");
        assert_eq!(addresses.count(), 13);
        let freed = leases[4].address;
        drop(leases);
        assert_eq!(addresses.count(), 0);
        assert_eq!(addresses.hold(freed).address(), freed);
    }

    #[test]
    fn who_comes_back_gets_another_address_if_there_is_one() {
        let two = addresses("10.1.0.0/29");
        for _ in 0..20 {
            let last = two.lease(None).unwrap().address();
            assert_ne!(two.lease(Some(last)).unwrap().address(), last);
        }

        let only = addresses("10.1.0.0/30");
        let last = only.lease(None).unwrap().address();
        assert_eq!(only.lease(Some(last)).unwrap().address(), last);
    }

    #[test]
    fn an_address_that_was_found_in_use_is_not_given_away() {
        let addresses = addresses("10.1.0.0/30");

        let held = addresses.hold("10.1.0.2".parse().unwrap());

        assert!(addresses.lease(None).is_none());
        drop(held);
        assert!(addresses.lease(None).is_some());
    }

    #[test]
    fn an_ethernet_address_says_whose_it_is() {
        let mac = Mac::of("10.100.7.250".parse().unwrap());

        assert_eq!(mac.to_string(), "02:00:00:64:07:fa");
    }
}
