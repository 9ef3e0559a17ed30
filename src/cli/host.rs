//! Commands that need no server: `token`, `doctor`, `completions`, `initramfs`.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Command};
use clap_complete::{Shell, generate};
use serde_json::{Value, json};

use super::{NAME, output};
use crate::config::{ConfigArgs, HomeArgs};
use crate::doctor::{self, Finding, Problem};
use crate::duration::GoDuration;
use crate::initramfs::Archive;
use crate::token::{Scope, Secret};

/// What can be typed after `ovum token`.
#[derive(Debug, Args)]
pub(super) struct TokenArgs {
    /// Whose token it is, for the server's log
    #[arg(long, default_value = "admin")]
    user_id: String,
    /// How long it is valid
    #[arg(long, default_value = "24h")]
    duration: GoDuration,
    /// What it allows; everything if omitted
    #[arg(long, value_delimiter = ',')]
    scopes: Option<Vec<String>>,
    /// List what can be allowed
    #[arg(long)]
    list_scopes: bool,
    #[command(flatten)]
    home: HomeArgs,
}

pub(super) fn token(args: TokenArgs) -> anyhow::Result<()> {
    if args.list_scopes {
        return Scope::NAMES.into_iter().try_for_each(output::line);
    }
    let unknown = |scope: &&String| !Scope::NAMES.contains(&scope.as_str());
    if let Some(scope) = args.scopes.iter().flatten().find(unknown) {
        bail!("There is no scope {scope:?}: `ovum token --list-scopes` lists them");
    }
    let lifetime = args.duration.positive().context("A token must be valid for some time")?;
    let home = args.home.find()?;
    let secret = match home.jwt_secret {
        Some(secret) => Secret::new(&secret),
        None => Secret::load(&home.data_dir).context(
            "There is no secret: run this as the server's user after its first start, or set \
             OVUM_JWT_SECRET for both",
        )?,
    };
    output::line(secret.mint(&args.user_id, lifetime, args.scopes))
}

/// What can be typed after `ovum doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    config: ConfigArgs,
}

pub(super) fn doctor(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let findings = doctor::examine(&args.config.load()?);
    if args.json {
        output::json(&findings.iter().map(as_json).collect::<Vec<_>>())?;
    } else {
        show(&findings)?;
    }
    let all_is_well = findings.iter().all(|finding| finding.outcome.is_ok());
    Ok(if all_is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn as_json(finding: &Finding) -> Value {
    let Finding { subject, outcome } = finding;
    match outcome {
        Ok(what) => json!({ "subject": subject, "ok": true, "what": what }),
        Err(Problem { what, mend }) => {
            json!({ "subject": subject, "ok": false, "what": what, "mend": mend })
        }
    }
}

fn show(findings: &[Finding]) -> anyhow::Result<()> {
    let [good, bad, plain] =
        if io::stdout().is_terminal() { ["\x1b[32m", "\x1b[31m", "\x1b[0m"] } else { [""; 3] };
    for Finding { subject, outcome } in findings {
        match outcome {
            Ok(what) => output::line(format!("{good}ok  {plain} {subject}: {what}"))?,
            Err(Problem { what, mend }) => {
                output::line(format!("{bad}FAIL{plain} {subject}: {what}"))?;
                output::line(format!("     mend: {mend}"))?;
            }
        }
    }
    Ok(())
}

/// What can be typed after `ovum completions`.
#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// For which shell
    shell: Shell,
}

/// Writes the script that makes a shell complete `command`, without what is not for people.
pub(super) fn completions(args: &CompletionsArgs, command: &Command) -> anyhow::Result<()> {
    let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
    let mut shown = Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .propagate_version(true)
        .subcommands(shown.cloned());
    let mut script = Vec::new();
    generate(args.shell, &mut shown, NAME, &mut script);
    output::line(String::from_utf8_lossy(&script).trim_end())
}

/// What can be typed after `ovum initramfs`.
#[derive(Debug, Args)]
pub(super) struct InitramfsArgs {
    /// Where to write it
    #[arg(long)]
    output: PathBuf,
    #[command(flatten)]
    config: ConfigArgs,
}

/// Writes the part of the initramfs that is the same for every guest.
pub(super) fn initramfs(args: &InitramfsArgs) -> anyhow::Result<()> {
    let config = args.config.clone().load()?;
    let agent = fs::read(&config.agent)
        .with_context(|| format!("Failed to read the guest agent {}", config.agent.display()))?;
    let archive = Archive::base(&agent)?;
    fs::write(&args.output, archive.bytes())
        .with_context(|| format!("Failed to write {}", args.output.display()))
}
