//! `ovum ps`, `logs`, `inspect`: what there is to see.

use std::pin::pin;

use clap::{Args, ValueEnum};
use futures_util::TryStreamExt;

use super::{AT_REST, ServerArgs, output};
use crate::api::instances::view::InstanceView;
use crate::client::segment;

/// Characters of an id in a table: enough to tell instances apart, and to be typed.
const ID_CHARS: usize = 12;

/// What can be typed after `ovum ps`.
#[derive(Debug, Args)]
pub(super) struct PsArgs {
    /// Those that ended, too
    #[arg(short, long)]
    all: bool,
    /// Ids only
    #[arg(short, long)]
    quiet: bool,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// What can be typed after `ovum logs`.
#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// Id, name, or the beginning of an id
    instance: String,
    /// Go on until the instance stops
    #[arg(short, long)]
    follow: bool,
    /// Lines from the end
    #[arg(long, default_value_t = 100)]
    tail: usize,
    /// Which log
    #[arg(short, long, default_value = "app")]
    source: Source,
    #[command(flatten)]
    server: ServerArgs,
}

/// Which log.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Source {
    /// The guest's console
    App,
    /// The machine's process
    Vmm,
    /// What the server did with it
    Hypeman,
}

/// What can be typed after `ovum inspect`.
#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Id, name, or the beginning of an id
    instance: String,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn ps(args: PsArgs) -> anyhow::Result<()> {
    let mut instances: Vec<InstanceView> = args.server.client()?.get("/instances").await?;
    instances.retain(|instance| args.all || !AT_REST.contains(&instance.state.as_str()));
    if args.json {
        return output::json(&instances);
    }
    if args.quiet {
        return instances.iter().try_for_each(|instance| output::line(&instance.id));
    }
    let rows: Vec<_> = instances.iter().map(row).collect();
    output::table(["ID", "NAME", "IMAGE", "STATE", "CREATED"], &rows)
}

fn row(instance: &InstanceView) -> [String; 5] {
    let state = match (instance.exit_code, &instance.state_error) {
        (Some(code), _) => format!("{} ({code})", instance.state),
        (None, Some(_)) => format!("{} (error)", instance.state),
        (None, None) => instance.state.clone(),
    };
    [
        instance.id.get(..ID_CHARS).unwrap_or(&instance.id).to_owned(),
        instance.name.clone(),
        instance.image.clone(),
        state,
        output::ago(instance.created_at),
    ]
}

pub(super) async fn logs(args: LogsArgs) -> anyhow::Result<()> {
    let source = match args.source {
        Source::App => "app",
        Source::Vmm => "vmm",
        Source::Hypeman => "hypeman",
    };
    let follow = if args.follow { "&follow=true&until=Stopped" } else { "" };
    let instance = segment(&args.instance);
    let path = format!("/instances/{instance}/logs?tail={}&source={source}{follow}", args.tail);
    let client = args.server.client()?;
    let mut lines = pin!(client.lines(&path).await?);
    while let Some(line) = lines.try_next().await? {
        output::line(line)?;
    }
    Ok(())
}

pub(super) async fn inspect(args: InspectArgs) -> anyhow::Result<()> {
    let path = format!("/instances/{}", segment(&args.instance));
    output::json(&args.server.client()?.get::<serde_json::Value>(&path).await?)
}
