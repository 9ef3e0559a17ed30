//! Guests that lie, and what that costs nobody else.

use proptest::prelude::*;

use super::*;

#[test]
fn a_guest_that_sends_without_credit_is_reset() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (client, socket) = rig.connect();
    let (mut other, other_socket) = rig.connect();
    let data = vec![7; 65_536];

    let mut reset = None;
    for _ in 0..100 {
        rig.send(&socket.header(OP_RW, 0, data.len()), &data);
        reset = rig.packets(true).into_iter().find(|(header, _)| header.op.get() == OP_RST);
        if reset.is_some() {
            break;
        }
    }

    let (reset, _) = reset.expect("the client never read");
    assert_eq!(reset.src_port.get(), socket.host_port);
    let kept = rig.read_all(client).len();
    assert!(kept.is_multiple_of(65_536) && kept > 0, "what had credit arrives: {kept}");
    rig.works(&mut other, &other_socket);
}

/// 5.10.6.4: what belongs to no connection is reset, a reset is not answered, and what does not
/// come from this guest or does not go to the host is dropped.
#[test]
fn packets_that_belong_to_nothing_are_reset_or_dropped() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.connect();
    let nothing = Socket { host_port: 5, ..socket.clone() };

    for op in [OP_REQUEST, OP_RESPONSE, OP_SHUTDOWN, OP_RW, OP_CREDIT_UPDATE, 0, 99] {
        let reset = rig.answer(&nothing.header(op, 0, 0), &[]);
        assert_eq!(reset.op.get(), OP_RST, "operation {op}");
        assert_eq!((reset.src_port.get(), reset.dst_port.get()), (5, PORT));
    }
    let seqpacket = Header { kind: U16::new(2), ..socket.header(OP_RW, 0, 0) };
    let reset = rig.answer(&seqpacket, &[]);
    assert_eq!((reset.op.get(), reset.kind.get()), (OP_RST, 2), "of the type it was sent with");

    let dropped = [
        nothing.header(OP_RST, 0, 0),
        Header { src_cid: U64::new(43), ..socket.header(OP_RST, 0, 0) },
        Header { dst_cid: U64::new(3), ..socket.header(OP_RST, 0, 0) },
        Header { dst_cid: U64::new(u64::MAX), ..nothing.header(OP_RW, 0, 0) },
    ];
    for header in dropped {
        rig.send(&header, &[]);
        rig.quiet();
    }
    rig.works(&mut client, &socket);
}

#[test]
fn packets_that_make_no_sense_reset_their_connection() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut bystander, bystander_socket) = rig.connect();
    let cases: [fn(&Socket) -> Header; 5] = [
        |socket| socket.header(OP_RW, 0, 5),
        |socket| socket.header(OP_RW, 0, 1 << 30),
        |socket| socket.header(OP_RESPONSE, 0, 0),
        |socket| socket.header(OP_REQUEST, 0, 0),
        |socket| socket.header(77, 0, 0),
    ];
    for case in cases {
        let (mut client, socket) = rig.connect();

        let reset = rig.answer(&case(&socket), b"four");

        assert_eq!((reset.op.get(), reset.src_port.get()), (OP_RST, socket.host_port));
        assert_eq!(everything(&mut client), b"");
    }
    rig.works(&mut bystander, &bystander_socket);
    let (head, _) = (rig.tx.offer(&[guest.buffer(43)], &[]), rig.bench.kick(TRANSMIT));
    assert!(rig.tx.used().contains(&(head, 0)), "half a header is dropped");
}

/// Resets need buffers; a guest that gives none cannot make the device remember without end.
#[test]
fn a_guest_that_takes_no_resets_is_not_heard_until_it_does() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    let nothing = Socket {
        host_port: 5,
        buf_alloc: 0,
        fwd_cnt: 0,
        sent: 0,
        peer_buf_alloc: 0,
        peer_fwd_cnt: 0,
    };
    let packet = guest.buffer_of(nothing.header(OP_RW, 0, 0).as_bytes());
    for _ in 0..100 {
        rig.tx.offer(&[packet], &[]);
    }

    rig.bench.kick(TRANSMIT);
    assert_eq!(rig.tx.used().len(), RESETS_MAX);
    rig.fill(200);
    let _ = rig.bench.round(0).unwrap();

    assert_eq!(rig.packets(false).len(), 100);
    assert_eq!(rig.tx.used().len(), 100 - RESETS_MAX);
}

#[test]
fn a_receive_buffer_without_room_is_a_fault() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest);
    rig.give(guest.buffer(44));
    let mut client = rig.client();
    client.write_all(b"CONNECT 1\n").unwrap();

    let fault = rig.bench.round(1000).unwrap_err();

    assert_eq!(
        fault.to_string(),
        "Driver broke the protocol of queue 0: a receive buffer has no room for data"
    );
}

/// Headers close enough to right ones to get far.
fn header(host_port: u32) -> impl Strategy<Value = Header> {
    let near = |right: u32| prop_oneof![6 => Just(right), 1 => any::<u32>()];
    let length = prop_oneof![4 => 0..64_u32, 1 => any::<u32>()];
    let numbers = (near(PORT), near(host_port), length, near(1), 0..9_u16);
    (numbers, 0..4_u32, any::<u32>(), any::<u32>()).prop_map(
        |((src_port, dst_port, len, kind, op), flags, buf_alloc, fwd_cnt)| Header {
            src_cid: U64::new(CID.into()),
            dst_cid: U64::new(2),
            src_port: U32::new(src_port),
            dst_port: U32::new(dst_port),
            len: U32::new(len),
            kind: U16::new(u16::try_from(kind & 0xff).unwrap()),
            op: U16::new(op),
            flags: U32::new(flags),
            buf_alloc: U32::new(buf_alloc),
            fwd_cnt: U32::new(fwd_cnt),
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever a guest sends, other connections go on and nothing is left behind a reset.
    #[test]
    fn garbage_hurts_nobody_else(
        packets in prop::collection::vec(
            (header((1 << 30) | (1 << 8)), prop::collection::vec(any::<u8>(), 0..64), 0..50_u32),
            1..40,
        ),
        written in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let guest = Guest::with_bytes(8 << 20);
        let mut rig = Rig::with_buffers(&guest);
        let (mut victim, socket) = rig.connect();
        prop_assert_eq!(socket.host_port, (1 << 30) | (1 << 8));
        let (mut client, other) = rig.connect();
        victim.set_nonblocking(true).unwrap();

        for (header, data, cut) in &packets {
            // It may be closed by now.
            let _ = victim.write_all(&written);
            rig.send_cut(header, data, &[*cut]);
            let _ = rig.bench.round(0).unwrap();
            rig.packets(true);
        }
        rig_until(&mut rig, |rig| {
            rig.packets(true);
            rig.bench.round(0).unwrap() == Served::NOTHING
        });
        rig.packets(true);

        rig.works(&mut client, &other);
        rig.bench.reset();
        prop_assert_eq!(rig.bench.watched(), 0);
    }
}
