//! How many times over something may be promised: `1`, `1.5`, `4`.

use std::fmt;
use std::str::FromStr;

/// Parts of one.
const PARTS: u32 = 1000;

/// Largest ratio: beyond, a promise says nothing.
const RATIO_MAX: u32 = 1000;

/// A ratio of up to three decimals, 0.001 to 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ratio(u32);

impl Ratio {
    /// `whole` times over.
    ///
    /// # Panics
    ///
    /// While compiling, if that is no ratio.
    pub const fn whole(whole: u32) -> Self {
        assert!(whole > 0 && whole <= RATIO_MAX, "0.001 to 1000");
        Self(whole * PARTS)
    }

    /// That much of `amount`, rounded down.
    pub fn of(self, amount: u64) -> u64 {
        let product = u128::from(amount) * u128::from(self.0) / u128::from(PARTS);
        u64::try_from(product).unwrap_or(u64::MAX)
    }

    /// As a number, for JSON.
    pub fn as_f64(self) -> f64 {
        f64::from(self.0) / f64::from(PARTS)
    }
}

impl FromStr for Ratio {
    type Err = RatioError;

    fn from_str(text: &str) -> Result<Self, RatioError> {
        let error = || RatioError { text: text.chars().take(32).collect() };
        let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
        let is_number = |part: &str, digits_max: usize| {
            (1..=digits_max).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit())
        };
        if !is_number(whole, 4) || !is_number(decimals, 3) {
            return Err(error());
        }
        let parts: u32 = format!("{whole}{decimals:0<3}").parse().map_err(|_| error())?;
        if (1..=RATIO_MAX * PARTS).contains(&parts) { Ok(Self(parts)) } else { Err(error()) }
    }
}

impl fmt::Display for Ratio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.as_f64())
    }
}

/// Why a text is no ratio.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no ratio: 0.001 to {RATIO_MAX}, up to three decimals, expected")]
pub struct RatioError {
    text: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_of_an_amount_and_rounds_down() {
        for (text, of_ten) in [("1", 10), ("1.5", 15), ("4", 40), ("0.25", 2), ("1000", 10_000)] {
            let ratio: Ratio = text.parse().unwrap();
            assert_eq!((ratio.of(10), ratio.to_string().as_str()), (of_ten, text));
        }
        assert_eq!(Ratio::whole(1000).of(u64::MAX), u64::MAX);
    }

    #[test]
    fn what_is_no_ratio_is_refused() {
        for text in ["", "0", "0.0", "-1", "1001", "1000.001", "1.2345", ".5", "1.", "x", "1e3"] {
            assert!(text.parse::<Ratio>().is_err(), "{text:?}");
        }
    }
}
