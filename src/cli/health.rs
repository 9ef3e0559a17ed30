//! `ovum health`: whether the server answers, or whether instances are well.

use std::process::ExitCode;

use clap::Args;
use serde_json::{Value, json};

use super::{ServerArgs, output};
use crate::api::instances::view::InstanceView;
use crate::client::segment;

/// What can be typed after `ovum health`.
#[derive(Debug, Args)]
pub(super) struct HealthArgs {
    /// Ids, names, or beginnings of ids; the server itself if there are none
    instances: Vec<String>,
    /// As JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: ServerArgs,
}

/// Tells how they are; fails if one is unhealthy.
pub(super) async fn health(args: HealthArgs) -> anyhow::Result<ExitCode> {
    let client = args.server.client()?;
    if args.instances.is_empty() {
        let health: Value = client.get("/health").await?;
        if args.json {
            output::json(&health)?;
        } else {
            output::line(health["status"].as_str().unwrap_or("unknown"))?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut instances = Vec::new();
    for key in &args.instances {
        let path = format!("/instances/{}", segment(key));
        instances.push(client.get::<InstanceView>(&path).await?);
    }
    if args.json {
        let as_json = |instance: &InstanceView| {
            json!({
                "id": instance.id, "name": instance.name, "state": instance.state,
                "health_status": instance.health_status,
            })
        };
        output::json(&instances.iter().map(as_json).collect::<Vec<_>>())?;
    } else {
        let rows: Vec<_> = instances.iter().map(row).collect();
        output::table(["NAME", "STATE", "HEALTH", "FAILURES", "CHECKED", "ERROR"], &rows)?;
    }
    let is_unhealthy = |instance: &InstanceView| instance.health_status.status == "unhealthy";
    let is_well = !instances.iter().any(is_unhealthy);
    Ok(if is_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn row(instance: &InstanceView) -> [String; 6] {
    let health = &instance.health_status;
    let error = health.last_error.as_deref().unwrap_or_default();
    [
        instance.name.clone(),
        instance.state.clone(),
        health.status.clone(),
        health.consecutive_failures.to_string(),
        health.last_checked_at.map(output::ago).unwrap_or_default(),
        error.lines().next().unwrap_or_default().to_owned(),
    ]
}
