//! How clients come in: one line, and what becomes of it.

use std::net::Shutdown;

use super::*;
use crate::virtio::vsock::connection::BUFFER_BYTES;

#[test]
fn a_client_is_connected_once_the_guest_has_answered() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.request();
    client.set_nonblocking(true).unwrap();
    assert!(client.read(&mut [0]).is_err(), "nothing is said before the guest has answered");
    client.set_nonblocking(false).unwrap();

    rig.send(&socket.header(OP_RESPONSE, 0, 0), &[]);

    assert_eq!(line(&mut client), format!("OK {}\n", socket.host_port));
    assert_eq!(socket.peer_buf_alloc, BUFFER_BYTES);
    rig.works(&mut client, &socket);
    rig.quiet();
}

#[test]
fn a_refused_client_is_closed() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let (mut client, socket) = rig.request();

    rig.send(&socket.header(OP_RST, 0, 0), &[]);

    assert_eq!(everything(&mut client), b"");
    rig.quiet();
    assert_eq!(rig.bench.watched(), 1, "only the listener is left");
}

#[test]
fn what_a_client_writes_behind_its_request_is_the_guests() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut client = rig.client();
    client.write_all(b"CONNECT 1024\nhello").unwrap();
    let (request, _) = rig.packet();
    let socket = Socket {
        host_port: request.src_port.get(),
        buf_alloc: 1000,
        fwd_cnt: 0,
        sent: 0,
        peer_buf_alloc: 0,
        peer_fwd_cnt: 0,
    };
    rig.quiet();

    let header = rig.answer(&socket.header(OP_RESPONSE, 0, 0), &[]);

    assert_eq!((header.op.get(), header.len.get()), (OP_RW, 5));
}

#[test]
fn silent_clients_do_not_keep_others_out() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut silent: Vec<UnixStream> = (0..PENDING_MAX + 8).map(|_| rig.client()).collect();
    for _ in 0..8 {
        let _ = rig.bench.round(0).unwrap();
    }

    let (mut client, socket) = rig.connect();

    rig.works(&mut client, &socket);
    assert_eq!(everything(&mut silent[0]), b"", "the oldest had to go");
    let youngest = silent.last_mut().unwrap();
    youngest.write_all(b"CONNECT 1024\n").unwrap();
    assert_eq!(rig.next_op(), (OP_REQUEST, 0));
}

#[test]
fn a_line_may_come_in_pieces_but_must_be_right() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut client = rig.client();
    for piece in ["CON", "NECT 10", "24", "\n"] {
        rig.quiet();
        client.write_all(piece.as_bytes()).unwrap();
    }
    assert_eq!(rig.next_op(), (OP_REQUEST, 0));

    let wrong =
        ["\n", "connect 1\n", "CONNECT\n", "CONNECT x\n", "CONNECT +1\n", "CONNECT 4294967296\n"];
    for line in wrong {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        rig.quiet();
        assert_eq!(everything(&mut client), b"", "{line:?}");
    }
    let mut client = rig.client();
    client.shutdown(Shutdown::Write).unwrap();
    rig.quiet();
    assert_eq!(everything(&mut client), b"");
}

#[test]
fn a_megabyte_of_a_line_is_not_read() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut client = rig.client();
    let writer = thread::spawn(move || client.write_all(&[b'1'; 1 << 20]));

    rig_until(&mut rig, |_| writer.is_finished());

    assert!(writer.join().unwrap().is_err(), "the socket was closed on it");
    assert_eq!(rig.bench.watched(), 1);
}

#[test]
fn connections_are_bounded_and_their_ports_differ() {
    let guest = Guest::new();
    let mut rig = Rig::with_buffers(&guest);
    let mut connected = Vec::new();
    for _ in 0..CONNECTIONS_MAX {
        connected.push(rig.connect());
    }

    let mut refused = rig.client();
    refused.write_all(b"CONNECT 1\n").unwrap();
    rig.quiet();
    assert_eq!(everything(&mut refused), b"");
    let (client, socket) = connected.swap_remove(100);
    drop(client);
    assert_eq!(rig.next_op().0, OP_SHUTDOWN);
    rig.send(&socket.header(OP_RST, 0, 0), &[]);
    rig.quiet();
    connected.push(rig.connect());

    let mut ports: Vec<u32> = connected.iter().map(|(_, socket)| socket.host_port).collect();
    ports.push(socket.host_port);
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), CONNECTIONS_MAX as usize + 1, "no port was used twice");
}
