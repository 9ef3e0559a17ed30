//! The body of `PATCH /instances/{id}`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::create::{SpecError, checked_disk_io};
use crate::api::instances::upkeep::UpkeepFields;
use crate::instances::spec::Upkeep;

/// What is to change; at least one thing.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct UpdateInstance {
    /// New values of variables that are the source of a credential; there are no credentials yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub env: Option<BTreeMap<String, String>>,
    /// Bytes per second to and from all disks together, from now on; `0` is without limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_io_bps: Option<String>,
    /// How it is looked after.
    #[serde(flatten, deserialize_with = "UpkeepFields::within")]
    pub upkeep: UpkeepFields,
}

impl UpdateInstance {
    /// Checks everything.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub fn into_upkeep(self) -> Result<Upkeep, SpecError> {
        let Self { env, disk_io_bps, upkeep } = self;
        if let Some(env) = &env {
            let why = match env.keys().next() {
                Some(name) => format!("{name:?} is not the source of a credential"),
                None => "at least one variable expected".to_owned(),
            };
            return Err(SpecError::invalid("env", why));
        }
        let changes_standby = upkeep.auto_standby.is_some();
        let asks_standby = upkeep.asks_standby()?;
        let disk_io_bps = disk_io_bps.as_deref().map(checked_disk_io).transpose()?;
        let upkeep = Upkeep { disk_io_bps, ..upkeep.parsed()? };
        if asks_standby {
            return Err(SpecError::NotSupported { field: "auto_standby" });
        }
        if upkeep == Upkeep::default() && !changes_standby {
            let why = "one of auto_standby, disk_io_bps, health_check, restart_policy, ttl, \
                expires_at expected";
            return Err(SpecError::invalid("body", why));
        }
        Ok(upkeep)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;

    use serde_json::{Value, json};

    use super::*;
    use crate::instances::spec::Expiry;

    fn upkeep(body: Value) -> Result<Upkeep, SpecError> {
        serde_json::from_value::<UpdateInstance>(body).unwrap().into_upkeep()
    }

    #[test]
    fn what_is_omitted_stays_and_what_is_none_goes() {
        let upkeep = upkeep(json!({ "health_check": { "type": "none" }, "ttl": "0s" })).unwrap();

        let health_check = Some(None);
        let expiry = Some(Expiry::Never);
        assert_eq!(upkeep, Upkeep { health_check, expiry, ..Upkeep::default() });
    }

    #[test]
    fn the_limit_of_disks_is_changed_or_lifted() {
        for (text, limit) in [("2MB/s", NonZeroU64::new(2 << 20)), ("0", None)] {
            let upkeep = upkeep(json!({ "disk_io_bps": text })).unwrap();
            assert_eq!(upkeep, Upkeep { disk_io_bps: Some(limit), ..Upkeep::default() });
        }
    }

    #[test]
    fn a_body_that_changes_nothing_or_what_cannot_change_is_refused() {
        for (body, word) in [
            (json!({}), "body"),
            (json!({ "name": "other" }), "body"),
            (json!({ "env": {} }), "env"),
            (json!({ "disk_io_bps": "1B/s" }), "disk_io_bps"),
            (json!({ "env": { "KEY": "x" } }), "\"KEY\""),
            (json!({ "ttl": "1h", "expires_at": "2999-01-01T00:00:00Z" }), "ttl"),
            (json!({ "expires_at": "2001-01-01T00:00:00Z" }), "expires_at"),
            (json!({ "restart_policy": { "backoff": "-1s" } }), "restart_policy.backoff"),
            (json!({ "auto_standby": { "enabled": true } }), "auto_standby.idle_timeout"),
        ] {
            let error = upkeep(body.clone()).unwrap_err().to_string();
            assert!(error.contains(word), "{body}: {error}");
        }
        let standby = json!({ "auto_standby": { "enabled": true, "idle_timeout": "1m" } });
        assert_eq!(upkeep(standby), Err(SpecError::NotSupported { field: "auto_standby" }));
        assert!(upkeep(json!({ "auto_standby": { "enabled": false } })).is_ok());
    }
}
