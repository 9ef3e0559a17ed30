//! `ovum device`: what of the host could be given to instances, registered and forgotten.

use clap::{Args, Subcommand};

use super::orders::delete_each;
use super::{ListArgs, ServerArgs, output, tags};
use crate::api::devices::{AvailableDevice, DeviceView, RegisterDevice};
use crate::client::segment;

/// What can be typed after `ovum device`.
#[derive(Debug, Subcommand)]
pub(super) enum DeviceCommand {
    /// List devices of the host that can be registered
    Available(ListArgs),
    /// Register a device, so that instances can have it, and print its id
    Register(RegisterArgs),
    /// List registered devices
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show all there is to know about a registered device, as JSON
    #[command(visible_alias = "inspect")]
    Get(GetArgs),
    /// Forget devices that no instance has
    #[command(visible_alias = "rm")]
    Delete(DeleteArgs),
}

#[derive(Debug, Args)]
pub(super) struct RegisterArgs {
    /// Where it is: 0000:a2:00.0
    #[arg(long, value_name = "ADDRESS")]
    pci_address: String,
    /// Its name; made of the address if omitted
    #[arg(long)]
    name: Option<String>,
    /// Tag: KEY=VALUE; may be repeated
    #[arg(short = 'l', long)]
    tag: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct GetArgs {
    /// Id or name
    #[arg(required_unless_present = "id")]
    device: Option<String>,
    /// Id or name, said in another way
    #[arg(long, conflicts_with = "device")]
    id: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct DeleteArgs {
    /// Ids or names
    #[arg(required_unless_present = "id")]
    devices: Vec<String>,
    /// Id or name, said in another way
    #[arg(long)]
    id: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn device(command: DeviceCommand) -> anyhow::Result<()> {
    match command {
        DeviceCommand::Available(args) => available(args).await,
        DeviceCommand::Register(args) => register(args).await,
        DeviceCommand::List(args) => list(args).await,
        DeviceCommand::Get(GetArgs { device, id, server }) => {
            let path = format!("/devices/{}", segment(&device.or(id).unwrap_or_default()));
            output::json(&server.client()?.get::<DeviceView>(&path).await?)
        }
        DeviceCommand::Delete(DeleteArgs { devices, id, server }) => {
            let devices = devices.into_iter().chain(id).collect();
            delete_each(&server.client()?, "/devices", devices).await
        }
    }
}

async fn available(args: ListArgs) -> anyhow::Result<()> {
    let devices: Vec<AvailableDevice> = args.server.client()?.get("/devices/available").await?;
    if args.json {
        return output::json(&devices);
    }
    let rows: Vec<_> = devices
        .into_iter()
        .map(|device| {
            let AvailableDevice { vendor_id, device_id, vendor_name, device_name, .. } = device;
            let name = [vendor_name.unwrap_or(vendor_id), device_name.unwrap_or(device_id)];
            [
                device.pci_address,
                device.iommu_group.to_string(),
                device.current_driver.unwrap_or_default(),
                name.join(" "),
            ]
        })
        .collect();
    output::table(["ADDRESS", "IOMMU GROUP", "DRIVER", "NAME"], &rows)
}

async fn register(args: RegisterArgs) -> anyhow::Result<()> {
    let RegisterArgs { pci_address, name, tag, server } = args;
    let body = RegisterDevice { pci_address, name, tags: Some(tags::parsed(&tag)) };
    let device: DeviceView = server.client()?.post("/devices", &body).await?;
    output::line(device.id)
}

async fn list(args: ListArgs) -> anyhow::Result<()> {
    let devices: Vec<DeviceView> = args.server.client()?.get("/devices").await?;
    if args.json {
        return output::json(&devices);
    }
    let rows: Vec<_> = devices
        .into_iter()
        .map(|device| {
            [
                device.id,
                device.name,
                device.kind,
                if device.gone {
                    format!("{} (gone)", device.pci_address)
                } else {
                    device.pci_address
                },
                device.attached_to.unwrap_or_default(),
                output::ago(device.created_at),
            ]
        })
        .collect();
    output::table(["ID", "NAME", "TYPE", "ADDRESS", "ATTACHED TO", "CREATED"], &rows)
}
