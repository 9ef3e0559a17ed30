//! `ovum resources`: what the host has, and who was promised what.

use super::{ListArgs, output};
use crate::api::resources::{GpuProfileView, GpuStatusView, ResourcesView, StatusView};

pub(super) async fn resources(args: ListArgs) -> anyhow::Result<()> {
    let view: ResourcesView = args.server.client()?.get("/resources").await?;
    if args.json {
        return output::json(&view);
    }
    let number = |number: u64| number.to_string();
    let mut rows = vec![row(&view.cpu, number), row(&view.memory, output::size)];
    rows.push(row(&view.disk, output::size));
    // Without a source nobody knows the host's.
    let rate = |bps| format!("{}/s", output::size(bps));
    let rates = [Some(&view.network), view.disk_io.as_ref()];
    let known = rates.into_iter().flatten().filter(|status| status.source.is_some());
    rows.extend(known.map(|status| row(status, rate)));
    output::table(["", "CAPACITY", "RATIO", "LIMIT", "PROMISED", "LEFT"], &rows)?;
    if let Some(gpu) = &view.gpu {
        output::line("")?;
        gpus(gpu)?;
    }
    if view.allocations.is_empty() {
        return Ok(());
    }
    output::line("")?;
    let rows: Vec<_> = view
        .allocations
        .iter()
        .map(|allocation| {
            [
                allocation.instance_name.clone(),
                allocation.cpu.to_string(),
                output::size(allocation.memory_bytes),
                output::size(allocation.disk_bytes),
            ]
        })
        .collect();
    output::table(["INSTANCE", "VCPUS", "MEMORY", "DISK"], &rows)
}

fn gpus(gpu: &GpuStatusView) -> anyhow::Result<()> {
    let parts = gpu.profiles.iter().map(|profile| {
        let GpuProfileView { name, framebuffer_mb, available } = profile;
        let memory = match framebuffer_mb {
            0 => String::new(),
            mib => output::size(mib.saturating_mul(1 << 20)),
        };
        [name.clone(), memory, available.to_string()]
    });
    let whole = gpu.devices.iter().map(|device| {
        let left = u8::from(device.available).to_string();
        [device.name.clone(), String::new(), left]
    });
    output::table(["GPU", "MEMORY", "LEFT"], &parts.chain(whole).collect::<Vec<_>>())
}

fn row(status: &StatusView, text: impl Fn(u64) -> String) -> [String; 6] {
    [
        status.kind.clone(),
        text(status.capacity),
        status.oversub_ratio.to_string(),
        text(status.effective_limit),
        text(status.allocated),
        text(status.available),
    ]
}
