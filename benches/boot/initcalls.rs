//! What the guest kernel calls one after the other as it starts, and how long each call took, by
//! its own word (`initcall_debug`).

use std::process::Stdio;

use ovum_test_host::{ovum, root};
use tokio::process::Command;

/// How many are reported: all others are small.
const SHOWN_MAX: usize = 12;

/// Until the kernel has its clock it measures in ticks (`CONFIG_HZ_250`): what seems to take so
/// many microseconds, or none, was not measured.
const TICK_MICROS: u32 = 4_000;

/// What has the kernel keep it and say all of it when it panics (`panic_print`): a line that goes
/// to the console at once takes longer than nearly every call does.
const CMDLINE: &str = "initcall_debug log_buf_len=1M printk.ignore_loglevel=N panic_print=0x20";

/// The dearest of one boot of a bare kernel, which ends where it finds no root; in milliseconds.
pub(crate) async fn dearest() -> Vec<(String, f64)> {
    let mut command = Command::new(ovum());
    command.arg("boot").arg("--kernel").arg(root().join("target/kernel/vmlinux"));
    command
        .args(["--memory-mib", "128", "--cmdline", CMDLINE])
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let console = command.output().await.unwrap().stdout;
    let console = String::from_utf8_lossy(&console);
    let mut calls: Vec<_> = console.lines().filter_map(call).collect();
    assert!(calls.len() > SHOWN_MAX, "the kernel did not say what it called: {console}");
    calls.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    calls.truncate(SHOWN_MAX);
    calls
}

/// `... initcall NAME+0x0/0x10 returned 0 after 123 usecs`
fn call(line: &str) -> Option<(String, f64)> {
    let (name, rest) = line.split_once("initcall ")?.1.split_once('+')?;
    let took: u32 = rest.split_once(" after ")?.1.strip_suffix(" usecs")?.parse().ok()?;
    (!took.is_multiple_of(TICK_MICROS)).then(|| (name.to_owned(), f64::from(took) / 1e3))
}
