//! How fast commands and bytes go into a guest and out of it through the API, and what that costs,
//! beside the same done on the host itself in the same run.
//!
//! On an emulated host only the ratios mean anything; exits are what they are everywhere.

#![expect(clippy::print_stdout, reason = "a table is what a bench is for")]
#![expect(clippy::disallowed_methods, reason = "the host's own commands are the peer")]

mod cost;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ovum_agent_proto::AGENT_PORT;
use ovum_test_host::{BUSYBOX, Frame, Server, Socket, TestHost};
use serde_json::{Value, json};
use tokio::runtime::Builder;

use cost::Cost;

/// Commands that do nothing.
const COMMANDS: u32 = 200;

/// Connections to the agent.
const CONNECTIONS: u32 = 50;

/// Bytes of output, and of the large file.
const BYTES: usize = 32 << 20;

/// Bytes in one message of a client, as in the SDKs.
const CHUNK_BYTES: usize = 32 << 10;

/// Small files, each with its path as content.
const FILES: u32 = 500;

const NAME: &str = "bench";

fn main() {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime needs only memory").block_on(bench());
}

async fn bench() {
    let host = TestHost::start().await;
    let server = &host.server;
    let instance = server.create(json!({
        "name": NAME, "image": BUSYBOX, "size": "256MB", "vcpus": 1, "cmd": ["sleep", "100000"],
    }));
    let id = instance.await["id"].as_str().expect("an instance has an id").to_owned();
    server.wait(NAME, "Running").await;
    let folder = server.data_dir.join("instances").join(id);
    assert_eq!(server.sh(NAME, "true").await.code, 0);

    connections(&folder.join("vsock.sock"));
    commands(server).await;
    output(server).await;
    large_file(server, &folder).await;
    small_files(server, &folder).await;

    server.delete(NAME).await;
    host.stop().await;
}

/// One connection to the agent: asked for, accepted, greeted, and closed by us.
fn connections(socket: &Path) {
    let before = Cost::now();
    for _ in 0..CONNECTIONS {
        let mut stream = UnixStream::connect(socket).expect("the worker listens");
        writeln!(stream, "CONNECT {AGENT_PORT}").expect("the worker reads");
        let mut answer = [0; 64];
        let mut length = 0;
        // The hello of the agent stands behind a line of the worker.
        while length < 24 {
            length += stream.read(&mut answer[length..]).expect("the worker answers");
        }
    }
    println!("a connection to the agent, of {CONNECTIONS}");
    Cost::since(&before).print(CONNECTIONS);
}

async fn commands(server: &Server) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let before = Cost::now();
    for _ in 0..COMMANDS {
        let started = Instant::now();
        assert_eq!(server.exec(NAME, json!({ "command": ["true"] })).await.code, 0);
        ours.push(started.elapsed());
    }
    let cost = Cost::since(&before);
    for _ in 0..COMMANDS {
        let started = Instant::now();
        assert!(Command::new("true").status().expect("there is true").success());
        theirs.push(started.elapsed());
    }
    let (p50, peer) = (at(&mut ours, 50), at(&mut theirs, 50));
    println!(
        "exec of true, of {COMMANDS}: p50 {:.1} ms, p99 {:.1} ms",
        ms(p50),
        ms(at(&mut ours, 99))
    );
    println!("  on the host itself: p50 {:.1} ms; ratio {:.1}", ms(peer), ms(p50) / ms(peer));
    cost.print(COMMANDS);
}

async fn output(server: &Server) {
    // Not `head -c`: the one of busybox goes byte by byte.
    let script = format!("dd if=/dev/zero bs=65536 count={} 2> /dev/null", BYTES >> 16);
    let before = Cost::now();
    let started = Instant::now();
    let ran = server.sh(NAME, &script).await;
    let ours = started.elapsed();
    let cost = Cost::since(&before);
    assert_eq!((ran.output.len(), ran.code), (BYTES, 0));

    let started = Instant::now();
    let mut child = Command::new("sh")
        .args(["-c", &script])
        .stdout(Stdio::piped())
        .spawn()
        .expect("there is a shell");
    let mut read = Vec::new();
    child.stdout.take().expect("it is piped").read_to_end(&mut read).expect("a pipe can be read");
    child.wait().expect("it is ours");
    row("output of a command", ours, started.elapsed());
    cost.print(megabytes());
}

async fn large_file(server: &Server, folder: &Path) {
    let content: Vec<u8> = (1..=251_u8).cycle().take(BYTES).collect();
    let before = Cost::now();
    let started = Instant::now();
    let chunks: Vec<&[u8]> = content.chunks(CHUNK_BYTES).collect();
    put(server, "/large", &chunks).await;
    let up = started.elapsed();
    let cost_up = Cost::since(&before);

    let before = Cost::now();
    let started = Instant::now();
    let tree = get(server, "/large").await;
    let down = started.elapsed();
    let cost_down = Cost::since(&before);
    assert!(tree.bytes == BYTES && tree.entries == 1);

    let path = folder.join("peer");
    let started = Instant::now();
    fs::write(&path, &content).expect("there is room");
    row("a file in", up, started.elapsed());
    cost_up.print(megabytes());
    let started = Instant::now();
    assert!(fs::read(&path).expect("it was written") == content);
    row("a file out", down, started.elapsed());
    cost_down.print(megabytes());
    fs::remove_file(path).expect("it is there");
}

async fn small_files(server: &Server, folder: &Path) {
    let before = Cost::now();
    let started = Instant::now();
    for number in 0..FILES {
        let path = format!("/small/{number}");
        put(server, &path, &[path.as_bytes()]).await;
    }
    let up = started.elapsed();
    let cost = Cost::since(&before);
    let started = Instant::now();
    let tree = get(server, "/small").await;
    let down = started.elapsed();
    assert_eq!(tree.entries, FILES + 1);

    let started = Instant::now();
    let peer: Vec<PathBuf> = (0..FILES).map(|n| folder.join(format!("small-{n}"))).collect();
    for path in &peer {
        fs::write(path, path.as_os_str().as_encoded_bytes()).expect("there is room");
    }
    let written = started.elapsed();
    for path in &peer {
        fs::remove_file(path).expect("it is there");
    }
    let rate = |took: Duration| f64::from(FILES) / took.as_secs_f64();
    println!(
        "small files: {:.0}/s in, {:.0}/s out; written on the host itself {:.0}/s",
        rate(up),
        rate(down),
        rate(written)
    );
    println!("  each in: {:.2} ms; ratio {:.0}", ms(up / FILES), ms(up) / ms(written));
    cost.print(FILES);
}

async fn put(server: &Server, path: &str, chunks: &[&[u8]]) {
    let mut socket = copy(server, &json!({ "direction": "to", "guest_path": path })).await;
    for chunk in chunks {
        socket.send(chunk).await;
    }
    socket.say(r#"{"type":"end"}"#).await;
    let result = socket.json().await;
    assert_eq!(result["success"], true, "{result}");
    assert_eq!(socket.next().await, Frame::Close(Some(1000)));
}

/// What came out of a guest.
struct Tree {
    entries: u32,
    bytes: usize,
}

async fn get(server: &Server, path: &str) -> Tree {
    let mut socket = copy(server, &json!({ "direction": "from", "guest_path": path })).await;
    let mut tree = Tree { entries: 0, bytes: 0 };
    loop {
        match socket.next().await {
            Frame::Binary(bytes) => tree.bytes += bytes.len(),
            Frame::Text(text) => {
                let text: Value = serde_json::from_str(&text).expect("a text is JSON");
                tree.entries += u32::from(text["type"] == "header");
                assert_ne!(text["type"], "error", "{text}");
            }
            Frame::Close(code) => {
                assert_eq!(code, Some(1000));
                return tree;
            }
        }
    }
}

async fn copy(server: &Server, request: &Value) -> Socket {
    let mut socket = server.socket(&format!("/instances/{NAME}/cp")).await;
    socket.say(&request.to_string()).await;
    socket
}

fn row(what: &str, ours: Duration, theirs: Duration) {
    let rate = |took: Duration| f64::from(megabytes()) / took.as_secs_f64();
    println!(
        "{what}: {:.1} MB/s; on the host itself {:.0} MB/s; ratio {:.3}",
        rate(ours),
        rate(theirs),
        rate(ours) / rate(theirs)
    );
}

fn megabytes() -> u32 {
    u32::try_from(BYTES / 1_000_000).expect("a few")
}

/// The time below which so many per cent of `times` are.
fn at(times: &mut [Duration], percent: usize) -> Duration {
    times.sort();
    times[times.len() * percent / 100]
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
