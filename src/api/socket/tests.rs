//! Both WebSockets over a real port, with an agent at the other end that we play.

use axum::Router;
use axum::routing::get;
use ovum_agent_proto::files::{Entry, EntryKind, PutKind};
use ovum_agent_proto::frame::WINDOW_BYTES;
use ovum_agent_proto::message::{ErrorCode, ToAgent, ToServer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message as Said;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

use super::*;
use crate::api::{cp, exec};
use crate::instances::inside::Inside;
use crate::instances::inside::agent::testing::{PlayedAgent, PlayedWorker};

/// A client of a route, and the worker of the guest behind it.
struct Client {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    worker: PlayedWorker,
}

impl Client {
    async fn at(route: &str) -> Self {
        let worker = PlayedWorker::new();
        let (to_exec, to_cp) = (Inside::at(worker.socket()), Inside::at(worker.socket()));
        let router = Router::new()
            .route(
                "/exec",
                get(async move |upgrade| Visit { inside: to_exec, upgrade }.begin(exec::serve)),
            )
            .route(
                "/cp",
                get(async move |upgrade| Visit { inside: to_cp, upgrade }.begin(cp::serve)),
            );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(axum::serve(listener, router).into_future());
        let (socket, _) = connect_async(format!("ws://{address}/{route}")).await.unwrap();
        Self { socket, worker }
    }

    async fn say(&mut self, value: &Value) {
        self.socket.send(Said::text(value.to_string())).await.unwrap();
    }

    async fn send(&mut self, bytes: &[u8]) {
        self.socket.send(Said::binary(bytes.to_vec())).await.unwrap();
    }

    async fn hear(&mut self) -> Said {
        self.socket.next().await.unwrap().unwrap()
    }

    async fn json(&mut self) -> Value {
        match self.hear().await {
            Said::Text(text) => serde_json::from_str(&text).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    /// Asks for something; returns the agent that has heard so.
    async fn ask(&mut self, request: &Value) -> (PlayedAgent, ToAgent) {
        self.say(request).await;
        let mut agent = self.worker.accept().await;
        let (1, heard) = agent.hear().await else { panic!("another stream") };
        (agent, heard)
    }

    async fn hear_close(&mut self) {
        match self.hear().await {
            Said::Close(Some(frame)) => assert_eq!(u16::from(frame.code), 1000),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_command_is_passed_on_in_both_directions() {
    let mut client = Client::at("exec").await;
    let request = json!({ "command": ["cat"], "tty": true, "rows": 5, "cols": 6 });
    let (mut agent, heard) = client.ask(&request).await;
    let ToAgent::Exec(spec) = heard else { panic!("{heard:?}") };
    assert_eq!((spec.argv.as_slice(), spec.apart), (&["cat".to_owned()][..], false));
    agent.say(1, &ToServer::Ack).await;

    client.send(b"bytes").await;
    client.say(&json!({ "resize": { "rows": 7, "cols": 8 } })).await;
    client.say(&json!({ "other": 1 })).await;

    assert_eq!(agent.hear().await, (1, ToAgent::Data(b"bytes".to_vec())));
    let (1, ToAgent::Resize(size)) = agent.hear().await else { panic!("no resize") };
    assert_eq!((size.rows, size.cols), (7, 8));
    assert_eq!(agent.hear().await, (1, ToAgent::Data(br#"{"other":1}"#.to_vec())));

    agent.say(1, &ToServer::Data(b"output".to_vec())).await;
    agent.say(1, &ToServer::Ended { code: 9 }).await;
    assert_eq!(client.hear().await, Said::binary(b"output".to_vec()));
    assert_eq!(client.hear().await, Said::text(r#"{"exitCode":9}"#));
    client.hear_close().await;
}

#[tokio::test]
async fn a_client_that_goes_calls_its_command_off() {
    let mut client = Client::at("exec").await;
    let (mut agent, _) = client.ask(&json!({ "command": ["yes"] })).await;
    agent.say(1, &ToServer::Ack).await;
    agent.say(1, &ToServer::Data(b"y\n".to_vec())).await;
    client.hear().await;

    drop(client.socket);

    assert_eq!(agent.hear().await, (1, ToAgent::Cancel));
}

/// Back-pressure: without a reader no credit goes back, and the agent has to stop.
#[tokio::test]
async fn a_client_that_does_not_read_gives_the_agent_no_credit() {
    let mut client = Client::at("exec").await;
    let (mut agent, _) = client.ask(&json!({ "command": ["yes"] })).await;
    agent.say(1, &ToServer::Ack).await;
    let chunk = ToServer::Data(vec![b'y'; 32 << 10]);
    let mut credit = WINDOW_BYTES;
    let mut sent = 0;
    // The sockets between us hold a few MiB.
    while sent < 64 << 20 {
        while let Some(left) = credit.checked_sub(chunk.cost()) {
            agent.say(1, &chunk).await;
            (credit, sent) = (left, sent + (32 << 10));
        }
        match time::timeout(Duration::from_millis(500), agent.hear()).await {
            Ok((1, ToAgent::Credit(more))) => credit += more,
            Ok(other) => panic!("{other:?}"),
            Err(_) => break,
        }
    }
    assert!(sent < 32 << 20, "{sent} bytes were taken from a client that reads none");

    let mut heard = 0;
    while heard < sent {
        let Said::Binary(bytes) = client.hear().await else { panic!("no output") };
        heard += bytes.len();
    }
    assert!(matches!(agent.hear().await, (1, ToAgent::Credit(_))));
}

#[tokio::test]
async fn what_an_agent_refuses_is_output_and_a_status() {
    for (code, status) in [(ErrorCode::NotFound, 127), (ErrorCode::NotExecutable, 126)] {
        let mut client = Client::at("exec").await;
        let (mut agent, _) = client.ask(&json!({ "command": ["x"] })).await;
        agent.say(1, &ToServer::Error { code, message: "x: no".into() }).await;

        assert_eq!(client.hear().await, Said::binary(b"Error: x: no\r\n".to_vec()));
        assert_eq!(client.json().await, json!({ "exitCode": status }));
        client.hear_close().await;
    }
}

#[tokio::test]
async fn an_agent_that_lies_or_goes_is_output_and_a_status() {
    let mut client = Client::at("exec").await;
    let (mut agent, _) = client.ask(&json!({ "command": ["x"] })).await;
    agent.say(1, &ToServer::Ack).await;
    agent.say(1, &ToServer::Stored { bytes: 1 }).await;
    assert_eq!(
        client.hear().await,
        Said::binary(b"Error: The agent answered out of place\r\n".to_vec())
    );
    assert_eq!(client.json().await, json!({ "exitCode": 127 }));

    let mut client = Client::at("exec").await;
    let (agent, _) = client.ask(&json!({ "command": ["x"] })).await;
    drop(agent);
    assert_eq!(
        client.hear().await,
        Said::binary(b"Error: The agent closed the connection\r\n".to_vec())
    );
    assert_eq!(client.json().await, json!({ "exitCode": 127 }));
}

#[tokio::test]
async fn a_first_message_of_another_kind_is_refused() {
    for first in [Said::text("no json"), Said::binary(b"{}".to_vec()), Said::text("[1]")] {
        let mut client = Client::at("exec").await;
        client.socket.send(first).await.unwrap();
        assert!(client.json().await["error"].is_string());
        assert!(matches!(client.hear().await, Said::Close(_)));
    }
    let mut client = Client::at("cp").await;
    client.socket.send(Said::text("{}")).await.unwrap();
    assert_eq!(client.json().await["type"], "error");
}

#[tokio::test]
async fn pings_are_answered_while_a_command_runs() {
    let mut client = Client::at("exec").await;
    let (mut agent, _) = client.ask(&json!({ "command": ["x"] })).await;
    agent.say(1, &ToServer::Ack).await;

    client.socket.send(Said::Ping(b"still there?".to_vec().into())).await.unwrap();

    assert_eq!(client.hear().await, Said::Pong(b"still there?".to_vec().into()));
}

#[tokio::test]
async fn a_file_is_taken_to_its_end_and_counted_by_the_agent() {
    let mut client = Client::at("cp").await;
    let request = json!({ "direction": "to", "guest_path": "/a", "mode": 0o600 });
    let (mut agent, heard) = client.ask(&request).await;
    let ToAgent::Put(spec) = heard else { panic!("{heard:?}") };
    assert_eq!((spec.path.as_str(), spec.kind, spec.mode), ("/a", PutKind::File, 0o600));
    agent.say(1, &ToServer::Ack).await;

    client.send(b"content").await;
    client.say(&json!({ "type": "end" })).await;
    assert_eq!(agent.hear().await, (1, ToAgent::Data(b"content".to_vec())));
    assert_eq!(agent.hear().await, (1, ToAgent::End));
    agent.say(1, &ToServer::Stored { bytes: 7 }).await;

    let result = json!({ "type": "result", "success": true, "bytes_written": 7 });
    assert_eq!(client.json().await, result);
    client.hear_close().await;
}

/// A way to the guest and back for each file, and not two.
#[tokio::test]
async fn the_bytes_of_a_file_do_not_wait_until_the_agent_has_made_it() {
    let mut client = Client::at("cp").await;
    let (mut agent, _) = client.ask(&json!({ "direction": "to", "guest_path": "/a" })).await;

    client.send(b"content").await;
    client.say(&json!({ "type": "end" })).await;

    assert_eq!(agent.hear().await, (1, ToAgent::Data(b"content".to_vec())));
    assert_eq!(agent.hear().await, (1, ToAgent::End));
    agent.say(1, &ToServer::Ack).await;
    agent.say(1, &ToServer::Stored { bytes: 7 }).await;
    assert_eq!(client.json().await["success"], true);
    client.hear_close().await;
}

#[tokio::test]
async fn a_file_that_cannot_be_made_is_refused_before_its_bytes_are_sent() {
    let mut client = Client::at("cp").await;
    let (mut agent, _) = client.ask(&json!({ "direction": "to", "guest_path": "/a" })).await;
    let message = "/a: is a directory".to_owned();

    agent.say(1, &ToServer::Error { code: ErrorCode::System, message: message.clone() }).await;

    let result = json!({ "type": "result", "success": false, "error": message });
    assert_eq!(client.json().await, result);
}

/// Otherwise a client that writes before it reads would never learn why. Until it has said all, the
/// server listens: a connection closed over what is still on its way takes the refusal with it.
#[tokio::test]
async fn a_refusal_arrives_while_the_client_still_sends() {
    let mut client = Client::at("cp").await;
    let (mut agent, _) = client.ask(&json!({ "direction": "to", "guest_path": "/a" })).await;
    agent.say(1, &ToServer::Ack).await;
    client.send(&[0; 4096]).await;
    agent.hear().await;
    let message = "/a: No space left on device".to_owned();

    agent.say(1, &ToServer::Error { code: ErrorCode::System, message: message.clone() }).await;
    for _ in 0..64 {
        client.send(&[0; 32 << 10]).await;
    }
    client.socket.send(Said::Ping(b"still there?".to_vec().into())).await.unwrap();

    let result = json!({ "type": "result", "success": false, "error": message });
    assert_eq!(client.json().await, result);
    assert_eq!(client.hear().await, Said::Pong(b"still there?".to_vec().into()));
    client.say(&json!({ "type": "end" })).await;
    client.hear_close().await;
}

#[tokio::test]
async fn a_client_that_pauses_hears_that_the_guest_has_ended() {
    let mut client = Client::at("cp").await;
    let (mut agent, _) = client.ask(&json!({ "direction": "to", "guest_path": "/a" })).await;
    agent.say(1, &ToServer::Ack).await;
    client.send(b"some").await;
    agent.hear().await;

    drop(agent);

    let result = client.json().await;
    assert_eq!((&result["type"], &result["success"]), (&json!("result"), &json!(false)));
}

fn entry(path: &str, kind: EntryKind, size: u64) -> ToServer {
    let path = path.to_owned();
    ToServer::Entry(Entry { path, kind, mode: 0o755, size, mtime: 5, uid: 0, gid: 0 })
}

#[tokio::test]
async fn only_the_last_entry_of_a_tree_is_final() {
    let mut client = Client::at("cp").await;
    let (mut agent, _) = client.ask(&json!({ "direction": "from", "guest_path": "/d" })).await;
    agent.say(1, &ToServer::Ack).await;
    agent.say(1, &entry("d", EntryKind::Directory, 0)).await;
    agent.say(1, &entry("d/f", EntryKind::File, 3)).await;
    agent.say(1, &ToServer::Data(b"abc".to_vec())).await;
    agent.say(1, &ToServer::End).await;

    assert_eq!(client.json().await["path"], "d");
    assert_eq!(client.json().await, json!({ "type": "end", "final": false }));
    assert_eq!(client.json().await["size"], 3);
    assert_eq!(client.hear().await, Said::binary(b"abc".to_vec()));
    assert_eq!(client.json().await, json!({ "type": "end", "final": true }));
    client.hear_close().await;
}

/// A guest that leads out, sends more than it said, or ends too early.
#[tokio::test]
async fn a_tree_that_is_none_is_an_error_to_the_client() {
    let lies = [
        vec![entry("../d", EntryKind::Directory, 0)],
        vec![entry("/d", EntryKind::Directory, 0)],
        vec![entry("f", EntryKind::File, 1), ToServer::Data(b"ab".to_vec())],
        vec![entry("f", EntryKind::File, 1), ToServer::End],
        vec![ToServer::Data(b"a".to_vec())],
    ];
    for lie in lies {
        let mut client = Client::at("cp").await;
        let (mut agent, _) = client.ask(&json!({ "direction": "from", "guest_path": "/" })).await;
        agent.say(1, &ToServer::Ack).await;
        for message in &lie {
            agent.say(1, message).await;
        }

        let mut said = client.json().await;
        if said["type"] == "header" {
            said = client.json().await;
        }
        assert_eq!(said["type"], "error", "{lie:?}: {said}");
    }
}
