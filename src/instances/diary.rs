//! The diary of an instance: what the server did with it, one line each, for its owner to read
//! (`logs?source=hypeman`).
//!
//! Bounded as a console log is: the oldest part becomes a hole.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use chrono::{SecondsFormat, Utc};

use crate::logs::bound;

/// Bytes that are kept on disk, at most.
const BYTES_MAX: u64 = 256 << 10;

/// Where the lines go.
#[derive(Debug)]
pub(super) struct Diary {
    path: PathBuf,
}

impl Diary {
    /// In the file `path`, made with the first line.
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Writes one line, with the time before it. What cannot be written is said once, elsewhere.
    pub(super) fn note(&self, text: &str) {
        if let Err(error) = self.append(text) {
            tracing::warn!(path = %self.path.display(), %error, "Failed to write a diary");
        }
    }

    fn append(&self, text: &str) -> io::Result<()> {
        let at = Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true);
        let line = format!("{at} {}\n", text.replace('\n', " "));
        let mut file = File::options().append(true).create(true).open(&self.path)?;
        file.write_all(line.as_bytes())?;
        bound(&file, line.len() as u64, BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_diary_of_any_length_takes_a_bounded_part_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("diary");
        let diary = Diary::new(path.clone());

        (0..400).for_each(|_| diary.note(&"word ".repeat(400)));
        diary.note("last\nline");

        let found = fs::metadata(&path).unwrap();
        assert!(found.len() > 3 * BYTES_MAX, "{}", found.len());
        assert!(found.blocks() * 512 <= BYTES_MAX + 8192, "{}", found.blocks() * 512);
        assert!(fs::read_to_string(&path).unwrap().ends_with("Z last line\n"));
    }
}
