//! Ends of a connection, from either side and in any order.

use std::net::Shutdown;

use super::*;

#[test]
fn a_client_that_hung_up_is_forgotten_in_the_watch_but_not_its_bytes() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(1);
    let (mut client, socket) = rig.connect();
    client.write_all(&pattern(5000)).unwrap();
    drop(client);

    let _ = rig.bench.round(0).unwrap();
    let first = rig.packets(false);
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1, "only the listener is waited for");
    rig.fill(8);
    let _ = rig.bench.round(0).unwrap();
    let rest = rig.packets(false);

    let got: Vec<u8> = [first, rest.clone()].concat().into_iter().flat_map(|(_, d)| d).collect();
    assert!(got == pattern(5000));
    let last = &rest.last().unwrap().0;
    assert_eq!((last.op.get(), last.flags.get()), (OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    rig.send(&socket.header(OP_RST, 0, 0), &[]);
    rig.quiet();
}

#[test]
fn a_client_may_end_its_half_first() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.connect();
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();

    assert_eq!(rig.packet().1, b"last words");
    assert_eq!(rig.next_op(), (OP_SHUTDOWN, SHUTDOWN_SEND));
    rig.quiet();
    rig.send(&socket.header(OP_RW, 0, 6), b"answer");
    let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
    rig.send(&socket.header(OP_SHUTDOWN, both, 0), &[]);

    assert_eq!(rig.next_op(), (OP_RST, 0));
    assert_eq!(everything(&mut client), b"answer");
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn a_guest_may_end_its_half_first() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.connect();
    rig.send(&socket.header(OP_RW, 0, 10), b"last words");
    rig.send(&socket.header(OP_SHUTDOWN, SHUTDOWN_SEND, 0), &[]);

    assert_eq!(everything(&mut client), b"last words");
    rig.quiet();
    client.write_all(b"answer").unwrap();
    assert_eq!(rig.packet().1, b"answer");
    drop(client);

    assert_eq!(rig.next_op(), (OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    rig.send(&socket.header(OP_RST, 0, 0), &[]);
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1);
}

/// The guest hears of the end at once; the client still gets all that was sent before it.
#[test]
fn a_guest_that_closes_does_not_wait_for_a_slow_client() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, mut socket) = rig.connect();
    let mut sent = 0;
    while socket.credit() > 0 {
        let size = socket.credit().min(60_000);
        rig.send(&socket.header(OP_RW, 0, size as usize), &pattern(size as usize));
        socket.sent += size;
        sent += size as usize;
        rig.packets(true).iter().for_each(|(header, _)| socket.learn(header));
    }

    rig.send(&socket.header(OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE, 0), &[]);

    assert_eq!(rig.next_op(), (OP_RST, 0));
    assert_eq!(rig.read_all(client).len(), sent);
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn a_client_that_closes_in_the_middle_ends_the_connection_for_the_guest() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, socket) = rig.connect();
    drop(client);

    let flags: Vec<(u16, u32)> = vec![rig.next_op()];
    rig.send(&socket.header(OP_RW, 0, 4), b"late");
    rig.send(&socket.header(OP_RST, 0, 0), &[]);

    assert!(flags[0].0 == OP_SHUTDOWN && flags[0].1 & SHUTDOWN_SEND != 0, "{flags:?}");
    rig.bench.until("the end", |bench| bench.watched() == 1);
    let unknown = socket.header(OP_RW, 0, 4);
    rig.packets(true);
    assert_eq!(rig.answer(&unknown, b"late").op.get(), OP_RST);
}

#[test]
fn a_client_that_does_not_wait_for_the_answer_ends_its_request() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, socket) = rig.request();
    drop(client);

    assert_eq!(rig.next_op(), (OP_RST, 0));
    let late = rig.answer(&socket.header(OP_RESPONSE, 0, 0), &[]);
    assert_eq!(late.op.get(), OP_RST);
}

#[test]
fn a_reset_closes_everything_and_waits_for_nothing() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, _) = rig.connect();
    let mut silent = rig.client();
    rig.quiet();
    assert_eq!(rig.bench.watched(), 3);

    rig.bench.reset();

    assert_eq!(rig.bench.watched(), 0);
    assert_eq!(everything(&mut client), b"");
    assert_eq!(everything(&mut silent), b"");
}
