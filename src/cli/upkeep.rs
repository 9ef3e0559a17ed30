//! How an instance is looked after, as it is typed for `ovum run` and `ovum update`: with the words
//! of `docker run`.

use chrono::{DateTime, Utc};
use clap::Args;

use crate::api::instances::policies::{
    ExecCheck, HealthCheck, HealthCheckKind, RestartPolicy, RestartWhen,
};
use crate::api::instances::upkeep::UpkeepFields;

/// What runs a health check's command.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// Restart policy, health check and lifetime.
#[derive(Debug, Clone, Args)]
pub(super) struct UpkeepArgs {
    /// When it is started again: no, always, unless-stopped (the same), on-failure or on-failure:N
    #[arg(long, value_name = "POLICY", value_parser = policy)]
    restart: Option<RestartPolicy>,
    /// How long after its end; 5s if omitted
    #[arg(long, value_name = "DURATION", requires = "restart")]
    restart_backoff: Option<String>,
    /// After how long a run attempts are forgotten; 10m if omitted
    #[arg(long, value_name = "DURATION", requires = "restart")]
    restart_stable_after: Option<String>,
    /// Whether it is well: a command for the guest's shell, which ends with 0 then
    #[arg(long, value_name = "COMMAND", conflicts_with = "no_healthcheck")]
    health_cmd: Option<String>,
    /// How often; 10s if omitted
    #[arg(long, value_name = "DURATION", requires = "health_cmd")]
    health_interval: Option<String>,
    /// How long one may take; 2s if omitted
    #[arg(long, value_name = "DURATION", requires = "health_cmd")]
    health_timeout: Option<String>,
    /// How long after the boot failures do not count; 30s if omitted
    #[arg(long, value_name = "DURATION", requires = "health_cmd")]
    health_start_period: Option<String>,
    /// So many failures in a row make it unhealthy; 3 if omitted
    #[arg(long, value_name = "COUNT", requires = "health_cmd")]
    health_retries: Option<i64>,
    /// Nobody asks whether it is well
    #[arg(long)]
    no_healthcheck: bool,
    /// Delete it after this time, for example 1h30m; 0s: never
    #[arg(long, value_name = "DURATION", conflicts_with = "expires_at")]
    ttl: Option<String>,
    /// Delete it at this time, for example 2030-01-31T12:00:00Z
    #[arg(long, value_name = "TIME")]
    expires_at: Option<DateTime<Utc>>,
}

impl UpkeepArgs {
    /// As the API takes it. Durations and counts are the server's to check.
    pub(super) fn fields(self) -> UpkeepFields {
        let restart_policy = self.restart.map(|policy| RestartPolicy {
            backoff: self.restart_backoff,
            stable_after: self.restart_stable_after,
            ..policy
        });
        let none = HealthCheck { kind: Some(HealthCheckKind::None), ..HealthCheck::default() };
        let health_check = self.health_cmd.map(|script| HealthCheck {
            exec: Some(ExecCheck {
                command: SHELL.map(str::to_owned).into_iter().chain([script]).collect(),
                working_dir: None,
            }),
            interval: self.health_interval,
            timeout: self.health_timeout,
            start_period: self.health_start_period,
            failure_threshold: self.health_retries,
            ..HealthCheck::default()
        });
        UpkeepFields {
            auto_standby: None,
            health_check: health_check.or(self.no_healthcheck.then_some(none)),
            restart_policy,
            ttl: self.ttl,
            expires_at: self.expires_at,
        }
    }
}

/// What docker calls it, and what the API does.
fn policy(text: &str) -> Result<RestartPolicy, String> {
    let (name, attempts) = match text.split_once(':') {
        Some((name, attempts)) => (name, Some(attempts)),
        None => (text, None),
    };
    let when = match name {
        "no" | "never" => RestartWhen::Never,
        "always" | "unless-stopped" => RestartWhen::Always,
        "on-failure" | "on_failure" => RestartWhen::OnFailure,
        _ => return Err("it has to be no, always, unless-stopped or on-failure[:N]".to_owned()),
    };
    let max_attempts = match attempts {
        Some(_) if when != RestartWhen::OnFailure => {
            return Err("only on-failure has a number of attempts".to_owned());
        }
        Some(number) => {
            let number: u32 =
                number.parse().map_err(|_| "after the colon a number has to be".to_owned())?;
            Some(number.into())
        }
        None => None,
    };
    Ok(RestartPolicy { policy: Some(when), max_attempts, ..RestartPolicy::default() })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::{Value, json};

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        upkeep: UpkeepArgs,
    }

    fn body(typed: &[&str]) -> Result<Value, String> {
        let line = Line::try_parse_from(["update"].iter().chain(typed));
        let line = line.map_err(|error| error.to_string())?;
        Ok(serde_json::to_value(line.upkeep.fields()).unwrap())
    }

    #[test]
    fn what_is_typed_becomes_a_body() {
        assert_eq!(body(&[]), Ok(json!({})));
        assert_eq!(
            body(&["--restart=on-failure:3", "--restart-backoff=1s", "--ttl=1h"]).unwrap(),
            json!({
                "restart_policy": { "policy": "on_failure", "max_attempts": 3, "backoff": "1s" },
                "ttl": "1h",
            })
        );
        assert_eq!(
            body(&["--health-cmd=test -e /up", "--health-interval=5s", "--restart=no"]).unwrap(),
            json!({
                "restart_policy": { "policy": "never" },
                "health_check": {
                    "exec": { "command": ["/bin/sh", "-c", "test -e /up"] }, "interval": "5s",
                },
            })
        );
        assert_eq!(body(&["--no-healthcheck"]), Ok(json!({ "health_check": { "type": "none" } })));
        let at = "2030-01-31T12:00:00Z";
        assert_eq!(body(&["--expires-at", at]), Ok(json!({ "expires_at": at })));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_its_flag() {
        for typed in [
            &["--restart=often"][..],
            &["--restart=always:3"],
            &["--restart=on-failure:many"],
            &["--health-interval=1s"],
            &["--health-cmd=true", "--no-healthcheck"],
            &["--ttl=1h", "--expires-at=2030-01-01T00:00:00Z"],
            &["--expires-at=soon"],
        ] {
            let error = body(typed).unwrap_err();
            let flag = typed[0].split('=').next().unwrap();
            assert!(error.contains(flag), "{typed:?}: {error}");
        }
    }
}
