//! `/resources/memory/reclaim`: has guests give up memory for a while.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::App;
use crate::api::body::JsonBody;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::instances::create::SpecError;
use crate::duration::GoDuration;
use crate::instances::reclaim::{Part, ReclaimSpec, Reclaimed};

/// How long memory is held unless told otherwise.
const HOLD: Duration = Duration::from_secs(5 * 60);

/// Longest time that memory is held.
const HOLD_MAX: Duration = Duration::from_secs(60 * 60);

/// Longest reason.
const REASON_CHARS_MAX: usize = 256;

/// What guests shall give up, all together.
#[derive(Debug, Deserialize, ToSchema)]
pub(super) struct MemoryReclaimRequest {
    /// How much they shall have given up in the end; 0 gives everything back.
    reclaim_bytes: i64,
    /// For how long, at most an hour; `5m` if omitted.
    hold_for: Option<String>,
    /// Only say what would be done.
    dry_run: Option<bool>,
    /// For the log.
    reason: Option<String>,
}

/// What came of it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MemoryReclaimResponse {
    /// As asked for.
    requested_reclaim_bytes: u64,
    /// What guests were asked for: never more than they have beyond their floors.
    planned_reclaim_bytes: u64,
    /// What they have given up by now.
    applied_reclaim_bytes: u64,
    /// Memory that the host could use.
    host_available_bytes: u64,
    /// `healthy`, or `pressure` with less than a tenth available.
    host_pressure_state: &'static str,
    /// Until when guests do without.
    #[serde(skip_serializing_if = "Option::is_none")]
    hold_until: Option<DateTime<Utc>>,
    /// Each running guest's part.
    actions: Vec<MemoryReclaimAction>,
}

/// One guest's part.
#[derive(Debug, Serialize, ToSchema)]
struct MemoryReclaimAction {
    /// Its id.
    instance_id: String,
    /// Its name.
    instance_name: String,
    /// Its runtime, by the name that it was created with.
    hypervisor: String,
    /// Its memory.
    assigned_memory_bytes: u64,
    /// Below this it is not brought.
    protected_floor_bytes: u64,
    /// What it was to have before.
    previous_target_guest_memory_bytes: u64,
    /// What it is to have.
    planned_target_guest_memory_bytes: u64,
    /// What it has.
    target_guest_memory_bytes: u64,
    /// What it has given up.
    applied_reclaim_bytes: u64,
    /// `planned`, `applied`, `partial` or `failed`.
    status: &'static str,
    /// Why it was not asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl MemoryReclaimRequest {
    fn into_spec(self) -> Result<ReclaimSpec, SpecError> {
        let Self { reclaim_bytes, hold_for, dry_run, reason } = self;
        let bytes = u64::try_from(reclaim_bytes)
            .map_err(|_negative| SpecError::schema("reclaim_bytes", "at least 0 expected"))?;
        let hold = hold_for.map_or(Ok(HOLD), |text| hold(&text))?;
        let reason = reason.unwrap_or_default();
        if reason.chars().count() > REASON_CHARS_MAX {
            let why = format!("more than {REASON_CHARS_MAX} characters");
            return Err(SpecError::schema("reason", why));
        }
        let dry_run = dry_run.unwrap_or_default();
        tracing::info!(bytes, ?hold, dry_run, reason, "Memory is to be reclaimed");
        Ok(ReclaimSpec { bytes, hold, dry_run })
    }
}

fn hold(text: &str) -> Result<Duration, SpecError> {
    let hold: GoDuration = text.parse().map_err(|error| SpecError::invalid("hold_for", error))?;
    let hold = if hold.is_zero() { Some(HOLD) } else { hold.positive() };
    hold.filter(|hold| *hold <= HOLD_MAX)
        .ok_or_else(|| SpecError::invalid("hold_for", "at most 1h expected, and no less than 0"))
}

impl From<&Part> for MemoryReclaimAction {
    fn from(part: &Part) -> Self {
        let Part { instance, assigned_bytes, floor_bytes, planned_bytes, given } = part;
        let assigned = *assigned_bytes;
        let held = instance.held_bytes;
        let (now, status, error) = match given {
            None => (held, "planned", None),
            Some(Ok(given)) if given == planned_bytes => (*given, "applied", None),
            Some(Ok(given)) => (*given, "partial", None),
            Some(Err(error)) => (held, "failed", Some(format!("{error}"))),
        };
        Self {
            instance_id: instance.id.clone(),
            instance_name: instance.spec.name.to_string(),
            hypervisor: instance.spec.hypervisor.clone(),
            assigned_memory_bytes: assigned,
            protected_floor_bytes: *floor_bytes,
            previous_target_guest_memory_bytes: assigned.saturating_sub(held),
            planned_target_guest_memory_bytes: assigned - planned_bytes,
            target_guest_memory_bytes: assigned.saturating_sub(now),
            applied_reclaim_bytes: if given.is_some() { now } else { 0 },
            status,
            error,
        }
    }
}

/// Has the running guests give up memory, each by what it has beyond its floor, for a while.
#[utoipa::path(
    post, path = "/resources/memory/reclaim", tag = "resources",
    request_body = MemoryReclaimRequest,
    responses(
        (status = 200, body = MemoryReclaimResponse), (status = "default", body = ErrorBody),
    ),
)]
pub(super) async fn reclaim(
    State(app): State<App>,
    JsonBody(body): JsonBody<MemoryReclaimRequest>,
) -> Result<Json<MemoryReclaimResponse>, ApiError> {
    let spec = body.into_spec()?;
    let Reclaimed { host, until, parts } = app.instances.reclaim(&spec).await?;
    let actions: Vec<MemoryReclaimAction> = parts.iter().map(Into::into).collect();
    Ok(Json(MemoryReclaimResponse {
        requested_reclaim_bytes: spec.bytes,
        planned_reclaim_bytes: parts.iter().map(|part| part.planned_bytes).sum(),
        applied_reclaim_bytes: actions.iter().map(|action| action.applied_reclaim_bytes).sum(),
        host_available_bytes: host.available_bytes,
        host_pressure_state: if host.is_short() { "pressure" } else { "healthy" },
        hold_until: until,
        actions,
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(body: Value) -> Result<ReclaimSpec, SpecError> {
        serde_json::from_value::<MemoryReclaimRequest>(body).unwrap().into_spec()
    }

    #[test]
    fn bytes_are_enough() {
        let expected = ReclaimSpec { bytes: 1 << 30, hold: HOLD, dry_run: false };
        assert_eq!(spec(json!({ "reclaim_bytes": 1 << 30 })), Ok(expected));
        let body = json!({ "reclaim_bytes": 0, "hold_for": "1h", "dry_run": true, "reason": "x" });
        let expected = ReclaimSpec { bytes: 0, hold: HOLD_MAX, dry_run: true };
        assert_eq!(spec(body), Ok(expected));
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        for (field, value) in [
            ("reclaim_bytes", json!(-1)),
            ("hold_for", json!("1h1ns")),
            ("hold_for", json!("-1s")),
            ("hold_for", json!("soon")),
            ("reason", json!("x".repeat(257))),
        ] {
            let mut body = json!({ "reclaim_bytes": 1 });
            body[field] = value;
            let error = spec(body).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
