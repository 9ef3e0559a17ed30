//! Streams of one connection, with an agent at its other end that we play.

use std::sync::Arc;

use futures_util::FutureExt;
use ovum_agent_proto::files::{Entry, EntryKind, PathInfo, PathKind, StatSpec};
use ovum_agent_proto::frame::FRAME_COST_BYTES;
use ovum_agent_proto::message::ErrorCode;
use ovum_agent_proto::report::Exit;
use proptest::prelude::*;
use tokio::task::JoinHandle;

use super::*;
use crate::agent::ExecSpec;
use crate::agent::testing::PlayedAgent;

/// A line that runs, and the agent at its end.
fn line() -> (Line, PlayedAgent, JoinHandle<()>) {
    line_for(Duration::from_secs(60))
}

fn line_for(quiet_timeout: Duration) -> (Line, PlayedAgent, JoinHandle<()>) {
    let (ours, stream) = UnixStream::pair().unwrap();
    let (line, run) = Line::new(ours, quiet_timeout, CancellationToken::new());
    (line, PlayedAgent::new(stream), tokio::spawn(run))
}

fn exec() -> ToAgent {
    ToAgent::Exec(ExecSpec { argv: vec!["true".into()], ..ExecSpec::default() })
}

fn stat() -> ToAgent {
    ToAgent::Stat(StatSpec { path: "/".into(), follow_links: false })
}

fn data(bytes: usize) -> ToServer {
    ToServer::Data(vec![b'x'; bytes])
}

#[tokio::test]
async fn each_stream_hears_its_own_messages() {
    let (line, mut agent, _run) = line();
    let first = line.open(&exec()).await.unwrap();
    let second = line.open(&exec()).await.unwrap();
    assert_eq!(agent.hear().await, (1, exec()));
    assert_eq!(agent.hear().await, (2, exec()));

    agent.say(2, &data(2)).await;
    agent.say(1, &data(1)).await;
    agent.say(9, &data(9)).await;
    agent.say(1, &ToServer::Ended { code: 3 }).await;

    assert_eq!(first.next().await.unwrap(), data(1));
    assert_eq!(first.next().await.unwrap(), ToServer::Ended { code: 3 });
    assert_eq!(second.next().await.unwrap(), data(2));
    assert!(matches!(first.next().await, Err(AgentError::Closed)), "it is over");
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_called_off_and_one_that_is_over_is_not() {
    let (line, mut agent, _run) = line();
    let dropped = line.open(&exec()).await.unwrap();
    let over = line.open(&stat()).await.unwrap();
    let info = ToServer::PathInfo(PathInfo { kind: PathKind::Missing, mode: 0, size: 0 });
    agent.say(2, &info).await;
    assert_eq!(over.next().await.unwrap(), info);

    drop(over);
    drop(dropped);

    assert_eq!(agent.hear().await, (1, exec()));
    assert_eq!(agent.hear().await, (2, stat()));
    assert_eq!(agent.hear().await, (1, ToAgent::Cancel));
}

/// What was sent before the end arrives, then how it ended.
#[tokio::test]
async fn the_end_of_a_guest_is_told_from_a_broken_line() {
    for (last, ended) in [(true, LineEnd::GuestEnded), (false, LineEnd::Lost)] {
        let (line, mut agent, run) = line();
        let stream = line.open(&exec()).await.unwrap();
        agent.hear().await;
        agent.say(1, &data(3)).await;
        if last {
            let exit = Exit { code: 0, oom: false };
            agent.say(CONNECTION, &ToServer::Exited(exit)).await;
        }
        drop(agent);
        run.await.unwrap();

        assert_eq!(stream.next().await.unwrap(), data(3));
        let error = stream.next().await.unwrap_err();
        let is_guest_ended = matches!(error, AgentError::GuestEnded);
        assert_eq!(is_guest_ended, ended == LineEnd::GuestEnded, "{error}");
        assert!(!line.is_open());
        assert!(line.open(&exec()).await.is_err());
    }
}

/// A command may write a byte at a time: what waits for a client is few pieces.
#[tokio::test]
async fn small_pieces_become_one_and_the_agent_is_told_when_they_are_taken() {
    let (line, mut agent, _run) = line();
    let stream = line.open(&exec()).await.unwrap();
    agent.hear().await;
    let pieces = WINDOW_BYTES / (1 + FRAME_COST_BYTES);
    for _ in 0..pieces {
        agent.say(1, &data(1)).await;
    }
    agent.say(1, &ToServer::Ended { code: 0 }).await;

    let mut bytes = 0;
    let mut messages = 0;
    while let ToServer::Data(piece) = stream.next().await.unwrap() {
        bytes += piece.len();
        messages += 1;
    }

    assert_eq!(bytes, pieces as usize);
    assert!(messages <= pieces, "{messages}");
    let (1, ToAgent::Credit(first)) = agent.hear().await else { panic!("no credit") };
    assert!(first >= TAKEN_BYTES_MIN, "{first}");
}

#[tokio::test]
async fn an_agent_that_sends_more_than_it_may_loses_the_line() {
    let (line, mut agent, run) = line();
    let stream = line.open(&exec()).await.unwrap();

    for _ in 0..WINDOW_BYTES as usize / DATA_BYTES_MAX {
        agent.say(1, &data(DATA_BYTES_MAX)).await;
    }

    run.await.unwrap();
    assert!(!line.is_open());
    drop(stream);
}

#[tokio::test]
async fn an_agent_of_another_version_is_not_spoken_to() {
    let (line, mut agent, run) = line();

    agent.say(CONNECTION, &ToServer::Hello { version: VERSION + 1, build: "x".into() }).await;

    run.await.unwrap();
    assert!(line.open(&exec()).await.is_err());
}

#[tokio::test]
async fn input_waits_for_credit_and_other_streams_do_not() {
    let (line, mut agent, _run) = line();
    let stream = Arc::new(line.open(&exec()).await.unwrap());
    let input = vec![7; 2 * WINDOW_BYTES as usize];
    let sender = Arc::clone(&stream);
    let sending = tokio::spawn(async move { sender.send(&input).await });

    assert_eq!(agent.hear().await, (1, exec()));
    let mut heard = 0;
    while heard < WINDOW_BYTES {
        let (1, message @ ToAgent::Data(_)) = agent.hear().await else { panic!("no data") };
        heard += message.cost();
    }
    assert_eq!(heard, WINDOW_BYTES, "and not a byte more");
    let other = line.open(&stat()).await.unwrap();
    assert_eq!(agent.hear().await, (2, stat()), "before any more data");
    assert!(!sending.is_finished());

    agent.say(1, &ToServer::Credit(WINDOW_BYTES)).await;
    while heard < 2 * WINDOW_BYTES {
        let (1, message @ ToAgent::Data(_)) = agent.hear().await else { panic!("no data") };
        heard += message.cost();
    }
    sending.await.unwrap().unwrap();
    drop(other);
}

/// Credit beyond the window would let us fill the guest's memory.
#[tokio::test]
async fn credit_never_exceeds_the_window() {
    let (line, mut agent, _run) = line();
    let stream = line.open(&exec()).await.unwrap();
    agent.hear().await;
    for _ in 0..3 {
        agent.say(1, &ToServer::Credit(u32::MAX)).await;
    }
    agent.say(1, &ToServer::Ack).await;
    assert_eq!(stream.next().await.unwrap(), ToServer::Ack, "the credit came before");

    let state = line.shared.lock();

    assert_eq!(state.streams[&1].credit, WINDOW_BYTES);
}

#[tokio::test]
async fn there_is_a_limit_to_streams() {
    let (line, _agent, _run) = line();
    let mut streams = Vec::new();
    for _ in 0..STREAMS_MAX {
        streams.push(line.open(&exec()).await.unwrap());
    }

    let refused = line.open(&exec()).await.unwrap_err();
    streams.pop();
    let admitted = line.open(&exec()).await;

    assert!(matches!(refused, AgentError::Busy { streams: STREAMS_MAX }), "{refused}");
    assert!(admitted.is_ok());
}

/// One who asks and goes must not make an agent that does not read cost ever more.
#[tokio::test]
async fn requests_wait_for_an_agent_that_does_not_read() {
    let (line, _agent, _run) = line();
    let argv = vec!["x".repeat(100_000)];
    let request = ToAgent::Exec(ExecSpec { argv, ..ExecSpec::default() });

    let asking = async {
        loop {
            drop(line.open(&request).await.unwrap());
        }
    };
    let waited = time::timeout(Duration::from_millis(200), asking).await;

    assert!(waited.is_err(), "it goes on for ever");
    assert!(line.shared.lock().outbox.len() < OUTBOX_BYTES_MAX + 200_000);
}

#[tokio::test]
async fn a_line_that_nobody_uses_is_closed() {
    let (line, mut agent, run) = line_for(Duration::from_millis(20));
    let stream = line.open(&exec()).await.unwrap();
    agent.hear().await;
    assert!(line.is_open(), "it is in use");

    drop(stream);

    run.await.unwrap();
    assert!(!line.is_open());
}

/// A command may say nothing for as long as it likes; its agent may not.
#[tokio::test]
async fn an_agent_that_is_silent_is_asked_and_then_given_up() {
    let quiet_timeout = Duration::from_millis(300);
    let (line, mut agent, run) = line_for(quiet_timeout);
    let stream = line.open(&exec()).await.unwrap();
    agent.hear().await;
    for number in 2..5 {
        assert_eq!(agent.hear().await, (number, stat()), "it is asked");
        let info = ToServer::PathInfo(PathInfo { kind: PathKind::Directory, mode: 0, size: 0 });
        agent.say(number, &info).await;
    }
    assert!(line.is_open(), "it answers");

    assert_eq!(agent.hear().await, (5, stat()));
    run.await.unwrap();

    let error = stream.next().await.unwrap_err();
    assert!(matches!(error, AgentError::Silent { after } if after == 2 * quiet_timeout), "{error}");
    assert!(!line.is_open());
}

#[tokio::test]
async fn a_refusal_is_the_last_word() {
    let (line, mut agent, _run) = line();
    let stream = line.open(&exec()).await.unwrap();
    agent.hear().await;
    let refusal = ToServer::Error { code: ErrorCode::NotFound, message: "no".into() };

    agent.say(1, &refusal).await;

    assert_eq!(stream.next().await.unwrap(), refusal);
    drop(stream);
    let _next = line.open(&stat()).await.unwrap();
    assert_eq!(agent.hear().await, (2, stat()), "nothing is called off");
}

/// What happens on a line, in any order.
#[derive(Debug, Clone)]
enum Step {
    Open,
    /// The agent says something, on whatever stream.
    Hear(u32, ToServer),
    Take(usize),
    Send(usize, usize),
    Say(usize),
    Drop(usize),
    /// What waits for the agent leaves.
    Leave,
    End,
}

/// What an agent can say, whether it makes sense or not.
fn word() -> impl Strategy<Value = ToServer> {
    let path = "d".to_owned();
    let entry = Entry { path, kind: EntryKind::File, mode: 0, size: 9, mtime: 0, uid: 0, gid: 0 };
    let info = PathInfo { kind: PathKind::Missing, mode: 0, size: 0 };
    prop_oneof![
        8 => (0..=DATA_BYTES_MAX).prop_map(data),
        2 => (0..100_usize).prop_map(|bytes| ToServer::ErrorData(vec![b'e'; bytes])),
        4 => any::<u32>().prop_map(ToServer::Credit),
        2 => Just(ToServer::Ack),
        2 => Just(ToServer::Entry(entry)),
        1 => Just(ToServer::End),
        1 => Just(ToServer::PathInfo(info)),
        1 => any::<u64>().prop_map(|bytes| ToServer::Stored { bytes }),
        1 => any::<u8>().prop_map(|code| ToServer::Ended { code }),
        1 => Just(ToServer::Hello { version: VERSION, build: String::new() }),
        1 => Just(ToServer::Error { code: ErrorCode::System, message: "no".into() }),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let stream = 0..8_usize;
    prop_oneof![
        3 => Just(Step::Open),
        12 => (0..8_u32, word()).prop_map(|(stream, word)| Step::Hear(stream, word)),
        6 => stream.clone().prop_map(Step::Take),
        3 => (stream.clone(), 0..100_000_usize).prop_map(|(stream, n)| Step::Send(stream, n)),
        1 => stream.clone().prop_map(Step::Say),
        1 => stream.prop_map(Step::Drop),
        1 => Just(Step::Leave),
        1 => Just(Step::End),
    ]
}

proptest! {
    /// Whatever an agent says, and whatever is done meanwhile, what it makes us keep is bounded,
    /// and so is what it is sent.
    #[test]
    fn an_agent_that_lies_costs_no_more_than_the_window(
        steps in prop::collection::vec(step(), 1..200),
    ) {
        let line = Line { shared: Arc::default() };
        let mut streams: Vec<Stream> = Vec::new();
        for step in steps {
            let count = streams.len().max(1);
            match step {
                Step::Open => {
                    streams.extend(line.open(&exec()).now_or_never().and_then(Result::ok));
                }
                Step::Hear(stream, word) => {
                    if line.shared.lock().hear(stream, word).is_err() {
                        line.shared.end(LineEnd::Lost);
                    }
                }
                Step::Take(stream) => drop(streams.get(stream % count).map(Stream::take)),
                Step::Send(stream, bytes) => {
                    let bytes = vec![b'x'; bytes];
                    let sent = streams.get(stream % count).map(|stream| stream.send(&bytes));
                    drop(sent.and_then(FutureExt::now_or_never));
                }
                Step::Say(stream) => {
                    let said = streams.get(stream % count).map(|stream| stream.say(&ToAgent::End));
                    drop(said.and_then(FutureExt::now_or_never));
                }
                Step::Drop(stream) if !streams.is_empty() => drop(streams.remove(stream % count)),
                Step::Drop(_) => {}
                Step::Leave => line.shared.lock().outbox.clear(),
                Step::End => line.shared.end(LineEnd::GuestEnded),
            }
            let state = line.shared.lock();
            prop_assert!(state.streams.len() <= streams.len());
            // Credit and calling off take none of the room that is waited for.
            prop_assert!(state.outbox.len() <= OUTBOX_BYTES_MAX + DATA_BYTES_MAX + 9 * 400);
            for slot in state.streams.values() {
                let kept: u32 = slot.inbox.iter().map(|(_, cost)| cost).sum();
                let bytes: u32 = slot.inbox.iter().map(|(message, _)| message.cost()).sum();
                prop_assert_eq!(kept + slot.window, WINDOW_BYTES);
                prop_assert!(bytes <= kept && slot.inbox.len() <= INBOX_MESSAGES_MAX);
                prop_assert!(slot.credit <= WINDOW_BYTES && slot.taken < TAKEN_BYTES_MIN);
            }
        }
    }
}
