//! Durations as the API writes them: `300ms`, `1h30m0s`, as in Go's `time.ParseDuration`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Longest text looked at.
const TEXT_BYTES_MAX: usize = 128;

/// Digits of a fraction that can matter: an hour has 3.6e12 nanoseconds.
const FRACTION_DIGITS_MAX: usize = 18;

const SECOND_NS: u64 = 1_000_000_000;
const MINUTE_NS: u64 = 60 * SECOND_NS;
const HOUR_NS: u64 = 60 * MINUTE_NS;

/// A duration of up to 292 years, which may be negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GoDuration {
    nanoseconds: i64,
}

impl GoDuration {
    /// From nanoseconds.
    pub fn from_nanoseconds(nanoseconds: i64) -> Self {
        Self { nanoseconds }
    }

    /// The duration, if it is longer than nothing.
    pub fn positive(self) -> Option<Duration> {
        let nanoseconds = u64::try_from(self.nanoseconds).ok().filter(|&n| n > 0)?;
        Some(Duration::from_nanos(nanoseconds))
    }

    /// Whether it is exactly nothing.
    pub fn is_zero(self) -> bool {
        self.nanoseconds == 0
    }
}

impl FromStr for GoDuration {
    type Err = DurationError;

    fn from_str(text: &str) -> Result<Self, DurationError> {
        let invalid = || DurationError { text: text.chars().take(TEXT_BYTES_MAX).collect() };
        if text.len() > TEXT_BYTES_MAX {
            return Err(invalid());
        }
        let (negative, mut rest) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        if rest == "0" {
            return Ok(Self { nanoseconds: 0 });
        }
        if rest.is_empty() {
            return Err(invalid());
        }
        let mut total: u128 = 0;
        while !rest.is_empty() {
            let (nanoseconds, after) = component(rest).ok_or_else(invalid)?;
            total += nanoseconds;
            rest = after;
        }
        let total = i128::try_from(total).map_err(|_| invalid())?;
        let nanoseconds = if negative { -total } else { total };
        i64::try_from(nanoseconds).map(Self::from_nanoseconds).map_err(|_| invalid())
    }
}

/// Reads one number with its unit; returns its nanoseconds and what follows.
fn component(text: &str) -> Option<(u128, &str)> {
    let (whole, rest) = digits(text);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => digits(rest),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let unit_end = rest.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(unit_end);
    let unit = u128::from(unit_ns(unit)?);
    let whole: u128 = if whole.is_empty() { 0 } else { u128::from(whole.parse::<u64>().ok()?) };
    let fraction = &fraction[..fraction.len().min(FRACTION_DIGITS_MAX)];
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    Some((whole * unit + part * unit / scale, rest))
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(text.len()))
}

fn unit_ns(unit: &str) -> Option<u64> {
    match unit {
        "ns" => Some(1),
        // U+00B5 micro sign and U+03BC Greek mu.
        "us" | "\u{b5}s" | "\u{3bc}s" => Some(1_000),
        "ms" => Some(1_000_000),
        "s" => Some(SECOND_NS),
        "m" => Some(MINUTE_NS),
        "h" => Some(HOUR_NS),
        _ => None,
    }
}

impl fmt::Display for GoDuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanoseconds < 0 {
            f.write_str("-")?;
        }
        let ns = self.nanoseconds.unsigned_abs();
        match ns {
            0 => f.write_str("0s"),
            1..1_000 => write!(f, "{ns}ns"),
            1_000..1_000_000 => decimal(f, ns, 1_000, "\u{b5}s"),
            1_000_000..SECOND_NS => decimal(f, ns, 1_000_000, "ms"),
            _ => {
                let (hours, minutes) = (ns / HOUR_NS, ns % HOUR_NS / MINUTE_NS);
                if hours > 0 {
                    write!(f, "{hours}h")?;
                }
                if hours > 0 || minutes > 0 {
                    write!(f, "{minutes}m")?;
                }
                decimal(f, ns % MINUTE_NS, SECOND_NS, "s")
            }
        }
    }
}

/// Writes `value / unit` exactly, `unit` being a power of ten.
fn decimal(f: &mut fmt::Formatter<'_>, value: u64, unit: u64, name: &str) -> fmt::Result {
    let digits = unit.ilog10() as usize;
    let fraction = format!("{:0digits$}", value % unit);
    match fraction.trim_end_matches('0') {
        "" => write!(f, "{}{name}", value / unit),
        fraction => write!(f, "{}.{fraction}{name}", value / unit),
    }
}

/// The text is not a duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Invalid duration {text:?}: numbers with units such as 300ms, 5s or 1h30m expected")]
pub struct DurationError {
    /// Its start.
    pub text: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nanoseconds(text: &str) -> Option<i64> {
        text.parse().ok().map(|GoDuration { nanoseconds }| nanoseconds)
    }

    #[test]
    fn numbers_with_units_add_up() {
        assert_eq!(nanoseconds("300ms"), Some(300_000_000));
        assert_eq!(nanoseconds("1h30m"), Some(5_400_000_000_000));
        assert_eq!(nanoseconds("1.5s"), Some(1_500_000_000));
        assert_eq!(nanoseconds(".5m"), Some(30_000_000_000));
        assert_eq!(nanoseconds("1\u{b5}s2ns"), Some(1_002));
        assert_eq!(nanoseconds("-5s"), Some(-5_000_000_000));
        assert_eq!(nanoseconds("0"), Some(0));
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "5", "s", "1.s.", ".s", "5 s", "1d", "1h-5m", "--1s", "300000000h"] {
            assert_eq!(nanoseconds(text), None, "{text}");
        }
    }

    #[test]
    fn the_form_written_is_that_of_go() {
        let written =
            [0, 7, 1_500, 300_000_000, 600_000_000_000, 5_400_000_000_000, -1_500_000_000]
                .map(|ns| GoDuration::from_nanoseconds(ns).to_string());

        assert_eq!(written, ["0s", "7ns", "1.5\u{b5}s", "300ms", "10m0s", "1h30m0s", "-1.5s"]);
    }

    proptest! {
        #[test]
        fn a_written_duration_reads_back(ns: i64) {
            let duration = GoDuration::from_nanoseconds(ns);
            prop_assert_eq!(duration.to_string().parse(), Ok(duration));
        }

        #[test]
        fn no_text_panics(
            text: String,
            likely in "[-+]?([0-9]{0,25}(\\.[0-9]{0,25})?[a-z\u{b5}]{0,3}){0,4}",
        ) {
            let _ = text.parse::<GoDuration>();
            let _ = likely.parse::<GoDuration>();
        }
    }
}
