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

/// How often something is tried before it counts as too slow: a host that stands still for longer
/// than what may come at once makes up for lost bytes costs a guest some, which is not the limit's.
const ATTEMPTS_MAX: usize = 5;

/// Runs a script that moves 50 MiB under a limit of 10 MiB in a second: never in less than five
/// seconds, but for a twentieth, nor in more, unless the host stands in the way.
async fn check_limit(host: &TestHost, name: &str, script: &str) {
    let mut seen = Vec::new();
    while !seen.last().is_some_and(|took| *took < 5.25) {
        assert!(seen.len() < ATTEMPTS_MAX, "{name}: 50 MiB at 10 MiB/s took {seen:?} s");
        let took = limited(host, name, script).await;
        assert!(took > 4.75, "{name}: 50 MiB at 10 MiB/s took {took} s");
        seen.push(took);
    }
}

/// How many seconds a script takes that moves 50 MiB under a limit of 10 MiB in a second.
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
        ("reads", "dd if=/dev/vda of=/dev/null bs=1M count=50 iflag=direct 2>&1"),
        ("writes", "dd if=/dev/zero of=/file bs=1M count=50 oflag=direct 2>&1"),
        ("small", "dd if=/dev/vda of=/dev/null bs=64k count=800 iflag=direct 2>&1"),
    ] {
        check_limit(host, name, script).await;
    }
}

async fn all_disks_of_an_instance_share_one_limit(host: &TestHost) {
    let script = "{ dd if=/dev/vda of=/dev/null bs=1M count=25 iflag=direct 2>&1 & } && \
        dd if=/dev/zero of=/file bs=1M count=25 oflag=direct 2>&1 && wait";

    check_limit(host, "both", script).await;
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
