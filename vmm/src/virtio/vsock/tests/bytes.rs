//! Bytes both ways, whole and in order, and who holds whom back.

use super::*;
use crate::virtio::vsock::connection::BUFFER_BYTES;

/// Through a window of 64 KiB, in buffers of 4 KiB, with the guest's credit always behind.
#[test]
fn ten_megabytes_reach_the_guest_unchanged() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.request();
    socket.buf_alloc = 64 << 10;
    rig.send(&socket.header(OP_RESPONSE, 0, 0), &[]);
    line(&mut client);
    let expected = pattern(10 << 20);
    let to_send = expected.clone();
    let sender = thread::spawn(move || {
        client.write_all(&to_send).unwrap();
        client
    });

    let mut got = Vec::new();
    rig_until(&mut rig, |rig| {
        for (header, data) in rig.packets(true) {
            got.extend(data);
            let behind = u32::try_from(got.len()).unwrap().wrapping_sub(socket.fwd_cnt);
            assert!(behind <= socket.buf_alloc, "{behind} bytes without credit");
            if behind > 40 << 10 || header.op.get() == OP_CREDIT_REQUEST {
                socket.fwd_cnt = u32::try_from(got.len()).unwrap();
                rig.send(&socket.header(OP_CREDIT_UPDATE, 0, 0), &[]);
            }
        }
        got.len() == expected.len()
    });

    assert!(got == expected);
    drop(sender.join().unwrap());
}

/// With packets cut in any way, as Linux does since 6.17, and credit that the device gives.
#[test]
fn ten_megabytes_reach_the_client_unchanged() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.connect();
    let expected = pattern(10 << 20);
    let bytes = expected.len();
    let receiver = thread::spawn(move || {
        let mut got = vec![0; bytes];
        client.read_exact(&mut got).unwrap();
        got
    });
    let sizes = [65_536, 1, 4096, 30_000, 65_536];
    let cuts: [&[u32]; 4] = [&[], &[44], &[10, 20, 30, 4096], &[43, 1, 4096, 4096, 4096, 0, 7]];

    let mut left = &expected[..];
    let mut number = 0;
    rig_until(&mut rig, |rig| {
        for (header, _) in rig.packets(true) {
            socket.learn(&header);
        }
        let size = sizes[number % sizes.len()].min(socket.credit() as usize).min(left.len());
        if size > 0 {
            let (now, later) = left.split_at(size);
            rig.send_cut(&socket.header(OP_RW, 0, size), now, cuts[number % cuts.len()]);
            socket.sent = socket.sent.wrapping_add(u32::try_from(size).unwrap());
            left = later;
            number += 1;
        }
        left.is_empty() && receiver.is_finished()
    });

    assert!(receiver.join().unwrap() == expected);
}

/// A client that does not read costs [`BUFFER_BYTES`] and no more; when it does, credit returns.
#[test]
fn a_slow_client_holds_the_guest_back() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.connect();
    let expected = pattern(4 << 20);

    let mut at = 0;
    loop {
        let _ = rig.bench.round(0).unwrap();
        for (header, _) in rig.packets(true) {
            socket.learn(&header);
        }
        let size = (socket.credit() as usize).min(10_000);
        if size == 0 {
            break;
        }
        rig.send(&socket.header(OP_RW, 0, size), &expected[at..at + size]);
        socket.sent += u32::try_from(size).unwrap();
        at += size;
    }
    rig.quiet();
    assert!(at > BUFFER_BYTES as usize && at < 1 << 20, "{at} bytes were taken");

    let reader = thread::spawn(move || everything(&mut client));
    let (update, _) = rig.packet();
    socket.learn(&update);
    assert_eq!(update.op.get(), OP_CREDIT_UPDATE);
    assert!(socket.credit() >= BUFFER_BYTES / 2);
    rig.send(&socket.header(OP_SHUTDOWN, SHUTDOWN_SEND, 0), &[]);
    rig_until(&mut rig, |_| reader.is_finished());
    assert!(reader.join().unwrap() == expected[..at]);
}

#[test]
fn the_guest_gets_no_more_than_it_has_room_for() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, mut socket) = rig.request();
    socket.buf_alloc = 1000;
    rig.send(&socket.header(OP_RESPONSE, 0, 0), &[]);
    line(&mut client);
    client.write_all(&[1; 1500]).unwrap();

    let (first, data) = rig.packet();
    assert_eq!((first.op.get(), data.len()), (OP_RW, 1000));
    assert_eq!(rig.next_op(), (OP_CREDIT_REQUEST, 0));
    rig.quiet();
    socket.fwd_cnt = 300;
    let next = rig.answer(&socket.header(OP_CREDIT_UPDATE, 0, 0), &[]);
    assert_eq!((next.op.get(), next.len.get()), (OP_RW, 300));
}

/// No buffers, nothing read: the client's bytes stay in its socket, and nobody spins on them.
#[test]
fn a_guest_without_buffers_holds_the_client_back() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.fill(1);
    let (mut client, _) = rig.connect();
    client.write_all(&pattern(10_000)).unwrap();

    // The one buffer, used and not given back.
    let _ = rig.bench.round(0).unwrap();
    let first = rig.packets(false);
    rig.quiet();
    rig.fill(1);
    let second = rig.packets(false);
    rig.fill(8);
    let third = rig.packets(false);

    let got: Vec<u8> = [first, second, third].concat().into_iter().flat_map(|(_, d)| d).collect();
    assert!(got == pattern(10_000));
    rig.quiet();
}
