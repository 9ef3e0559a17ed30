//! `/volumes`: create, fill, list, read, delete.

use std::io;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use futures_util::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio_util::io::StreamReader;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::query::Query;
use crate::api::tags::{self, Tags};
use crate::volumes::spec::{SIZE_GIB_MAX, VolumeIdError, VolumeNameError, VolumeSpec};
use crate::volumes::{Attachment, Volume};

/// A volume to be made.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CreateVolume {
    /// Its name; others may have the same.
    pub name: String,
    /// Its size, in GiB.
    pub size_gb: i64,
    /// Its id, if the caller chooses it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// The caller's labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tags: Option<Tags>,
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeView {
    /// Unique on this host.
    pub id: String,
    /// Not unique.
    pub name: String,
    /// Its size, in GiB.
    pub size_gb: u64,
    /// When it was asked for.
    pub created_at: DateTime<Utc>,
    /// The caller's labels.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    /// Who has it, running or not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub attachments: Vec<AttachmentView>,
}

/// An instance that has a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AttachmentView {
    /// Which.
    pub instance_id: String,
    /// Where in its guest.
    pub mount_path: String,
    /// It does not write to the volume.
    pub readonly: bool,
}

impl From<Volume> for VolumeView {
    fn from(volume: Volume) -> Self {
        let Volume { id, name, size_gib, created_at, tags, attachments } = volume;
        let attachments = attachments.into_iter().map(|attachment| {
            let Attachment { instance_id, mount_path, read_only } = attachment;
            AttachmentView { instance_id, mount_path, readonly: read_only }
        });
        Self {
            id: id.into(),
            name,
            size_gb: size_gib,
            created_at,
            tags,
            attachments: attachments.collect(),
        }
    }
}

/// Lists volumes, oldest first.
#[utoipa::path(
    get, path = "/volumes", tag = "volumes",
    params(
        ("tags" = Option<Tags>, Query, style = DeepObject, explode, description = "All must match"),
    ),
    responses((status = 200, body = Vec<VolumeView>), (status = "default", body = ErrorBody)),
)]
pub(super) async fn list(
    State(app): State<App>,
    query: Query,
) -> Result<Json<Vec<VolumeView>>, ApiError> {
    let wanted = query.tags();
    let volumes = app.volumes.list()?.into_iter();
    let volumes = volumes.filter(|volume| tags::have(&volume.tags, &wanted));
    Ok(Json(volumes.map(VolumeView::from).collect()))
}

/// Makes an empty volume.
#[utoipa::path(
    post, path = "/volumes", tag = "volumes", request_body = CreateVolume,
    responses((status = 201, body = VolumeView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn create(
    State(app): State<App>,
    JsonBody(body): JsonBody<CreateVolume>,
) -> Result<(StatusCode, Json<VolumeView>), ApiError> {
    let CreateVolume { name, size_gb, id, tags } = body;
    let size_gib = checked_size(size_gb)?;
    let spec = spec(&name, size_gib, id.as_deref(), tags.unwrap_or_default())?;
    let volume = app.volumes.create(spec).await?;
    Ok((StatusCode::CREATED, Json(volume.into())))
}

/// Makes a volume of what is in a tar archive: plain, gzip or zstd.
#[utoipa::path(
    post, path = "/volumes/from-archive", tag = "volumes",
    params(
        ("name" = String, Query, description = "Others may have the same"),
        ("size_gb" = i64, Query, description = "The most it may have, in GiB"),
        ("id" = Option<String>, Query, description = "If the caller chooses it"),
        ("tags" = Option<Tags>, Query, style = DeepObject, explode),
    ),
    request_body(content = Vec<u8>, content_type = "application/gzip"),
    responses((status = 201, body = VolumeView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn create_from_archive(
    State(app): State<App>,
    query: Query,
    body: Body,
) -> Result<(StatusCode, Json<VolumeView>), ApiError> {
    let needed = |field| query.value(field).ok_or(VolumeSpecError::Missing { field });
    let size_gb = needed("size_gb")?.parse().map_err(|_| VolumeSpecError::Size)?;
    let size_gib = checked_size(size_gb)?;
    let spec = spec(needed("name")?, size_gib, query.value("id"), query.tags())?;
    let archive = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    let volume = app.volumes.create_from_archive(spec, archive).await?;
    Ok((StatusCode::CREATED, Json(volume.into())))
}

/// Reads one volume.
#[utoipa::path(
    get, path = "/volumes/{id}", tag = "volumes",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 200, body = VolumeView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(
    State(app): State<App>,
    Path(key): Path<String>,
) -> Result<Json<VolumeView>, ApiError> {
    Ok(Json(app.volumes.find(&key)?.into()))
}

/// Removes a volume that nobody has, with all that is on it.
#[utoipa::path(
    delete, path = "/volumes/{id}", tag = "volumes",
    params(("id" = String, Path, description = "Id or name")),
    responses((status = 204), (status = "default", body = ErrorBody)),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Path(key): Path<String>,
) -> Result<StatusCode, ApiError> {
    app.volumes.delete(&key).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn spec(name: &str, size_gib: u64, id: Option<&str>, tags: Tags) -> Result<VolumeSpec, ApiError> {
    tags::check(&tags)?;
    let id = id.filter(|id| !id.is_empty()).map(str::parse).transpose();
    let id = id.map_err(VolumeSpecError::Id)?;
    let name = name.parse().map_err(VolumeSpecError::Name)?;
    Ok(VolumeSpec { id, name, size_gib, tags })
}

fn checked_size(size_gb: i64) -> Result<u64, VolumeSpecError> {
    let size = u64::try_from(size_gb).ok().filter(|size| (1..=SIZE_GIB_MAX).contains(size));
    size.ok_or(VolumeSpecError::Size)
}

/// Why no volume can be like that.
#[derive(Debug, thiserror::Error)]
pub(super) enum VolumeSpecError {
    /// A parameter that is needed.
    #[error("Parameter {field} is missing")]
    Missing {
        /// Which.
        field: &'static str,
    },
    /// The size.
    #[error("Value of size_gb is invalid: 1 to {SIZE_GIB_MAX} expected")]
    Size,
    /// The id.
    #[error("Value of id is invalid")]
    Id(#[source] VolumeIdError),
    /// The name.
    #[error("Value of name is invalid")]
    Name(#[source] VolumeNameError),
}
