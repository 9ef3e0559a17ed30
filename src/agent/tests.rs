//! Orders to an agent, over a real socket.

use std::path::PathBuf;

use ovum_agent_proto::frame::CONNECTION;
use ovum_agent_proto::message::ErrorCode;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::*;
use crate::agent::testing::PlayedWorker;

/// What a worker and the agent behind it answer, whatever they hear; returns what they heard.
async fn asked(answer: Vec<u8>) -> (Result<(), AgentError>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path: PathBuf = dir.path().join("vsock.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let peer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&answer).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut heard = Vec::new();
        // One who gives up leaves our words unread, which is an error to us.
        let _ = stream.read_to_end(&mut heard).await;
        heard
    };
    tokio::join!(shutdown(&path, Duration::from_millis(1500)), peer)
}

fn answer(messages: &[(u32, ToServer)]) -> Vec<u8> {
    let mut bytes = b"OK 1073741824\n".to_vec();
    for (stream, message) in messages {
        message.encode(*stream, &mut bytes).unwrap();
    }
    bytes
}

fn hello() -> (u32, ToServer) {
    (CONNECTION, ToServer::Hello { version: 1, build: "test".into() })
}

#[tokio::test]
async fn a_shutdown_is_done_when_it_is_acknowledged() {
    let (done, heard) = asked(answer(&[hello(), (REQUEST, ToServer::Ack)])).await;

    assert!(done.is_ok(), "{done:?}");
    let mut expected = b"CONNECT 1024\n".to_vec();
    ToAgent::Shutdown { signal: 0, grace_ms: 1500 }.encode(1, &mut expected).unwrap();
    assert_eq!(heard, expected);
}

#[tokio::test]
async fn a_refusal_carries_the_agents_words() {
    let refusal = ToServer::Error { code: ErrorCode::System, message: "no".into() };

    let (done, _) = asked(answer(&[hello(), (REQUEST, refusal)])).await;

    assert_eq!(done.unwrap_err().to_string(), "no");
}

#[tokio::test]
async fn nobody_silence_and_nonsense_are_told_apart() {
    let error = async |bytes: &[u8]| asked(bytes.to_vec()).await.0.unwrap_err();

    assert!(matches!(error(b"").await, AgentError::NotListening));
    assert!(matches!(error(&[b'x'; 100]).await, AgentError::NotListening));
    assert!(matches!(error(b"OK 1\n").await, AgentError::Closed));
    assert!(matches!(error(b"OK 1\n\xff\xff\xff\xff").await, AgentError::Frame(_)));
}

#[tokio::test]
async fn a_volume_is_mounted_when_the_agent_says_so_and_not_when_it_says_no() {
    let worker = PlayedWorker::new();
    let socket = worker.socket();
    let agents = Agents::default();
    let spec = AttachSpec { serial: "v".into(), path: "/data".into(), read_only: true };
    let gone = DetachSpec { serial: "v".into() };

    let script = async {
        let mut agent = worker.accept().await;
        let (stream, heard) = agent.hear().await;
        agent.say(stream, &ToServer::Ack).await;
        assert_eq!(heard, ToAgent::Attach(spec.clone()));
        // An answered request is over.
        let (stream, heard) = loop {
            match agent.hear().await {
                (_, ToAgent::Cancel) => {}
                heard => break heard,
            }
        };
        assert_eq!(heard, ToAgent::Detach(gone.clone()));
        let (code, message) = (ErrorCode::Unsupported, "Frame of unknown kind 0x4".to_owned());
        agent.say(stream, &ToServer::Error { code, message }).await;
        agent
    };
    let asked = async {
        agents.attach(&socket, spec.clone()).await.unwrap();
        agents.detach(&socket, gone.clone()).await.unwrap_err()
    };
    let (_agent, refused) = tokio::join!(script, asked);

    assert!(matches!(refused, AgentError::Refused { code: ErrorCode::Unsupported, .. }));
}
