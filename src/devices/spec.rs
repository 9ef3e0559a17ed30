//! A device of the host as it is registered.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::devices::address::PciAddress;
use crate::text::text_type;

/// Most characters of a name, and fewest.
const NAME_BYTES_MAX: usize = 128;
const NAME_BYTES_MIN: usize = 2;

/// A device that someone wants to be able to give to instances.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSpec {
    /// Where it is.
    pub address: PciAddress,
    /// Its name, which no other has; made of the address if there is none.
    pub name: Option<DeviceName>,
    /// The caller's labels.
    pub tags: BTreeMap<String, String>,
}

/// The name of a device: letters, digits, `_`, `.` and `-`, the first a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(String);

impl DeviceName {
    /// That of a device at `address` whose name nobody chose.
    pub fn of(address: &PciAddress) -> Self {
        Self(format!("pci-{}", address.as_str().replace([':', '.'], "-")))
    }
}

text_type!(DeviceName, DeviceNameError);

impl FromStr for DeviceName {
    type Err = DeviceNameError;

    fn from_str(text: &str) -> Result<Self, DeviceNameError> {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let well_formed = (NAME_BYTES_MIN..=NAME_BYTES_MAX).contains(&text.len())
            && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
            && text.bytes().all(is_inner);
        if well_formed { Ok(Self(text.to_owned())) } else { Err(DeviceNameError) }
    }
}

/// The text is no name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "A device's name must be {NAME_BYTES_MIN} to {NAME_BYTES_MAX} letters, digits, underscores, \
     dots and dashes, beginning with a letter or digit"
)]
pub struct DeviceNameError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_word_or_made_of_the_address() {
        for name in ["l4-gpu", "A1", "0.x_y-z", &"x".repeat(128)] {
            assert!(name.parse::<DeviceName>().is_ok(), "{name}");
        }
        for name in ["", "a", "-a", ".a", "_a", "a b", "a/b", "ab\n", "äb", &"x".repeat(129)] {
            assert_eq!(name.parse::<DeviceName>(), Err(DeviceNameError), "{name:?}");
        }
        let made = DeviceName::of(&"0000:a2:00.0".parse().unwrap());
        assert_eq!(made.as_str(), "pci-0000-a2-00-0");
        assert_eq!(made.as_str().parse(), Ok(made));
    }
}
