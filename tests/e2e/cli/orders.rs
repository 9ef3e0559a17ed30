//! `ovum stop`, `start`, `update`, `rm`, `health`, `stats`, `top`, as they are typed.

use ovum_test_host::{BUSYBOX, TestHost};
use serde_json::{Value, json};

use super::terminal::Terminal;
use super::{on, text, typed};
use crate::cases;

cases![
    several_instances_are_stopped_started_and_deleted_at_once,
    an_order_that_is_refused_for_one_is_done_for_the_others,
    how_an_instance_is_looked_after_can_be_typed,
    what_instances_cost_is_shown_once,
    what_instances_cost_is_shown_in_place_on_a_terminal,
];

fn json_of(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|_| panic!("no JSON: {}", text(bytes)))
}

async fn several_instances_are_stopped_started_and_deleted_at_once(host: &TestHost) {
    let server = &host.server;
    server.start_idle("first", BUSYBOX).await;
    server.start_idle("second", BUSYBOX).await;

    let stopped = on(server, &["stop", "second", "first"]);
    let again = on(server, &["stop", "--json", "first"]);
    let started = on(server, &["start", "--cmd=sh", "--cmd=-c", "--cmd=exit 5", "first", "second"]);
    for name in ["first", "second"] {
        assert_eq!(server.wait(name, "Stopped").await["exit_code"], 5);
    }
    let removed = on(server, &["rm", "first", "second"]);

    assert_eq!(text(&stopped.stdout), "second\nfirst\n", "{}", text(&stopped.stderr));
    let again = json_of(&again.stdout);
    assert_eq!((&again[0]["name"], &again[0]["state"]), (&json!("first"), &json!("Stopped")));
    assert_eq!(text(&started.stdout), "first\nsecond\n", "{}", text(&started.stderr));
    assert_eq!(text(&removed.stdout), "first\nsecond\n", "{}", text(&removed.stderr));
    assert_eq!(server.get("/instances").await, json!([]));
}

async fn an_order_that_is_refused_for_one_is_done_for_the_others(host: &TestHost) {
    let server = &host.server;
    server.start_idle("there", BUSYBOX).await;

    let changed = on(server, &["start", "--cmd=true", "there"]);
    let removed = on(server, &["rm", "there"]);
    let stopped = on(server, &["stop", "nobody", "there"]);
    let nothing = on(server, &["update", "there"]);

    assert_eq!(changed.status.code(), Some(1));
    assert!(text(&changed.stderr).contains("Running"), "{}", text(&changed.stderr));
    assert!(text(&removed.stderr).contains("--force"), "{}", text(&removed.stderr));
    assert_eq!((stopped.status.code(), text(&stopped.stdout)), (Some(1), "there\n".into()));
    assert!(text(&stopped.stderr).contains("Failed to stop nobody"), "{}", text(&stopped.stderr));
    assert!(text(&nothing.stderr).contains("nothing to change"), "{}", text(&nothing.stderr));
    server.delete("there").await;
}

async fn how_an_instance_is_looked_after_can_be_typed(host: &TestHost) {
    let server = &host.server;
    let run = [
        "run",
        "--detach",
        "--name=watched",
        "--memory=128MB",
        "--restart=on-failure:2",
        "--health-cmd=test ! -e /ill",
        "--health-interval=3s",
        "--health-timeout=3s",
        "--health-start-period=0s",
        "--health-retries=1",
        BUSYBOX,
        "--",
        "sleep",
        "1000",
    ];
    let ran = on(server, &run);
    assert!(ran.status.success(), "{}", text(&ran.stderr));
    server.wait("watched", "Running").await;

    let health = |instance: &Value| instance[0]["health_status"]["status"].clone();
    let asked = || json_of(&on(server, &["health", "--json", "watched"]).stdout);
    let before = server.get("/instances/watched").await;
    super::until("it is well", || health(&asked()) == "healthy").await;
    // Lest it be started again for being ill.
    let changed = on(server, &["update", "--restart=no", "--ttl=1h", "--json", "watched"]);
    on(server, &["exec", "watched", "touch", "/ill"]);
    super::until("it is ill", || health(&asked()) == "unhealthy").await;
    let ill = on(server, &["health", "watched"]);
    let server_is = on(server, &["health"]);
    on(server, &["update", "--no-healthcheck", "watched"]);

    let policy = &before["restart_policy"];
    assert_eq!((&policy["policy"], &policy["max_attempts"]), (&json!("on_failure"), &json!(2)));
    let changed = json_of(&changed.stdout);
    assert_eq!(changed[0]["restart_policy"], Value::Null);
    assert!(changed[0]["expires_at"].is_string(), "{changed}");
    assert_eq!(text(&server_is.stdout), "ok\n");
    assert_eq!(ill.status.code(), Some(1));
    assert!(text(&ill.stdout).contains("unhealthy"), "{}", text(&ill.stdout));
    let instance = server.get("/instances/watched").await;
    assert_eq!(instance["health_status"]["status"], "disabled");
    server.delete("watched").await;
}

async fn what_instances_cost_is_shown_once(host: &TestHost) {
    let server = &host.server;
    server.start_idle("costs", BUSYBOX).await;

    let stats = on(server, &["stats"]);
    let named = on(server, &["stats", "--json", "--no-stream", "costs"]);
    let nobody = on(server, &["stats", "nobody"]);
    let top = on(server, &["top", "--interval=200ms"]);
    let as_json = on(server, &["top", "--json", "--interval=200ms"]);

    assert!(text(&stats.stdout).contains("costs  1      "), "{}", text(&stats.stdout));
    let named = json_of(&named.stdout);
    assert_eq!(named[0]["instance_name"], "costs");
    assert!(named[0]["memory_rss_bytes"].as_u64() > Some(10 << 20), "{named}");
    assert!(
        text(&nobody.stderr).contains("nobody: resource not found"),
        "{}",
        text(&nobody.stderr)
    );
    let shown = text(&top.stdout);
    assert!(shown.starts_with("NAME   STATE    HEALTH    CPU %"), "{shown}");
    assert!(!shown.contains('\x1b'), "this is no terminal: {shown:?}");
    let line = &json_of(&as_json.stdout)[0];
    assert_eq!((&line["name"], &line["state"]), (&json!("costs"), &json!("Running")));
    assert!(line["cpu_percent"].as_f64() >= Some(0.0), "{line}");
    server.delete("costs").await;
}

async fn what_instances_cost_is_shown_in_place_on_a_terminal(host: &TestHost) {
    let server = &host.server;
    server.start_idle("busy", BUSYBOX).await;
    let mut terminal = Terminal::start(&typed(server, &["top", "--interval=200ms"]), 24, 40);

    let first = terminal.until("busy").await;
    let second = terminal.until("busy").await;
    terminal.resize(24, 100);
    terminal.until("STARTED").await;
    let during = terminal.is_raw();
    terminal.keys("q");
    let (after, status) = terminal.ended().await;

    assert!(first.starts_with("\x1b[?1049h\x1b[?25l\x1b[H1 running"), "{first:?}");
    assert!(second.contains("\x1b[H1 running"), "in place: {second:?}");
    assert_eq!((during, after, status.code()), (true, false, Some(0)));
    let once = Terminal::start(&typed(server, &["top", "--once", "--interval=200ms"]), 24, 80);
    let (shown, status) = once.end().await;
    assert!(shown.starts_with("NAME  STATE") && status.success(), "{shown:?}");
    server.delete("busy").await;
}
