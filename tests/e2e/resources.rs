//! What the host has, who was promised what, and what a guest really gets.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use futures_util::future::join_all;
use ovum_test_host::{BUSYBOX, Server, TestHost, ovum, worker_pids};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;

cases![
    a_worker_has_its_share_of_the_host_and_gives_it_back,
    a_worker_that_takes_more_memory_than_its_share_ends_and_says_so,
    twenty_creates_at_once_promise_no_more_than_there_is,
    a_start_is_refused_while_others_have_what_it_needs,
    each_vcpu_is_a_core_of_one_socket,
];

/// A server that may promise this much.
async fn limited(name: &str, settings: &[(&str, &str)]) -> Server {
    let mut command = Command::new(ovum());
    command.envs(settings.iter().copied());
    let dir = Path::new("/var/lib/ovum").join(name);
    let server = Server::start_as(&dir, command).await;
    server.pull(BUSYBOX).await;
    server
}

fn body(name: &str, vcpus: u64) -> Value {
    json!({
        "name": name, "image": BUSYBOX, "size": "128MB", "vcpus": vcpus, "overlay_size": "1GB",
        "cmd": ["sleep", "100000"],
    })
}

async fn twenty_creates_at_once_promise_no_more_than_there_is(_: &TestHost) {
    let mut server =
        limited("limited", &[("OVUM_OVERCOMMIT_DISK", "1"), ("OVUM_DISK_CAPACITY", "5GB")]).await;
    let creating = (0..20).map(|number| {
        let body = body(&format!("racer-{number}"), 1);
        server.call(Method::POST, "/instances", Some(body))
    });

    let answers = join_all(creating).await;

    let created: Vec<_> = answers.iter().filter(|(status, _)| status.is_success()).collect();
    let refused = answers.iter().find(|(status, _)| *status == StatusCode::CONFLICT);
    let (_, refusal) = refused.expect("some do not fit");
    assert_eq!(refusal["code"], "insufficient_resources", "{refusal}");
    assert!(refusal["message"].as_str().unwrap().contains("disk"), "{refusal}");
    assert_eq!(created.len(), 4, "images take some of the fifth: {answers:?}");
    let view = server.get("/resources").await;
    assert!(view["disk"]["allocated"].as_u64() <= view["disk"]["effective_limit"].as_u64());
    for (_, instance) in created {
        server.delete(instance["id"].as_str().unwrap()).await;
    }
    server.kill();
}

async fn a_start_is_refused_while_others_have_what_it_needs(_: &TestHost) {
    let mut server = limited("limited", &[("OVUM_OVERCOMMIT_CPU", "2")]).await;
    let vcpus = server.get("/resources").await["cpu"]["effective_limit"].as_u64().unwrap();
    server.create(body("first", vcpus)).await;
    server.wait("first", "Running").await;
    server.call(Method::POST, "/instances/first/stop", None).await;
    server.create(body("second", vcpus)).await;

    let (status, refusal) = server.call(Method::POST, "/instances/first/start", None).await;
    server.delete("second").await;
    let (again, _) = server.call(Method::POST, "/instances/first/start", None).await;

    assert_eq!(status, StatusCode::CONFLICT, "{refusal}");
    assert_eq!(refusal["code"], "insufficient_resources", "{refusal}");
    assert!(refusal["message"].as_str().unwrap().contains("cpu"), "{refusal}");
    assert_eq!(again, StatusCode::OK);
    server.delete("first").await;
    server.kill();
}

/// The control group of the only worker.
fn group() -> PathBuf {
    let pids = worker_pids();
    let [pid] = pids[..] else { panic!("one worker expected: {pids:?}") };
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap();
    Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'))
}

async fn a_worker_has_its_share_of_the_host_and_gives_it_back(host: &TestHost) {
    let server = &host.server;
    let before = server.get("/resources").await;
    server.create(body("counted", 2)).await;
    server.wait("counted", "Running").await;

    let with = server.get("/resources").await;
    let group = group();
    let read = |name: &str| fs::read_to_string(group.join(name)).unwrap().trim().to_owned();
    let (weight, most) = (read("cpu.weight"), read("memory.max").parse::<u64>().unwrap());
    let killed = Command::new("kill").args(["-9", &worker_pids()[0].to_string()]).status();
    assert!(killed.unwrap().success());
    server.wait("counted", "Stopped").await;
    let ended = server.get("/resources").await;
    server.delete("counted").await;

    let allocated = |view: &Value, kind: &str| view[kind]["allocated"].as_u64().unwrap();
    assert_eq!(allocated(&with, "cpu"), allocated(&before, "cpu") + 2);
    assert_eq!(allocated(&with, "memory"), allocated(&before, "memory") + (128 << 20));
    assert_eq!(with["disk_breakdown"]["overlays_bytes"], 1_u64 << 30);
    assert_eq!(with["allocations"][0]["instance_name"], "counted", "{with}");
    assert_eq!(ended["allocations"], json!([]));
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo.lines().next().unwrap().split_whitespace().nth(1).unwrap();
    assert_eq!(with["memory"]["capacity"], total.parse::<u64>().unwrap() << 10);

    assert!(group.starts_with("/sys/fs/cgroup/ovum"), "{}", group.display());
    assert_eq!(weight, "200");
    assert!(most > 128 << 20 && most < 512 << 20, "{most}");
    let gone = async {
        while group.exists() {
            time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(time::timeout(Duration::from_secs(5), gone).await.is_ok(), "the group is left");
}

/// A share that is made smaller than what is taken already is one that is exceeded.
async fn a_worker_that_takes_more_memory_than_its_share_ends_and_says_so(host: &TestHost) {
    let server = &host.server;
    server.create(body("hungry", 1)).await;
    server.wait("hungry", "Running").await;

    fs::write(group().join("memory.max"), "8M").unwrap();
    let ended = server.wait("hungry", "Stopped").await;
    server.delete("hungry").await;

    let error = ended["state_error"].as_str().unwrap_or_default();
    assert!(error.contains("more of the host's memory"), "{ended}");
}

async fn each_vcpu_is_a_core_of_one_socket(host: &TestHost) {
    let script = "cd /sys/devices/system/cpu; for cpu in cpu[0-9]*; do \
        cat $cpu/topology/physical_package_id $cpu/topology/core_id \
        $cpu/topology/thread_siblings_list $cpu/topology/core_siblings_list | tr '\\n' ' '; \
        echo; done";
    let mut body = body("topology", 3);
    body["cmd"] = json!(["sh", "-c", script]);

    let (log, _) = host.server.run_body(body).await;

    assert_eq!(log, "0 0 0 0-2 \n0 1 1 0-2 \n0 2 2 0-2 \n");
}
