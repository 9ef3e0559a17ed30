//! Orders to an agent, over a real socket.

use std::path::PathBuf;

use ovum_agent_proto::frame::CONNECTION;
use ovum_agent_proto::message::ErrorCode;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;

use super::*;

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
