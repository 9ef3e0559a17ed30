//! Memory: what is added after the boot, and what goes back to the host.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ovum_test_host::{BUSYBOX, Server, TestHost, ovum, worker_pids};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;

cases![
    memory_added_after_the_boot_holds_what_is_written,
    memory_that_is_freed_goes_back_to_the_host,
    guests_give_up_memory_for_a_while_and_get_it_back,
    a_guest_that_is_short_gets_memory_and_gives_it_up_when_it_is_idle,
    a_guest_gets_memory_on_demand_while_there_is_no_server,
    a_command_that_is_short_waits_for_memory_as_the_workload_does,
    more_memory_than_an_instance_may_have_is_refused,
];

const PATIENCE: Duration = Duration::from_secs(60);

const MIB: u64 = 1 << 20;

/// An instance that does nothing until it is deleted.
async fn start(server: &Server, name: &str, size: &str, hotplug_size: &str) -> Value {
    server
        .create(json!({
            "name": name, "image": BUSYBOX, "size": size, "hotplug_size": hotplug_size,
            "vcpus": 1, "cmd": ["sleep", "100000"],
        }))
        .await;
    server.wait(name, "Running").await
}

/// What a script in an instance writes, which must succeed.
async fn output(server: &Server, name: &str, script: &str) -> String {
    let ran = server.sh(name, script).await;
    assert_eq!(ran.code, 0, "{script}: {}", ran.text());
    ran.text().to_owned()
}

/// All memory the guest has, in MiB.
async fn total_mib(server: &Server, name: &str) -> u64 {
    let total = output(server, name, "awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo").await;
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
    let instance = start(&host.server, "grows", "256MB", "1GB").await;
    assert_eq!((&instance["size"], &instance["hotplug_size"]), (&json!("256MB"), &json!("1GB")));

    let deadline = Instant::now() + PATIENCE;
    while total_mib(&host.server, "grows").await < 1150 {
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
    let sums = output(&host.server, "grows", &script).await;
    let sums: Vec<&str> = sums.lines().collect();
    assert!(sums.len() == 2 && sums[0] == sums[1], "{sums:?}");
    host.server.delete("grows").await;
}

async fn memory_that_is_freed_goes_back_to_the_host(host: &TestHost) {
    start(&host.server, "frees", "512MB", "0").await;
    let script = "mkdir /t && mount -t tmpfs -o size=300m none /t && \
        head -c 209715200 /dev/zero > /t/f";
    output(&host.server, "frees", script).await;
    let filled = resident_mib();
    assert!(filled > 200, "{filled} MiB");

    output(&host.server, "frees", "rm /t/f").await;

    let deadline = Instant::now() + PATIENCE;
    while resident_mib() + 180 > filled {
        assert!(Instant::now() < deadline, "{} of {filled} MiB are left", resident_mib());
        time::sleep(Duration::from_millis(200)).await;
    }
    host.server.delete("frees").await;
}

async fn guests_give_up_memory_for_a_while_and_get_it_back(host: &TestHost) {
    start(&host.server, "squeezed", "1GB", "0").await;
    let reclaim = async |body: Value| {
        let path = "/resources/memory/reclaim";
        let (status, answer) = host.server.call(Method::POST, path, Some(body)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer
    };
    let pages = async |word: &str| {
        let script = format!("awk '/^{word} / {{print $2}}' /proc/vmstat");
        output(&host.server, "squeezed", &script).await.trim().parse::<u64>().unwrap()
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

/// Where guests get memory when they need it, and lose it after some quiet seconds.
async fn on_demand(name: &str) -> Server {
    let mut command = Command::new(ovum());
    command.envs([("OVUM_HOTPLUG_POLICY", "demand"), ("OVUM_HOTPLUG_QUIET", "4s")]);
    Server::start_as(&Path::new("/var/lib/ovum").join(name), command).await
}

/// Waits until the guest has no more than `mib`.
async fn until_total_is(server: &Server, name: &str, mib: u64) {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let total = total_mib(server, name).await;
        if total <= mib {
            return;
        }
        assert!(Instant::now() < deadline, "{total} MiB of {mib} are left");
        time::sleep(Duration::from_millis(500)).await;
    }
}

/// What is written into memory by a guest that boots with less, in bytes.
const WRITTEN: u64 = 200 * MIB;

/// An instance whose workload writes into memory, as fast as it can, once there is a file `/go`.
async fn start_hungry(server: &Server, name: &str) {
    let script = "mkdir /t && mount -t tmpfs -o size=300m none /t && \
        while [ ! -e /go ]; do sleep 0.2; done; sleep 2; \
        dd if=/dev/zero of=/t/f bs=1M count=200; sleep 100000";
    let body = json!({
        "name": name, "image": BUSYBOX, "size": "128MB", "hotplug_size": "384MB", "vcpus": 1,
        "cmd": ["sh", "-c", script],
    });
    server.create(body).await;
    server.wait(name, "Running").await;
}

/// Waits until the workload has written all of it, and nothing was killed for that.
async fn until_it_is_fed(server: &Server, name: &str) {
    let deadline = Instant::now() + 2 * PATIENCE;
    while output(server, name, "wc -c < /t/f || true").await.trim() != WRITTEN.to_string() {
        assert!(Instant::now() < deadline, "{}", output(server, name, "ls -l /t").await);
        time::sleep(Duration::from_millis(500)).await;
    }
    let killed = output(server, name, "awk '/^oom_kill / {print $2}' /proc/vmstat").await;
    assert_eq!(killed.trim(), "0");
}

async fn a_guest_that_is_short_gets_memory_and_gives_it_up_when_it_is_idle(_: &TestHost) {
    let mut server = on_demand("elastic").await;
    server.pull(BUSYBOX).await;
    start_hungry(&server, "elastic").await;
    let promised = server.get("/resources").await["memory"]["allocated"].clone();
    assert_eq!(promised, json!(512 * MIB));
    let booted = total_mib(&server, "elastic").await;
    assert!(booted < 128, "{booted} MiB");
    // Nobody is asked for what they do not have.
    let body = json!({ "reclaim_bytes": 1_u64 << 30, "dry_run": true });
    let path = "/resources/memory/reclaim";
    let (_, planned) = server.call(Method::POST, path, Some(body)).await;
    let action = &planned["actions"][0];
    assert_eq!(action["assigned_memory_bytes"], 128 * MIB, "{planned}");
    assert_eq!(planned["planned_reclaim_bytes"], 0, "{planned}");

    output(&server, "elastic", "touch /go").await;
    until_it_is_fed(&server, "elastic").await;
    let filled = (total_mib(&server, "elastic").await, resident_mib());
    assert!(filled.0 > 230 && filled.1 > 200, "{filled:?} MiB");

    output(&server, "elastic", "rm /t/f").await;
    until_total_is(&server, "elastic", booted).await;
    let deadline = Instant::now() + PATIENCE;
    while resident_mib() + 150 > filled.1 {
        assert!(Instant::now() < deadline, "{} of {} MiB are left", resident_mib(), filled.1);
        time::sleep(Duration::from_millis(200)).await;
    }
    assert_eq!(server.get("/resources").await["memory"]["allocated"], promised);
    server.delete("elastic").await;
    server.kill();
}

async fn a_guest_gets_memory_on_demand_while_there_is_no_server(_: &TestHost) {
    let mut server = on_demand("absent").await;
    server.pull(BUSYBOX).await;
    start_hungry(&server, "alone").await;
    let booted = total_mib(&server, "alone").await;

    output(&server, "alone", "touch /go").await;
    server.kill();
    let before = resident_mib();
    let deadline = Instant::now() + 2 * PATIENCE;
    while resident_mib() < before + 180 {
        assert!(Instant::now() < deadline, "{} MiB, {before} before", resident_mib());
        time::sleep(Duration::from_millis(200)).await;
    }
    let mut server = on_demand("absent").await;

    until_it_is_fed(&server, "alone").await;
    assert!(total_mib(&server, "alone").await > 230);
    output(&server, "alone", "rm /t/f").await;
    until_total_is(&server, "alone", booted).await;
    server.delete("alone").await;
    server.kill();
}

async fn a_command_that_is_short_waits_for_memory_as_the_workload_does(_: &TestHost) {
    let mut server = on_demand("beside").await;
    server.pull(BUSYBOX).await;
    let body = json!({
        "name": "beside", "image": BUSYBOX, "size": "128MB", "hotplug_size": "384MB", "vcpus": 1,
        "cmd": ["sleep", "100000"],
    });
    server.create(body).await;
    server.wait("beside", "Running").await;

    let script = "mkdir /t && mount -t tmpfs -o size=300m none /t && \
        dd if=/dev/zero of=/t/f bs=1M count=200 2>/dev/null; cat /proc/self/cgroup";
    assert_eq!(output(&server, "beside", script).await.trim(), "0::/workload");

    until_it_is_fed(&server, "beside").await;
    server.delete("beside").await;
    server.kill();
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
