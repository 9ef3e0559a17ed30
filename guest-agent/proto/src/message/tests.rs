//! Messages survive the wire; what is no message is told apart and costs nothing else.

use proptest::prelude::*;
use proptest::sample;

use super::*;
use crate::files::{EntryKind, PathKind, PutKind};
use crate::frame::{CONNECTION, FRAME_BYTES_MAX, FRAME_COST_BYTES};

const TEXT: &str = "\\PC{0,40}";

fn exec() -> impl Strategy<Value = ExecSpec> {
    let size = (any::<u16>(), any::<u16>()).prop_map(|(rows, cols)| WindowSize { rows, cols });
    (
        prop::collection::vec(TEXT, 1..5),
        prop::collection::vec((TEXT, TEXT), 0..5),
        prop::option::of(TEXT),
        any::<u32>(),
        prop::option::of(size),
        any::<bool>(),
    )
        .prop_map(|(argv, env, working_dir, timeout_ms, terminal, apart)| ExecSpec {
            argv,
            env,
            working_dir,
            timeout_ms,
            terminal,
            apart,
        })
}

fn put() -> impl Strategy<Value = PutSpec> {
    let kind =
        prop_oneof![Just(PutKind::File), Just(PutKind::Directory), TEXT.prop_map(PutKind::Link)];
    let owner = prop::option::of(any::<(u32, u32)>());
    (TEXT, kind, 0_u32..=0o7777, owner, prop::option::of(any::<i64>()))
        .prop_map(|(path, kind, mode, owner, mtime)| PutSpec { path, kind, mode, owner, mtime })
}

fn entry() -> impl Strategy<Value = Entry> {
    let kind = prop_oneof![
        Just(EntryKind::File),
        Just(EntryKind::Directory),
        TEXT.prop_map(EntryKind::Link)
    ];
    (TEXT, kind, 0_u32..=0o7777, any::<(u64, i64, u32, u32)>()).prop_map(
        |(path, kind, mode, (size, mtime, uid, gid))| Entry {
            path,
            kind,
            mode,
            size,
            mtime,
            uid,
            gid,
        },
    )
}

fn path_info() -> impl Strategy<Value = PathInfo> {
    let kind = prop_oneof![
        Just(PathKind::Missing),
        Just(PathKind::File),
        Just(PathKind::Directory),
        Just(PathKind::Special),
        TEXT.prop_map(PathKind::Link),
    ];
    (kind, 0_u32..=0o7777, any::<u64>()).prop_map(|(kind, mode, size)| PathInfo {
        kind,
        mode,
        size,
    })
}

fn to_agent() -> impl Strategy<Value = ToAgent> {
    prop_oneof![
        (0_u8..=64, any::<u32>())
            .prop_map(|(signal, grace_ms)| ToAgent::Shutdown { signal, grace_ms }),
        (TEXT, any::<bool>())
            .prop_map(|(path, follow_links)| ToAgent::Stat(StatSpec { path, follow_links })),
        ("\\PC{1,5}", "/\\PC{0,40}", any::<bool>()).prop_map(|(serial, path, read_only)| {
            ToAgent::Attach(AttachSpec { serial, path, read_only })
        }),
        "\\PC{1,5}".prop_map(|serial| ToAgent::Detach(DetachSpec { serial })),
        exec().prop_map(ToAgent::Exec),
        put().prop_map(ToAgent::Put),
        (TEXT, any::<bool>())
            .prop_map(|(path, follow_links)| ToAgent::Get(GetSpec { path, follow_links })),
        any::<Vec<u8>>().prop_map(ToAgent::Data),
        Just(ToAgent::End),
        any::<u32>().prop_map(ToAgent::Credit),
        (any::<u16>(), any::<u16>())
            .prop_map(|(rows, cols)| ToAgent::Resize(WindowSize { rows, cols })),
        Just(ToAgent::Cancel),
    ]
}

fn to_server() -> impl Strategy<Value = ToServer> {
    prop_oneof![
        (any::<u32>(), TEXT).prop_map(|(version, build)| ToServer::Hello { version, build }),
        Just(ToServer::Ack),
        (sample::select(ErrorCode::ALL.to_vec()), TEXT)
            .prop_map(|(code, message)| ToServer::Error { code, message }),
        (any::<u8>(), any::<bool>()).prop_map(|(code, oom)| ToServer::Exited(Exit { code, oom })),
        path_info().prop_map(ToServer::PathInfo),
        any::<Vec<u8>>().prop_map(ToServer::Data),
        any::<Vec<u8>>().prop_map(ToServer::ErrorData),
        any::<u32>().prop_map(ToServer::Credit),
        entry().prop_map(ToServer::Entry),
        Just(ToServer::End),
        any::<u64>().prop_map(|bytes| ToServer::Stored { bytes }),
        any::<u8>().prop_map(|code| ToServer::Ended { code }),
    ]
}

proptest! {
    #[test]
    fn what_the_server_says_arrives(message in to_agent(), stream: u32) {
        let mut bytes = Vec::new();
        message.encode(stream, &mut bytes).unwrap();

        let (frame, taken) = Frame::decode(&bytes).unwrap().unwrap();

        prop_assert_eq!((frame.stream, taken), (stream, bytes.len()));
        prop_assert_eq!(ToAgent::decode(frame), Ok(message));
    }

    #[test]
    fn what_the_agent_says_arrives_in_order_however_the_bytes_are_cut(
        messages in prop::collection::vec((to_server(), any::<u32>()), 0..8),
        cuts in prop::collection::vec(1_usize..40, 1..40),
    ) {
        let mut bytes = Vec::new();
        for (message, stream) in &messages {
            message.encode(*stream, &mut bytes).unwrap();
        }

        let mut received = Vec::new();
        let (mut buffer, mut unsent) = (Vec::new(), &bytes[..]);
        for cut in cuts.iter().cycle() {
            let (now, later) = unsent.split_at((*cut).min(unsent.len()));
            buffer.extend_from_slice(now);
            unsent = later;
            while let Some((frame, taken)) = Frame::decode(&buffer).unwrap() {
                received.push((ToServer::decode(frame).unwrap(), frame.stream));
                buffer.drain(..taken);
            }
            if unsent.is_empty() {
                break;
            }
        }

        prop_assert_eq!(received, messages);
        prop_assert!(buffer.is_empty());
    }

    /// A whole frame never costs the connection, and what is read of it is what would be written.
    #[test]
    fn any_body_of_any_kind_is_a_message_or_a_clean_error(kind: u8, body: Vec<u8>) {
        let frame = Frame { kind, stream: 7, body: &body };
        for error in [ToAgent::decode(frame).err(), ToServer::decode(frame).err()] {
            let lost = matches!(error, Some(FrameError::Length { .. }));
            prop_assert!(!lost, "a whole frame cost the connection");
        }
    }

    /// A message with a few bytes changed, cut off or added.
    #[test]
    fn a_spoilt_message_is_a_message_or_a_clean_error(
        request in to_agent(),
        answer in to_server(),
        at: sample::Index,
        byte: u8,
        cut: sample::Index,
        tail in prop::collection::vec(any::<u8>(), 0..3),
    ) {
        let (mut asked, mut answered) = (Vec::new(), Vec::new());
        request.encode(1, &mut asked).unwrap();
        answer.encode(1, &mut answered).unwrap();
        for bytes in [&asked, &answered] {
            let (frame, _) = Frame::decode(bytes).unwrap().unwrap();
            let mut body = frame.body.to_vec();
            if !body.is_empty() {
                let at = at.index(body.len());
                body[at] = byte;
                body.truncate(cut.index(body.len()) + 1);
            }
            body.extend_from_slice(&tail);
            let frame = Frame { kind: frame.kind, stream: 1, body: &body };
            let _ = (ToAgent::decode(frame), ToServer::decode(frame));
        }
    }
}

#[test]
fn a_text_for_people_that_does_not_fit_is_cut() {
    let mut bytes = Vec::new();
    let message = "m".repeat(FRAME_BYTES_MAX);
    ToServer::Error { code: ErrorCode::System, message }.encode(7, &mut bytes).unwrap();

    let (frame, taken) = Frame::decode(&bytes).unwrap().unwrap();

    assert_eq!((frame.stream, taken), (7, 4 + FRAME_BYTES_MAX));
}

#[test]
fn a_command_that_does_not_fit_is_refused_and_leaves_no_trace() {
    let mut bytes = Vec::new();
    let argv = vec!["run".to_owned(), "a".repeat(FRAME_BYTES_MAX)];
    let request = ToAgent::Exec(ExecSpec { argv, ..ExecSpec::default() });

    let refused = request.encode(7, &mut bytes).unwrap_err();

    assert!(refused.bytes > FRAME_BYTES_MAX && bytes.is_empty(), "{refused}");
}

#[test]
fn data_and_entries_take_credit_and_nothing_else_does() {
    assert_eq!(ToAgent::Data(vec![0; 9]).cost(), 9);
    assert_eq!(ToAgent::Credit(9).cost(), 0);
    assert_eq!(ToServer::ErrorData(vec![0; 3]).cost(), 3 + FRAME_COST_BYTES);
    assert_eq!(ToServer::Ended { code: 1 }.cost(), 0);
    let entry = Entry {
        path: "abc".into(),
        kind: EntryKind::File,
        mode: 0,
        size: 0,
        mtime: 0,
        uid: 0,
        gid: 0,
    };
    let bytes = 4 + 3 + 1 + 4 + 4 + 8 + 8 + 4 + 4;
    assert_eq!(ToServer::Entry(entry).cost(), bytes + FRAME_COST_BYTES);
}

/// The bytes on the wire, so that nobody changes them without noticing.
#[test]
fn the_wire_is_this() {
    let mut asked = Vec::new();
    ToAgent::Shutdown { signal: 15, grace_ms: 5000 }.encode(1, &mut asked).unwrap();
    let spec = ExecSpec {
        argv: vec!["ls".into()],
        env: vec![("A".into(), "b".into())],
        working_dir: Some("/".into()),
        timeout_ms: 258,
        terminal: Some(WindowSize { rows: 24, cols: 80 }),
        apart: false,
    };
    ToAgent::Exec(spec).encode(2, &mut asked).unwrap();
    ToAgent::Data(b"hi".to_vec()).encode(2, &mut asked).unwrap();
    let mut answered = Vec::new();
    ToServer::Hello { version: 1, build: "0.1".into() }.encode(CONNECTION, &mut answered).unwrap();
    ToServer::Ack.encode(1, &mut answered).unwrap();
    ToServer::Exited(Exit { code: 137, oom: true }).encode(CONNECTION, &mut answered).unwrap();
    ToServer::Ended { code: 7 }.encode(2, &mut answered).unwrap();

    assert_eq!(
        asked,
        [
            &[10, 0, 0, 0, 0x01, 1, 0, 0, 0, 15, 0x88, 0x13, 0, 0][..],
            &[49, 0, 0, 0, 0x10, 2, 0, 0, 0],
            &[1, 0, 0, 0, 2, 0, 0, 0, b'l', b's'],
            &[1, 0, 0, 0, 1, 0, 0, 0, b'A', 1, 0, 0, 0, 1, 0, 0, 0, b'b'],
            &[1, 1, 0, 0, 0, b'/', 2, 1, 0, 0, 1, 24, 0, 80, 0, 0],
            &[7, 0, 0, 0, 0x20, 2, 0, 0, 0, b'h', b'i'],
        ]
        .concat()
    );
    assert_eq!(
        answered,
        [
            &[12, 0, 0, 0, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, b'0', b'.', b'1'][..],
            &[5, 0, 0, 0, 0x81, 1, 0, 0, 0],
            &[7, 0, 0, 0, 0x83, 0, 0, 0, 0, 137, 1],
            &[6, 0, 0, 0, 0xa6, 2, 0, 0, 0, 7],
        ]
        .concat()
    );
}

#[test]
fn a_kind_from_the_future_can_be_told_from_a_broken_body() {
    let frame = |kind, body| Frame { kind, stream: 3, body };

    assert_eq!(ToAgent::decode(frame(0x1f, &[])), Err(FrameError::Kind { kind: 0x1f }));
    assert_eq!(
        ToAgent::decode(frame(SHUTDOWN, &[65, 0, 0, 0, 0])),
        Err(FrameError::Body { kind: SHUTDOWN, bytes: 5 })
    );
    assert_eq!(
        ToAgent::decode(frame(EXEC, &[0; 8])),
        Err(FrameError::Body { kind: EXEC, bytes: 8 }),
        "a command without a program"
    );
    assert_eq!(
        ToServer::decode(frame(EXITED, &[0, 2])),
        Err(FrameError::Body { kind: EXITED, bytes: 2 })
    );
}
