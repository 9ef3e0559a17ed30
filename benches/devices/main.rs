//! Disks, networks and memory of guests, beside QEMU in the same run.
//!
//! Three commands. `own`: fio on a disk of the guest's own, iperf3 and ping to the host over a TAP,
//! and a gibibyte of memory that is plugged; QEMU is its `microvm`, which has no room for memory to
//! be plugged: there that figure stands alone. `lent`: fio on the NVMe disk of
//! `dev/in-host --vfio`, by a guest of ours, by one of QEMU, to which the controller is passed on,
//! and by the host itself. `boots`: what being lent it adds to a boot; QEMU is a `q35` for these
//! two.
//!
//! Rounds are interleaved, each subject once, and they take turns at going first. Same kernel,
//! agent, root and work; 1 vCPU, 256 MiB. On an emulated host only the ratios mean anything.

#![expect(clippy::print_stdout, reason = "a table is what a bench is for")]
#![expect(clippy::unwrap_used, reason = "a step that fails is a bench that fails")]
#![expect(clippy::disallowed_methods, reason = "QEMU and iperf3 are peers, not tools of ours")]

mod guest;
mod host;
mod ours;
mod qemu;

use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::process::{Child, Command, Stdio};

use ovum_test_host::lent::Lent;
use ovum_test_host::{median, registry_storage};

use crate::guest::{DISK_MEASURES, Figures, Guest, LINK_MEASURES, Measure};
use crate::host::Host;

/// Rounds.
const ROUNDS: usize = 5;

/// Size of the disk that fio reads and writes.
const DISK_BYTES: u64 = 512 << 20;

fn main() {
    match env::args().nth(1).as_deref() {
        Some("own") => own(),
        Some("lent") => lent(),
        Some("boots") => boots(),
        _ => panic!("say `own`, `lent` or `boots`"),
    }
}

fn own() {
    let disk = guest::file("disk");
    // Written, for a hole is read faster than what is there.
    io::copy(&mut io::repeat(1).take(DISK_BYTES), &mut File::create(&disk).unwrap()).unwrap();
    let mut server = iperf3();
    let guest = Guest { disk: Some(disk), ..with_root() };
    let mut plugs_ms = Vec::new();

    let [ours, qemu] =
        rounds(&mut [&mut || ours::work(&guest), &mut || qemu::work(&guest)], || {
            plugs_ms.push(ours::plug(&guest));
        });
    server.kill().unwrap();
    server.wait().unwrap();

    title("QEMU");
    for measure in DISK_MEASURES.iter().chain(&LINK_MEASURES) {
        row(measure, &ours, &qemu);
    }
    println!("{:<36}{:<9}{:>12.2}", "a GiB plugged", "ms", median(plugs_ms));
}

fn lent() {
    let host = Host::new(&with_root());
    let by_guest = |work: fn(&Guest) -> Figures| {
        let lent = Lent::take();
        work(&Guest { lent: Some(lent.path()), ..with_root() })
    };

    // What is not written yet is read faster.
    host.work();
    let [ours, qemu, host] = rounds(
        &mut [&mut || by_guest(ours::work_lent), &mut || by_guest(qemu::work_lent), &mut || {
            host.work()
        }],
        || {},
    );

    for (peer, figures) in [("QEMU", qemu), ("the host", host)] {
        title(peer);
        for measure in &DISK_MEASURES {
            row(measure, &ours, &figures);
        }
    }
}

fn boots() {
    let boot = |boot: fn(&Guest) -> f64, is_lent: bool| {
        let lent = is_lent.then(Lent::take);
        let path = lent.as_ref().map(Lent::path);
        Figures::from([(FIRST_USER.name, boot(&Guest { lent: path, ..with_root() }))])
    };
    let [ours, ours_lent, qemu, qemu_lent] = rounds(
        &mut [
            &mut || boot(ours::boot, false),
            &mut || boot(ours::boot, true),
            &mut || boot(qemu::boot, false),
            &mut || boot(qemu::boot, true),
        ],
        || {},
    );

    title("QEMU");
    println!("without a device");
    row(&FIRST_USER, &ours, &qemu);
    println!("with one");
    row(&FIRST_USER, &ours_lent, &qemu_lent);
}

/// What a boot is worth.
const FIRST_USER: Measure =
    Measure { name: "to the first user instruction", unit: "ms", more_is_better: false };

/// What of a guest is the same everywhere.
fn with_root() -> Guest {
    let root = registry_storage().with_file_name("measure.erofs");
    Guest { root, disk: None, lent: None }
}

/// Has each of `subjects` work once a round, and does something before each. Whoever comes second
/// finds writes of the first still on their way, so another is first each time.
fn rounds<const N: usize>(
    subjects: &mut [&mut dyn FnMut() -> Figures; N],
    mut before: impl FnMut(),
) -> [Vec<Figures>; N] {
    let mut figures = [const { Vec::new() }; N];
    for round in 0..ROUNDS {
        before();
        for turn in 0..N {
            let subject = (round + turn) % N;
            figures[subject].push(subjects[subject]());
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    figures
}

fn title(peer: &str) {
    println!(
        "medians of {ROUNDS}, 1 vCPU, 256 MiB{:>22}{peer:>12}{:>12}  of a round",
        "ovum", "ratio"
    );
}

/// Above 1 we are ahead, whichever way the figure counts. Beside the ratio of the medians are the
/// lowest and the highest of a round.
fn row(measure: &Measure, ours: &[Figures], theirs: &[Figures]) {
    let of = |figures: &[Figures]| figures.iter().map(|of| of[measure.name]).collect::<Vec<_>>();
    let (ours, theirs) = (of(ours), of(theirs));
    let ratio = |ours: f64, theirs: f64| {
        if measure.more_is_better { ours / theirs } else { theirs / ours }
    };
    let mut ratios: Vec<_> = ours.iter().zip(&theirs).map(|(o, t)| ratio(*o, *t)).collect();
    ratios.sort_by(f64::total_cmp);
    let (ours, theirs) = (median(ours), median(theirs));
    println!(
        "{:<36}{:<9}{ours:>12.2}{theirs:>12.2}{:>12.2}  {:.2} to {:.2}",
        measure.name,
        measure.unit,
        ratio(ours, theirs),
        ratios[0],
        ratios[ROUNDS - 1]
    );
}

/// What guests measure the network against, listening at all addresses of the host.
fn iperf3() -> Child {
    let mut command = Command::new("iperf3");
    command.arg("--server").stdout(Stdio::null()).spawn().expect("iperf3 runs")
}
