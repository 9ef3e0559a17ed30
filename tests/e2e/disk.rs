//! Disks: how much may be read and written in a second.

use ovum_test_host::{DEBIAN, TestHost};
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::cases;

cases![
    the_limit_of_disks_is_kept_within_five_percent,
    all_disks_of_an_instance_share_one_limit,
    a_limit_is_changed_while_the_guest_runs,
    a_limit_that_no_guest_boots_with_is_refused,
];

/// What a limit lets pass in a second.
const RATE_MIB: f64 = 10.0;

/// How often something is tried before it counts as too slow: a host that stands still for longer
/// than what may come at once makes up for costs a guest some of its bytes, which is not the
/// limit's doing.
const ATTEMPTS_MAX: usize = 5;

/// Runs a script that moves so many MiB: never faster than the limit says by a twentieth, nor
/// slower, unless the host stands in the way. Programs that have to start are part of the time, so
/// there is a lot to move.
async fn check_limit(host: &TestHost, name: &str, moved_mib: u32, script: &str) {
    let mut seen = Vec::new();
    while !seen.last().is_some_and(|rate| *rate > 0.95) {
        assert!(seen.len() < ATTEMPTS_MAX, "{name}: {seen:?} of what was asked for");
        let rate = f64::from(moved_mib) / RATE_MIB / limited(host, name, script).await;
        assert!(rate < 1.05, "{name}: {rate} of what was asked for");
        seen.push(rate);
    }
    println!("{name}: {seen:?} of what was asked for");
}

/// How many seconds a script takes whose disks are limited.
async fn limited(host: &TestHost, name: &str, script: &str) -> f64 {
    host.server.pull(DEBIAN).await;
    // What may come at once was used up by what goes before.
    let script = format!(
        "dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct 2>&1 && \
         begin=$(date +%s%N) && {script} && end=$(date +%s%N) && echo took $((end - begin)) ns"
    );
    let body = json!({
        "name": name, "image": DEBIAN, "size": "256MB", "vcpus": 1, "disk_io_bps": "10MB/s",
        "cmd": ["bash", "-c", script],
    });
    let created = host.server.create(body).await;
    assert_eq!(created["disk_io_bps"], "10MB/s");
    host.server.wait(name, "Stopped").await;
    let log = host.server.log(name).await;
    host.server.delete(name).await;
    let took = log.lines().find_map(|line| line.strip_prefix("took ")?.strip_suffix(" ns"));
    let took_ns: f64 = took.and_then(|ns| ns.parse().ok()).unwrap_or_else(|| panic!("{log}"));
    took_ns / 1e9
}

async fn the_limit_of_disks_is_kept_within_five_percent(host: &TestHost) {
    for (name, script) in [
        ("reads", "dd if=/dev/vda of=/dev/null bs=1M count=100 iflag=direct 2>&1"),
        ("writes", "dd if=/dev/zero of=/file bs=1M count=100 oflag=direct 2>&1"),
        ("small", "dd if=/dev/vda of=/dev/null bs=64k count=1600 iflag=direct 2>&1"),
    ] {
        check_limit(host, name, 100, script).await;
    }
}

async fn all_disks_of_an_instance_share_one_limit(host: &TestHost) {
    let script = "{ dd if=/dev/vda of=/dev/null bs=1M count=75 iflag=direct 2>&1 & } && \
        dd if=/dev/zero of=/file bs=1M count=75 oflag=direct 2>&1 && wait";

    check_limit(host, "both", 150, script).await;
}

async fn a_limit_is_changed_while_the_guest_runs(host: &TestHost) {
    host.server.pull(DEBIAN).await;
    let body = json!({
        "name": "changed", "image": DEBIAN, "size": "256MB", "vcpus": 1, "disk_io_bps": "2MB/s",
        "cmd": ["sleep", "100000"],
    });
    host.server.create(body).await;
    host.server.wait("changed", "Running").await;
    let change = json!({ "disk_io_bps": "0" });

    let (status, changed) =
        host.server.call(Method::PATCH, "/instances/changed", Some(change)).await;

    assert_eq!((status, changed.get("disk_io_bps")), (StatusCode::OK, None), "{changed}");
    let script = "begin=$(date +%s%N); dd if=/dev/vda of=/dev/null bs=1M count=40 iflag=direct; \
        echo took $((($(date +%s%N) - begin) / 1000000)) ms";
    let ran = host.server.sh("changed", script).await;
    let took = ran.text().lines().find_map(|l| l.strip_prefix("took ")?.strip_suffix(" ms"));
    let took_ms: u64 = took.and_then(|ms| ms.parse().ok()).unwrap_or_else(|| panic!("{ran:?}"));
    assert!(took_ms < 10_000, "40 MiB took {took_ms} ms: half of what the old limit allows");
    host.server.delete("changed").await;
}

async fn a_limit_that_no_guest_boots_with_is_refused(host: &TestHost) {
    for disk_io_bps in ["1KB/s", "fast", "1.5MB/s"] {
        let body = json!({ "name": "slow", "image": DEBIAN, "disk_io_bps": disk_io_bps });
        let (status, body) = host.server.call(Method::POST, "/instances", Some(body)).await;

        assert_eq!(status, StatusCode::BAD_REQUEST, "{disk_io_bps}: {body}");
        assert_eq!(body["code"], "invalid_disk_io_bps", "{body}");
    }
}
