//! A volume as it is asked for.

use std::collections::BTreeMap;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::text::text_type;

/// Longest id: it is the name of a folder.
const ID_BYTES_MAX: usize = 63;

/// Longest name, in characters.
const NAME_CHARS_MAX: usize = 128;

/// Largest volume, in GiB: the largest disk there is.
pub const SIZE_GIB_MAX: u64 = 8 << 10;

/// A volume someone asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    /// Its id, if the caller chose it.
    pub id: Option<VolumeId>,
    /// Its name, which others may have too.
    pub name: VolumeName,
    /// Its size, 1 to [`SIZE_GIB_MAX`]; of one with content, the most it may have.
    pub size_gib: u64,
    /// The caller's labels.
    pub tags: BTreeMap<String, String>,
}

/// The id of a volume: letters, digits, dashes and underscores, the first a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeId(String);

impl VolumeId {
    /// One that nobody has.
    pub(super) fn new() -> Self {
        Self(cuid2::create_id())
    }
}

text_type!(VolumeId, VolumeIdError);

impl FromStr for VolumeId {
    type Err = VolumeIdError;

    fn from_str(text: &str) -> Result<Self, VolumeIdError> {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let well_formed = text.len() <= ID_BYTES_MAX
            && text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
            && text.bytes().all(is_inner);
        if well_formed { Ok(Self(text.to_owned())) } else { Err(VolumeIdError) }
    }
}

/// The name of a volume: anything that can be read in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

text_type!(VolumeName, VolumeNameError);

impl FromStr for VolumeName {
    type Err = VolumeNameError;

    fn from_str(text: &str) -> Result<Self, VolumeNameError> {
        let chars = text.chars().count();
        let well_formed = (1..=NAME_CHARS_MAX).contains(&chars)
            && !text.chars().any(|c| c.is_control() || c == '/')
            && text.trim() == text;
        if well_formed { Ok(Self(text.to_owned())) } else { Err(VolumeNameError) }
    }
}

/// The text is not the id of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "Volume id must be 1 to {ID_BYTES_MAX} letters, digits, dashes and underscores, beginning \
     with a letter or digit"
)]
pub struct VolumeIdError;

/// The text is not the name of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "Volume name must be 1 to {NAME_CHARS_MAX} characters, with no slash or control character \
     among them and no space at its ends"
)]
pub struct VolumeNameError;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_the_name_of_a_folder_and_nothing_else() {
        for id in ["a", "0", "A-b_c", "tz4a98xxat96iws9zmbrgj3a", &"x".repeat(63)] {
            assert!(id.parse::<VolumeId>().is_ok(), "{id}");
        }
        for id in ["", ".", "..", "a/b", "-a", "_a", "a.b", "a b", "ü", "a\0", &"x".repeat(64)] {
            assert_eq!(id.parse::<VolumeId>(), Err(VolumeIdError), "{id:?}");
        }
    }

    #[test]
    fn a_name_can_be_read() {
        for name in ["data", "my data", "données", &"x".repeat(128)] {
            assert!(name.parse::<VolumeName>().is_ok(), "{name}");
        }
        for name in ["", " ", " a", "a\n", "a/b", "a\0b", &"x".repeat(129)] {
            assert_eq!(name.parse::<VolumeName>(), Err(VolumeNameError), "{name:?}");
        }
    }
}
