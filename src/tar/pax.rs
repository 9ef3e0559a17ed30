//! PAX extended headers (POSIX.1-2017, pax, "pax Extended Header"): `length key=value\n` records.

/// The prefix of extended attributes, as GNU tar, star and container tools write them.
const XATTR: &[u8] = b"SCHILY.xattr.";

/// What the records in front of an entry say about it; `None` where they say nothing.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size_bytes: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    /// Seconds and nanoseconds.
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether the entry is one of GNU's sparse files.
    pub(super) sparse: bool,
}

/// Parses a PAX header. A record's length counts itself, so values may hold any byte.
pub(super) fn parse(mut bytes: &[u8]) -> Result<Records, &'static str> {
    let mut records = Records::default();
    // Some writers pad with NULs.
    while !bytes.is_empty() && bytes[0] != 0 {
        let (record, rest) = split_record(bytes).ok_or("a PAX record has a wrong length")?;
        let equals = record.iter().position(|&byte| byte == b'=').ok_or("a PAX record has no =")?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        records.set(key, value).ok_or("a PAX record has a bad value")?;
        bytes = rest;
    }
    Ok(records)
}

/// Takes `length key=value\n` off the front; what comes back is `key=value`.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    const LENGTH_DIGITS_MAX: usize = 8;
    let space = bytes.iter().take(LENGTH_DIGITS_MAX + 1).position(|&byte| byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    if length <= space + 1 || length > bytes.len() || bytes[length - 1] != b'\n' {
        return None;
    }
    Some((&bytes[space + 1..length - 1], &bytes[length..]))
}

impl Records {
    /// `None` if the value cannot be what the key says. An empty value unsets the key.
    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let number = |value: &[u8]| match value {
            [] => Some(None),
            value => decimal(value).map(Some),
        };
        let text = |value: &[u8]| (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = text(value),
            b"linkpath" => self.link = text(value),
            b"size" => self.size_bytes = number(value)?,
            b"uid" => self.uid = number(value)?,
            b"gid" => self.gid = number(value)?,
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(timestamp(value)?),
            key if key.starts_with(b"GNU.sparse.") => self.sparse = true,
            key => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    if name.is_empty() || name.contains(&0) {
                        return None;
                    }
                    self.xattrs.retain(|(known, _)| known != name);
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Some(())
    }
}

/// Decimal digits, up to 2^63 - 1.
fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: i64 = str::from_utf8(digits).ok()?.parse().ok()?;
    u64::try_from(number).ok()
}

/// `[-]seconds[.fraction]` as seconds, rounded down, and nanoseconds.
fn timestamp(text: &[u8]) -> Option<(i64, u32)> {
    const NANOSECOND_DIGITS: usize = 9;
    const SECOND_NS: u32 = 1_000_000_000;
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let nanoseconds = match parts.next() {
        None | Some([]) => 0,
        Some(fraction) => {
            decimal(&fraction[..fraction.len().min(NANOSECOND_DIGITS)])?;
            let mut digits = [b'0'; NANOSECOND_DIGITS];
            let used = fraction.len().min(NANOSECOND_DIGITS);
            digits[..used].copy_from_slice(&fraction[..used]);
            u32::try_from(decimal(&digits)?).ok()?
        }
    };
    match (negative, nanoseconds) {
        (false, _) => Some((seconds, nanoseconds)),
        (true, 0) => Some((-seconds, 0)),
        (true, nanoseconds) => Some((-seconds - 1, SECOND_NS - nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_may_hold_any_byte() {
        let records = parse(b"12 path=a\nb\n28 SCHILY.xattr.user.k=\n\0=\xff\n").unwrap();

        assert_eq!(records.path, Some(b"a\nb".to_vec()));
        assert_eq!(records.xattrs, [(b"user.k".to_vec(), b"\n\0=\xff".to_vec())]);
    }

    #[test]
    fn numbers_and_times_are_read() {
        let text = b"22 size=9999999999999\n11 uid=123\n26 mtime=-1.5000000009999\n";
        let records = parse(text).unwrap();

        assert_eq!(records.size_bytes, Some(9_999_999_999_999));
        assert_eq!(records.uid, Some(123));
        assert_eq!(records.mtime, Some((-2, 500_000_000)));
        assert_eq!(timestamp(b"1350244992.02"), Some((1_350_244_992, 20_000_000)));
        assert_eq!(timestamp(b"-3"), Some((-3, 0)));
    }

    #[test]
    fn broken_records_are_refused() {
        for text in [
            &b"8 path=a\n"[..],
            b"11 path=a\n",
            b"x path=a\n",
            b"0 path=a\n",
            b"99999999999999999999 path=a\n",
            b"8 patha\n",
            b"9 size=x\n",
            b"30 size=99999999999999999999\n",
            b"11 mtime=.\n",
            b"10 path=ab",
        ] {
            assert!(parse(text).is_err(), "{}", text.escape_ascii());
        }
    }
}
