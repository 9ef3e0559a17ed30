//! A console as its driver sees it, over real files.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::*;
use crate::testing::{Bench, Guest, QueueFixture};

fn console<'g>(guest: &'g Guest, log: &File) -> (Bench<Console>, QueueFixture<'g>) {
    let mut receive = QueueFixture::new(guest, 0, 64);
    let mut transmit = QueueFixture::new(guest, 1, 256);
    let device = Console::new(log.try_clone().unwrap()).unwrap();
    (Bench::new(device, &mut [&mut receive, &mut transmit]), transmit)
}

fn text(log: &mut File) -> String {
    log.rewind().unwrap();
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn what_the_guest_prints_is_appended_in_order_whatever_its_pieces() {
    let guest = Guest::new();
    let mut log = tempfile::tempfile().unwrap();
    log.write_all(b"before\n").unwrap();
    let (mut bench, mut transmit) = console(&guest, &log);
    transmit.offer(&[guest.buffer_of(b"Linux "), guest.buffer_of(b"version\n")], &[]);
    transmit.offer_indirect(&[guest.buffer_of(b"6"), guest.buffer_of(b".12\n")], &[]);
    transmit.offer(&[guest.buffer_of(b"")], &[]);

    let served = bench.service(1).unwrap();

    assert_eq!(served, Served::used(1));
    assert_eq!(transmit.used().len(), 3);
    assert_eq!(text(&mut log), "before\nLinux version\n6.12\n");
}

/// The receive queue is kicked when the driver fills it; nothing may come of it.
#[test]
fn buffers_for_input_are_left_alone() {
    let guest = Guest::new();
    let log = tempfile::tempfile().unwrap();
    let mut receive = QueueFixture::new(&guest, 0, 64);
    let mut transmit = QueueFixture::new(&guest, 1, 256);
    let device = Console::new(log).unwrap();
    let mut bench = Bench::new(device, &mut [&mut receive, &mut transmit]);
    receive.offer(&[], &[guest.buffer(4096)]);

    assert_eq!(bench.service(0).unwrap(), Served::NOTHING);
    assert_eq!(receive.used(), []);
}

/// A queue's worth is one turn, so a guest that prints without end leaves time for others.
#[test]
fn a_full_queue_is_one_turn_and_asks_for_the_next() {
    let guest = Guest::new();
    let mut log = tempfile::tempfile().unwrap();
    let (mut bench, mut transmit) = console(&guest, &log);
    for number in 0..256 {
        transmit.offer(&[guest.buffer_of(format!("{number},").as_bytes())], &[]);
    }

    let served = bench.service(1).unwrap();

    assert_eq!(served, Served::used(1).and(Served::again(1)));
    assert_eq!(bench.service(1).unwrap(), Served::NOTHING);
    let expected: String = (0..256).map(|number| format!("{number},")).collect();
    assert_eq!(text(&mut log), expected);
}

/// A guest that prints for ever must not fill the disk, and who reads the log by offset must find
/// what was written there, or a hole.
#[test]
fn the_log_keeps_its_offsets_but_not_its_size_on_disk() {
    let guest = Guest::new();
    let log = tempfile::tempfile().unwrap();
    let (mut bench, mut transmit) = console(&guest, &log);
    let buffer = guest.buffer(1 << 20);
    let written_mib = 150;

    for number in 0..written_mib {
        guest.write(buffer, &[number + 1; 1 << 20]);
        transmit.offer(&[buffer], &[]);
        bench.kick(1);
        let disk_bytes = log.metadata().unwrap().blocks() * 512;
        assert!(disk_bytes <= LOG_BYTES_MAX + 2 * LOG_CHECK_BYTES, "{disk_bytes} on disk");
    }

    assert_eq!(log.metadata().unwrap().len(), u64::from(written_mib) << 20);
    let mut byte = [0xff];
    log.read_exact_at(&mut byte, (149 << 20) + 5).unwrap();
    assert_eq!(byte, [150], "the newest part is where it was written");
    log.read_exact_at(&mut byte, 5).unwrap();
    assert_eq!(byte, [0], "the oldest part is a hole");
    assert_eq!(bench.device.dropped_bytes(), 0);
}

/// /dev/full fails every write with ENOSPC.
#[test]
fn a_full_disk_costs_output_and_nothing_else() {
    let guest = Guest::new();
    let log = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let (mut bench, mut transmit) = console(&guest, &log);
    transmit.offer(&[guest.buffer_of(b"hello")], &[]);

    assert_eq!(bench.service(1).unwrap(), Served::used(1));
    assert_eq!(transmit.used().len(), 1);
    assert_eq!(bench.device.dropped_bytes(), 5);
}

#[test]
fn a_buffer_beyond_the_limit_loses_its_end() {
    let guest = Guest::new();
    let log = tempfile::tempfile().unwrap();
    let (mut bench, mut transmit) = console(&guest, &log);
    transmit.offer(&[guest.buffer(1 << 20), guest.buffer(77)], &[]);

    bench.kick(1);

    assert_eq!(bench.device.dropped_bytes(), 77);
    assert_eq!(log.metadata().unwrap().len(), 1 << 20);
}

/// A worker that continues an old log finds it bounded, too.
#[test]
fn a_log_that_is_too_large_already_is_cut_at_once() {
    let mut log = tempfile::tempfile().unwrap();
    for _ in 0..70 {
        log.write_all(&[7; 1 << 20]).unwrap();
    }
    log.seek(SeekFrom::End(0)).unwrap();

    Console::new(log.try_clone().unwrap()).unwrap();

    assert!(log.metadata().unwrap().blocks() * 512 <= LOG_BYTES_MAX / 2 + (2 << 20));
    assert_eq!(log.metadata().unwrap().len(), 70 << 20);
}
