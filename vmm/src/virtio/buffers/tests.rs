//! Spans against plain bytes, and chains that no driver should make.

use std::io::{Read, Seek};
use std::os::fd::AsFd;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::testing::{Buffer, Guest, QueueFixture};
use crate::virtio::ring::Ring;

fn walked<'g>(guest: &'g Guest, readable: &[Buffer], writable: &[Buffer]) -> Buffers<'g> {
    let mut queue = QueueFixture::new(guest, 0, 256);
    queue.offer(readable, writable);
    ring(&queue).take(&guest.mem).unwrap().unwrap().1
}

fn ring(queue: &QueueFixture<'_>) -> Ring {
    queue.ring()
}

fn fault(guest: &Guest, queue: &QueueFixture<'_>) -> String {
    ring(queue).take(&guest.mem).unwrap_err().to_string()
}

#[test]
fn a_chain_that_loops_is_a_fault() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 16);
    queue.raw(Descriptor::new(guest.buffer(1).0, 1, 1, 0));

    assert_eq!(fault(&guest, &queue), "Driver broke the protocol of queue 0: a chain does not end");
}

#[test]
fn a_head_outside_of_the_queue_is_a_fault() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 16);
    queue.publish(16);

    assert_eq!(fault(&guest, &queue), "Driver broke the protocol of queue 0: a chain does not end");
}

/// An indirect table has room for 65535 descriptors; the queue's size is the limit all the same.
#[test]
fn an_indirect_chain_longer_than_the_queue_is_a_fault() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 16);
    queue.offer_indirect(&[(0, 1); 17], &[]);

    assert_eq!(
        fault(&guest, &queue),
        "Driver broke the protocol of queue 0: a chain is longer than the queue"
    );
}

#[test]
fn a_readable_part_behind_a_writable_one_is_a_fault() {
    let guest = Guest::new();
    let mut queue = QueueFixture::new(&guest, 0, 16);
    queue.raw(Descriptor::new(guest.buffer(1).0, 1, 1 | 2, 14));
    queue.raw(Descriptor::new(guest.buffer(1).0, 1, 0, 0));

    assert_eq!(
        fault(&guest, &queue),
        "Driver broke the protocol of queue 0: a readable descriptor is behind a writable"
    );
}

#[test]
fn a_span_may_cross_memory_regions() {
    let guest = Guest::new();
    let border = guest.end() / 2;
    let mut span = walked(&guest, &[], &[(border - 3, 6)]).writable;

    assert!(span.write(b"abcdef"));

    assert_eq!(guest.read((border - 3, 6)), b"abcdef");
}

#[test]
fn the_last_writable_byte_is_known_even_behind_an_empty_descriptor() {
    let guest = Guest::new();
    let buffer = guest.buffer(10);

    let buffers = walked(&guest, &[], &[buffer, (0, 0)]);

    assert_eq!(buffers.writable_end, Some(GuestAddress(buffer.0 + 9)));
}

#[test]
fn more_slices_than_one_call_takes_move_in_several() {
    let guest = Guest::new();
    let pieces: Vec<Buffer> = (0..100).map(|byte| guest.buffer_of(&[byte; 3])).collect();
    let mut span = walked(&guest, &pieces, &[]).readable;
    let mut file = tempfile::tempfile().unwrap();

    let counts = [span.write_to(file.as_fd()).unwrap(), span.write_to(file.as_fd()).unwrap()];

    assert_eq!(counts, [64 * 3, 36 * 3]);
    assert!(span.is_empty());
    file.rewind().unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, (0..100).flat_map(|byte| [byte; 3]).collect::<Vec<u8>>());
}

proptest! {
    /// However a request is cut and in whatever steps it is used, its bytes come out in order.
    #[test]
    fn a_span_is_its_bytes(
        pieces in prop::collection::vec(0..40_u32, 1..20),
        steps in prop::collection::vec((0..4_u8, 0..60_usize), 0..20),
    ) {
        let guest = Guest::new();
        let total: u32 = pieces.iter().sum();
        let mut model: Vec<u8> = (0..total).map(|n| (n % 251) as u8).collect();
        let mut rest = &model[..];
        let buffers: Vec<Buffer> = pieces.iter().map(|bytes| {
            let (now, later) = rest.split_at(*bytes as usize);
            rest = later;
            guest.buffer_of(now)
        }).collect();
        let mut span = walked(&guest, &buffers, &[]).readable;

        for (step, count) in steps {
            match step {
                0 => {
                    span.advance(count);
                    model.drain(..count.min(model.len()));
                }
                1 => {
                    span.truncate(count);
                    model.truncate(count);
                }
                2 => {
                    let mut iovecs = IoVecs::default();
                    iovecs.fill(&span, Direction::Emptied);
                    iovecs.advance(count as u64);
                    let left = model.len().saturating_sub(count) as u64;
prop_assert_eq!(iovecs.bytes(), left);
                }
                _ => {
                    let mut bytes = vec![0; count];
                    let whole = span.read(&mut bytes);
                    prop_assert_eq!(whole, count <= model.len());
                    if whole {
                        prop_assert_eq!(bytes, model.drain(..count).collect::<Vec<_>>());
                    }
                }
            }
            prop_assert_eq!(span.len(), model.len());
        }

        let mut bytes = vec![0; model.len()];
        prop_assert!(span.read(&mut bytes));
        prop_assert_eq!(bytes, model);
    }
}
