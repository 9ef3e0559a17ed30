//! What many stored instances cost: a list of all of them, and the server's memory. Needs no KVM.
//!
//! The records are made through the store, as the server makes them, and read by a server that
//! finds them when it starts.

#![expect(clippy::print_stdout, reason = "a table is what a bench is for")]
#![expect(clippy::disallowed_methods, reason = "the server is started as a user would")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ovum::instances::record::Record;
use ovum::store::Store;
use ovum_test_host::{Server, ovum};
use reqwest::Method;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Builder;

/// Instances that are stored.
const INSTANCES: usize = 1000;

/// Lists that are asked for, one after the other.
const LISTS: usize = 500;

fn main() {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime needs only memory").block_on(bench());
}

async fn bench() {
    let (empty_bytes, ..) = measure(0).await;
    let (full_bytes, cpu_time, mut times) = measure(INSTANCES).await;
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e3;
    println!("GET /instances, {INSTANCES} stored, {LISTS} times: one after the other");
    let cpu_ms = cpu_time.as_secs_f64() * 1e3;
    println!("p50 {:6.2} ms   p99 {:6.2} ms   server's CPU {cpu_ms:6.2} ms", at(50), at(99));
    println!("server's resident memory, MiB");
    println!("{:6.1} with none   {:6.1} with {INSTANCES}", mib(empty_bytes), mib(full_bytes));
}

/// Memory of a server with so many instances that was asked for a list of them, what each list cost
/// it, and how long each took.
async fn measure(instances: usize) -> (u64, Duration, Vec<Duration>) {
    let dir = TempDir::new().expect("there is room for a folder");
    let data_dir = dir.path().join("data");
    fill(&data_dir, instances);
    let mut command = Command::new(ovum());
    command.env("OVUM_NETWORK", "false");
    let server = Server::start_as(&data_dir, command).await;
    let before = server.cpu_time();
    let mut times = Vec::new();
    for _ in 0..LISTS {
        let asked = Instant::now();
        let (status, text) = server.call_text(Method::GET, "/instances", None).await;
        times.push(asked.elapsed());
        assert!(status.is_success() && text.matches("\"id\":").count() == instances, "{status}");
    }
    let cpu_time = (server.cpu_time() - before) / u32::try_from(LISTS).expect("a few hundred");
    (server.resident_bytes(), cpu_time, times)
}

/// Stores instances that have ended, in the folder of a server that never ran.
fn fill(data_dir: &Path, instances: usize) {
    fs::create_dir_all(data_dir).expect("the folder is ours");
    let store = Store::open(&data_dir.join("records.db")).expect("SQLite opens a new file");
    for number in 0..instances {
        let record = record(number);
        fs::create_dir_all(data_dir.join("instances").join(&record.id)).expect("so is this one");
        store.transact(|records| record.insert(records)).expect("each has its own name");
    }
}

fn record(number: usize) -> Record {
    let env: serde_json::Map<_, _> = (0..20)
        .map(|n| (format!("VARIABLE_{n}"), format!("value {n} of {number}").into()))
        .collect();
    let record = json!({
        "id": format!("bench{number:019}"),
        "digest": format!("sha256:{number:064x}"),
        "created_at": "2026-01-02T03:04:05Z",
        "phase": "kept",
        "timeline": {},
        "end": {
            "at": "2026-01-02T03:05:05Z", "started_at": "2026-01-02T03:04:06Z",
            "how": { "exit_code": 0, "exit_message": "success", "error": null },
        },
        "spec": {
            "name": format!("instance-{number}"),
            "image": "docker.io/library/debian:bookworm",
            "memory_bytes": 1_u64 << 30, "overlay_bytes": 10_u64 << 30, "vcpus": 2,
            "env": env, "tags": { "team": "bench", "number": number.to_string() },
            "hypervisor": "native", "agent": true,
            "entrypoint": ["/usr/bin/server"], "cmd": ["--listen", "0.0.0.0:8080"],
        },
    });
    serde_json::from_value(record).expect("a record of this version")
}

#[expect(clippy::cast_precision_loss, reason = "megabytes")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
