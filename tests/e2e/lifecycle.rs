//! Stop, start, and what survives them.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use ovum_test_host::{BUSYBOX, Server, TestHost, worker_pids, workers};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;

cases![
    an_instance_stops_and_starts_on_the_same_disk,
    a_workload_may_refuse_to_end_for_a_while_only,
    a_start_may_change_the_command,
    a_guest_without_an_agent_is_stopped_too,
    who_waits_for_a_start_is_woken_up,
    what_the_state_forbids_is_refused_at_once,
    orders_queue_behind_each_other,
    an_instance_that_fails_is_started_again_until_it_is_given_up,
    an_instance_that_is_stopped_by_hand_stays_so,
    a_killed_worker_is_replaced_if_the_policy_says_so,
    an_unhealthy_instance_is_started_again_and_gets_well,
    an_instance_lives_as_long_as_it_was_given_even_without_a_server,
    a_server_killed_during_stops_leaves_them_finished_or_not_begun,
    a_server_killed_during_starts_leaves_them_done_or_undone,
];

/// An instance that runs `script`.
async fn run(server: &Server, name: &str, script: &str) -> Value {
    let body = json!({
        "name": name, "image": BUSYBOX, "size": "128MB", "vcpus": 1, "cmd": ["sh", "-c", script],
    });
    server.create(body).await;
    server.wait(name, "Running").await
}

/// What a POST that must succeed answers.
async fn post(server: &Server, path: &str, body: Option<Value>) -> Value {
    let (status, answer) = server.call(Method::POST, path, body).await;
    assert_eq!(status, StatusCode::OK, "POST {path}: {answer}");
    answer
}

async fn an_instance_stops_and_starts_on_the_same_disk(host: &TestHost) {
    let script = "trap 'echo stopping; exit 9' TERM; echo boot >> /boots; cat /boots; \
        echo counted $(wc -l < /boots); while :; do sleep 0.1; done";
    let first = run(&host.server, "twice", script).await;
    host.server.follow_until("twice", "counted 1").await;

    let stopped = post(&host.server, "/instances/twice/stop", None).await;
    let again = post(&host.server, "/instances/twice/stop", None).await;
    let left = workers();
    let started = post(&host.server, "/instances/twice/start", None).await;
    host.server.follow_until("twice", "counted 2").await;
    let second = host.server.wait("twice", "Running").await;

    assert_eq!((&stopped["state"], &stopped["exit_code"]), (&json!("Stopped"), &json!(9)));
    assert_eq!(stopped["exit_message"], "exit code 9");
    assert!(stopped["stopped_at"].is_string(), "{stopped}");
    assert_eq!(again["state"], "Stopped");
    assert_eq!(left, Vec::<String>::new(), "a stopped instance has no process");
    assert!(started.get("exit_code").is_none() && started["stopped_at"].is_null(), "{started}");
    assert_eq!(second["id"], first["id"]);
    assert_eq!(second["created_at"], first["created_at"]);
    assert!(second["started_at"].as_str() > first["started_at"].as_str(), "{second}");
    assert!(second["phase_durations_ms"]["kernel"].as_u64() > Some(0), "{second}");
    let log = host.server.log("twice").await;
    assert!(log.contains("stopping\n"), "the workload was asked: {log}");
    host.server.delete("twice").await;
}

async fn a_workload_may_refuse_to_end_for_a_while_only(host: &TestHost) {
    run(&host.server, "stubborn", "trap '' TERM; echo deaf; while :; do sleep 1; done").await;
    host.server.follow_until("stubborn", "deaf").await;

    let began = Instant::now();
    let stopped = post(&host.server, "/instances/stubborn/stop", None).await;

    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(stopped["state"], "Stopped");
    host.server.delete("stubborn").await;
}

async fn a_start_may_change_the_command(host: &TestHost) {
    run(&host.server, "changes", "sleep 1000").await;
    post(&host.server, "/instances/changes/stop", None).await;

    let body = json!({ "entrypoint": [], "cmd": ["sh", "-c", "echo other; exit 3"] });
    post(&host.server, "/instances/changes/start", Some(body)).await;
    let ended = host.server.wait("changes", "Stopped").await;
    post(&host.server, "/instances/changes/start", Some(json!({}))).await;
    let once_more = host.server.wait("changes", "Stopped").await;

    assert_eq!((&ended["exit_code"], &once_more["exit_code"]), (&json!(3), &json!(3)));
    let log = host.server.log("changes").await;
    assert_eq!(log.matches("other\n").count(), 2, "{log}");
    host.server.delete("changes").await;
}

async fn a_guest_without_an_agent_is_stopped_too(host: &TestHost) {
    let body = json!({
        "name": "agentless", "image": BUSYBOX, "size": "128MB", "skip_guest_agent": true,
        "cmd": ["sleep", "1000"],
    });
    host.server.create(body).await;
    host.server.wait("agentless", "Running").await;

    let stopped = post(&host.server, "/instances/agentless/stop", None).await;

    assert_eq!(stopped["state"], "Stopped");
    assert!(stopped.get("state_error").is_none(), "{stopped}");
    host.server.delete("agentless").await;
}

async fn who_waits_for_a_start_is_woken_up(host: &TestHost) {
    run(&host.server, "waited", "sleep 1000").await;
    let wait = async {
        let (_, answer) =
            host.server.call(Method::GET, "/instances/waited/wait?state=Stopped", None).await;
        answer
    };

    let (answer, _) = tokio::join!(wait, post(&host.server, "/instances/waited/stop", None));

    assert_eq!((&answer["state"], &answer["timed_out"]), (&json!("Stopped"), &json!(false)));
    host.server.delete("waited").await;
}

async fn what_the_state_forbids_is_refused_at_once(host: &TestHost) {
    run(&host.server, "running", "sleep 1000").await;

    let same = post(&host.server, "/instances/running/start", None).await;
    let body = Some(json!({ "cmd": ["other"] }));
    let (status, refusal) = host.server.call(Method::POST, "/instances/running/start", body).await;
    let (missing, _) = host.server.call(Method::POST, "/instances/nobody/stop", None).await;

    assert_eq!(same["state"], "Running", "nothing to do");
    assert_eq!((status, &refusal["code"]), (StatusCode::CONFLICT, &json!("invalid_state")));
    assert_eq!(missing, StatusCode::NOT_FOUND);
    host.server.delete("running").await;
}

async fn orders_queue_behind_each_other(host: &TestHost) {
    run(&host.server, "queue", "sleep 1000").await;
    let verbs = ["stop", "start", "stop", "stop", "start", "start", "stop"];

    let orders = verbs.map(|verb| async move {
        let path = format!("/instances/queue/{verb}");
        host.server.call(Method::POST, &path, None).await
    });
    let answers = join_all(orders).await;

    for (status, answer) in answers {
        assert_eq!(status, StatusCode::OK, "none of them fails: {answer}");
    }
    host.server.delete("queue").await;
}

/// Waits until `instance` is as `is_right` says.
async fn until(server: &Server, name: &str, is_right: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let instance = server.get(&format!("/instances/{name}")).await;
        if is_right(&instance) {
            return instance;
        }
        assert!(Instant::now() < deadline, "{instance}");
        time::sleep(Duration::from_millis(50)).await;
    }
}

async fn an_instance_that_fails_is_started_again_until_it_is_given_up(host: &TestHost) {
    let policy = json!({ "policy": "on_failure", "backoff": "200ms", "max_attempts": 2 });
    let script = "echo boot >> /boots; echo number $(wc -l < /boots); exit 1";
    let body = json!({
        "name": "fails", "image": BUSYBOX, "size": "128MB", "cmd": ["sh", "-c", script],
        "restart_policy": policy,
    });
    host.server.create(body).await;

    let given_up = until(&host.server, "fails", |instance| {
        !instance["restart_status"]["blocked_reason"].is_null()
    })
    .await;

    assert_eq!(given_up["state"], "Stopped");
    assert_eq!(given_up["restart_status"]["attempts"], 2);
    assert_eq!(given_up["restart_status"]["blocked_reason"], "max_attempts_exceeded");
    let log = host.server.log("fails").await;
    assert!(log.contains("number 3\n") && !log.contains("number 4\n"), "{log}");
    host.server.delete("fails").await;
}

async fn an_instance_that_is_stopped_by_hand_stays_so(host: &TestHost) {
    let body = json!({
        "name": "by-hand", "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "1000"],
        "restart_policy": { "policy": "always", "backoff": "0s" },
    });
    host.server.create(body).await;
    host.server.wait("by-hand", "Running").await;

    let stopped = post(&host.server, "/instances/by-hand/stop", None).await;
    let wait = host.server.get("/instances/by-hand/wait?state=Running&timeout=2s").await;
    let started = post(&host.server, "/instances/by-hand/start", None).await;

    assert_eq!(stopped["restart_status"]["blocked_reason"], "manual_stop");
    assert_eq!(wait["state"], "Stopped");
    assert!(started.get("restart_status").is_none(), "{started}");
    host.server.delete("by-hand").await;
}

async fn a_killed_worker_is_replaced_if_the_policy_says_so(host: &TestHost) {
    let body = json!({
        "name": "replaced", "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "1000"],
        "restart_policy": { "policy": "on_failure", "backoff": "1s" },
    });
    host.server.create(body).await;
    host.server.wait("replaced", "Running").await;

    for pid in worker_pids() {
        let killed = Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
        assert!(killed.success());
    }
    let stopped = host.server.wait("replaced", "Stopped").await;
    let running = until(&host.server, "replaced", |instance| instance["state"] == "Running").await;

    assert!(stopped["state_error"].is_string(), "{stopped}");
    assert!(stopped["restart_status"]["next_attempt_at"].is_string(), "{stopped}");
    assert_eq!(running["restart_status"]["attempts"], 1);
    assert!(running.get("state_error").is_none(), "{running}");
    host.server.delete("replaced").await;
}

async fn an_unhealthy_instance_is_started_again_and_gets_well(host: &TestHost) {
    let script = "echo boot >> /boots; test $(wc -l < /boots) -gt 1 && touch /well; sleep 1000";
    let body = json!({
        "name": "sick", "image": BUSYBOX, "size": "128MB", "cmd": ["sh", "-c", script],
        "restart_policy": { "policy": "on_failure", "backoff": "100ms" },
        "health_check": {
            "exec": { "command": ["sh", "-c", "test -e $PWD/well || { echo ill; exit 3; }"] },
            "interval": "2s", "timeout": "2s", "start_period": "0s", "failure_threshold": 2,
        },
    });
    host.server.create(body).await;
    let status = |instance: &Value| instance["health_status"]["status"].clone();

    let sick = until(&host.server, "sick", |i| i["health_status"]["last_error"].is_string()).await;
    let well = until(&host.server, "sick", |i| status(i) == "healthy").await;

    let error = sick["health_status"]["last_error"].as_str().unwrap();
    assert!(error.contains("ill") && error.contains('3'), "{sick}");
    assert_eq!(well["restart_status"]["last_reason"], "health_check_failed");
    assert_eq!(well["restart_status"]["attempts"], 1);
    assert_eq!(well["state"], "Running");
    post(&host.server, "/instances/sick/stop", None).await;
    let stopped = host.server.get("/instances/sick").await;
    assert_eq!(status(&stopped), "unknown");
    host.server.delete("sick").await;
}

async fn an_instance_lives_as_long_as_it_was_given_even_without_a_server(_: &TestHost) {
    let mut server = Server::start("mortal").await;
    server.pull(BUSYBOX).await;
    let body = |name, ttl| {
        let cmd = ["sleep", "999"];
        json!({ "name": name, "image": BUSYBOX, "size": "128MB", "cmd": cmd, "ttl": ttl })
    };
    server.create(body("long", "1h")).await;
    let brief = server.create(body("brief", "3s")).await;

    server.kill();
    let expires_at: DateTime<Utc> = serde_json::from_value(brief["expires_at"].clone()).unwrap();
    time::sleep((expires_at - Utc::now()).to_std().unwrap_or_default()).await;
    let data_dir = server.data_dir.clone();
    let mut server = Server::start_at(&data_dir).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    while server.call(Method::GET, "/instances/brief", None).await.0 == StatusCode::OK {
        assert!(Instant::now() < deadline, "it outlives its time");
        time::sleep(Duration::from_millis(50)).await;
    }

    server.wait("long", "Running").await;
    server.delete("long").await;
    server.kill();
}

/// Restarts the server after it was killed `delay_ms` after `verb` was asked for.
async fn killed_during(server: &mut Server, verb: &str, name: &str, delay_ms: u64) -> bool {
    let path = format!("/instances/{name}/{verb}");
    let asked = server.call(Method::POST, &path, None);
    let answer = time::timeout(Duration::from_millis(delay_ms), asked).await;
    let acknowledged = answer.is_ok_and(|(status, _)| status.is_success());
    server.kill();
    *server = Server::start_at(&server.data_dir.clone()).await;
    acknowledged
}

async fn a_server_killed_during_stops_leaves_them_finished_or_not_begun(_: &TestHost) {
    let mut server = Server::start_at(Path::new("/var/lib/ovum/stopping")).await;
    server.pull(BUSYBOX).await;
    let script = "trap 'sleep 1; exit 4' TERM; echo up; while :; do sleep 0.1; done";
    run(&server, "stops", script).await;
    for delay_ms in [1, 5, 20, 300, 900] {
        let acknowledged = killed_during(&mut server, "stop", "stops", delay_ms).await;
        let before = server.get("/instances/stops").await["state"].clone();
        if acknowledged || before == "Shutdown" {
            server.wait("stops", "Stopped").await;
            assert_eq!(workers(), Vec::<String>::new(), "killed after {delay_ms} ms");
        }
        post(&server, "/instances/stops/stop", None).await;
        post(&server, "/instances/stops/start", None).await;
        server.wait("stops", "Running").await;
        assert_eq!(workers().len(), 1, "killed after {delay_ms} ms");
    }
    server.delete("stops").await;
    server.kill();
}

async fn a_server_killed_during_starts_leaves_them_done_or_undone(_: &TestHost) {
    let mut server = Server::start_at(Path::new("/var/lib/ovum/starting")).await;
    server.pull(BUSYBOX).await;
    run(&server, "starts", "sleep 1000").await;
    for delay_ms in [1, 5, 15, 30, 60, 120] {
        post(&server, "/instances/starts/stop", None).await;
        let acknowledged = killed_during(&mut server, "start", "starts", delay_ms).await;
        let found = server.get("/instances/starts").await;
        match found["state"].as_str().unwrap() {
            "Stopped" => {
                assert!(!acknowledged, "acknowledged and lost: {found}");
                assert_eq!(workers(), Vec::<String>::new(), "killed after {delay_ms} ms");
                assert!(found["stopped_at"].is_string(), "as before: {found}");
                post(&server, "/instances/starts/start", None).await;
            }
            _ => assert_eq!(workers().len(), 1, "killed after {delay_ms} ms"),
        }
        server.wait("starts", "Running").await;
    }
    server.delete("starts").await;
    server.kill();
}
