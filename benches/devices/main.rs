//! Disks, networks and memory of guests, beside QEMU in the same run.
//!
//! Rounds are interleaved, one guest of ours and one of QEMU's, and again. Same kernel, agent, root
//! and work: fio on a disk of its own, iperf3 and ping to the host over a TAP, and a gibibyte of
//! memory that is plugged. 1 vCPU, 256 MiB. QEMU is its `microvm`, which has no room for memory to
//! be plugged: there that figure stands alone. On an emulated host only the ratios mean anything.

#![expect(clippy::print_stdout, reason = "a table is what a bench is for")]
#![expect(clippy::unwrap_used, reason = "a step that fails is a bench that fails")]
#![expect(clippy::disallowed_methods, reason = "QEMU and iperf3 are peers, not tools of ours")]

mod guest;
mod ours;
mod qemu;

use std::fs::File;
use std::io::{self, Read};
use std::process::{Child, Command, Stdio};

use ovum_test_host::{median, registry_storage};

use crate::guest::{Figures, Guest, Measure};

/// Guests of each subject.
const ROUNDS: usize = 5;

/// Size of the disk that fio reads and writes.
const DISK_BYTES: u64 = 512 << 20;

fn main() {
    let root = registry_storage().with_file_name("measure.erofs");
    let disk = guest::file("disk");
    // Written, for a hole is read faster than what is there.
    io::copy(&mut io::repeat(1).take(DISK_BYTES), &mut File::create(&disk).unwrap()).unwrap();
    let mut server = iperf3();
    let guest = Guest { root, disk };

    let (mut our_figures, mut qemu_figures) = (Vec::new(), Vec::new());
    let mut plugs_ms = Vec::new();
    for round in 1..=ROUNDS {
        plugs_ms.push(ours::plug(&guest));
        // Whoever comes second finds the disk's writes of the first still on their way.
        let ours_first = round % 2 == 1;
        if ours_first {
            our_figures.push(ours::work(&guest));
        }
        qemu_figures.push(qemu::work(&guest));
        if !ours_first {
            our_figures.push(ours::work(&guest));
        }
        eprintln!("round {round} of {ROUNDS}");
    }
    server.kill().unwrap();
    server.wait().unwrap();

    println!("medians of {ROUNDS}, 1 vCPU, 256 MiB{:>22}{:>12}{:>12}", "ovum", "QEMU", "ratio");
    for measure in guest::MEASURES {
        let of = |figures: &[Figures]| median(figures.iter().map(|of| of[measure.name]).collect());
        row(measure, of(&our_figures), of(&qemu_figures));
    }
    println!("{:<36}{:<9}{:>12.2}", "a GiB plugged", "ms", median(plugs_ms));
}

/// Above 1 we are ahead, whichever way the figure counts.
fn row(measure: &Measure, ours: f64, qemu: f64) {
    let ratio = if measure.more_is_better { ours / qemu } else { qemu / ours };
    println!("{:<36}{:<9}{ours:>12.2}{qemu:>12.2}{ratio:>12.2}", measure.name, measure.unit);
}

/// What guests measure the network against, listening at all addresses of the host.
fn iperf3() -> Child {
    let mut command = Command::new("iperf3");
    command.arg("--server").stdout(Stdio::null()).spawn().expect("iperf3 runs")
}
