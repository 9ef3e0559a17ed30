//! Memory: what is added after the boot, and what goes back to the host.

use std::fs;
use std::time::{Duration, Instant};

use ovum_test_host::{BUSYBOX, TestHost, worker_pids};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;

cases![
    memory_added_after_the_boot_holds_what_is_written,
    memory_that_is_freed_goes_back_to_the_host,
    guests_give_up_memory_for_a_while_and_get_it_back,
    more_memory_than_an_instance_may_have_is_refused,
];

const PATIENCE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// An instance that does nothing until it is deleted.
async fn start(host: &TestHost, name: &str, size: &str, hotplug_size: &str) -> Value {
    host.server
        .create(json!({
            "name": name, "image": BUSYBOX, "size": size, "hotplug_size": hotplug_size,
            "vcpus": 1, "cmd": ["sleep", "100000"],
        }))
        .await;
    host.server.wait(name, "Running").await
}

/// What a script in an instance writes, which must succeed.
async fn output(host: &TestHost, name: &str, script: &str) -> String {
    let ran = host.server.sh(name, script).await;
    assert_eq!(ran.code, 0, "{script}: {}", ran.text());
    ran.text().to_owned()
}

/// All memory the guest has, in MiB.
async fn total_mib(host: &TestHost, name: &str) -> u64 {
    let total = output(host, name, "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").await;
    total.trim().parse().unwrap()
}

/// What the only worker has of the host's memory, in MiB.
fn resident_mib() -> u64 {
    let workers = worker_pids();
    let [pid] = workers[..] else { panic!("one worker expected: {workers:?}") };
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096 / MIB
}

async fn memory_added_after_the_boot_holds_what_is_written(host: &TestHost) {
    let instance = start(host, "grows", "256MB", "1GB").await;
    assert_eq!((&instance["size"], &instance["hotplug_size"]), (&json!("256MB"), &json!("1GB")));

    let deadline = Instant::now() + PATIENCE;
    while total_mib(host, "grows").await < 1150 {
        assert!(Instant::now() < deadline, "the memory did not come");
        time::sleep(Duration::from_millis(200)).await;
    }

    // More than it booted with, so that some of it lies in what was added.
    let pattern = "for i in $(seq 300); do cat /piece; done";
    let script = format!(
        "head -c 1048576 /dev/urandom > /piece && mkdir /t && \
         mount -t tmpfs -o size=500m none /t && {pattern} > /t/f && \
         {pattern} | md5sum && md5sum < /t/f"
    );
    let sums = output(host, "grows", &script).await;
    let sums: Vec<&str> = sums.lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{sums:?}");
    host.server.delete("grows").await;
}

async fn memory_that_is_freed_goes_back_to_the_host(host: &TestHost) {
    start(host, "frees", "512MB", "0").await;
    let script = "mkdir /t && mount -t tmpfs -o size=300m none /t && \
        head -c 209715200 /dev/zero > /t/f";
    output(host, "frees", script).await;
    let filled = resident_mib();
    assert!(filled > 200, "{filled} MiB");

    output(host, "frees", "rm /t/f").await;

    let deadline = Instant::now() + PATIENCE;
    while resident_mib() + 180 > filled {
        assert!(Instant::now() < deadline, "{} of {filled} MiB are left", resident_mib());
        time::sleep(Duration::from_millis(200)).await;
    }
    host.server.delete("frees").await;
}

async fn guests_give_up_memory_for_a_while_and_get_it_back(host: &TestHost) {
    start(host, "squeezed", "1GB", "0").await;
    let reclaim = async |body: Value| {
        let path = "/resources/memory/reclaim";
        let (status, answer) = host.server.call(Method::POST, path, Some(body)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let pages = async |word: &str| {
        let script = format!("awk '/^{word} / {{print $2}}' /proc/vmstat");
        output(host, "squeezed", &script).await.trim().parse::<u64>().unwrap()
    };

    let planned = reclaim(json!({ "reclaim_bytes": 8_u64 << 30, "dry_run": true })).await;
    assert_eq!(planned["planned_reclaim_bytes"], 512 * MIB, "half of it is its own: {planned}");
    assert_eq!((&planned["applied_reclaim_bytes"], pages("balloon_inflate").await), (&json!(0), 0));

    let done = reclaim(json!({ "reclaim_bytes": 32 * MIB, "hold_for": "10s" })).await;
    let action = &done["actions"][0];
    assert_eq!(
        (&action["instance_name"], &action["planned_target_guest_memory_bytes"]),
        (&json!("squeezed"), &json!(992 * MIB)),
        "{done}"
    );
    let deadline = Instant::now() + PATIENCE;
    while pages("balloon_deflate").await * 4096 < 32 * MIB {
        assert!(Instant::now() < deadline, "its memory did not come back: {done}");
        time::sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(pages("balloon_inflate").await * 4096, 32 * MIB);
    host.server.delete("squeezed").await;
}

async fn more_memory_than_an_instance_may_have_is_refused(host: &TestHost) {
    for hotplug_size in ["32GB", "-1", "1.5GB", "lots"] {
        let body = json!({
            "name": "greedy", "image": BUSYBOX, "size": "128MB", "hotplug_size": hotplug_size,
        });
        let (status, body) = host.server.call(Method::POST, "/instances", Some(body)).await;

        assert_eq!(status, StatusCode::BAD_REQUEST, "{hotplug_size}: {body}");
        assert_eq!(body["code"], "invalid_hotplug_size", "{body}");
    }
}
