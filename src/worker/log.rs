//! What the worker itself says: standard error, of which the server made a file in the instance's
//! folder. A worker may run for a year, so it keeps that file bounded.

use std::io::{self, Write};

use crate::os::log::bound;

/// Bytes that are kept on disk, at most.
const BYTES_MAX: u64 = 1 << 20;

/// The log of this process.
#[derive(Debug, Clone, Copy)]
pub struct WorkerLog;

impl Write for WorkerLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = io::stderr().lock();
        let written = log.write(bytes)?;
        // A log that cannot be bounded is still one, and there is nowhere to say so.
        let _ = bound(&log, written as u64, BYTES_MAX);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
