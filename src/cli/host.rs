//! Commands that need no server: `token`, `doctor`, `initramfs`.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;

use super::output;
use crate::config::{self, Config, ConfigArgs, DATA_DIR};
use crate::doctor::{self, Problem};
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
    /// The server's data folder; OVUM_JWT_SECRET goes before the secret in it
    #[arg(long, env = "OVUM_DATA_DIR", default_value = DATA_DIR)]
    data_dir: PathBuf,
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
    let secret = match config::jwt_secret() {
        Some(secret) => Secret::new(&secret),
        None => Secret::load(&args.data_dir).context(
            "There is no secret: run this as the server's user after its first start, or set \
             OVUM_JWT_SECRET for both",
        )?,
    };
    output::line(secret.mint(&args.user_id, lifetime, args.scopes))
}

pub(super) fn doctor(args: ConfigArgs) -> anyhow::Result<ExitCode> {
    let config = Config::try_from(args)?;
    let [good, bad, plain] =
        if io::stdout().is_terminal() { ["\x1b[32m", "\x1b[31m", "\x1b[0m"] } else { [""; 3] };
    let mut code = ExitCode::SUCCESS;
    for finding in doctor::examine(&config) {
        let subject = finding.subject;
        match finding.outcome {
            Ok(what) => output::line(format!("{good}ok  {plain} {subject}: {what}"))?,
            Err(Problem { what, mend }) => {
                output::line(format!("{bad}FAIL{plain} {subject}: {what}"))?;
                output::line(format!("     mend: {mend}"))?;
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
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
    let config = Config::try_from(args.config.clone())?;
    let agent = fs::read(&config.agent)
        .with_context(|| format!("Failed to read the guest agent {}", config.agent.display()))?;
    let archive = Archive::base(&agent)?;
    fs::write(&args.output, archive.bytes())
        .with_context(|| format!("Failed to write {}", args.output.display()))
}
