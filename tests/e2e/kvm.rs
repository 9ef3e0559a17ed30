//! The monitor's own suite against the real KVM: another program, whose tests count with ours.

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
}

/// Runs those of its tests that `which` tells it, one after the other, and passes on what it says.
pub(crate) fn run(which: &[&str]) -> Tally {
    let program = env::var_os("OVUM_KVM_SUITE")
        .expect("OVUM_KVM_SUITE names the program that dev/end-to-end built");
    let mut suite = Command::new(program)
        .args(["--test-threads", "1"])
        .args(which)
        .stdout(Stdio::piped())
        .spawn()
        .expect("the suite of the monitor starts");
    let mut tally = None;
    for line in BufReader::new(suite.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        println!("{line}");
        tally = verdict(&line).or(tally);
    }
    let has_passed = suite.wait().unwrap().success();
    // One that ends without a verdict is a test that failed.
    let tally = tally.unwrap_or(Tally { passed: 0, failed: 1 });
    Tally { failed: tally.failed.max(usize::from(!has_passed)), ..tally }
}

/// What `test result: ok. 5 passed; 0 failed; ...` says.
fn verdict(line: &str) -> Option<Tally> {
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let count = |what| {
        let count = counts.split("; ").find_map(|count| count.strip_suffix(what))?;
        count.parse().ok()
    };
    Some(Tally { passed: count(" passed")?, failed: count(" failed")? })
}
