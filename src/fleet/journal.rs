//! The events file, from the reader's side.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use crate::control::Event;
use crate::fleet::files;

/// Most bytes read of an events file. A worker writes fewer than a hundred short lines.
const BYTES_MAX: u64 = 1 << 20;

/// All events in the folder `dir`, in order. Half a line at the end is not an event yet.
///
/// # Errors
///
/// What the file system says, other than that there is no file: then nothing happened.
pub fn read(dir: &Path) -> io::Result<Vec<Event>> {
    let file = match File::open(dir.join(files::EVENTS)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut events = Vec::new();
    for line in BufReader::new(file.take(BYTES_MAX)).split(b'\n') {
        match serde_json::from_slice(&line?) {
            Ok(event) => events.push(event),
            Err(_half) => break,
        }
    }
    Ok(events)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::control::Happening;

    #[test]
    fn whole_lines_are_events_and_half_a_line_is_none_yet() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), []);
        let event = Event { seq: 0, at_ns: 7, what: Happening::Launched };
        let line = serde_json::to_string(&event).unwrap();
        fs::write(dir.path().join(files::EVENTS), format!("{line}\n{{\"seq\":1,\"at")).unwrap();

        assert_eq!(read(dir.path()).unwrap(), [event]);
    }
}
