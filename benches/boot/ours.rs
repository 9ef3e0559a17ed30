//! Guests of ours, by way of the server.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use ovum_agent_proto::report::{Phase, Report};
use ovum_test_host::resident::Resident;
use ovum_test_host::{BUSYBOX, TestHost, kvm_counter, median, only_worker, ovum};
use reqwest::Method;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time;

use crate::Shape;

/// KVM's counters that are read once a guest has spoken.
pub(crate) const EXITS: [&str; 6] =
    ["exits", "io_exits", "mmio_exits", "halt_exits", "irq_exits", "irq_injections"];

/// How long a report may take after the output that it reports.
const REPORT_PATIENCE: Duration = Duration::from_secs(10);

/// How long a guest has been idle when its worker's memory is measured.
const IDLE: Duration = Duration::from_secs(3);

/// What one boot took.
pub(crate) struct Boot {
    /// When what ended, in nanoseconds, beginning with the request.
    moments: Vec<(&'static str, u64)>,
    pub(crate) delete_ms: f64,
    pub(crate) server_cpu_ms: f64,
    pub(crate) worker_cpu_ms: f64,
    pub(crate) memory: Resident,
    pub(crate) exits: Vec<f64>,
}

/// What follows the request, and the event with which it ends.
const PHASES: [(&str, Ending); 7] = [
    ("server", Ending::Happening("launched")),
    ("vmm", Ending::Happening("booted")),
    ("kernel", Ending::Reported(Phase::AgentStarted)),
    ("root", Ending::Reported(Phase::RootMounted)),
    ("agent", Ending::Reported(Phase::AgentReady)),
    ("workload", Ending::Reported(Phase::WorkloadStarted)),
    ("first output", Ending::Reported(Phase::FirstOutput)),
];

#[derive(Clone, Copy)]
enum Ending {
    Happening(&'static str),
    Reported(Phase),
}

impl Boot {
    /// Milliseconds from the worker's start to the agent's.
    pub(crate) fn first_user(&self) -> f64 {
        milliseconds(self.at("server"), self.at("kernel"))
    }

    /// Milliseconds from the request to the workload's process, with which the instance runs.
    pub(crate) fn running(&self) -> f64 {
        milliseconds(self.at("asked"), self.at("workload"))
    }

    /// Milliseconds from the request to the workload's first output.
    pub(crate) fn first_output(&self) -> f64 {
        milliseconds(self.at("asked"), self.at("first output"))
    }

    /// How long each phase took, the one in the middle of all boots.
    pub(crate) fn median_phases(boots: &[Self]) -> Vec<(String, f64)> {
        let phase = |nth: usize| {
            let took = |boot: &Self| milliseconds(boot.moments[nth].1, boot.moments[nth + 1].1);
            (PHASES[nth].0.to_owned(), median(boots.iter().map(took).collect()))
        };
        (0..PHASES.len()).map(phase).collect()
    }

    fn at(&self, name: &str) -> u64 {
        self.moments.iter().find(|(of, _)| *of == name).expect("all are there").1
    }
}

/// One that has spoken.
pub(crate) struct Spoken {
    moments: Vec<(&'static str, u64)>,
    server_cpu_ms: f64,
    worker: u32,
    worker_cpu_ms: f64,
    exits: Vec<f64>,
}

/// Boots one, until it has spoken.
pub(crate) async fn boot(host: &TestHost, name: &str, shape: Shape) -> Spoken {
    let server_before_ms = cpu_ms(host.server.pid());
    let asked_ns = monotonic_ns();
    let instance = host.server.create(body(name, shape)).await;
    host.server.follow_until(name, "first").await;
    let exits = EXITS.iter().map(|counter| kvm_counter(counter) as f64).collect();
    let server_cpu_ms = cpu_ms(host.server.pid()) - server_before_ms;
    let id = instance["id"].as_str().expect("an instance has an id");
    let events = host.server.data_dir.join("instances").join(id).join("events");
    let events = events_until(&events, Phase::FirstOutput).await;
    let worker = only_worker();
    let worker_cpu_ms = cpu_ms(worker);
    let mut moments = vec![("asked", asked_ns)];
    moments.extend(PHASES.iter().map(|(name, ending)| (*name, ending.of(&events))));
    Spoken { moments, server_cpu_ms, worker, worker_cpu_ms, exits }
}

impl Spoken {
    /// Measures the idle worker, and deletes the instance.
    pub(crate) async fn end(self, host: &TestHost, name: &str, shape: Shape) -> Boot {
        let Self { moments, server_cpu_ms, worker, worker_cpu_ms, exits } = self;
        time::sleep(IDLE).await;
        let memory = Resident::of(worker, shape.memory_mib);
        let deleting = Instant::now();
        host.server.delete(name).await;
        let delete_ms = deleting.elapsed().as_secs_f64() * 1e3;
        Boot { moments, delete_ms, server_cpu_ms, worker_cpu_ms, memory, exits }
    }
}

/// `ovum run` of a guest that says a word, from the command's start to its end, in milliseconds.
pub(crate) async fn run(host: &TestHost, shape: Shape) -> f64 {
    let mut command = Command::new(ovum());
    command.args(["run", "--rm", "--cpus", &shape.vcpus.to_string()]);
    command.args(["--memory", &format!("{}MB", shape.memory_mib)]);
    command.args(["--base-url", &host.server.base_url, "--token", host.server.token()]);
    command.args([BUSYBOX, "--", "echo", "first"]).stdin(Stdio::null()).kill_on_drop(true);
    let started = Instant::now();
    let output = command.output().await.expect("ovum runs");
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    assert_eq!(output.stdout, b"first\n", "{}", String::from_utf8_lossy(&output.stderr));
    took_ms
}

/// Boots so many at the same time; returns how many milliseconds it took until all had spoken.
pub(crate) async fn boot_crowd(host: &TestHost, count: usize, shape: Shape) -> f64 {
    let names: Vec<String> = (1..=count).map(|nth| format!("crowd-{nth}")).collect();
    let started = Instant::now();
    join_all(names.iter().map(async |name| {
        host.server.create(body(name, shape)).await;
        host.server.follow_until(name, "first").await;
    }))
    .await;
    let took_ms = started.elapsed().as_secs_f64() * 1e3;
    join_all(names.iter().map(async |name| {
        let path = format!("/instances/{name}");
        host.server.call(Method::DELETE, &path, None).await;
    }))
    .await;
    took_ms
}

fn body(name: &str, shape: Shape) -> Value {
    json!({
        "name": name, "image": BUSYBOX, "vcpus": shape.vcpus,
        "size": format!("{}MB", shape.memory_mib),
        "cmd": ["sh", "-c", "echo first; exec sleep 1000"],
    })
}

/// Time that all threads of a process have had on processors.
fn cpu_ms(pid: u32) -> f64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    let times = threads.flatten().filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    times.sum::<f64>() / 1e6
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

impl Ending {
    fn of(self, events: &str) -> u64 {
        let found = find(events, |what| match self {
            Self::Happening(name) => what["what"] == name,
            Self::Reported(phase) => is_report(what, phase),
        });
        found.expect("the event is there")
    }
}

fn is_report(what: &Value, phase: Phase) -> bool {
    what["what"] == "reported" && what["word"] == Report::Phase(phase).encode()
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
