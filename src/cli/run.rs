//! `ovum run`: the whole way from an image's name to an exit code.
//!
//! Without a server the command is one itself for that long, and leaves only the image behind.

use std::collections::BTreeMap;
use std::env;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use futures_util::TryStreamExt;

use super::embedded::Reached;
use super::interrupt::interrupted;
use super::upkeep::UpkeepArgs;
use super::{ServerArgs, images, output, tags, volumes, waterfall};
use crate::api::instances::WaitView;
use crate::api::instances::create::CreateInstance;
use crate::api::instances::devices::Gpu;
use crate::api::instances::extras::Network;
use crate::api::instances::view::InstanceView;
use crate::api::instances::volumes::VolumeMount;
use crate::client::{Client, ClientError, segment};
use crate::timeline;

/// Exit code if the workload has none, as docker does it.
const NO_EXIT_CODE: u8 = 125;

/// Longest name that is made from an image's: four characters and a dash follow.
const NAME_CHARS_MAX: usize = 40;

/// What can be typed after `ovum run`.
#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// For example alpine or docker.io/library/alpine:3.20
    image: String,
    /// Instead of the image's command
    #[arg(last = true)]
    command: Vec<String>,
    /// Name of the instance; made from the image's if omitted
    #[arg(long)]
    name: Option<String>,
    /// Environment: NAME=VALUE, or NAME to pass on one's own; may be repeated
    #[arg(short, long)]
    env: Vec<String>,
    /// Memory
    #[arg(long, default_value = "1GB")]
    memory: String,
    /// Memory that is added once the workload runs
    #[arg(long, value_name = "SIZE")]
    hotplug_size: Option<String>,
    /// vCPUs
    #[arg(long, default_value_t = 2)]
    cpus: i64,
    /// Size of the writable layer
    #[arg(long, default_value = "10GB")]
    overlay_size: String,
    /// Volume: NAME:/PATH, NAME:/PATH:ro or NAME:/PATH:ro:overlay=SIZE; may be repeated
    #[arg(short, long, value_parser = volumes::mount)]
    volume: Vec<VolumeMount>,
    /// Device of the host, by id or name; may be repeated
    #[arg(long, value_name = "DEVICE")]
    device: Vec<String>,
    /// Part of a GPU of the host, as `ovum resources` names them
    #[arg(long, value_name = "PROFILE")]
    gpu_profile: Option<String>,
    /// Most bytes per second to and from its disks together: 100MB/s, or 0 for no limit
    #[arg(long, value_name = "RATE")]
    disk_io: Option<String>,
    /// Instead of the image's entrypoint; may be repeated, one word each
    #[arg(long, allow_hyphen_values = true)]
    entrypoint: Vec<String>,
    /// Tag: KEY=VALUE; may be repeated
    #[arg(short = 'l', long)]
    tag: Vec<String>,
    /// Whether it has a network; if not said, it has one if the server can give it
    #[arg(long, value_name = "BOOL")]
    network: Option<bool>,
    /// What modules for its kernel are built with, in /usr/src and /lib/modules
    #[arg(long)]
    kernel_headers: bool,
    /// The guest's agent does not listen
    #[arg(long)]
    skip_guest_agent: bool,
    /// Delete the instance afterwards
    #[arg(long, conflicts_with = "detach")]
    rm: bool,
    /// Print the id and leave it running
    #[arg(short, long)]
    detach: bool,
    /// Say afterwards where the time of the boot went
    #[arg(long, conflicts_with = "detach")]
    timeline: bool,
    #[command(flatten)]
    upkeep: UpkeepArgs,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn run(args: RunArgs) -> anyhow::Result<ExitCode> {
    let RunArgs { rm, detach, timeline, ref server, .. } = args;
    let mut server = Reached::open(server.clone()).await?;
    if detach && server.is_embedded() {
        server.close().await;
        bail!("--detach needs a server that stays: `ovum serve` starts one");
    }
    // A guest that nobody could ever end would outlive a command that is killed.
    let ends_with_server = server.is_embedded().then_some(true);
    let body = CreateInstance { ends_with_server, ..request(args) };
    let created = OnceLock::new();
    let (outcome, is_cut_off) = tokio::select! {
        code = work(&mut server, &body, &created, (detach, timeline)) => (code, false),
        code = interrupted() => (code, true),
    };
    let cleaned = match created.get() {
        // Without a server nobody could ever ask for it again.
        Some(instance) if rm || server.is_embedded() => remove(server.client(), instance).await,
        Some(InstanceView { name, .. }) if is_cut_off => {
            output::note(&format!("Instance {name} runs on; `ovum rm -f {name}` ends it"));
            Ok(())
        }
        _ => Ok(()),
    };
    server.close().await;
    let code = outcome?;
    cleaned.map(|()| code)
}

async fn remove(client: &Client, instance: &InstanceView) -> anyhow::Result<()> {
    let path = format!("/instances/{}", segment(&instance.id));
    client.delete(&path).await.context("Failed to delete the instance")
}

/// Pulls, creates and attends. What was created is told at once: this may be cut off anywhere.
async fn work(
    server: &mut Reached,
    body: &CreateInstance,
    created: &OnceLock<InstanceView>,
    (detach, timeline): (bool, bool),
) -> anyhow::Result<ExitCode> {
    images::ensure(server.client(), &body.image).await?;
    let instance: InstanceView = server.client().post("/instances", body).await?;
    let instance = created.get_or_init(|| instance);
    if detach {
        output::line(&instance.id)?;
        return Ok(ExitCode::SUCCESS);
    }
    let path = format!("/instances/{}", segment(&instance.id));
    let mut shown = 0;
    let ended = loop {
        match attend(server.client(), &path, &mut shown).await {
            Ok(ended) => break ended,
            Err(error) => {
                let is_gone = error.downcast_ref().is_some_and(ClientError::is_gone);
                if !is_gone || !server.find_another().await? {
                    return Err(error);
                }
            }
        }
    };
    Ok(tell(&ended, timeline))
}

fn request(args: RunArgs) -> CreateInstance {
    let name = args.name.unwrap_or_else(|| name_from(&args.image));
    CreateInstance {
        image: args.image,
        name,
        size: Some(args.memory),
        hotplug_size: args.hotplug_size,
        disk_io_bps: args.disk_io,
        overlay_size: Some(args.overlay_size),
        vcpus: Some(args.cpus),
        env: Some(environment(&args.env)),
        tags: Some(tags::parsed(&args.tag)),
        network: args
            .network
            .map(|enabled| Network { enabled: Some(enabled), ..Network::default() }),
        upkeep: args.upkeep.fields(),
        volumes: Some(args.volume).filter(|volumes| !volumes.is_empty()),
        devices: Some(args.device).filter(|devices| !devices.is_empty()),
        gpu: args.gpu_profile.map(|profile| Gpu { profile: Some(profile) }),
        skip_kernel_headers: Some(!args.kernel_headers),
        skip_guest_agent: args.skip_guest_agent.then_some(true),
        entrypoint: Some(args.entrypoint),
        cmd: Some(args.command),
        ..CreateInstance::default()
    }
}

fn environment(given: &[String]) -> BTreeMap<String, String> {
    given
        .iter()
        .filter_map(|text| match text.split_once('=') {
            Some((name, value)) => Some((name.to_owned(), value.to_owned())),
            None => env::var(text).ok().map(|value| (text.clone(), value)),
        })
        .collect()
}

/// The last part of the image's name, and four characters that make it unique.
fn name_from(image: &str) -> String {
    let image = image.split('@').next().unwrap_or(image);
    let last = image.rsplit('/').next().unwrap_or(image);
    let last = last.split(':').next().unwrap_or(last).to_ascii_lowercase();
    let is_allowed = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let name: String = last.chars().filter(is_allowed).take(NAME_CHARS_MAX).collect();
    let name = if name.is_empty() { "instance" } else { &name };
    let id = cuid2::create_id();
    let unique = id.get(id.len().saturating_sub(4)..).unwrap_or(&id);
    format!("{name}-{unique}")
}

/// Shows what the instance writes, but for the lines `shown` before, until it has ended.
async fn attend(client: &Client, path: &str, shown: &mut usize) -> anyhow::Result<InstanceView> {
    let log = format!("{path}/logs?follow=true&until=Stopped&tail=100000");
    let mut lines = pin!(client.lines(&log).await?);
    let mut known = *shown;
    while let Some(line) = lines.try_next().await? {
        if known > 0 {
            known -= 1;
            continue;
        }
        output::line(line)?;
        *shown += 1;
    }
    while client.get::<WaitView>(&format!("{path}/wait?state=Stopped")).await?.timed_out {}
    Ok(client.get(path).await?)
}

/// Says how the instance ended; returns its exit code as ours.
fn tell(ended: &InstanceView, timeline: bool) -> ExitCode {
    if timeline {
        show_timeline(ended);
    }
    if let Some(error) = &ended.state_error {
        output::note(&format!("{}: {error}", ended.name));
    }
    if let (Some(code @ 1..), Some(message)) = (ended.exit_code, &ended.exit_message) {
        let prefix = if message.starts_with("exit code") { "" } else { "exit code " };
        let code = if prefix.is_empty() { String::new() } else { format!("{code}: ") };
        output::note(&format!("{}: {prefix}{code}{message}", ended.name));
    }
    ExitCode::from(ended.exit_code.unwrap_or(NO_EXIT_CODE))
}

fn show_timeline(instance: &InstanceView) {
    // JSON does not keep their order.
    let phases = timeline::phase_names().filter_map(|name| {
        let took_ms = instance.phase_durations_ms.get(name)?;
        Some((name, Duration::from_millis(*took_ms)))
    });
    waterfall::show(&format!("boot of {}", instance.name), &phases.collect::<Vec<_>>());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_comes_from_the_image() {
        for (image, name) in [
            ("alpine", "alpine-"),
            ("127.0.0.1:5000/Team/My_App:v1.2", "myapp-"),
            ("docker.io/library/debian@sha256:00", "debian-"),
            ("___", "instance-"),
        ] {
            let made = name_from(image);
            assert!(made.starts_with(name) && made.len() == name.len() + 4, "{image}: {made}");
        }
        assert_ne!(name_from("alpine"), name_from("alpine"));
    }

    #[test]
    fn environment_is_given_or_passed_on() {
        let given = ["A=b=c", "EMPTY=", "CARGO_PKG_NAME", "SURELY_NOT_SET_ANYWHERE"];

        let env = environment(&given.map(str::to_owned));

        assert_eq!(env["A"], "b=c");
        assert_eq!(env["EMPTY"], "");
        assert_eq!(env.get("CARGO_PKG_NAME").map(String::as_str), option_env!("CARGO_PKG_NAME"));
        assert!(!env.contains_key("SURELY_NOT_SET_ANYWHERE"));
    }
}
