//! Files that grow, as lines: the last so many, then what comes.
//!
//! A reader starts near the end of the file, found backwards, and wakes up when the file grows
//! ([`watch`]). The head of a console log may be punched out while it is read, since its size is
//! bounded: a reader steps over holes and goes on with the first whole line behind them.

use std::fs::File;
use std::io;
use std::mem;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

pub use crate::os::log::bound;

pub mod watch;

/// Longest line handed out; a longer one comes in pieces.
pub const LINE_BYTES_MAX: usize = 64 << 10;

/// Most lines a reader starts back from the end.
pub const TAIL_LINES_MAX: usize = 100_000;

/// Bytes read at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// A place in a growing file of text.
#[derive(Debug)]
pub struct LogFile {
    file: File,
    position: u64,
    /// Read, but not yet a whole line.
    pending: Vec<u8>,
    /// What comes next is the rest of a line whose beginning is lost.
    in_lost_line: bool,
}

impl LogFile {
    /// Opens `path` at the beginning of the last `tail` lines.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn open(path: &Path, tail: usize) -> io::Result<Self> {
        let file = File::open(path)?;
        let mut log = Self { file, position: 0, pending: Vec::new(), in_lost_line: false };
        let end = log.file.metadata()?.len();
        let start = log.data_from(0)?.unwrap_or(end);
        log.position = end;
        log.rewind(start, tail.min(TAIL_LINES_MAX))?;
        Ok(log)
    }

    /// Moves back from the end until `lines` lines lie ahead, or to `start`.
    fn rewind(&mut self, start: u64, lines: usize) -> io::Result<()> {
        if lines == 0 {
            return Ok(());
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        let (mut at, mut seen, mut is_last) = (self.position, 0, true);
        while at > start {
            let wanted = CHUNK_BYTES.min(usize::try_from(at - start).unwrap_or(CHUNK_BYTES));
            let base = at - wanted as u64;
            self.file.read_exact_at(&mut chunk[..wanted], base)?;
            for (index, &byte) in chunk[..wanted].iter().enumerate().rev() {
                // The newline at the very end ends the last line and begins none.
                if byte == b'\n' && !is_last {
                    seen += 1;
                    if seen == lines {
                        self.position = base + index as u64 + 1;
                        return Ok(());
                    }
                }
                is_last = false;
            }
            at = base;
        }
        self.position = at;
        self.in_lost_line = start > 0;
        Ok(())
    }

    /// The next lines, without their ends; none if there is no whole one yet.
    ///
    /// # Errors
    ///
    /// What the file system says.
    pub fn read(&mut self) -> io::Result<Vec<String>> {
        let mut lines = Vec::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        while lines.is_empty() {
            self.skip_hole()?;
            let read = self.file.read_at(&mut chunk, self.position)?;
            if read == 0 {
                break;
            }
            self.position += read as u64;
            self.pending.extend_from_slice(&chunk[..read]);
            self.split(&mut lines);
        }
        Ok(lines)
    }

    /// What is left when no more will come: a last line without an end.
    pub fn finish(&mut self) -> Option<String> {
        let rest = mem::take(&mut self.pending);
        (!rest.is_empty() && !self.in_lost_line).then(|| text(&rest))
    }

    fn skip_hole(&mut self) -> io::Result<()> {
        let end = self.file.metadata()?.len();
        // Shorter than it was: somebody emptied it.
        let position = self.position.min(end);
        let data = self.data_from(position)?.unwrap_or(end);
        if data > position {
            self.pending.clear();
            self.in_lost_line = true;
        }
        self.position = data;
        Ok(())
    }

    /// Where data begins at or behind `position`, if there is any.
    fn data_from(&self, position: u64) -> io::Result<Option<u64>> {
        match seek(&self.file, SeekFrom::Data(position)) {
            Ok(data) => Ok(Some(data)),
            Err(Errno::NXIO) => Ok(None),
            // A file system that knows no holes has none.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(position)),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the whole lines out of what was read.
    fn split(&mut self, lines: &mut Vec<String>) {
        let mut taken = 0;
        while let Some(length) = self.pending[taken..].iter().position(|&byte| byte == b'\n') {
            let mut line = &self.pending[taken..taken + length];
            taken += length + 1;
            if mem::take(&mut self.in_lost_line) {
                continue;
            }
            while line.len() > LINE_BYTES_MAX {
                let (piece, rest) = line.split_at(piece_length(line));
                lines.push(text(piece));
                line = rest;
            }
            lines.push(text(line));
        }
        self.pending.drain(..taken);
        while self.pending.len() > LINE_BYTES_MAX {
            let length = piece_length(&self.pending);
            let piece: Vec<u8> = self.pending.drain(..length).collect();
            if !self.in_lost_line {
                lines.push(text(&piece));
            }
        }
    }
}

/// Length of the first piece of a line that is too long: no character is cut in two.
fn piece_length(line: &[u8]) -> usize {
    let is_inside = |at: usize| line.get(at).is_some_and(|byte| byte & 0xc0 == 0x80);
    (LINE_BYTES_MAX - 3..=LINE_BYTES_MAX).rev().find(|&at| !is_inside(at)).unwrap_or(LINE_BYTES_MAX)
}

fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line.strip_suffix(b"\r").unwrap_or(line)).into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use rustix::fs::{FallocateFlags, fallocate};

    use super::*;

    struct Log {
        dir: tempfile::TempDir,
    }

    impl Log {
        fn new(content: &[u8]) -> Self {
            let log = Self { dir: tempfile::tempdir().unwrap() };
            log.append(content);
            log
        }

        fn append(&self, content: &[u8]) {
            let path = self.dir.path().join("log");
            let mut file = File::options().append(true).create(true).open(path).unwrap();
            file.write_all(content).unwrap();
        }

        fn punch(&self, bytes: u64) {
            let file = File::options().write(true).open(self.dir.path().join("log")).unwrap();
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&file, flags, 0, bytes).unwrap();
        }

        fn open(&self, tail: usize) -> LogFile {
            LogFile::open(&self.dir.path().join("log"), tail).unwrap()
        }

        fn tail(&self, tail: usize) -> Vec<String> {
            let mut log = self.open(tail);
            let mut lines = Vec::new();
            loop {
                let more = log.read().unwrap();
                if more.is_empty() {
                    break;
                }
                lines.extend(more);
            }
            lines.extend(log.finish());
            lines
        }
    }

    #[test]
    fn a_tail_is_the_last_lines() {
        let log = Log::new(b"one\ntwo\r\nthree\n");

        assert_eq!(log.tail(2), ["two", "three"]);
        assert_eq!(log.tail(3), ["one", "two", "three"]);
        assert_eq!(log.tail(100), ["one", "two", "three"]);
        assert_eq!(log.tail(0), [""; 0]);
        log.append(b"four");
        assert_eq!(log.tail(2), ["three", "four"]);
        assert_eq!(Log::new(b"").tail(5), [""; 0]);
        assert_eq!(Log::new(b"\n\n").tail(5), ["", ""]);
    }

    #[test]
    fn a_tail_longer_than_a_chunk_is_found() {
        let content: Vec<u8> = (0..100_000).flat_map(|n| format!("{n}\n").into_bytes()).collect();
        let log = Log::new(&content);

        let lines = log.tail(50_000);

        assert_eq!(lines.len(), 50_000);
        assert_eq!((lines[0].as_str(), lines[49_999].as_str()), ("50000", "99999"));
    }

    #[test]
    fn what_is_appended_comes_when_its_line_is_whole() {
        let log = Log::new(b"one\n");
        let mut reader = log.open(0);

        assert_eq!(reader.read().unwrap(), [""; 0]);
        log.append(b"two\nthr");
        assert_eq!(reader.read().unwrap(), ["two"]);
        assert_eq!(reader.read().unwrap(), [""; 0]);
        log.append(b"ee\n");
        assert_eq!(reader.read().unwrap(), ["three"]);
    }

    #[test]
    fn a_hole_at_the_head_costs_the_line_it_cuts_and_no_other() {
        let content: Vec<u8> = (0..4096).flat_map(|n| format!("{n:09}\n").into_bytes()).collect();
        let log = Log::new(&content);
        let mut reader = log.open(TAIL_LINES_MAX);
        log.punch(8192);

        // 8192 bytes are 819 lines and two bytes of the next.
        assert_eq!(log.tail(TAIL_LINES_MAX)[0], "000000820");
        assert_eq!(log.tail(2), ["000004094", "000004095"]);
        assert_eq!(reader.read().unwrap()[0], "000000820");
    }

    #[test]
    fn a_long_line_comes_in_pieces_that_cut_no_character() {
        let line = "ü".repeat(LINE_BYTES_MAX / 2 - 1) + "x€" + &"y".repeat(10);
        let log = Log::new((line.clone() + "\nnext\n").as_bytes());

        let lines = log.tail(10);

        assert_eq!(lines[..2].concat(), line);
        assert!(lines[0].len() <= LINE_BYTES_MAX);
        assert_eq!(lines[2..], ["next"]);
        let endless = Log::new(&vec![b'z'; 3 * LINE_BYTES_MAX]);
        assert_eq!(endless.tail(1).iter().map(String::len).sum::<usize>(), 3 * LINE_BYTES_MAX);
    }

    #[test]
    fn bytes_that_are_no_text_are_replaced() {
        assert_eq!(Log::new(b"a\xff\xfeb\0\n").tail(1), ["a\u{fffd}\u{fffd}b\0"]);
    }

    #[test]
    fn a_file_that_was_emptied_is_read_from_its_new_end() {
        let log = Log::new(b"one\ntwo\n");
        let mut reader = log.open(0);
        let mut file = File::create(log.dir.path().join("log")).unwrap();
        file.rewind().unwrap();

        assert_eq!(reader.read().unwrap(), [""; 0]);
        log.append(b"three\n");
        assert_eq!(reader.read().unwrap(), ["three"]);
    }
}
