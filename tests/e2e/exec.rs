//! Commands in a guest.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cases;
use ovum_test_host::{BUSYBOX, Frame, TestHost};

cases![
    a_command_has_output_and_a_status,
    a_command_is_told_where_and_with_what_to_run,
    a_command_may_be_a_shell_that_nobody_named,
    output_comes_as_it_is_written,
    a_terminal_is_one,
    a_timeout_ends_the_whole_group,
    a_client_that_leaves_takes_its_command_along,
    much_output_does_not_grow_the_server,
    much_input_arrives_and_channels_are_kept_apart,
    what_goes_wrong_is_told_as_output,
    nobody_is_upgraded_for_nothing,
    many_commands_run_at_once,
    commands_go_on_after_the_server_was_killed,
    an_ended_guest_ends_its_commands,
    how_long_a_command_takes,
];

/// Looks in a row that see no more written: then it stands still.
const STILL_LOOKS: usize = 8;

async fn a_command_has_output_and_a_status(host: &TestHost) {
    let server = &host.server;
    server.start_idle("exec", BUSYBOX).await;

    let ran = server.sh("exec", "echo hi; echo there >&2; exit 3").await;
    let killed = server.sh("exec", "kill -9 $$").await;
    let terminated = server.sh("exec", "kill -15 $$").await;

    assert_eq!((ran.text(), ran.code), ("hi\nthere\n", 3));
    assert_eq!((killed.code, terminated.code), (137, 143));
    server.delete("exec").await;
}

async fn a_command_is_told_where_and_with_what_to_run(host: &TestHost) {
    let server = &host.server;
    server
        .create(json!({
            "name": "told", "image": BUSYBOX, "size": "256MB", "vcpus": 1,
            "cmd": ["sleep", "100000"], "env": { "FROM": "instance", "KEPT": "yes" },
        }))
        .await;
    server.wait("told", "Running").await;

    let ran = server
        .exec(
            "told",
            json!({
                "command": ["sh", "-c", "echo $FROM $KEPT $HOME; pwd; id -u"],
                "env": { "FROM": "request" }, "cwd": "/bin", "wait_for_agent": 5,
            }),
        )
        .await;

    assert_eq!((ran.text(), ran.code), ("request yes /root\n/bin\n0\n", 0));
    server.delete("told").await;
}

async fn a_command_may_be_a_shell_that_nobody_named(host: &TestHost) {
    let server = &host.server;
    server.start_idle("shell", BUSYBOX).await;
    let mut socket = server.socket("/instances/shell/exec").await;

    socket.say(r#"{"command":null,"tty":false}"#).await;
    socket.send(b"echo from bytes\n").await;
    socket.say("echo from text; exit 4\n").await;
    let ran = socket.until_exit().await;

    assert_eq!((ran.text(), ran.code), ("from bytes\nfrom text\n", 4));
    server.delete("shell").await;
}

async fn output_comes_as_it_is_written(host: &TestHost) {
    let server = &host.server;
    server.start_idle("writes", BUSYBOX).await;
    let mut socket = server.socket("/instances/writes/exec").await;
    let script = "echo first; read line; echo second";

    socket.say(&json!({ "command": ["sh", "-c", script] }).to_string()).await;
    let first = socket.until("first\n").await;
    socket.send(b"go\n").await;
    let ran = socket.until_exit().await;

    assert_eq!(first, "first\n");
    assert_eq!((ran.text(), ran.code), ("second\n", 0));
    server.delete("writes").await;
}

async fn a_terminal_is_one(host: &TestHost) {
    let server = &host.server;
    server.start_idle("terminal", BUSYBOX).await;
    let mut socket = server.socket("/instances/terminal/exec").await;
    let script = "test -t 0 && test -t 1 && echo $TERM $LANG $COLORTERM; stty size; \
                  trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.1; done";

    let request = json!({ "command": ["sh", "-c", script], "tty": true, "rows": 30, "cols": 100 });
    socket.say(&request.to_string()).await;
    let before = socket.until("ready\r\n").await;
    socket.say(r#"{"resize":{"rows":50,"cols":132}}"#).await;
    let ran = socket.until_exit().await;
    let default =
        server.exec("terminal", json!({ "command": ["stty", "size"], "tty": true })).await;

    assert_eq!(before, "xterm-256color C.UTF-8 truecolor\r\n30 100\r\nready\r\n");
    assert_eq!((ran.text(), ran.code), ("50 132\r\n", 5));
    assert_eq!(default.text(), "24 80\r\n");
    server.delete("terminal").await;
}

async fn a_timeout_ends_the_whole_group(host: &TestHost) {
    let server = &host.server;
    server.start_idle("timed", BUSYBOX).await;
    let started = Instant::now();

    let script = "echo begun; sleep 7777 & sleep 7777";
    let ran = server.exec("timed", json!({ "command": ["sh", "-c", script], "timeout": 8 })).await;
    let left = server.sh("timed", "ps | grep -c '[s]leep 7777'").await;

    assert_eq!((ran.text(), ran.code), ("begun\n", 124));
    assert!(started.elapsed() > Duration::from_secs(8));
    assert_eq!(left.text(), "0\n");
    server.delete("timed").await;
}

async fn a_client_that_leaves_takes_its_command_along(host: &TestHost) {
    let server = &host.server;
    server.start_idle("left", BUSYBOX).await;
    let mut socket = server.socket("/instances/left/exec").await;
    let script = "echo begun; sleep 8888 & sleep 8888";
    socket.say(&json!({ "command": ["sh", "-c", script] }).to_string()).await;
    socket.until("begun\n").await;
    let before = server.sh("left", "ps | grep -c '[s]leep 8888'").await;

    drop(socket);

    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let left = server.sh("left", "ps | grep -c '[s]leep 8888'").await;
        if left.text() == "0\n" {
            break;
        }
        assert!(Instant::now() < deadline, "{} are left", left.text());
    }
    assert_eq!(before.text(), "2\n");
    server.delete("left").await;
}

async fn much_output_does_not_grow_the_server(host: &TestHost) {
    let server = &host.server;
    server.start_idle("much", BUSYBOX).await;
    let before = server.resident_bytes();
    let mut socket = server.socket("/instances/much/exec").await;
    let bytes = 64_u64 << 20;
    let script = "i=0; while [ $i -lt 64 ]; do head -c 1048576 /dev/zero; i=$((i + 1)); \
                  echo $i > /written; done";
    socket.say(&json!({ "command": ["sh", "-c", script] }).to_string()).await;

    // A client that is slow to begin: what no longer fits on the way to it waits in the guest.
    let mut looks = VecDeque::<String>::new();
    while looks.len() < STILL_LOOKS
        || looks[0].is_empty()
        || looks.iter().any(|look| *look != looks[0])
    {
        looks.truncate(STILL_LOOKS - 1);
        looks.push_front(server.sh("much", "cat /written 2> /dev/null").await.text().to_owned());
    }
    assert!(looks[0].trim().parse::<u64>().unwrap() < bytes >> 20, "nothing waited");
    let waiting = server.resident_bytes();
    let started = Instant::now();
    let ran = socket.until_exit().await;
    let took = started.elapsed();
    let after = server.resident_bytes();

    assert_eq!((ran.output.len() as u64, ran.code), (bytes, 0));
    assert!(ran.output == vec![0; ran.output.len()], "and all of it is zeroes");
    println!("exec output: {:.1} MB/s", bytes as f64 / 1e6 / took.as_secs_f64());
    let grown = waiting.max(after).saturating_sub(before);
    assert!(grown < 16 << 20, "the server grew by {grown} bytes");
    server.delete("much").await;
}

async fn much_input_arrives_and_channels_are_kept_apart(host: &TestHost) {
    let server = &host.server;
    server.start_idle("input", BUSYBOX).await;
    let mut socket = server.socket("/instances/input/exec").await;
    let script = "wc -c; echo done >&2";
    socket.say(&json!({ "command": ["sh", "-c", script], "channels": true }).to_string()).await;

    let chunk = vec![b'x'; 1 << 20];
    for _ in 0..8 {
        socket.send(&chunk).await;
    }
    socket.say(r#"{"eof":true}"#).await;
    let (mut output, mut error) = (Vec::new(), Vec::new());
    let last = loop {
        match socket.next().await {
            Frame::Binary(bytes) if bytes[0] == 1 => output.extend_from_slice(&bytes[1..]),
            Frame::Binary(bytes) if bytes[0] == 2 => error.extend_from_slice(&bytes[1..]),
            Frame::Text(text) => break text,
            other => panic!("{other:?}"),
        }
    };

    assert_eq!(String::from_utf8(output).unwrap(), format!("{}\n", 8 << 20));
    assert_eq!(error, b"done\n");
    assert_eq!(last, r#"{"exitCode":0}"#);
    server.delete("input").await;
}

async fn what_goes_wrong_is_told_as_output(host: &TestHost) {
    let server = &host.server;
    server.start_idle("wrong", BUSYBOX).await;

    let missing = server.exec("wrong", json!({ "command": ["nothing", "here"] })).await;
    let denied = server.exec("wrong", json!({ "command": ["/proc/version"] })).await;
    let nowhere = server.exec("wrong", json!({ "command": ["true"], "cwd": "/nowhere" })).await;
    let long = json!({ "command": ["echo", "x".repeat(300_000)] });
    let long = server.exec("wrong", long).await;

    assert_eq!((missing.text(), missing.code), ("Error: nothing: not found\r\n", 127));
    assert_eq!((denied.text(), denied.code), ("Error: /proc/version: permission denied\r\n", 126));
    assert!(nowhere.text().starts_with("Error: working directory /nowhere"), "{nowhere:?}");
    assert_eq!(nowhere.code, 127);
    assert!(long.text().starts_with("Error: The request is too long"), "{long:?}");

    for first in ["no json", "[]", r#"{"command":"ls"}"#, r#"{"env":{"A=":"b"}}"#] {
        let mut socket = server.socket("/instances/wrong/exec").await;
        socket.say(first).await;
        let answer = socket.json().await;
        assert!(answer["error"].is_string(), "{first}: {answer}");
        assert!(matches!(socket.next().await, Frame::Close(_)));
    }
    let mut socket = server.socket("/instances/wrong/exec").await;
    socket.send(b"{}").await;
    assert!(socket.json().await["error"].is_string());
    server.delete("wrong").await;
}

async fn nobody_is_upgraded_for_nothing(host: &TestHost) {
    let server = &host.server;
    server
        .create(json!({ "name": "over", "image": BUSYBOX, "size": "128MB", "cmd": ["true"] }))
        .await;
    server.wait("over", "Stopped").await;

    for route in ["exec", "cp"] {
        let (status, body) = server.refused_socket(&format!("/instances/over/{route}")).await;
        assert_eq!((status, &body["code"]), (409, &json!("invalid_state")), "{body}");
        assert_eq!(body["message"], "instance must be running (current state: Stopped)");
        let (status, body) = server.refused_socket(&format!("/instances/none/{route}")).await;
        assert_eq!((status, &body["code"]), (404, &json!("not_found")));
    }
    server.delete("over").await;
}

async fn many_commands_run_at_once(host: &TestHost) {
    let server = &host.server;
    server.start_idle("many", BUSYBOX).await;
    let mut sockets = Vec::new();
    for number in 0..40 {
        let mut socket = server.socket("/instances/many/exec").await;
        let script = format!("read line; echo {number} $line; exit {number}");
        socket.say(&json!({ "command": ["sh", "-c", script] }).to_string()).await;
        sockets.push(socket);
    }

    for (number, socket) in sockets.iter_mut().enumerate().rev() {
        socket.send(b"go\n").await;
        let ran = socket.until_exit().await;
        assert_eq!(ran.text(), format!("{number} go\n"));
        assert_eq!(usize::try_from(ran.code), Ok(number));
    }
    server.delete("many").await;
}

async fn commands_go_on_after_the_server_was_killed(_: &TestHost) {
    let mut server = ovum_test_host::Server::start("exec-killed").await;
    server.pull(BUSYBOX).await;
    server.start_idle("stays", BUSYBOX).await;
    let mut socket = server.socket("/instances/stays/exec").await;
    socket.say(&json!({ "command": ["sh", "-c", "echo begun; sleep 9999"] }).to_string()).await;
    socket.until("begun\n").await;

    server.kill();
    let data_dir = server.data_dir.clone();
    let mut server = ovum_test_host::Server::start_at(&data_dir).await;

    server.wait("stays", "Running").await;
    let ran = server.sh("stays", "ps | grep -c '[s]leep 9999'").await;
    assert_eq!(ran.text(), "0\n", "whose client is gone, is gone");
    server.delete("stays").await;
    server.kill();
}

async fn an_ended_guest_ends_its_commands(host: &TestHost) {
    let server = &host.server;
    server.start_idle("ends", BUSYBOX).await;
    let mut socket = server.socket("/instances/ends/exec").await;
    socket.say(&json!({ "command": ["sh", "-c", "echo begun; sleep 9999"] }).to_string()).await;
    socket.until("begun\n").await;

    let (ran, ()) = tokio::join!(socket.until_exit(), server.delete("ends"));

    assert!(ran.code == 137 || ran.code == 127, "{ran:?}");
}

/// No claim but that it ends: a line for those who watch the time.
async fn how_long_a_command_takes(host: &TestHost) {
    let server = &host.server;
    server.start_idle("fast", BUSYBOX).await;
    let mut times = Vec::new();
    for _ in 0..50 {
        let started = Instant::now();
        let ran = server.exec("fast", json!({ "command": ["true"] })).await;
        assert_eq!(ran.code, 0);
        times.push(started.elapsed());
    }
    times.sort();
    println!(
        "exec of true: p50 {:?}, p90 {:?}",
        times[times.len() / 2],
        times[times.len() * 9 / 10]
    );
    server.delete("fast").await;
}
