//! Images whose program is systemd: it is PID 1, and the agent one of its units.

use std::time::{Duration, Instant};

use ovum_test_host::{DEBIAN_SYSTEMD, Server, TestHost};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;
use crate::volumes::{layered, make, remove};

cases![
    // First, for it does least besides to pull the image.
    a_guest_without_an_agent_may_run_systemd_too,
    systemd_boots_runs_commands_stops_and_starts_again,
    a_systemd_that_does_not_end_is_ended,
    a_volume_leaves_though_the_agent_pauses,
];

/// An instance of the image's own command, which is /sbin/init.
async fn boot(server: &Server, name: &str) -> Value {
    boot_with(server, name, json!([])).await
}

async fn boot_with(server: &Server, name: &str, volumes: Value) -> Value {
    let body = json!({
        "name": name, "image": DEBIAN_SYSTEMD, "size": "512MB", "vcpus": 1, "volumes": volumes,
    });
    server.create(body).await;
    server.wait(name, "Running").await
}

/// What a script in the guest that must succeed writes.
async fn sh(server: &Server, name: &str, script: &str) -> String {
    let ran = server.sh(name, script).await;
    assert_eq!(ran.code, 0, "{script}: {}", ran.text());
    ran.text().trim_end().to_owned()
}

async fn post(server: &Server, path: &str) -> Value {
    let (status, answer) = server.call(Method::POST, path, None).await;
    assert_eq!(status, StatusCode::OK, "POST {path}: {answer}");
    answer
}

/// What systemd says once it is at rest: `running`, or what is wrong.
async fn settled(server: &Server, name: &str) -> String {
    let script = "systemctl is-system-running --wait; systemctl --failed --no-legend; true";
    sh(server, name, script).await
}

async fn systemd_boots_runs_commands_stops_and_starts_again(host: &TestHost) {
    let server = &host.server;
    server.pull(DEBIAN_SYSTEMD).await;
    make(server, "under").await;
    let began = Instant::now();
    boot_with(server, "unit", json!([layered("under", "/srv/under")])).await;
    println!("systemd: agent answers after {:?}", began.elapsed());
    let state = settled(server, "unit").await;
    println!("systemd: at rest after {:?}", began.elapsed());
    assert_eq!(state, "running");

    is_as_systemd_expects(server).await;
    agent_survives(server).await;
    a_volume_comes_and_goes(server).await;
    a_layer_goes(server).await;
    ends_in_order(server).await;

    post(server, "/instances/unit/start").await;
    server.wait("unit", "Running").await;
    let again = sh(server, "unit", "cat /var/ended /etc/machine-id").await;
    assert!(again.starts_with("in order\n"), "the disk was not kept: {again}");
    assert_eq!(sh(server, "unit", "cat /srv/data/file").await, "unit");
    assert_eq!(again.lines().last().map(str::len), Some(32), "{again}");
    is_stopped_though_its_agent_is_silent(server).await;

    post(server, "/instances/unit/start").await;
    server.wait("unit", "Running").await;
    sh(server, "unit", "systemctl poweroff --no-block").await;
    let ended = server.wait("unit", "Stopped").await;
    assert_eq!((&ended["exit_code"], &ended["state_error"]), (&json!(0), &Value::Null), "{ended}");
    server.delete("unit").await;
    remove(server, "unit").await;
    remove(server, "under").await;
}

/// Units see a volume that comes, and those with mounts of their own keep nobody from taking it
/// away. It comes back, so that systemd has to unmount it at the end.
async fn a_volume_comes_and_goes(server: &Server) {
    make(server, "unit").await;
    let path = "/instances/unit/volumes/unit";
    let attach = || server.call(Method::POST, path, Some(json!({ "mount_path": "/srv/data" })));

    let (given, answer) = attach().await;
    assert_eq!(given, StatusCode::OK, "{answer}");
    let script = "systemd-run --wait --quiet -p ProtectHome=yes \
        sh -c 'echo unit > /srv/data/file'; cat /srv/data/file";
    assert_eq!(sh(server, "unit", script).await, "unit");
    let script = "systemd-run --quiet --unit holds -p WorkingDirectory=/srv/data sleep 9999";
    sh(server, "unit", script).await;
    let (held, _) = server.call(Method::DELETE, path, None).await;
    assert_eq!(held, StatusCode::CONFLICT);
    sh(server, "unit", "systemctl stop holds").await;
    bind_in_unit(server, "/srv/data").await;
    let (bound, _) = server.call(Method::DELETE, path, None).await;
    assert_eq!(bound, StatusCode::CONFLICT);
    assert_eq!(sh(server, "unit", "cat /srv/data/file; systemctl stop binds").await, "unit");
    let (taken, answer) = server.call(Method::DELETE, path, None).await;
    assert_eq!(taken, StatusCode::OK, "{answer}");
    let (given, answer) = attach().await;
    assert_eq!(given, StatusCode::OK, "{answer}");
}

/// Has a unit mount a folder once more, elsewhere: that does not go with it.
async fn bind_in_unit(server: &Server, folder: &str) {
    let script = format!(
        "systemd-run --quiet --unit binds -p BindPaths={folder}:/mnt sleep 9999; \
         until grep -q ' /mnt ' /proc/$(systemctl show -P MainPID binds)/mounts; do :; done"
    );
    sh(server, "unit", &script).await;
}

/// The agent of the unit did not mount it, and finds it all the same.
async fn a_layer_goes(server: &Server) {
    sh(server, "unit", "echo above > /srv/under/file; sync").await;

    bind_in_unit(server, "/srv/under").await;

    let path = "/instances/unit/volumes/under";
    let (bound, answer) = server.call(Method::DELETE, path, None).await;
    assert_eq!(bound, StatusCode::CONFLICT, "{answer}");
    assert_eq!(sh(server, "unit", "cat /srv/under/file; systemctl stop binds").await, "above");
    let (taken, answer) = server.call(Method::DELETE, path, None).await;

    assert_eq!(taken, StatusCode::OK, "{answer}");
    assert_eq!(sh(server, "unit", "ls /srv/under; grep -c under /proc/mounts || true").await, "0");
}

/// An agent that does not answer in time leaves open what it will do. What it has done in the end
/// is found out, without anybody asking.
async fn a_volume_leaves_though_the_agent_pauses(host: &TestHost) {
    let server = &host.server;
    server.pull(DEBIAN_SYSTEMD).await;
    make(server, "unit").await;
    boot(server, "unit").await;
    let path = "/instances/unit/volumes/unit";
    let how = json!({ "mount_path": "/srv/data" });
    let (given, answer) = server.call(Method::POST, path, Some(how)).await;
    assert_eq!(given, StatusCode::OK, "{answer}");
    let agent = "$(systemctl show -P MainPID ovum-agent)";
    let script = format!(
        "(agent={agent}; sleep 1; kill -STOP $agent; echo paused > /dev/hvc0; sleep 40; \
         kill -CONT $agent) > /dev/null 2>&1 &"
    );
    sh(server, "unit", &script).await;
    server.follow_until("unit", "paused").await;
    let attached = async || server.get("/volumes/unit").await["attachments"].is_array();

    let (unknown, answer) = server.call(Method::DELETE, path, None).await;
    assert_eq!(unknown, StatusCode::INTERNAL_SERVER_ERROR, "{answer}");
    assert!(answer["message"].as_str().unwrap().contains("asked in vain"), "{answer}");
    assert!(attached().await, "nobody knows better yet");
    let began = Instant::now();
    while attached().await {
        assert!(began.elapsed() < Duration::from_secs(60), "it is never found out");
        time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(sh(server, "unit", "grep -c /srv/data /proc/mounts || true").await, "0");
    server.delete("unit").await;
    remove(server, "unit").await;
}

/// PID 1, its target, its mounts and its journal are as on a machine of its own.
async fn is_as_systemd_expects(server: &Server) {
    let script = "cat /proc/1/comm; hostname; systemctl is-active multi-user.target \
        ovum-agent.service dbus.service; cat /proc/self/oom_score_adj /proc/self/cgroup; \
        cat /proc/$(systemctl show -P MainPID ovum-agent)/oom_score_adj";
    let found = sh(server, "unit", script).await;
    let expected = "systemd\nunit\nactive\nactive\nactive\n0\n\
        0::/system.slice/ovum-agent.service\n-1000";
    assert_eq!(found, expected);

    let mounts = sh(server, "unit", "cat /proc/mounts").await;
    let is_mounted_once = |place: &str| {
        let lines = mounts.lines().filter(|line| line.split(' ').nth(1) == Some(place));
        lines.count() == 1
    };
    for place in ["/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/run", "/sys/fs/cgroup"] {
        assert!(is_mounted_once(place), "{place}: {mounts}");
    }
    assert!(mounts.contains("nsdelegate"), "cgroups are as systemd mounts them: {mounts}");

    sh(server, "unit", "echo to the journal | systemd-cat; journalctl --flush").await;
    let log = server.log("unit").await;
    assert!(log.contains("Multi-User System"), "the console shows the boot: {log}");
    assert!(!log.contains("to the journal"), "the journal is not the console: {log}");
    let login = log.lines().find(|line| line.contains("login:"));
    assert_eq!(login, None, "a console without input asks nobody to log in");
    let journal = sh(server, "unit", "journalctl --no-pager -n 50").await;
    assert!(journal.contains("to the journal"), "{journal}");
}

/// Whatever systemd does to itself or to its units, commands run.
async fn agent_survives(server: &Server) {
    sh(server, "unit", "systemctl daemon-reload; systemctl daemon-reexec").await;
    assert_eq!(sh(server, "unit", "systemctl is-active ovum-agent").await, "active");

    let pid = sh(server, "unit", "sleep 600 > /dev/null 2>&1 & echo $!").await;
    // The command's own connection is lost with the agent it came through.
    let agent = "$(systemctl show -P MainPID ovum-agent)";
    let _cut_off = server.sh("unit", &format!("kill -9 {agent}; sleep 60")).await;
    let restarts = after_a_while(server, "systemctl show -P NRestarts ovum-agent").await;
    let _cut_off = server.sh("unit", "systemctl restart --no-block ovum-agent; sleep 60").await;
    let runs_on = after_a_while(server, &format!("kill -0 {pid} && echo yes")).await;
    assert_eq!((restarts.as_str(), runs_on.as_str()), ("1\n", "yes\n"));
    assert_eq!(server.get("/instances/unit").await["state"], "Running");
}

/// What a script writes once the agent is there again.
async fn after_a_while(server: &Server, script: &str) -> String {
    let body = json!({ "command": ["sh", "-c", script], "wait_for_agent": 60 });
    server.exec("unit", body).await.text().to_owned()
}

/// Units are told to end before the power goes.
async fn ends_in_order(server: &Server) {
    let unit = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n\
        ExecStop=/bin/sh -c 'echo in order > /var/ended'\n";
    let script = format!(
        "printf %s \"{unit}\" > /run/systemd/system/ends.service; systemctl daemon-reload; \
         systemctl start ends"
    );
    sh(server, "unit", &script).await;
    let began = Instant::now();
    let stopped = post(server, "/instances/unit/stop").await;
    println!("systemd: stopped after {:?}", began.elapsed());
    assert_eq!((&stopped["state"], &stopped["exit_code"]), (&json!("Stopped"), &json!(0)));
    assert_eq!(stopped["state_error"], Value::Null);
}

/// An agent that takes connections and says nothing costs whoever asks a bounded time.
async fn is_stopped_though_its_agent_is_silent(server: &Server) {
    let agent = "$(systemctl show -P MainPID ovum-agent)";
    sh(server, "unit", &format!("(sleep 1; kill -STOP {agent}) > /dev/null 2>&1 &")).await;
    sh(server, "unit", "sleep 0.1").await;
    let began = Instant::now();
    // Until it is stopped: before it hears of a command, or while one runs.
    while server.sh("unit", "true").await.code == 0 {}
    println!("systemd: a silent agent was given up after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(90), "{:?}", began.elapsed());

    let began = Instant::now();
    let stopped = post(server, "/instances/unit/stop").await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!((&stopped["state"], &stopped["exit_code"]), (&json!("Stopped"), &Value::Null));
}

async fn a_systemd_that_does_not_end_is_ended(host: &TestHost) {
    let server = &host.server;
    server.pull(DEBIAN_SYSTEMD).await;
    boot(server, "endless").await;
    let script = "printf '[Service]\\nTimeoutStopSec=infinity\\nExecStart=/bin/sleep 9999\\n\
        ExecStop=/bin/sleep 9999\\n' > /run/systemd/system/endless.service; \
        systemctl daemon-reload; systemctl start endless";
    sh(server, "endless", script).await;

    let began = Instant::now();
    let stopped = post(server, "/instances/endless/stop").await;

    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    assert_eq!((&stopped["state"], &stopped["exit_code"]), (&json!("Stopped"), &json!(137)));
    server.delete("endless").await;
}

async fn a_guest_without_an_agent_may_run_systemd_too(host: &TestHost) {
    let server = &host.server;
    server.pull(DEBIAN_SYSTEMD).await;
    let body = json!({
        "name": "alone", "image": DEBIAN_SYSTEMD, "size": "512MB", "vcpus": 1,
        "skip_guest_agent": true,
    });
    server.create(body).await;
    server.wait("alone", "Running").await;

    let stopped = post(server, "/instances/alone/stop").await;

    assert_eq!(stopped["state"], "Stopped");
    assert_eq!(stopped["exit_code"], Value::Null, "nobody could report one");
    server.delete("alone").await;
}
