//! How an instance is looked after: the fields that creating one and changing one have in common.

use chrono::{DateTime, Utc};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;

use crate::api::instances::create::SpecError;
use crate::api::instances::extras::{AutoStandby, duration_asks, parsed_duration};
use crate::api::instances::policies::{HealthCheck, RestartPolicy};
use crate::instances::spec::{Expiry, Upkeep};

/// How an instance is looked after.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UpkeepFields {
    /// When to go to standby. Not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_standby: Option<AutoStandby>,
    /// Whether the workload is well; type `none` for no check.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// When it is started again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub restart_policy: Option<RestartPolicy>,
    /// Time to live, from creation or from this change on; `0s` is for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<String>,
    /// When it shall be deleted; not together with `ttl`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<DateTime<Utc>>,
}

impl UpkeepFields {
    /// Reads these fields of a body that has others, too. Which of them is wrong is said here: to
    /// whoever reads the body as a whole, flattened fields have no names.
    ///
    /// # Errors
    ///
    /// That of the body.
    pub(super) fn within<'de, D: Deserializer<'de>>(body: D) -> Result<Self, D::Error> {
        serde_path_to_error::deserialize(body).map_err(Error::custom)
    }

    /// Whether it asks for standby, checked.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub(super) fn asks_standby(&self) -> Result<bool, SpecError> {
        self.auto_standby.as_ref().map_or(Ok(false), AutoStandby::asks)
    }

    /// Checks everything else.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub(super) fn parsed(self) -> Result<Upkeep, SpecError> {
        Ok(Upkeep {
            expiry: expiry(self.ttl.as_deref(), self.expires_at)?,
            restart_policy: self.restart_policy.map(RestartPolicy::parsed).transpose()?,
            health_check: self.health_check.map(HealthCheck::parsed).transpose()?,
            disk_io_bps: None,
        })
    }
}

/// When an instance is to be deleted by itself; `None` if neither field says anything.
fn expiry(
    ttl: Option<&str>,
    expires_at: Option<DateTime<Utc>>,
) -> Result<Option<Expiry>, SpecError> {
    match (ttl, expires_at) {
        (Some(_), Some(_)) => Err(SpecError::invalid("ttl", "not together with expires_at")),
        (None, None) => Ok(None),
        (None, Some(at)) if at <= Utc::now() => {
            Err(SpecError::invalid("expires_at", "it is in the past"))
        }
        (None, Some(at)) => Ok(Some(Expiry::At(at))),
        (Some(text), None) if !duration_asks("ttl", Some(text))? => Ok(Some(Expiry::Never)),
        (Some(text), None) => {
            let ttl = parsed_duration("ttl", text)?.positive();
            Ok(Some(ttl.map_or(Expiry::Never, Expiry::In)))
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::Json;
    use serde_json::{Value, json};

    use crate::api::instances::create::CreateInstance;
    use crate::api::instances::update::UpdateInstance;

    /// As a client hears it.
    fn said(body: &Value) -> [String; 2] {
        let mut create = json!({ "name": "web", "image": "nginx" });
        create.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
        let create = Json::<CreateInstance>::from_bytes(create.to_string().as_bytes());
        let update = Json::<UpdateInstance>::from_bytes(body.to_string().as_bytes());
        [create.unwrap_err().body_text(), update.unwrap_err().body_text()]
    }

    #[test]
    fn a_field_of_another_type_is_named_to_its_end() {
        for (body, words) in [
            (json!({ "ttl": 7 }), "ttl: invalid type: integer `7`, expected a string"),
            (json!({ "expires_at": "soon" }), "expires_at: "),
            (json!({ "restart_policy": { "policy": "often" } }), "restart_policy.policy: unknown"),
            (
                json!({ "health_check": { "exec": { "command": ["a", 1] } } }),
                "health_check.exec.command[1]: invalid type: integer `1`",
            ),
        ] {
            for text in said(&body) {
                assert!(text.contains(&format!(": {words}")), "{body}: {text}");
            }
        }
    }
}
