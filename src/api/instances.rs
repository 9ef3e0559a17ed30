//! `/instances`: create, list, read, change, wait, stop, start, delete.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::body::{JsonBody, OptionalBody};
use crate::api::error::{ApiError, ErrorBody};
use crate::api::instances::create::CreateInstance;
use crate::api::instances::start::StartInstance;
use crate::api::instances::update::UpdateInstance;
use crate::api::instances::view::InstanceView;
use crate::api::key::Key;
use crate::api::query::{Query, QueryError};
use crate::api::tags::{self, Tags};
use crate::api::{App, REQUEST_TIMEOUT};
use crate::duration::GoDuration;
use crate::instances::Waited;
use crate::instances::state::{State as InstanceState, StateNameError};

pub mod create;
pub mod devices;
pub mod extras;
pub mod policies;
pub mod start;
pub mod texts;
pub mod update;
pub mod upkeep;
pub mod view;
pub mod volumes;

/// How long a wait lasts unless told otherwise.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A wait ends this long before its request does, to be answered and not cut off.
const WAIT_MARGIN: Duration = Duration::from_secs(1);

/// What came of waiting for a state.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct WaitView {
    /// The state now.
    pub state: String,
    /// What went wrong with the instance, if something did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
    /// The time was over first.
    pub timed_out: bool,
}

impl From<Waited> for WaitView {
    fn from(waited: Waited) -> Self {
        let Waited { state, error, timed_out } = waited;
        Self { state: state.to_string(), state_error: error, timed_out }
    }
}

/// Lists instances, oldest first.
#[utoipa::path(
    get, path = "/instances", tag = "instances",
    params(
        ("state" = Option<String>, Query, description = "Exactly this state"),
        ("tags" = Option<Tags>, Query, style = DeepObject, explode, description = "All must match"),
    ),
    responses((status = 200, body = Vec<InstanceView>), (status = "default", body = ErrorBody)),
)]
pub(super) async fn list(State(app): State<App>, query: Query) -> Result<Response, ApiError> {
    let wanted = query.tags();
    let state = query.value("state").map(str::parse::<InstanceState>).transpose();
    let state = state
        .map_err(|_| QueryError::Malformed { name: "state", expected: "the name of a state" })?;
    let mut instances = app.instances.list();
    instances.retain(|instance| {
        state.is_none_or(|state| instance.state == state)
            && tags::have(&instance.spec.tags, &wanted)
    });
    let list = app.texts.list(&instances).map_err(|error| ApiError::internal(&error))?;
    Ok(([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], list).into_response())
}

/// Creates an instance and starts its machine, without waiting for the guest.
#[utoipa::path(
    post, path = "/instances", tag = "instances", request_body = CreateInstance,
    responses((status = 201, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn create(
    State(app): State<App>,
    JsonBody(body): JsonBody<CreateInstance>,
) -> Result<(StatusCode, Json<InstanceView>), ApiError> {
    let (spec, expiry) = body.into_spec(&app.limits)?;
    let instance = app.instances.create(spec, expiry).await?;
    Ok((StatusCode::CREATED, Json((&*instance).into())))
}

/// Reads one instance.
#[utoipa::path(
    get, path = "/instances/{id}", tag = "instances",
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    responses((status = 200, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(
    State(app): State<App>,
    Key(key): Key,
) -> Result<Json<InstanceView>, ApiError> {
    Ok(Json((&*app.instances.find(&key)?).into()))
}

/// Changes how an instance is looked after; what is omitted stays as it is.
#[utoipa::path(
    patch, path = "/instances/{id}", tag = "instances", request_body = UpdateInstance,
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    responses((status = 200, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn update(
    State(app): State<App>,
    Key(key): Key,
    JsonBody(body): JsonBody<UpdateInstance>,
) -> Result<Json<InstanceView>, ApiError> {
    let upkeep = body.into_upkeep()?;
    Ok(Json((&*app.instances.look_after(&key, upkeep).await?).into()))
}

/// Ends an instance, in whatever state it is, and removes all of it.
#[utoipa::path(
    delete, path = "/instances/{id}", tag = "instances",
    params(
        ("id" = String, Path, description = "Id, name, or the beginning of an id"),
        ("graceful_shutdown" = Option<bool>, Query, description = "false: at once"),
    ),
    responses((status = 204), (status = "default", body = ErrorBody)),
)]
pub(super) async fn delete(
    State(app): State<App>,
    Key(key): Key,
    query: Query,
) -> Result<StatusCode, ApiError> {
    let graceful = query.flag("graceful_shutdown")?.unwrap_or(true);
    app.instances.delete(&key, graceful).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Stops an instance; its disk stays. It is not started again until somebody does.
#[utoipa::path(
    post, path = "/instances/{id}/stop", tag = "instances",
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    responses((status = 200, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn stop(
    State(app): State<App>,
    Key(key): Key,
) -> Result<Json<InstanceView>, ApiError> {
    Ok(Json((&*app.instances.stop(&key).await?).into()))
}

/// Starts a stopped instance on the same disk, without waiting for the guest.
#[utoipa::path(
    post, path = "/instances/{id}/start", tag = "instances",
    params(("id" = String, Path, description = "Id, name, or the beginning of an id")),
    request_body = Option<StartInstance>,
    responses((status = 200, body = InstanceView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn start(
    State(app): State<App>,
    Key(key): Key,
    OptionalBody(body): OptionalBody<StartInstance>,
) -> Result<Json<InstanceView>, ApiError> {
    let command = body.into_command()?;
    Ok(Json((&*app.instances.start(&key, command).await?).into()))
}

/// Waits for a state. Comes back early if the instance can no longer get there by itself.
#[utoipa::path(
    get, path = "/instances/{id}/wait", tag = "instances",
    params(
        ("id" = String, Path, description = "Id, name, or the beginning of an id"),
        ("state" = String, Query, description = "In any case"),
        ("timeout" = Option<String>, Query, description = "For example 30s; at most 59s"),
    ),
    responses((status = 200, body = WaitView), (status = "default", body = ErrorBody)),
)]
pub(super) async fn wait(
    State(app): State<App>,
    Key(key): Key,
    query: Query,
) -> Result<Json<WaitView>, ApiError> {
    let state = wait_state(query.value("state").unwrap_or_default())?;
    let timeout = wait_timeout(query.value("timeout"))?;
    Ok(Json(app.instances.wait(&key, state, timeout).await?.into()))
}

/// The names of the states that can be waited for; the query takes them in any case.
pub fn wait_states() -> impl Iterator<Item = &'static str> {
    awaitable().map(InstanceState::name)
}

fn awaitable() -> impl Iterator<Item = InstanceState> {
    InstanceState::ALL.into_iter().filter(|&state| state != InstanceState::Unknown)
}

fn wait_state(name: &str) -> Result<InstanceState, QueryError> {
    let found = awaitable().find(|state| state.name().eq_ignore_ascii_case(name));
    found.ok_or(QueryError::State(StateNameError))
}

fn wait_timeout(text: Option<&str>) -> Result<Duration, QueryError> {
    let Some(text) = text else { return Ok(WAIT_TIMEOUT.min(REQUEST_TIMEOUT - WAIT_MARGIN)) };
    let duration: GoDuration =
        text.parse().map_err(|source| QueryError::Timeout { source: Some(source) })?;
    let duration = duration.positive().ok_or(QueryError::Timeout { source: None })?;
    Ok(duration.min(REQUEST_TIMEOUT - WAIT_MARGIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_for_a_state_in_any_case_but_not_for_unknown() {
        assert_eq!(wait_state("running").unwrap(), InstanceState::Running);
        assert_eq!(wait_state("STOPPED").unwrap(), InstanceState::Stopped);
        for name in ["", "Unknown", "unknown", "Runnin", "Running "] {
            assert!(matches!(wait_state(name), Err(QueryError::State(_))), "{name}");
        }
    }

    #[test]
    fn a_wait_ends_before_its_request() {
        assert_eq!(wait_timeout(None).unwrap(), Duration::from_secs(59));
        assert_eq!(wait_timeout(Some("5m")).unwrap(), Duration::from_secs(59));
        assert_eq!(wait_timeout(Some("300ms")).unwrap(), Duration::from_millis(300));
        for text in ["", "0", "0s", "-1s", "soon", "5"] {
            assert!(matches!(wait_timeout(Some(text)), Err(QueryError::Timeout { .. })), "{text}");
        }
    }
}
