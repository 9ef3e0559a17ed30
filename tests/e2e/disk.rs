//! Disks: how much may be read and written in a second.

use ovum_test_host::{DEBIAN, DEBIAN_MEASURE, TestHost};
use reqwest::{Method, StatusCode};
use serde_json::json;

use crate::cases;

cases![
    the_limit_of_all_disks_together_is_kept_within_five_percent,
    a_limit_is_changed_while_the_guest_runs,
    a_limit_that_no_guest_boots_with_is_refused,
];

/// What a limit lets pass in a second, in KiB.
const RATE_KIB: f64 = 10_240.0;

/// How often something is tried before it counts as too slow: a host that stands still for longer
/// than what may come at once makes up for costs a guest some of its bytes, which is not the
/// limit's doing.
const ATTEMPTS_MAX: usize = 5;

/// What all measurements have in common: 5 s, after what may come at once was used up.
const FIO: &str =
    "fio --minimal --direct=1 --ioengine=libaio --time_based --ramp_time=1 --runtime=5";

/// Runs fio in a guest whose disks are limited: never faster than the limit says by a twentieth,
/// nor slower, unless the host stands in the way.
async fn check_limit(host: &TestHost, name: &str, jobs: &str) {
    let mut seen = Vec::new();
    while !seen.last().is_some_and(|part| *part > 0.95) {
        assert!(seen.len() < ATTEMPTS_MAX, "{name}: {seen:?} of what was asked for");
        // Fields 7 and 48 are KiB per second that were read and written, a line per job.
        let script =
            format!("{FIO} {jobs} | awk -F';' '/^3;/ {{ sum += $7 + $48 }} END {{ print sum }}'");
        let ran = host.server.sh("limited", &script).await;
        let kib: f64 = ran.text().trim().parse().unwrap_or_else(|_| panic!("{name}: {ran:?}"));
        let part = kib / RATE_KIB;
        assert!(part < 1.05, "{name}: {part} of what was asked for");
        seen.push(part);
    }
    println!("{name}: {seen:?} of what was asked for");
}

async fn the_limit_of_all_disks_together_is_kept_within_five_percent(host: &TestHost) {
    host.server.pull(DEBIAN_MEASURE).await;
    let body = json!({
        "name": "limited", "image": DEBIAN_MEASURE, "size": "256MB", "vcpus": 1,
        "disk_io_bps": "10MB/s", "cmd": ["sleep", "100000"],
    });
    let created = host.server.create(body).await;
    assert_eq!(created["disk_io_bps"], "10MB/s");
    host.server.wait("limited", "Running").await;
    let read = "--name=read --filename=/dev/vda --rw=read";
    let write = "--name=write --filename=/file --size=64M --rw=write";
    let small = "--name=small --filename=/dev/vda --rw=randread --iodepth=16";
    for (name, jobs) in [
        ("reads", format!("--bs=1M {read}")),
        ("writes", format!("--bs=1M {write}")),
        ("small", format!("--bs=64k {small}")),
        ("both", format!("--bs=1M {read} {write}")),
    ] {
        check_limit(host, name, &jobs).await;
    }
    host.server.delete("limited").await;
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
