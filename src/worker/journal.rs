//! The journal: every event of a machine as one line in the events file.
//!
//! The line is written before anyone is told. A write(2) that returned survives the death of this
//! process, which is all that is promised: a host that loses power loses its machines too.

use std::fs::File;
use std::io::{self, Write};

use crate::control::{Event, Happening};

/// The events file and the number of the next event.
#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    next_seq: u64,
}

impl Journal {
    /// Starts to number from 0, at the end of `file`.
    pub(super) fn new(file: File) -> Self {
        Self { file, next_seq: 0 }
    }

    /// Writes an event down and returns it with its number.
    ///
    /// A disk that takes no more does not stop the machine: those who are connected still hear of
    /// the event, and the worker's own log says that it was not written.
    pub(super) fn append(&mut self, at_ns: u64, what: Happening) -> Event {
        let event = Event { seq: self.next_seq, at_ns, what };
        self.next_seq += 1;
        if let Err(error) = self.write(&event) {
            tracing::error!(%error, seq = event.seq, "Failed to write to the events file");
        }
        event
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        self.file.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn events_are_lines_numbered_from_zero() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events");
        let mut journal = Journal::new(File::create(&path).unwrap());

        journal.append(7, Happening::Launched);
        journal.append(8, Happening::Reported { word: 3 });

        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"seq\":0,\"at_ns\":7,\"what\":{\"what\":\"launched\"}}\n\
             {\"seq\":1,\"at_ns\":8,\"what\":{\"what\":\"reported\",\"word\":3}}\n"
        );
    }
}
