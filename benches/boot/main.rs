//! How long a boot takes, and what it costs, beside QEMU `microvm` in the same run.
//!
//! Two commands. `measure` boots guests where there is a real `/dev/kvm` and prints a report
//! (`report.rs`); rounds are interleaved, one boot of ours, one of QEMU, and again, so that
//! whatever else the machine does hits both. `draw FILE` shows such a report: a table, and beside
//! the file a waterfall (`waterfall.rs`).
//!
//! On an emulated host only ratios mean anything. Where its clocks count instructions
//! (`dev/in-host --count`) they are the same in each run, and say what a boot costs a processor,
//! not what it costs the emulator.

#![expect(clippy::print_stdout, reason = "a table is what a bench is for")]
#![expect(clippy::unwrap_used, reason = "a step that fails is a bench that fails")]

mod initcalls;
mod ours;
mod patience;
mod peers;
mod qemu;
mod report;
mod waterfall;

use std::env;
use std::fs;
use std::path::Path;

use ovum_test_host::TestHost;
use tokio::runtime::Builder;

use crate::patience::Patience;
use crate::peers::Peer;
use crate::qemu::Qemu;
use crate::report::{Report, Row, ShapeReport};

/// Boots of each subject and shape.
const ROUNDS: usize = 15;

/// Guests that start at the same time, and how often.
const CROWD: usize = 20;
const CROWD_ROUNDS: usize = 3;

/// Whose guests.
const OURS: &str = "ovum";
const THEIRS: &str = "QEMU microvm";

/// The size of a guest.
#[derive(Debug, Clone, Copy)]
struct Shape {
    vcpus: u8,
    memory_mib: u32,
}

/// Of which many are measured, too.
const SMALL: Shape = Shape { vcpus: 1, memory_mib: 128 };

const SHAPES: [Shape; 3] =
    [SMALL, Shape { vcpus: 2, memory_mib: 1024 }, Shape { vcpus: 8, memory_mib: 4096 }];

fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["measure", ..] => {
            let runtime = Builder::new_current_thread().enable_all().build().unwrap();
            println!("{}", serde_json::to_string_pretty(&runtime.block_on(measure())).unwrap());
        }
        ["draw", path, ..] => draw(Path::new(path)),
        _ => panic!("say `measure`, or `draw` and a report"),
    }
}

fn draw(path: &Path) {
    let report: Report = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    print!("{report}");
    let picture = path.with_extension("svg");
    fs::write(&picture, waterfall::svg(&report)).unwrap();
    println!("waterfall: {}", picture.display());
}

async fn measure() -> Report {
    let host = TestHost::start().await;
    let qemu = Qemu::new();
    let peers = Peer::all(&qemu.initramfs);
    let counts = env::var("OVUM_BENCH_CLOCK").is_ok_and(|clock| clock == "instructions");
    let mut patience = Patience::new(counts);
    let mut shapes = Vec::new();
    for shape in SHAPES {
        shapes.push(measure_shape(&host, &qemu, &peers, shape, &mut patience).await);
    }
    let crowd = measure_crowd(&host, &qemu, &mut patience).await;
    let initcalls = patience.with(OURS, 1, &host, initcalls::dearest).await;
    host.stop().await;
    Report::new(counts, patience.given_up, shapes, crowd, initcalls)
}

async fn measure_shape(
    host: &TestHost,
    qemu: &Qemu,
    peers: &[Peer],
    shape: Shape,
    patience: &mut Patience,
) -> ShapeReport {
    let (mut ours, mut runs, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    let mut others = vec![Vec::new(); peers.len()];
    for round in 1..=ROUNDS {
        let name = format!("bench-{round}");
        runs.push(patience.with(OURS, 1, host, async || ours::run(host, shape).await).await);
        let boot = async || ours::boot(host, &name, shape).await;
        let spoken = patience.with(OURS, 1, host, boot).await;
        ours.push(spoken.end(host, &name, shape).await);
        theirs.push(patience.with(THEIRS, 1, host, async || qemu.boot_crowd(1, shape).await).await);
        for (peer, took) in peers.iter().zip(&mut others) {
            took.push(patience.with(peer.name, 1, host, async || peer.boot(shape).await).await);
        }
        eprintln!("{} vCPUs, {} MiB: {round} of {ROUNDS}", shape.vcpus, shape.memory_mib);
    }
    let of = |figure: fn(&ours::Boot) -> f64| ours.iter().map(figure).collect();
    let mut rows = vec![
        Row::new("QEMU microvm, process start to first user instruction", "ms", theirs),
        Row::new("ovum, worker start to first user instruction", "ms", of(ours::Boot::first_user)),
        Row::new("ovum, POST to first output", "ms", of(ours::Boot::first_output)),
        Row::new("ovum, POST to Running", "ms", of(ours::Boot::running)),
        Row::new("ovum run, all of it, with a guest that says a word", "ms", runs),
        Row::new("ovum, delete", "ms", of(|boot| boot.delete_ms)),
        Row::new("CPU time of the server, POST to first output", "ms", of(|b| b.server_cpu_ms)),
        Row::new("CPU time of the worker, guest included", "ms", of(|b| b.worker_cpu_ms)),
        Row::new("worker's memory outside guest RAM", "MiB", of(|boot| boot.memory.mib)),
        Row::new("  of it its own, the rest is the program", "MiB", of(|boot| boot.memory.own_mib)),
    ];
    for (peer, took) in peers.iter().zip(others) {
        let what = format!("{}, process start to first user instruction", peer.name);
        rows.push(Row::new(&what, "ms", took));
    }
    for (nth, counter) in ours::EXITS.iter().enumerate() {
        let counted = ours.iter().map(|boot| boot.exits[nth]).collect();
        rows.push(Row::new(&format!("KVM: {counter}"), "", counted));
    }
    let phases = ours::Boot::median_phases(&ours);
    ShapeReport { vcpus: shape.vcpus, memory_mib: shape.memory_mib, rows, phases }
}

/// Twenty at once, until the last has spoken.
async fn measure_crowd(host: &TestHost, qemu: &Qemu, patience: &mut Patience) -> Vec<Row> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=CROWD_ROUNDS {
        let crowd = async || ours::boot_crowd(host, CROWD, SMALL).await;
        ours.push(patience.with(OURS, CROWD, host, crowd).await);
        let crowd = async || qemu.boot_crowd(CROWD, SMALL).await;
        theirs.push(patience.with(THEIRS, CROWD, host, crowd).await);
        eprintln!("{CROWD} at once: {round} of {CROWD_ROUNDS}");
    }
    vec![
        Row::new("QEMU microvm, all at their first user instruction", "ms", theirs),
        Row::new("ovum, all at their first output", "ms", ours),
    ]
}
