//! Being told to end, by a person or a program.

use std::process::ExitCode;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Exit codes after a signal: 128 and its number.
const HUNG_UP: u8 = 129;
const INTERRUPTED: u8 = 130;
const TERMINATED: u8 = 143;

/// Waits to be told to end; returns the exit code for it.
pub(super) async fn interrupted() -> anyhow::Result<ExitCode> {
    let mut hang_up = signal(SignalKind::hangup()).context("Failed to await SIGHUP")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("Failed to await Ctrl-C")?;
    let mut terminate = signal(SignalKind::terminate()).context("Failed to await SIGTERM")?;
    Ok(ExitCode::from(tokio::select! {
        _ = hang_up.recv() => HUNG_UP,
        _ = interrupt.recv() => INTERRUPTED,
        _ = terminate.recv() => TERMINATED,
    }))
}
