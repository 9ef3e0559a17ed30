//! `ovum stats`: what instances cost the host, once. `ovum top` goes on.

use anyhow::Context;
use clap::Args;
use futures_util::{StreamExt, TryStreamExt, stream};

use super::{AT_REST, ServerArgs, output};
use crate::api::instances::view::InstanceView;
use crate::api::stats::StatsView;
use crate::client::{Client, segment};

/// Instances that are asked at a time.
pub(super) const AT_A_TIME: usize = 16;

/// What can be typed after `ovum stats`.
#[derive(Debug, Args)]
pub(super) struct StatsArgs {
    /// Ids, names, or beginnings of ids; all that run if there are none
    instances: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
    /// Once; that is always so, and the flag is for those who are used to it
    #[arg(long)]
    no_stream: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Shows what they cost.
pub(super) async fn stats(args: StatsArgs) -> anyhow::Result<()> {
    let client = args.server.client()?;
    let keys = if args.instances.is_empty() {
        running(&client).await?.into_iter().map(|instance| instance.id).collect()
    } else {
        args.instances
    };
    let cost = async |key: &String| {
        let stats: Result<StatsView, _> =
            client.get(&format!("/instances/{}/stats", segment(key))).await;
        stats.with_context(|| format!("Failed to read the stats of {key}"))
    };
    let costs = stream::iter(&keys).map(cost).buffered(AT_A_TIME);
    let stats: Vec<_> = costs.try_collect().await?;
    if args.json {
        return output::json(&stats);
    }
    let rows: Vec<_> = stats.iter().map(row).collect();
    output::table(
        ["NAME", "VCPUS", "CPU TIME", "MEM USED", "MEMORY", "MEM %", "NET RX", "NET TX"],
        &rows,
    )
}

fn row(stats: &StatsView) -> [String; 8] {
    [
        stats.instance_name.clone(),
        stats.allocated_vcpus.to_string(),
        format!("{:.1} s", stats.cpu_seconds),
        output::size(stats.memory_rss_bytes),
        output::size(stats.allocated_memory_bytes),
        percent(stats.memory_utilization_ratio),
        output::size(stats.network_rx_bytes),
        output::size(stats.network_tx_bytes),
    ]
}

/// The instances that cost more than disk.
pub(super) async fn running(client: &Client) -> anyhow::Result<Vec<InstanceView>> {
    let mut instances: Vec<InstanceView> = client.get("/instances").await?;
    instances.retain(|instance| !AT_REST.contains(&instance.state.as_str()));
    Ok(instances)
}

/// A ratio for people, if there is one.
pub(super) fn percent(ratio: Option<f64>) -> String {
    ratio.map_or("-".to_owned(), |ratio| format!("{:.1}", ratio * 100.0))
}
