//! `ovum image`: pull, load, list, tag, delete.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use futures_util::TryStreamExt;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use tokio::fs::File;
use tokio::io::stdin;
use tokio::time;
use tokio_util::io::ReaderStream;

use super::orders::delete_each;
use super::{ListArgs, ServerArgs, output};
use crate::api::images::{CreateImage, ImageView};
use crate::api::tags::Tags;
use crate::client::{Client, segment};

/// Between two looks at a pull.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How often in a row an image may be missing while it is waited for.
const MISSING_MAX: u32 = 20;

/// What can be typed after `ovum image`.
#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Pull an image and wait until it is ready
    Pull(PullArgs),
    /// List images
    Ls(ListArgs),
    /// Delete images
    Rm(RmArgs),
    /// Take images out of a tar archive (docker save or OCI layout)
    Load(LoadArgs),
    /// Give an image another name
    Tag(TagArgs),
}

#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// For example alpine or docker.io/library/alpine:3.20
    image: String,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// Names, by tag or digest
    #[arg(required = true)]
    images: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct LoadArgs {
    /// The archive; - is stdin
    file: PathBuf,
    /// Name of the only image in it
    #[arg(long)]
    name: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, Args)]
pub(super) struct TagArgs {
    /// The image
    source: String,
    /// Its other name
    target: String,
    #[command(flatten)]
    server: ServerArgs,
}

pub(super) async fn image(command: ImageCommand) -> anyhow::Result<()> {
    match command {
        ImageCommand::Pull(args) => {
            let image = pull(&args.server.client()?, &args.image).await?;
            output::line(image.name)
        }
        ImageCommand::Ls(args) => ls(args).await,
        ImageCommand::Rm(RmArgs { images, server }) => {
            delete_each(&server.client()?, "/images", images).await
        }
        ImageCommand::Load(args) => load(args).await,
        ImageCommand::Tag(TagArgs { source, target, server }) => {
            let path = format!("/images/{}/tag", segment(&source));
            let body = json!({ "target": target });
            let image: ImageView = server.client()?.post(&path, &body).await?;
            output::line(image.name)
        }
    }
}

/// Pulls `name` whatever is there, and shows how it goes.
pub(super) async fn pull(client: &Client, name: &str) -> anyhow::Result<ImageView> {
    let body =
        CreateImage { name: name.to_owned(), platform: None, credentials: None, tags: Tags::new() };
    let image: ImageView = client.post("/images", &body).await?;
    settled(client, image).await
}

/// The image called `name`, pulled if it is not there.
pub(super) async fn ensure(client: &Client, name: &str) -> anyhow::Result<ImageView> {
    match client.find::<ImageView>(&format!("/images/{}", segment(name))).await? {
        Some(image) if image.status == "failed" => pull(client, name).await,
        Some(image) => settled(client, image).await,
        None => pull(client, name).await,
    }
}

/// Waits until an image is ready, showing how far it is.
async fn settled(client: &Client, mut image: ImageView) -> anyhow::Result<ImageView> {
    let path = format!("/images/{}", segment(&image.name));
    let progress = Progress::new(&image);
    let mut missing = 0;
    loop {
        match image.status.as_str() {
            "ready" => return Ok(image),
            "failed" => bail!("Image {}: {}", image.name, image.error.unwrap_or_default()),
            _ => {}
        }
        progress.show(&image);
        time::sleep(POLL_INTERVAL).await;
        match client.find(&path).await? {
            Some(found) => (image, missing) = (found, 0),
            None if missing < MISSING_MAX => missing += 1,
            None => bail!("Image {} was deleted while it was waited for", image.name),
        }
    }
}

/// A bar on a terminal; nothing elsewhere. It goes when the image is there.
struct Progress(ProgressBar);

impl Progress {
    fn new(image: &ImageView) -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        if !io::stderr().is_terminal() {
            bar.set_draw_target(ProgressDrawTarget::hidden());
            if image.status != "ready" {
                output::note(&format!("Pulling {}", image.name));
            }
        }
        Self(bar)
    }

    fn show(&self, image: &ImageView) {
        let template = match image.pull_bytes {
            Some(total) => {
                self.0.set_length(total);
                self.0.set_position(image.pulled_bytes.unwrap_or_default());
                "{prefix} {bar:30} {binary_bytes} of {binary_total_bytes} {spinner}"
            }
            None => "{prefix} {spinner}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
        let place = image.queue_position.map(|place| format!(", {place} in the queue"));
        self.0.set_prefix(format!("{}: {}{}", image.name, image.status, place.unwrap_or_default()));
        self.0.tick();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

async fn ls(args: ListArgs) -> anyhow::Result<()> {
    let images: Vec<ImageView> = args.server.client()?.get("/images").await?;
    if args.json {
        return output::json(&images);
    }
    let rows: Vec<_> = images
        .iter()
        .map(|image| {
            let digest = image.digest.trim_start_matches("sha256:");
            [
                image.name.clone(),
                image.platform.clone(),
                image.status.clone(),
                digest.get(..12).unwrap_or(digest).to_owned(),
                image.size_bytes.map(output::size).unwrap_or_default(),
                output::ago(image.created_at),
            ]
        })
        .collect();
    output::table(["NAME", "PLATFORM", "STATUS", "DIGEST", "SIZE", "CREATED"], &rows)
}

async fn load(args: LoadArgs) -> anyhow::Result<()> {
    let client = args.server.client()?;
    let query = args.name.map(|name| format!("?name={}", segment(&name))).unwrap_or_default();
    let path = format!("/images/from-archive{query}");
    let images: Vec<ImageView> = if args.file.as_os_str() == "-" {
        client.upload(&path, ReaderStream::new(stdin())).await?
    } else {
        let file = File::open(&args.file)
            .await
            .with_context(|| format!("Failed to open {}", args.file.display()))?;
        client.upload(&path, ReaderStream::new(file).map_ok(|bytes| bytes)).await?
    };
    for image in images {
        output::line(settled(&client, image).await?.name)?;
    }
    Ok(())
}
