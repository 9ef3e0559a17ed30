//! `/instances/{id}/stat`: what lies at a path in an instance.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::App;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::key::Key;
use crate::api::query::{Query, QueryError};
use crate::instances::inside::agent::AgentError;
use crate::instances::inside::agent::files::{PathInfo, PathKind, StatSpec};

/// What lies at a path.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StatView {
    /// Whether anything does.
    pub exists: bool,
    /// A directory.
    pub is_dir: bool,
    /// A regular file.
    pub is_file: bool,
    /// A symbolic link.
    pub is_symlink: bool,
    /// Where the link leads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_target: Option<String>,
    /// Permission bits.
    pub mode: u32,
    /// Bytes.
    pub size: u64,
    /// Why it could not be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<PathInfo> for StatView {
    fn from(info: PathInfo) -> Self {
        let PathInfo { kind, mode, size } = info;
        Self {
            exists: kind != PathKind::Missing,
            is_dir: kind == PathKind::Directory,
            is_file: kind == PathKind::File,
            is_symlink: matches!(kind, PathKind::Link(_)),
            link_target: match kind {
                PathKind::Link(target) => Some(target),
                PathKind::Missing | PathKind::File | PathKind::Directory | PathKind::Special => {
                    None
                }
            },
            mode,
            size,
            error: None,
        }
    }
}

/// Says what lies at a path. That nothing does is an answer, not an error.
#[utoipa::path(
    get, path = "/instances/{id}/stat", tag = "instances",
    params(
        ("id" = String, Path, description = "Id, name, or the beginning of an id"),
        ("path" = String, Query, description = "A relative path counts from the root"),
        ("follow_links" = Option<bool>, Query, description = "A link is what it leads to"),
    ),
    responses((status = 200, body = StatView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(
    State(app): State<App>,
    Key(key): Key,
    query: Query,
) -> Result<Json<StatView>, ApiError> {
    let path = query.value("path").filter(|path| !path.is_empty());
    let path = path.ok_or(QueryError::Malformed { name: "path", expected: "a path" })?;
    let follow_links = query.flag("follow_links")?.unwrap_or_default();
    let inside = app.instances.inside(&key)?;
    match inside.stat(StatSpec { path: path.to_owned(), follow_links }).await {
        Ok(info) => Ok(Json(info.into())),
        Err(AgentError::Refused { message, .. }) => {
            Ok(Json(StatView { error: Some(message), ..StatView::default() }))
        }
        Err(error) => Err(error.into()),
    }
}
