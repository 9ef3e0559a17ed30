//! `ovum stop`, `start`, `update`, `rm`: orders to instances, several at a time.
//!
//! Each instance is done or refused by itself; the names of those that are done come out in the
//! order in which they were typed, and one that is refused makes the command fail at its end.

use std::pin::pin;

use anyhow::{Context, bail, ensure};
use clap::Args;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use super::upkeep::UpkeepArgs;
use super::{AT_REST, ServerArgs, output};
use crate::api::instances::start::StartInstance;
use crate::api::instances::update::UpdateInstance;
use crate::api::instances::upkeep::UpkeepFields;
use crate::api::instances::view::InstanceView;
use crate::client::{Client, ClientError, segment};

/// Orders that are under way at a time.
const AT_A_TIME: usize = 16;

/// Which instances, and how to tell what came of it.
#[derive(Debug, Args)]
struct Whom {
    /// Ids, names, or beginnings of ids
    #[arg(required = true)]
    instances: Vec<String>,
    /// The instances as they are now, as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// What can be typed after `ovum stop`.
#[derive(Debug, Args)]
pub(super) struct StopArgs {
    #[command(flatten)]
    whom: Whom,
}

/// What can be typed after `ovum start`.
#[derive(Debug, Args)]
pub(super) struct StartArgs {
    /// Instead of the entrypoint so far; may be repeated, one word each
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// Instead of the arguments so far; may be repeated, one word each
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    cmd: Vec<String>,
    #[command(flatten)]
    whom: Whom,
}

/// What can be typed after `ovum update`.
#[derive(Debug, Args)]
pub(super) struct UpdateArgs {
    #[command(flatten)]
    upkeep: UpkeepArgs,
    #[command(flatten)]
    whom: Whom,
}

/// What can be typed after `ovum rm`.
#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Ids, names, or beginnings of ids
    #[arg(required_unless_present = "all")]
    instances: Vec<String>,
    /// Also instances that run
    #[arg(short, long)]
    force: bool,
    /// All instances
    #[arg(long, conflicts_with = "instances")]
    all: bool,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn stop(args: StopArgs) -> anyhow::Result<()> {
    let client = args.whom.server.client()?;
    let stop = async |path: String| client.post(&format!("{path}/stop"), &json!({})).await;
    args.whom.order("stop", stop).await
}

pub(super) async fn start(args: StartArgs) -> anyhow::Result<()> {
    let client = args.whom.server.client()?;
    let body = StartInstance { entrypoint: Some(args.entrypoint), cmd: Some(args.cmd) };
    let start = async |path: String| client.post(&format!("{path}/start"), &body).await;
    args.whom.order("start", start).await
}

pub(super) async fn update(args: UpdateArgs) -> anyhow::Result<()> {
    let client = args.whom.server.client()?;
    let upkeep = args.upkeep.fields();
    if upkeep == UpkeepFields::default() {
        bail!(
            "There is nothing to change: give one of --restart, --health-cmd, --no-healthcheck, \
             --ttl, --expires-at"
        );
    }
    let body = UpdateInstance { upkeep, ..UpdateInstance::default() };
    let update = async |path: String| client.patch(&path, &body).await;
    args.whom.order("update", update).await
}

pub(super) async fn rm(args: RmArgs) -> anyhow::Result<()> {
    let client = args.server.client()?;
    let keys = if args.all {
        let instances: Vec<InstanceView> = client.get("/instances").await?;
        instances.into_iter().map(|instance| instance.id).collect()
    } else {
        args.instances
    };
    let remove = async |key: String| remove(&client, &key, args.force).await;
    each(keys, remove, |key, ()| output::line(key)).await
}

/// Deletes what lies at `keys` in `folder` of the API and prints each, up to the first that stays.
pub(super) async fn delete_each(
    client: &Client,
    folder: &str,
    keys: Vec<String>,
) -> anyhow::Result<()> {
    for key in keys {
        let path = format!("{folder}/{}", segment(&key));
        client.delete(&path).await.with_context(|| format!("Failed to delete {key}"))?;
        output::line(key)?;
    }
    Ok(())
}

async fn remove(client: &Client, key: &str, force: bool) -> anyhow::Result<()> {
    let path = format!("/instances/{}", segment(key));
    let failed = || format!("Failed to delete {key}");
    let instance: InstanceView = client.get(&path).await.with_context(failed)?;
    if !force && !AT_REST.contains(&instance.state.as_str()) {
        bail!("Instance {key} is {}: --force deletes it", instance.state);
    }
    client.delete(&path).await.with_context(failed)
}

impl Whom {
    /// Gives each of them an order, which gets the path of its instance.
    async fn order(
        self,
        verb: &str,
        order: impl AsyncFn(String) -> Result<Value, ClientError>,
    ) -> anyhow::Result<()> {
        let mut done = Vec::new();
        let order = async |key: String| {
            let answer = order(format!("/instances/{}", segment(&key))).await;
            answer.with_context(|| format!("Failed to {verb} {key}"))
        };
        let outcome = each(self.instances, order, |key, instance| {
            if self.json {
                done.push(instance);
                return Ok(());
            }
            output::line(key)
        });
        let outcome = outcome.await;
        if self.json {
            output::json(&done)?;
        }
        outcome
    }
}

/// Has `order` done for each of `keys`, and `tell` told about those for which it was.
async fn each<T>(
    keys: Vec<String>,
    order: impl AsyncFn(String) -> anyhow::Result<T>,
    mut tell: impl FnMut(String, T) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let order = &order;
    let ordered = keys.into_iter().map(|key| async move { (key.clone(), order(key).await) });
    let mut outcomes = pin!(stream::iter(ordered).buffered(AT_A_TIME));
    let mut failed = 0;
    while let Some((key, outcome)) = outcomes.next().await {
        match outcome {
            Ok(done) => tell(key, done)?,
            Err(error) => {
                output::error(&error);
                failed += 1;
            }
        }
    }
    ensure!(failed == 0, "{failed} failed");
    Ok(())
}
