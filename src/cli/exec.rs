//! `ovum exec`: a command in an instance, as if it ran here.
//!
//! On a terminal it gets one, with its size and its keys; otherwise what is piped in goes to it,
//! with an end, and its output and error come out where they belong. We exit as it exits.

use std::convert::Infallible;
use std::future;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::ServerArgs;
use super::interrupt::interrupted;
use super::terminal::{self, Raw};
use crate::client::segment;
use crate::client::websocket::{Receiver, Said, Sender};

/// What is before output and error.
const CHANNEL_OUTPUT: u8 = 1;
const CHANNEL_ERROR: u8 = 2;

/// What can be typed after `ovum exec`.
#[derive(Debug, Args)]
pub(super) struct ExecArgs {
    /// Pass input on; that is always done, and the flag is for those who are used to it
    #[arg(short, long)]
    interactive: bool,
    /// On a terminal of its own, even if there is none here
    #[arg(short, long, conflicts_with = "no_tty")]
    tty: bool,
    /// Without a terminal, even if there is one here
    #[arg(short = 'T', long)]
    no_tty: bool,
    /// Environment variables
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory
    #[arg(short = 'w', long, visible_alias = "workdir", value_name = "PATH")]
    cwd: Option<String>,
    /// Seconds after which it is killed
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u32>,
    /// Id, name, or the beginning of an id
    instance: String,
    /// The command; a shell if there is none
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
}

/// Runs a command in an instance.
pub(super) async fn exec(args: ExecArgs) -> anyhow::Result<ExitCode> {
    let is_here = io::stdin().is_terminal() && io::stdout().is_terminal();
    let tty = args.tty || (is_here && !args.no_tty);
    let mut env = serde_json::Map::new();
    for pair in &args.env {
        let (name, value) = pair.split_once('=').with_context(|| {
            format!("Environment variable {pair:?} has no value: NAME=VALUE is expected")
        })?;
        env.insert(name.to_owned(), value.into());
    }
    let (rows, cols) = terminal::size().unzip();
    let request = json!({
        "command": args.command, "tty": tty, "env": env, "cwd": args.cwd,
        "timeout": args.timeout, "rows": rows, "cols": cols, "channels": true,
    });
    let client = args.server.client()?;
    let path = format!("/instances/{}/exec", segment(&args.instance));
    let (mut sender, receiver) = client.websocket(&path).await?;
    sender.say(request.to_string()).await?;
    let raw = (tty && io::stdin().is_terminal()).then(Raw::make).transpose();
    let raw = raw.context("Failed to prepare the terminal")?;
    let ended = tokio::select! {
        ended = show(receiver) => ended.map(ExitCode::from),
        failed = feed(sender, tty) => failed.map(|never| match never {}),
        code = interrupted() => code,
    };
    drop(raw);
    ended
}

/// Shows what the command writes until it has ended; returns its exit status.
async fn show(mut receiver: Receiver) -> anyhow::Result<u8> {
    loop {
        match receiver.next().await? {
            Said::Binary(bytes) => write(&bytes)?,
            Said::Text(text) => return exit_code(&text),
        }
    }
}

/// Passes input and sizes on for as long as it is let.
async fn feed(mut sender: Sender, tty: bool) -> anyhow::Result<Infallible> {
    let mut input = terminal::input();
    let mut has_input = true;
    let mut resized = signal(SignalKind::window_change())?;
    loop {
        let sent = tokio::select! {
            chunk = input.recv(), if has_input => match chunk {
                Some(bytes) => sender.send(bytes).await,
                None => {
                    has_input = false;
                    sender.say(json!({ "eof": true }).to_string()).await
                }
            },
            _ = resized.recv(), if tty => {
                let (rows, cols) = terminal::size().unzip();
                let resize = json!({ "resize": { "rows": rows, "cols": cols } });
                sender.say(resize.to_string()).await
            }
            else => Ok(()),
        };
        // A server that listens no more has said why, or is about to.
        if sent.is_err() || !(has_input || tty) {
            return future::pending().await;
        }
    }
}

fn write(bytes: &[u8]) -> anyhow::Result<()> {
    match bytes.split_first() {
        Some((&CHANNEL_OUTPUT, bytes)) => {
            let mut out = io::stdout().lock();
            out.write_all(bytes)?;
            out.flush()?;
        }
        Some((&CHANNEL_ERROR, bytes)) => io::stderr().lock().write_all(bytes)?,
        Some((channel, _)) => bail!("The server sent output for channel {channel}"),
        None => {}
    }
    Ok(())
}

fn exit_code(text: &str) -> anyhow::Result<u8> {
    let said: Value = serde_json::from_str(text).context("The server sent no JSON")?;
    if let Some(error) = said["error"].as_str() {
        bail!("{error}");
    }
    let code = said["exitCode"].as_u64().context("The server sent no exit status")?;
    Ok(u8::try_from(code).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_is_a_status_or_a_reason() {
        assert_eq!(exit_code(r#"{"exitCode":42}"#).unwrap(), 42);
        let error = exit_code(r#"{"error":"invalid JSON: x"}"#).unwrap_err();
        assert_eq!(error.to_string(), "invalid JSON: x");
        assert!(exit_code("{}").is_err() && exit_code("hello").is_err());
    }
}
