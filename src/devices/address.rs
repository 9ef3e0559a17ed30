//! Where a device sits on the host's PCI buses: `0000:a2:00.0`.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::text_type;

/// Digits of a domain, of which the kernel writes four unless it needs more.
const DOMAIN_DIGITS: [usize; 2] = [4, 8];

/// Largest number of a device on its bus, and of a function in its device (PCI 3.0, 3.2.2.3
/// "Configuration Space Decoding").
const DEVICE_MAX: u8 = 0x1f;
const FUNCTION_MAX: u8 = 7;

/// The address of a PCI function, as sysfs spells it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress(String);

text_type!(PciAddress, PciAddressError);

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<Self, PciAddressError> {
        let text = text.to_ascii_lowercase();
        if is_well_formed(&text) { Ok(Self(text)) } else { Err(PciAddressError) }
    }
}

fn is_well_formed(text: &str) -> bool {
    let number = |text: &str, digits: usize| {
        let is_hex = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        if is_hex { u8::from_str_radix(text, 16).ok() } else { None }
    };
    let mut parts = text.splitn(3, ':');
    let (Some(domain), Some(bus), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    let Some((device, function)) = rest.split_once('.') else { return false };
    let [fewest, most] = DOMAIN_DIGITS;
    (fewest..=most).contains(&domain.len())
        && domain.bytes().all(|byte| byte.is_ascii_hexdigit())
        && number(bus, 2).is_some()
        && number(device, 2).is_some_and(|device| device <= DEVICE_MAX)
        && number(function, 1).is_some_and(|function| function <= FUNCTION_MAX)
}

/// The text is no address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("A PCI address is DOMAIN:BUS:DEVICE.FUNCTION in hexadecimal, for example 0000:a2:00.0")]
pub struct PciAddressError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_the_name_of_a_folder_in_sysfs_and_nothing_else() {
        for (text, address) in [
            ("0000:a2:00.0", "0000:a2:00.0"),
            ("0000:A2:1F.7", "0000:a2:1f.7"),
            ("10000:01:00.0", "10000:01:00.0"),
        ] {
            assert_eq!(text.parse::<PciAddress>().unwrap().as_str(), address);
        }
        for text in [
            "",
            "a2:00.0",
            "0000:a2:00",
            "0000:a2:20.0",
            "0000:a2:00.8",
            "0000:a2:00.00",
            "000:a2:00.0",
            "000000000:a2:00.0",
            "0000:a2:00.0\n",
            "0000:a2:+0.0",
            "../../a2:00.0",
            "0000:a2:00.0/..",
            "0000:é2:00.0",
        ] {
            assert_eq!(text.parse::<PciAddress>(), Err(PciAddressError), "{text:?}");
        }
    }
}
