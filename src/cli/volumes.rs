//! `ovum volume`: create, list, inspect, attach, detach, delete.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use futures_util::TryStreamExt;
use tokio::fs::File;
use tokio::io::stdin;
use tokio_util::io::ReaderStream;

use super::orders::delete_each;
use super::{ListArgs, ServerArgs, output, tags};
use crate::api::instances::view::InstanceView;
use crate::api::instances::volumes::{AttachVolume, VolumeMount};
use crate::api::volumes::{CreateVolume, VolumeView};
use crate::client::{Client, segment};
use crate::size::ByteSize;

/// What can be typed after `ovum volume`.
#[derive(Debug, Subcommand)]
pub(super) enum VolumeCommand {
    /// Make a volume, empty or of an archive, and print its id
    Create(CreateArgs),
    /// List volumes
    Ls(ListArgs),
    /// Show all there is to know about a volume, as JSON
    Inspect(InspectArgs),
    /// Give an instance a volume, which it has at once if it runs
    Attach(AttachArgs),
    /// Take a volume from an instance, which must not be using it
    Detach(DetachArgs),
    /// Delete volumes that nobody has
    Rm(RmArgs),
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Its name; others may have the same
    name: String,
    /// Its size, in whole GB; of one made of an archive, the most it may have
    #[arg(long, default_value = "10GB")]
    size: ByteSize,
    /// Its id; made up if omitted
    #[arg(long)]
    id: Option<String>,
    /// Tag: KEY=VALUE; may be repeated
    #[arg(short = 'l', long)]
    tag: Vec<String>,
    /// What it is made of: a tar archive, plain, gzip or zstd; - is stdin
    #[arg(long, value_name = "FILE")]
    from_archive: Option<PathBuf>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Id or name
    volume: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct AttachArgs {
    /// Id, name, or the beginning of an id
    instance: String,
    /// The volume and where it goes: NAME:/PATH, or NAME:/PATH:ro to be read only
    #[arg(value_name = "NAME:/PATH[:ro]", value_parser = mount)]
    volume: VolumeMount,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct DetachArgs {
    /// Id, name, or the beginning of an id
    instance: String,
    /// Id or name
    volume: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Ids or names
    #[arg(required = true)]
    volumes: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn volume(command: VolumeCommand) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create(args) => create(args).await,
        VolumeCommand::Ls(args) => ls(args).await,
        VolumeCommand::Inspect(InspectArgs { volume, server }) => {
            let path = format!("/volumes/{}", segment(&volume));
            output::json(&server.client()?.get::<VolumeView>(&path).await?)
        }
        VolumeCommand::Attach(args) => attach(args).await,
        VolumeCommand::Detach(DetachArgs { instance, volume, server }) => {
            server.client()?.delete(&attachment(&instance, &volume)).await?;
            Ok(())
        }
        VolumeCommand::Rm(RmArgs { volumes, server }) => {
            delete_each(&server.client()?, "/volumes", volumes).await
        }
    }
}

async fn create(args: CreateArgs) -> anyhow::Result<()> {
    let CreateArgs { name, size, id, tag, from_archive, server } = args;
    if size.0 == 0 || !size.0.is_multiple_of(1 << 30) {
        bail!("--size {size}: volumes have whole GB, for example 10GB");
    }
    let size_gb = i64::try_from(size.0 >> 30).context("--size is too large")?;
    let client = server.client()?;
    let body = CreateVolume { name, size_gb, id, tags: Some(tags::parsed(&tag)) };
    let volume = match from_archive {
        Some(file) => fill(&client, &file, body).await?,
        None => client.post("/volumes", &body).await?,
    };
    output::line(volume.id)
}

async fn attach(args: AttachArgs) -> anyhow::Result<()> {
    let AttachArgs { instance, volume, server } = args;
    let VolumeMount { volume_id, mount_path, readonly, overlay_size, .. } = volume;
    if overlay_size.is_some() {
        bail!("A volume has an overlay from the creation of an instance on, or not at all");
    }
    let body = AttachVolume { mount_path, readonly };
    let client = server.client()?;
    client.post::<InstanceView>(&attachment(&instance, &volume_id), &body).await?;
    Ok(())
}

/// The path of a volume in an instance.
fn attachment(instance: &str, volume: &str) -> String {
    format!("/instances/{}/volumes/{}", segment(instance), segment(volume))
}

async fn fill(client: &Client, file: &Path, volume: CreateVolume) -> anyhow::Result<VolumeView> {
    let CreateVolume { name, size_gb, id, tags } = volume;
    let mut path = format!("/volumes/from-archive?name={}&size_gb={size_gb}", segment(&name));
    if let Some(id) = id {
        path.push_str(&format!("&id={}", segment(&id)));
    }
    for (key, value) in tags.unwrap_or_default() {
        path.push_str(&format!("&tags[{}]={}", segment(&key), segment(&value)));
    }
    if file.as_os_str() == "-" {
        return Ok(client.upload(&path, ReaderStream::new(stdin())).await?);
    }
    let opened = File::open(file).await;
    let opened = opened.with_context(|| format!("Failed to open {}", file.display()))?;
    Ok(client.upload(&path, ReaderStream::new(opened).map_ok(|bytes| bytes)).await?)
}

async fn ls(args: ListArgs) -> anyhow::Result<()> {
    let volumes: Vec<VolumeView> = args.server.client()?.get("/volumes").await?;
    if args.json {
        return output::json(&volumes);
    }
    let rows: Vec<_> = volumes
        .iter()
        .map(|volume| {
            let users: Vec<_> = volume.attachments.iter().map(|a| a.instance_id.as_str()).collect();
            [
                volume.id.clone(),
                volume.name.clone(),
                format!("{}GB", volume.size_gb),
                users.join(","),
                output::ago(volume.created_at),
            ]
        })
        .collect();
    output::table(["ID", "NAME", "SIZE", "ATTACHED TO", "CREATED"], &rows)
}

/// `NAME:/path`, `NAME:/path:ro` or `NAME:/path:ro:overlay=SIZE`, as `ovum run --volume` takes it.
pub(super) fn mount(text: &str) -> Result<VolumeMount, String> {
    let malformed =
        || format!("{text:?} is not NAME:/PATH, with :ro or :ro:overlay=SIZE behind it if wanted");
    let mut parts = text.split(':');
    let (Some(volume), Some(path)) = (parts.next(), parts.next()) else { return Err(malformed()) };
    if volume.is_empty() || !path.starts_with('/') {
        return Err(malformed());
    }
    let (readonly, overlay_size) = match (parts.next(), parts.next()) {
        (None | Some("rw"), None) => (false, None),
        (Some("ro"), None) => (true, None),
        (Some("ro"), Some(option)) => {
            (true, Some(option.strip_prefix("overlay=").ok_or_else(malformed)?.to_owned()))
        }
        _ => return Err(malformed()),
    };
    if parts.next().is_some() {
        return Err(malformed());
    }
    Ok(VolumeMount {
        volume_id: volume.to_owned(),
        mount_path: path.to_owned(),
        readonly: Some(readonly),
        overlay: Some(overlay_size.is_some()),
        overlay_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_a_volume_a_path_and_how() {
        let how = |text| {
            let mount = mount(text).unwrap();
            assert_eq!((mount.volume_id.as_str(), mount.mount_path.as_str()), ("data", "/d"));
            (mount.readonly.unwrap(), mount.overlay_size)
        };
        assert_eq!(how("data:/d"), (false, None));
        assert_eq!(how("data:/d:rw"), (false, None));
        assert_eq!(how("data:/d:ro"), (true, None));
        assert_eq!(how("data:/d:ro:overlay=1GB"), (true, Some("1GB".to_owned())));
        for text in ["data", ":/d", "data:d", "data:/d:x", "data:/d:rw:overlay=1GB", "a:/b:ro:x"] {
            assert!(mount(text).unwrap_err().contains("NAME:/PATH"), "{text}");
        }
    }
}
