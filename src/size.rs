//! Sizes and rates as the API writes them: `512MB`, `10GB/s`, `1Gbps`.
//!
//! Multiples are powers of 1024 whatever the unit is called; only a bandwidth in bits per second
//! counts in thousands. A size is written back in its shortest exact form, never with decimals, so
//! that what a client reads is what it can send.

use std::fmt;
use std::str::FromStr;

/// Longest text looked at: twenty digits and a unit, with room for spaces.
const TEXT_BYTES_MAX: usize = 64;

/// Units from the largest that fits 64 bits down; the exponent is of 1024.
const UNITS: [(&str, u32); 7] =
    [("EB", 6), ("PB", 5), ("TB", 4), ("GB", 3), ("MB", 2), ("KB", 1), ("B", 0)];

/// Bytes. Parsed from and displayed as `512MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Bytes per second. Displayed as `100MB/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteRate(pub u64);

impl ByteRate {
    /// Reads the rate of a disk: a size, then `/s` or `ps` or nothing.
    ///
    /// # Errors
    ///
    /// [`SizeError`], as for a size.
    pub fn from_disk(text: &str) -> Result<Self, SizeError> {
        let lower = text.trim().to_ascii_lowercase();
        let size = lower.strip_suffix("/s").or(lower.strip_suffix("ps")).unwrap_or(&lower);
        size.parse().map(|ByteSize(bytes)| Self(bytes)).map_err(|error: SizeError| error.of(text))
    }

    /// Reads the rate of a network: `<n>[k|m|g]bps` are bits, in thousands; anything else is the
    /// rate of a disk.
    ///
    /// # Errors
    ///
    /// [`SizeError`], as for a size.
    pub fn from_network(text: &str) -> Result<Self, SizeError> {
        let lower = text.trim().to_ascii_lowercase();
        // `10MBps` is bytes: only a small `b` before `ps` is a bit.
        let is_bits = lower.ends_with("bps") && !text.trim().ends_with("Bps");
        let Some(bits) = lower.strip_suffix("bps").filter(|_| is_bits) else {
            return Self::from_disk(text);
        };
        let (digits, factor) = match bits.as_bytes().last() {
            Some(b'g') => (&bits[..bits.len() - 1], 1_000_000_000),
            Some(b'm') => (&bits[..bits.len() - 1], 1_000_000),
            Some(b'k') => (&bits[..bits.len() - 1], 1_000),
            _ => (bits, 1),
        };
        let number = digits_of(digits.trim_end()).ok_or_else(|| SizeError::malformed(text))?;
        let bits = number.checked_mul(factor).ok_or_else(|| SizeError::too_large(text))?;
        Ok(Self(bits / 8))
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(SizeError::malformed(text));
        }
        let trimmed = text.trim();
        let end = trimmed.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(end);
        let exponent = exponent_of(unit.trim_start()).filter(|_| !digits.is_empty());
        let exponent = exponent.ok_or_else(|| SizeError::malformed(text))?;
        digits_of(digits)
            .and_then(|number| number.checked_mul(1024_u64.pow(exponent)))
            .map(Self)
            .ok_or_else(|| SizeError::too_large(text))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = |exponent: u32| self.0 != 0 && self.0.is_multiple_of(1024_u64.pow(exponent));
        let (unit, exponent) =
            UNITS.into_iter().find(|&(_, exponent)| exact(exponent)).unwrap_or(("B", 0));
        write!(f, "{}{unit}", self.0 / 1024_u64.pow(exponent))
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/s", ByteSize(self.0))
    }
}

/// A text that is only digits, and no more than 64 bits of them.
fn digits_of(text: &str) -> Option<u64> {
    let all_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    all_digits.then(|| text.parse().ok()).flatten()
}

/// Which power of 1024 a unit is. `Mb` and its kin could mean bits and are no unit.
fn exponent_of(unit: &str) -> Option<u32> {
    if matches!(unit, "Kb" | "Mb" | "Gb" | "Tb" | "Pb" | "Eb") {
        return None;
    }
    match unit.to_ascii_lowercase().as_str() {
        "" | "b" | "byte" | "bytes" => Some(0),
        "k" | "kb" | "kib" | "kilo" | "kilobyte" | "kilobytes" => Some(1),
        "m" | "mb" | "mib" | "mega" | "megabyte" | "megabytes" => Some(2),
        "g" | "gb" | "gib" | "giga" | "gigabyte" | "gigabytes" => Some(3),
        "t" | "tb" | "tib" | "tera" | "terabyte" | "terabytes" => Some(4),
        "p" | "pb" | "pib" | "peta" | "petabyte" | "petabytes" => Some(5),
        "e" | "eb" | "eib" | "exa" | "exabyte" | "exabytes" => Some(6),
        _ => None,
    }
}

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It is not digits and a unit.
    #[error("Invalid size {text:?}: a whole number and a unit such as MB or GB expected")]
    Malformed {
        /// Its start.
        text: String,
    },
    /// It does not fit 64 bits.
    #[error("Size {text:?} is too large")]
    TooLarge {
        /// Its start.
        text: String,
    },
}

impl SizeError {
    fn malformed(text: &str) -> Self {
        Self::Malformed { text: clipped(text) }
    }

    fn too_large(text: &str) -> Self {
        Self::TooLarge { text: clipped(text) }
    }

    /// The same error about the text as it was typed.
    fn of(self, text: &str) -> Self {
        match self {
            Self::Malformed { .. } => Self::malformed(text),
            Self::TooLarge { .. } => Self::too_large(text),
        }
    }
}

fn clipped(text: &str) -> String {
    text.chars().take(TEXT_BYTES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(text: &str) -> Option<u64> {
        text.parse().ok().map(|ByteSize(bytes)| bytes)
    }

    #[test]
    fn multiples_are_of_1024_and_units_in_any_case() {
        assert_eq!(bytes("1GB"), Some(1_073_741_824));
        assert_eq!(bytes("512 MiB"), Some(536_870_912));
        assert_eq!(bytes("2kilo"), Some(2048));
        assert_eq!(bytes("7"), Some(7));
        assert_eq!(bytes(" 3   t "), Some(3 << 40));
        assert_eq!(bytes("mb"), None);
    }

    #[test]
    fn what_could_mean_something_else_is_refused() {
        for text in ["1Gb", "1Kb", "1.5GB", "-1GB", "+1GB", "1e3", "0x10", "", " ", "GB", "1 G B"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Malformed { .. })), "{text}");
        }
        for text in ["99999999999999999999GB", "16EB", "18446744073709551616"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::TooLarge { .. })), "{text}");
        }
    }

    #[test]
    fn the_shortest_exact_form_is_written() {
        let written =
            [0, 1, 1023, 1024, 1 << 30, 1536 << 20, u64::MAX].map(|n| ByteSize(n).to_string());

        assert_eq!(written, ["0B", "1B", "1023B", "1KB", "1GB", "1536MB", "18446744073709551615B"]);
    }

    #[test]
    fn rates_are_bytes_unless_they_end_in_bps() {
        let network = |text: &str| ByteRate::from_network(text).ok().map(|ByteRate(rate)| rate);

        assert_eq!(ByteRate::from_disk("500MBps"), Ok(ByteRate(500 << 20)));
        assert_eq!(ByteRate::from_disk("10MB/s"), Ok(ByteRate(10 << 20)));
        assert_eq!(network("1Gbps"), Some(125_000_000));
        assert_eq!(network("800bps"), Some(100));
        assert_eq!(network("125MB/s"), Some(131_072_000));
        assert_eq!(network("10MBps"), Some(10 << 20));
        assert_eq!(network("1.5Gbps"), None);
        assert_eq!(network("bps"), None);
        assert_eq!(ByteRate(100 << 20).to_string(), "100MB/s");
    }

    proptest! {
        #[test]
        fn a_written_size_reads_back(n: u64) {
            prop_assert_eq!(ByteSize(n).to_string().parse(), Ok(ByteSize(n)));
        }

        #[test]
        fn no_text_panics(text: String, number: u64, unit in "\\PC{0,6}") {
            for text in [text, format!("{number}{unit}")] {
                let _ = text.parse::<ByteSize>();
                let _ = ByteRate::from_network(&text);
            }
        }
    }
}
