//! What commands print.

use std::array;
use std::io::{self, Write};

use chrono::{DateTime, Utc};
use serde::Serialize;

/// Prints one line to stdout.
pub(super) fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_ref().as_bytes())?;
    Ok(stdout.write_all(b"\n")?)
}

/// Prints something as JSON, for programs and curious people.
pub(super) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// Prints rows in columns.
pub(super) fn table<const COLUMNS: usize>(
    head: [&str; COLUMNS],
    rows: &[[String; COLUMNS]],
) -> anyhow::Result<()> {
    columns(head, rows).iter().try_for_each(line)
}

/// Rows in columns as wide as their widest cell, two spaces apart.
pub(super) fn columns<const COLUMNS: usize>(
    head: [&str; COLUMNS],
    rows: &[[String; COLUMNS]],
) -> Vec<String> {
    let widths: [usize; COLUMNS] = array::from_fn(|column| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or_default()
    });
    let padded = |cells: [&str; COLUMNS]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let cells = rows.iter().map(|row| row.each_ref().map(String::as_str));
    [head].into_iter().chain(cells).map(padded).collect()
}

/// Prints an error and its causes to stderr.
pub(super) fn error(error: &anyhow::Error) {
    // Nobody is left to tell if this fails.
    let _ = writeln!(io::stderr(), "ovum: {error:#}");
}

/// Prints a remark to stderr.
pub(super) fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// How long ago something was, in its largest unit.
pub(super) fn ago(then: DateTime<Utc>) -> String {
    let seconds = (Utc::now() - then).num_seconds().max(0);
    match seconds {
        0..60 => format!("{seconds} s ago"),
        60..3600 => format!("{} min ago", seconds / 60),
        3600..86_400 => format!("{} h ago", seconds / 3600),
        _ => format!("{} d ago", seconds / 86_400),
    }
}

/// Bytes for people: three digits or so.
pub(super) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut tenths = u128::from(bytes) * 10;
    while tenths >= 10_240 && unit + 1 < units.len() {
        tenths /= 1024;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{}.{} {}", tenths / 10, tenths % 10, units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        let sizes = [0, 1023, 1024, 77 << 20, 5_368_709_120, u64::MAX].map(size);

        assert_eq!(sizes, ["0 B", "1023 B", "1.0 KiB", "77.0 MiB", "5.0 GiB", "16777215.9 TiB"]);
    }
}
