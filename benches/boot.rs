//! How long a boot takes, and what it costs, beside QEMU `microvm` in the same run.
//!
//! Rounds are interleaved: one boot of ours, one of QEMU, and again, so that whatever else the
//! machine does hits both. Same kernel, same initramfs, 1 vCPU, 128 MiB. QEMU ends at the agent's
//! first report, a write to the report port, where an `isa-debug-exit` device sits.
//! On an emulated host only the ratios mean anything.

#![expect(clippy::print_stdout, reason = "a table is what a bench is for")]
#![expect(clippy::disallowed_methods, reason = "QEMU is the peer, not a tool of ours")]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ovum_agent_proto::report::{Phase, REPORT_PORT, Report};
use ovum_test_host::qemu::microvm;
use ovum_test_host::{BUSYBOX, TestHost, median, workers};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::runtime::Builder;
use tokio::time;

/// Boots of each subject.
const ROUNDS: usize = 15;

const MEMORY_MIB: u32 = 128;

const GUEST_BYTES: u64 = 128 << 20;

/// How long a report may take after the output that it reports.
const REPORT_PATIENCE: Duration = Duration::from_secs(10);

fn main() {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime needs only memory").block_on(bench());
}

async fn bench() {
    let host = TestHost::start().await;
    let initramfs = qemu_initramfs();
    let (mut ours, mut theirs, mut memory_kib) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let boot = boot_ours(&host, round).await;
        memory_kib.push(boot.memory_kib);
        ours.push(boot);
        theirs.push(boot_qemu(&initramfs));
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    host.stop().await;

    let qemu = median(theirs);
    let first_user = median(ours.iter().map(|boot| boot.first_user_ms).collect());
    let first_output = median(ours.iter().map(|boot| boot.first_output_ms).collect());
    println!("medians of {ROUNDS}, 1 vCPU, {MEMORY_MIB} MiB");
    println!("QEMU microvm, process start to first user instruction   {qemu:8.1} ms  1.00");
    row("ovum, worker start to first user instruction", first_user, qemu);
    row("ovum, POST /instances to the workload's first output", first_output, qemu);
    println!("ovum worker's memory outside guest RAM {:23.1} MiB", median(memory_kib) / 1024.0);
}

fn row(what: &str, milliseconds: f64, qemu: f64) {
    println!("{what:<55} {milliseconds:8.1} ms  {:.2}", milliseconds / qemu);
}

struct Boot {
    first_user_ms: f64,
    first_output_ms: f64,
    memory_kib: f64,
}

async fn boot_ours(host: &TestHost, round: usize) -> Boot {
    let name = format!("bench-{round}");
    let script = "echo first; exec sleep 1000";
    let body = json!({
        "name": name, "image": BUSYBOX, "vcpus": 1, "size": format!("{MEMORY_MIB}MB"),
        "cmd": ["sh", "-c", script],
    });
    let posted_ns = monotonic_ns();
    let instance = host.server.create(body).await;
    host.server.follow_until(&name, "first").await;
    let id = instance["id"].as_str().expect("an instance has an id");
    let events = host.server.data_dir.join("instances").join(id).join("events");
    let events = events_until(&events, Phase::FirstOutput).await;
    let memory_kib = worker_memory_kib();
    host.server.delete(&name).await;
    let worker_ns = instant_of(&events, |what| what["what"] == "launched");
    Boot {
        first_user_ms: milliseconds(worker_ns, reported(&events, Phase::AgentStarted)),
        first_output_ms: milliseconds(posted_ns, reported(&events, Phase::FirstOutput)),
        memory_kib,
    }
}

/// From process start to the agent's first report, in milliseconds.
fn boot_qemu(initramfs: &Path) -> f64 {
    let started = Instant::now();
    let status = microvm(MEMORY_MIB, initramfs, "quiet panic=-1 8250.nr_uarts=0")
        .args(["-device", &format!("isa-debug-exit,iobase={REPORT_PORT:#x},iosize=4")])
        .status()
        .expect("qemu-system-x86_64 runs");
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    let word = Report::Phase(Phase::AgentStarted).encode();
    let expected = i32::try_from((word << 1 | 1) & 0xff).expect("an exit status is a byte");
    assert_eq!(status.code(), Some(expected), "QEMU ended before the agent began");
    took_ms
}

/// The initramfs that guests of ours get, as the server built it.
fn qemu_initramfs() -> PathBuf {
    let path = env::temp_dir().join("bench-initramfs");
    let mut command = Command::new(ovum_test_host::ovum());
    command.args(["initramfs", "--output"]).arg(&path);
    assert!(command.status().expect("ovum runs").success());
    path
}

/// Resident memory of the only worker, guest memory left out: that is what is mapped in ranges of
/// at least [`GUEST_BYTES`], of which the worker itself has none that it touches.
fn worker_memory_kib() -> f64 {
    let lines = workers();
    assert_eq!(lines.len(), 1, "{lines:?}");
    let pid = ovum_test_host::worker_pids().pop().expect("there is one");
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("root reads smaps");
    let (mut is_guest, mut kib) = (false, 0.0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Rss:") if !is_guest => {
                kib += words.next().and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
            }
            Some(first) if first.contains('-') => is_guest = bytes(first) >= GUEST_BYTES,
            _ => {}
        }
    }
    kib
}

/// The length of a range that is written as in /proc/PID/smaps: `start-end`.
fn bytes(range: &str) -> u64 {
    let ends = range.split('-').map(|end| u64::from_str_radix(end, 16));
    let [Ok(start), Ok(end)] = ends.collect::<Vec<_>>()[..] else { return 0 };
    end - start
}

/// The events of an instance once `phase` is among them: the agent passes output on, then reports.
async fn events_until(path: &Path, phase: Phase) -> String {
    let deadline = Instant::now() + REPORT_PATIENCE;
    loop {
        let events = fs::read_to_string(path).expect("an instance has an events file");
        let is_whole = events.ends_with('\n');
        if is_whole && find(&events, |what| is_report(what, phase)).is_some() {
            return events;
        }
        assert!(Instant::now() < deadline, "{phase:?} was never reported: {events}");
        time::sleep(Duration::from_millis(5)).await;
    }
}

fn reported(events: &str, phase: Phase) -> u64 {
    instant_of(events, |what| is_report(what, phase))
}

fn is_report(what: &Value, phase: Phase) -> bool {
    what["what"] == "reported" && what["word"] == Report::Phase(phase).encode()
}

fn instant_of(events: &str, is_it: impl Fn(&Value) -> bool) -> u64 {
    find(events, is_it).expect("the event is there")
}

fn find(events: &str, is_it: impl Fn(&Value) -> bool) -> Option<u64> {
    events
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("a line of JSON"))
        .find(|event| is_it(&event["what"]))
        .and_then(|event| event["at_ns"].as_u64())
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

#[expect(clippy::cast_precision_loss, reason = "nanoseconds of one boot fit 53 bits")]
fn milliseconds(from_ns: u64, to_ns: u64) -> f64 {
    (to_ns - from_ns) as f64 / 1e6
}
