//! Entropy device: the host's random numbers for the guest's pool (virtio 1.3, 5.4).

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::buffers::{Buffers, Span};
use super::ring::Answer;
use super::{Device, DeviceIo, DeviceState, Fault, Served, Watch};

/// Bytes given per request, whatever the guest asked for.
///
/// The guest sizes the buffer, so the guest must not size our work. The device "MAY use less than
/// the entire buffer length" (5.4.6.2); Linux asks for 64 bytes at a time.
const REQUEST_BYTES_MAX: usize = 4 << 10;

/// Bytes taken from the kernel in one call: up to 256 the call is never cut short by a signal.
const CHUNK_BYTES: usize = 256;

const KIND: u32 = 4;
const QUEUE_SIZES: [u16; 1] = [64];

/// A source of random bytes. Nothing about it can be configured, and it remembers nothing.
#[derive(Debug, Default)]
pub struct Entropy {}

impl Entropy {
    /// The host's own random number generator.
    pub fn new() -> Self {
        Self {}
    }
}

impl Device for Entropy {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn service(&mut self, index: u16, io: &mut DeviceIo<'_>) -> Result<Served, Fault> {
        let Some(ring) = io.rings.get_mut(usize::from(index)) else { return Ok(Served::NOTHING) };
        ring.serve(io.mem, |_, Buffers { mut writable, .. }| {
            Ok(Answer::Used { written_bytes: fill(&mut writable)? })
        })
    }

    fn reset(&mut self, _watch: &mut dyn Watch) {}

    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }
}

/// Fills the front of `target`, at most [`REQUEST_BYTES_MAX`], and returns how much.
fn fill(target: &mut Span<'_>) -> Result<u32, Fault> {
    target.truncate(REQUEST_BYTES_MAX);
    let mut chunk = [0; CHUNK_BYTES];
    let mut filled: u32 = 0;
    while !target.is_empty() {
        let (wanted, _) = chunk.split_at_mut(target.len().min(CHUNK_BYTES));
        let count = match getrandom(&mut *wanted, GetRandomFlags::empty()) {
            Ok(count) => count,
            Err(Errno::INTR) => continue,
            Err(errno) => {
                return Err(Fault::Host { what: "take random bytes", source: errno.into() });
            }
        };
        let Some(random) = wanted.get(..count) else { break };
        if !target.write(random) {
            break;
        }
        filled = filled.saturating_add(u32::try_from(count).unwrap_or(0));
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::testing::{Bench, Guest, QueueFixture};
    use crate::virtio::Fault;

    /// The guest chooses the buffer size; the host's work must not depend on it.
    #[test]
    fn a_large_buffer_is_filled_up_to_the_cap() {
        let guest = Guest::new();
        let mut queue = QueueFixture::new(&guest, 0, 64);
        let mut bench = Bench::new(Entropy::new(), &mut [&mut queue]);
        let buffer = guest.buffer(64 << 10);
        queue.offer(&[], &[buffer]);

        let served = bench.service(0).unwrap();

        assert_eq!(served, Served::used(0));
        assert_eq!(queue.used(), [(0, 4096)]);
        let bytes = guest.read(buffer);
        let (given, rest) = bytes.split_at(REQUEST_BYTES_MAX);
        assert!(rest.iter().all(|byte| *byte == 0), "nothing is written past the cap");
        let kinds = given.iter().collect::<HashSet<_>>().len();
        assert!(kinds > 200, "4096 random bytes have nearly all values, not {kinds}");
    }

    #[test]
    fn a_request_may_be_cut_anywhere() {
        let guest = Guest::new();
        let mut queue = QueueFixture::new(&guest, 0, 64);
        let mut bench = Bench::new(Entropy::new(), &mut [&mut queue]);
        let pieces = [guest.buffer(1), guest.buffer(300), guest.buffer(7)];
        queue.offer(&[], &pieces);
        queue.offer_indirect(&[guest.buffer(5)], &[guest.buffer(64)]);
        queue.offer(&[guest.buffer(16)], &[]);

        bench.kick(0);

        let written: Vec<u32> = queue.used().into_iter().map(|(_, written)| written).collect();
        assert_eq!(written, [308, 64, 0]);
        assert!(guest.read(pieces[1]).iter().any(|byte| *byte != 0));
    }

    #[test]
    fn a_buffer_outside_of_guest_memory_is_a_fault() {
        let guest = Guest::new();
        let mut queue = QueueFixture::new(&guest, 0, 64);
        let mut bench = Bench::new(Entropy::new(), &mut [&mut queue]);
        queue.offer(&[], &[(guest.end() - 8, 16)]);

        let fault = bench.service(0).unwrap_err();

        assert!(matches!(fault, Fault::Queue { index: 0, .. }), "{fault}");
        assert_eq!(queue.used(), []);
    }
}
