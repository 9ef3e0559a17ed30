//! kill -9 at bad moments: nothing acknowledged is lost, nothing half-made stays.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;
use ovum_test_host::{BUSYBOX, DEBIAN, Server, TestHost, groups, worker_pids, workers};

cases![
    guests_outlive_the_server_and_are_found_again,
    an_exit_without_a_server_is_told_by_the_next_one,
    a_killed_worker_is_seen_at_once,
    a_control_group_goes_with_its_last_process,
    a_server_killed_during_a_pull_leaves_an_image_that_can_be_pulled,
    a_server_killed_during_creations_keeps_all_or_nothing,
    kills_at_any_time_lose_nothing_acknowledged_and_leave_nothing,
];

/// Orders of the chaos, each followed by a kill, or by none.
const ROUNDS: u32 = 40;

/// Names that its orders are about.
const NAMES: u64 = 3;

pub(crate) fn data_dir(name: &str) -> PathBuf {
    Path::new("/var/lib/ovum").join(name)
}

async fn guests_outlive_the_server_and_are_found_again(_: &TestHost) {
    let mut server = Server::start("outlive").await;
    server.pull(BUSYBOX).await;
    let script = "echo before; sleep 4; echo after; sleep 1000";
    let body =
        json!({ "name": "stays", "image": BUSYBOX, "size": "128MB", "cmd": ["sh", "-c", script] });
    let created = server.create(body).await;
    server.wait("stays", "Running").await;

    server.kill();
    let survivors = workers();
    let mut server = Server::start_at(&data_dir("outlive")).await;
    let found = server.get("/instances/stays").await;
    server.follow_until("stays", "after").await;

    assert_eq!(survivors.len(), 1, "{survivors:?}");
    assert_eq!((&found["id"], &found["state"]), (&created["id"], &json!("Running")));
    server.delete("stays").await;
    server.kill();
}

async fn an_exit_without_a_server_is_told_by_the_next_one(_: &TestHost) {
    let mut server = Server::start("unseen").await;
    server.pull(BUSYBOX).await;
    let script = "sleep 2; echo last words; exit 5";
    let body =
        json!({ "name": "ends", "image": BUSYBOX, "size": "128MB", "cmd": ["sh", "-c", script] });
    server.create(body).await;
    server.wait("ends", "Running").await;

    server.kill();
    while !workers().is_empty() {
        time::sleep(Duration::from_millis(50)).await;
    }
    let mut server = Server::start_at(&data_dir("unseen")).await;
    let ended = server.wait("ends", "Stopped").await;

    assert_eq!(ended["exit_code"], 5, "{ended}");
    assert!(server.log("ends").await.contains("last words\n"));
    server.delete("ends").await;
    server.kill();
}

async fn a_killed_worker_is_seen_at_once(host: &TestHost) {
    let body =
        json!({ "name": "victim", "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "999"] });
    host.server.create(body).await;
    host.server.wait("victim", "Running").await;

    let killed = Command::new("pkill").args(["-9", "-x", "ovum-worker"]).status().unwrap();
    let answer = host.server.get("/instances/victim/wait?state=Stopped&timeout=5s").await;

    assert!(killed.success());
    assert_eq!((&answer["state"], &answer["timed_out"]), (&json!("Stopped"), &json!(false)));
    let instance = host.server.get("/instances/victim").await;
    assert!(instance["state_error"].is_string(), "{instance}");
    host.server.delete("victim").await;
}

/// Of an instance whose worker died with the server, while another process was in its group.
async fn a_control_group_goes_with_its_last_process(_: &TestHost) {
    let mut server = Server::start("grouped").await;
    server.pull(BUSYBOX).await;
    let body =
        json!({ "name": "grouped", "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "999"] });
    server.create(body).await;
    server.wait("grouped", "Running").await;
    let group = groups().pop().unwrap();
    server.kill();
    let mut last = Command::new("sleep").arg("1000").spawn().unwrap();
    fs::write(group.join("cgroup.procs"), last.id().to_string()).unwrap();
    let worker = worker_pids().pop().unwrap();
    assert!(Command::new("kill").args(["-9", &worker.to_string()]).status().unwrap().success());

    let mut server = Server::start_at(&data_dir("grouped")).await;
    server.wait("grouped", "Stopped").await;
    assert!(group.exists(), "a group that has a process is gone");
    last.kill().unwrap();
    last.wait().unwrap();

    let deadline = Instant::now() + Duration::from_secs(10);
    while group.exists() {
        assert!(Instant::now() < deadline, "{} is left", group.display());
        time::sleep(Duration::from_millis(20)).await;
    }
    server.delete("grouped").await;
    server.kill();
}

async fn a_server_killed_during_a_pull_leaves_an_image_that_can_be_pulled(_: &TestHost) {
    let mut server = Server::start("pulling").await;
    for delay_ms in [20, 150, 600] {
        server.call(Method::POST, "/images", Some(json!({ "name": DEBIAN }))).await;
        time::sleep(Duration::from_millis(delay_ms)).await;
        server.kill();
        server = Server::start_at(&data_dir("pulling")).await;
    }
    let image = server.pull(DEBIAN).await;
    let (log, _) = server.run("after-pull", DEBIAN, &["cat", "/etc/debian_version"]).await;

    assert_eq!(image["status"], "ready");
    assert!(log.contains("12."), "{log}");
    server.kill();
}

async fn a_server_killed_during_creations_keeps_all_or_nothing(_: &TestHost) {
    let mut server = Server::start("creating").await;
    server.pull(BUSYBOX).await;
    for round in 0..6_u64 {
        let name = format!("round-{round}");
        let body =
            json!({ "name": name, "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "999"] });
        let create = server.call(Method::POST, "/instances", Some(body));
        let answer = time::timeout(Duration::from_millis(15 * round), create).await;
        let acknowledged = answer.is_ok_and(|(status, _)| status.is_success());
        server.kill();
        server = Server::start_at(&data_dir("creating")).await;
        let list = server.get("/instances").await;
        let there = list.as_array().unwrap().iter().any(|instance| instance["name"] == *name);
        assert!(there || !acknowledged, "round {round}: acknowledged and lost");
        if there {
            server.wait(&name, "Running").await;
            server.delete(&name).await;
        }
        let folders = fs::read_dir(data_dir("creating").join("instances")).unwrap().count();
        assert_eq!(folders, 0, "round {round} left a folder");
        assert_eq!(workers(), Vec::<String>::new(), "round {round} left a worker");
    }
    server.kill();
}

/// Numbers that look random and are the same for the same seed (xorshift64*).
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) % bound
    }
}

/// Sends `order` about `name` and waits at most `patience`; says whether the instance is there, if
/// that is certain now.
async fn order(server: &Server, order: u64, name: &str, patience: Duration) -> Option<bool> {
    let path = format!("/instances/{name}");
    let (method, path, body) = match order {
        0 | 1 => {
            let body =
                json!({ "name": name, "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "999"] });
            (Method::POST, "/instances".to_owned(), Some(body))
        }
        2 => (Method::POST, format!("{path}/stop"), None),
        3 => (Method::POST, format!("{path}/start"), None),
        _ => (Method::DELETE, path, None),
    };
    match time::timeout(patience, server.call(method, &path, body)).await {
        Ok((StatusCode::CREATED | StatusCode::OK | StatusCode::CONFLICT, _)) => Some(true),
        Ok((StatusCode::NO_CONTENT | StatusCode::NOT_FOUND, _)) => Some(false),
        Ok((status, answer)) => panic!("{path}: {status} {answer}"),
        Err(_elapsed) => None,
    }
}

/// Waits until there is a worker, in a control group, for each instance that is not stopped, and a
/// folder for each instance.
pub(crate) async fn settle(server: &Server) -> Vec<Value> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let list = server.get("/instances").await.as_array().unwrap().clone();
        let alive = list.iter().filter(|instance| instance["state"] != "Stopped").count();
        let folders = fs::read_dir(server.data_dir.join("instances")).unwrap().count();
        if (worker_pids().len(), groups().len(), folders) == (alive, alive, list.len()) {
            return list;
        }
        let seen = (worker_pids(), groups(), folders);
        assert!(Instant::now() < deadline, "workers, groups and folders {seen:?} of {list:?}");
        time::sleep(Duration::from_millis(50)).await;
    }
}

async fn kills_at_any_time_lose_nothing_acknowledged_and_leave_nothing(_: &TestHost) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let seed = env::var("OVUM_CHAOS_SEED").map_or(now, |seed| seed.parse().unwrap());
    println!("chaos: OVUM_CHAOS_SEED={seed} does the same again");
    let mut dice = Dice(seed | 1);
    let mut server = Server::start("chaos").await;
    server.pull(BUSYBOX).await;
    let mut certain = BTreeMap::new();
    for round in 0..ROUNDS {
        let name = format!("chaos-{}", dice.below(NAMES));
        let patience = Duration::from_millis(dice.below(600));
        match order(&server, dice.below(5), &name, patience).await {
            Some(there) => certain.insert(name, there),
            None => certain.remove(&name),
        };
        match dice.below(3) {
            0 => {
                server.kill();
                server = Server::start_at(&data_dir("chaos")).await;
            }
            1 => {
                if let Some(pid) = worker_pids().first() {
                    let _gone_by_itself =
                        Command::new("kill").args(["-9", &pid.to_string()]).status();
                }
            }
            _ => {}
        }
        let list = settle(&server).await;
        for (name, &there) in &certain {
            let found = list.iter().any(|instance| instance["name"] == **name);
            assert_eq!(found, there, "round {round}, {name}: {list:?}");
        }
    }
    for instance in settle(&server).await {
        server.delete(instance["id"].as_str().unwrap()).await;
    }
    assert_eq!(settle(&server).await, Vec::<Value>::new());
    assert_eq!(workers(), Vec::<String>::new());
    server.kill();
}
