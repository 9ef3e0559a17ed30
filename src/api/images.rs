//! `/images`: pull, load, list, read, tag, delete.

use std::io;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio_util::io::StreamReader;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::key::Key;
use crate::api::query::Query;
use crate::api::tags::{self, Tags};
use crate::images::reference::Reference;
use crate::images::registry::Credentials;
use crate::images::{Image, ImageSpec, ImageStatus};

/// What a tag request ends in; before that is the image's name.
const TAG_SUFFIX: &str = "/tag";

/// An image to be pulled.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateImage {
    /// For example `alpine`, `docker.io/library/alpine:3.20` or with `@sha256:...`.
    pub name: String,
    /// `linux/amd64`, which is also the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// For this pull only; never stored.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials: Option<ImageCredentials>,
    /// The caller's labels.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
}

/// Who to be at the registry: a user, or the bearer of a token.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageCredentials {
    /// Name.
    #[serde(default)]
    pub username: String,
    /// Password.
    #[serde(default)]
    pub password: String,
    /// A token the registry takes as it is; goes before the password.
    #[serde(default)]
    pub registry_token: String,
}

/// A name that an image shall also have.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct TagImage {
    /// A reference with a tag.
    target: String,
}

/// An image as the API shows it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageView {
    /// Normalised name.
    pub name: String,
    /// Digest of the manifest.
    pub digest: String,
    /// `pending`, `pulling`, `converting`, `ready` or `failed`.
    pub status: String,
    /// When the name appeared on this host.
    pub created_at: DateTime<Utc>,
    /// `os/arch`.
    pub platform: String,
    /// Place in the queue, from 1, while pending.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<usize>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Disk use of the root disk; null until ready.
    pub size_bytes: Option<u64>,
    /// Bytes pulled so far, while pulling. Not in the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pulled_bytes: Option<u64>,
    /// Bytes to be pulled in all, while pulling. Not in the original.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_bytes: Option<u64>,
    /// First words of the command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub entrypoint: Vec<String>,
    /// The rest of the command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Environment.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub env: Tags,
    /// Working folder.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub working_dir: String,
    /// The caller's labels.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
}

impl From<Image> for ImageView {
    fn from(image: Image) -> Self {
        let status = match image.status {
            ImageStatus::Pending => "pending",
            ImageStatus::Pulling => "pulling",
            ImageStatus::Converting => "converting",
            ImageStatus::Ready => "ready",
            ImageStatus::Failed => "failed",
        };
        Self {
            name: image.name.to_string(),
            digest: image.digest.to_string(),
            status: status.to_owned(),
            created_at: image.created_at,
            platform: image.platform,
            queue_position: image.queue_position,
            error: image.error,
            size_bytes: image.size_bytes,
            pulled_bytes: image.progress.map(|progress| progress.done_bytes),
            pull_bytes: image.progress.map(|progress| progress.total_bytes),
            entrypoint: image.config.entrypoint,
            cmd: image.config.cmd,
            env: image.config.env,
            working_dir: image.config.working_dir,
            tags: image.tags,
        }
    }
}

impl From<ImageCredentials> for Option<Credentials> {
    fn from(credentials: ImageCredentials) -> Self {
        let ImageCredentials { username, password, registry_token } = credentials;
        if !registry_token.is_empty() {
            Some(Credentials::Token(registry_token))
        } else if username.is_empty() && password.is_empty() {
            None
        } else {
            Some(Credentials::Password { username, password })
        }
    }
}

/// Lists images.
#[utoipa::path(
    get, path = "/images", tag = "images",
    params(
        ("tags" = Option<Tags>, Query, style = DeepObject, explode, description = "All must match"),
    ),
    responses((status = 200, body = Vec<ImageView>), (status = "default", body = ErrorBody)),
)]
pub(super) async fn list(State(app): State<App>, query: Query) -> Json<Vec<ImageView>> {
    let wanted = query.tags();
    let images = app.images.list().into_iter().filter(|image| tags::have(&image.tags, &wanted));
    Json(images.map(ImageView::from).collect())
}

/// Pulls an image, or joins the pull that is under way. Ready images come back at once.
#[utoipa::path(
    post, path = "/images", tag = "images", request_body = CreateImage,
    responses((status = 202, body = ImageView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn create(
    State(app): State<App>,
    JsonBody(body): JsonBody<CreateImage>,
) -> Result<(StatusCode, Json<ImageView>), ApiError> {
    let CreateImage { name, platform, credentials, tags } = body;
    let name = name.parse::<Reference>()?;
    tags::check(&tags)?;
    let credentials = credentials.and_then(Option::<Credentials>::from);
    let image = app.images.request(ImageSpec { name, platform, credentials, tags }).await?;
    Ok((StatusCode::ACCEPTED, Json(image.into())))
}

/// Takes the images out of a tar archive (docker save or OCI layout, plain or gzip). Not in the
/// original.
#[utoipa::path(
    post, path = "/images/from-archive", tag = "images",
    params(
        ("name" = Option<String>, Query, description = "Name of the only image in it"),
        ("tags" = Option<Tags>, Query, style = DeepObject, explode),
    ),
    request_body(content = Vec<u8>, content_type = "application/x-tar"),
    responses((status = 202, body = Vec<ImageView>), (status = "default", body = ErrorBody)),
)]
pub(super) async fn load(
    State(app): State<App>,
    query: Query,
    body: Body,
) -> Result<(StatusCode, Json<Vec<ImageView>>), ApiError> {
    let name = query.value("name").map(str::parse::<Reference>).transpose()?;
    let tags = query.tags();
    tags::check(&tags)?;
    let archive = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    let images = app.images.load(archive, name, tags).await?;
    Ok((StatusCode::ACCEPTED, Json(images.into_iter().map(ImageView::from).collect())))
}

/// Reads one image, by tag or digest.
#[utoipa::path(
    get, path = "/images/{*name}", tag = "images",
    params(("name" = String, Path, description = "Slashes raw, or encoded once or twice")),
    responses((status = 200, body = ImageView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(
    State(app): State<App>,
    Key(name): Key,
) -> Result<Json<ImageView>, ApiError> {
    let name = Reference::from_path(&name)?;
    let image = app.images.get(&name).ok_or_else(|| ApiError::no_image(&name.to_string()))?;
    Ok(Json(image.into()))
}

/// Removes a name, and its root disk once no name is left for it.
#[utoipa::path(
    delete, path = "/images/{*name}", tag = "images",
    params(("name" = String, Path, description = "Slashes raw, or encoded once or twice")),
    responses((status = 204), (status = "default", body = ErrorBody)),
)]
pub(super) async fn delete(State(app): State<App>, Key(name): Key) -> Result<StatusCode, ApiError> {
    let name = Reference::from_path(&name)?;
    app.images.delete(&name, |digest| app.instances.uses(digest)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Gives a ready image another name. Nothing is pulled.
#[utoipa::path(
    post, path = "/images/{*name}", tag = "images",
    params(("name" = String, Path, description = "Slashes raw, or encoded once or twice")),
    request_body = TagImage,
    responses((status = 201, body = ImageView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn tag(
    State(app): State<App>,
    Key(name): Key,
    JsonBody(TagImage { target }): JsonBody<TagImage>,
) -> Result<(StatusCode, Json<ImageView>), ApiError> {
    let Some(name) = name.strip_suffix(TAG_SUFFIX) else {
        let message = format!("no such route: POST /images/{name}");
        return Err(ApiError::of_status(StatusCode::NOT_FOUND, message));
    };
    let image = app.images.tag(&Reference::from_path(name)?, &target.parse()?)?;
    Ok((StatusCode::CREATED, Json(image.into())))
}
