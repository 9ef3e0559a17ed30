//! Health check and restart policy, as clients write and read them.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::instances::create::SpecError;
use crate::api::instances::extras::{check_port, duration_asks, parsed_duration};
use crate::duration::GoDuration;
use crate::instances::health::{self, Probe};
use crate::instances::restart;

/// From check to check unless told otherwise.
const INTERVAL: &str = "10s";

/// How long one check may take unless told otherwise.
const TIMEOUT: &str = "2s";

/// How long failures do not count unless told otherwise.
const START_PERIOD: &str = "30s";

/// Failures that are bad health unless told otherwise.
const FAILURE_THRESHOLD: i64 = 3;

/// Successes that are good health unless told otherwise.
const SUCCESS_THRESHOLD: i64 = 1;

/// From an end to the next start unless told otherwise.
const BACKOFF: &str = "5s";

/// A run this long makes attempts forgotten unless told otherwise.
const STABLE_AFTER: &str = "10m";

/// Whether a workload is well.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HealthCheck {
    /// How it is asked; what the only one of the others says if omitted.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<HealthCheckKind>,
    /// By HTTP. Not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpCheck>,
    /// By connecting. Not there yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<TcpCheck>,
    /// By a program in the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exec: Option<ExecCheck>,
    /// How often; `10s` if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// How long one may take; `2s` if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
    /// How long failures do not count; `30s` if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_period: Option<String>,
    /// Failures that make it unhealthy; 3 if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure_threshold: Option<i64>,
    /// Successes that make it healthy; 1 if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_threshold: Option<i64>,
}

/// How a workload is asked whether it is well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HealthCheckKind {
    /// Not at all.
    None,
    /// By HTTP.
    Http,
    /// By connecting.
    Tcp,
    /// By a program.
    Exec,
}

/// A health check by HTTP.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HttpCheck {
    /// Port.
    pub port: i64,
    /// Path; `/` if omitted.
    pub path: Option<String>,
    /// `http` if omitted.
    pub scheme: Option<HttpScheme>,
    /// 200 if omitted.
    pub expected_status: Option<i64>,
}

/// Scheme of a health check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum HttpScheme {
    /// Plain.
    Http,
    /// Encrypted.
    Https,
}

/// A health check by connecting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TcpCheck {
    /// Port.
    pub port: i64,
}

/// A health check by a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExecCheck {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Where it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
}

/// When an instance is started again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestartPolicy {
    /// When; never if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<RestartWhen>,
    /// After how long; `5s` if omitted, and a second at least.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backoff: Option<String>,
    /// How often; 0, or omitted, is without end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_attempts: Option<i64>,
    /// After how long a run attempts are forgotten; `10m` if omitted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable_after: Option<String>,
}

/// When an instance is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartWhen {
    /// Never.
    Never,
    /// Whenever it ended.
    Always,
    /// If it ended badly.
    OnFailure,
}

impl HealthCheck {
    /// Checks everything; `None` if there is to be no check.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub(super) fn parsed(self) -> Result<Option<health::HealthCheck>, SpecError> {
        let kind = self.kind()?;
        let [interval, timeout] = [
            ("health_check.interval", self.interval.as_deref().unwrap_or(INTERVAL)),
            ("health_check.timeout", self.timeout.as_deref().unwrap_or(TIMEOUT)),
        ]
        .map(|(field, text)| {
            let duration = parsed_duration(field, text)?.positive();
            duration.ok_or_else(|| SpecError::invalid(field, "more than 0 expected"))
        });
        let (interval, timeout) = (interval?, timeout?);
        if timeout > interval {
            return Err(SpecError::invalid("health_check.timeout", "it is longer than interval"));
        }
        let start_period =
            span("health_check.start_period", self.start_period.as_deref(), START_PERIOD)?;
        let [failure_threshold, success_threshold] = [
            ("health_check.failure_threshold", self.failure_threshold.unwrap_or(FAILURE_THRESHOLD)),
            ("health_check.success_threshold", self.success_threshold.unwrap_or(SUCCESS_THRESHOLD)),
        ]
        .map(|(field, threshold)| {
            let counted = u32::try_from(threshold).ok().filter(|&threshold| threshold > 0);
            counted.ok_or_else(|| SpecError::invalid(field, format!("1 to {} expected", u32::MAX)))
        });
        let (failure_threshold, success_threshold) = (failure_threshold?, success_threshold?);
        let missing = || SpecError::invalid("health_check", "what its type needs is missing");
        let probe = match kind {
            HealthCheckKind::None => return Ok(None),
            HealthCheckKind::Http => {
                self.http.ok_or_else(missing)?.check()?;
                return Err(SpecError::NotSupported { field: "health_check.http" });
            }
            HealthCheckKind::Tcp => {
                check_port("health_check.tcp.port", self.tcp.ok_or_else(missing)?.port)?;
                return Err(SpecError::NotSupported { field: "health_check.tcp" });
            }
            HealthCheckKind::Exec => self.exec.ok_or_else(missing)?.probe()?,
        };
        Ok(Some(health::HealthCheck {
            probe,
            interval,
            timeout,
            start_period,
            failure_threshold,
            success_threshold,
        }))
    }

    fn kind(&self) -> Result<HealthCheckKind, SpecError> {
        let given = [self.http.is_some(), self.tcp.is_some(), self.exec.is_some()];
        match (self.kind, given) {
            (Some(kind), _) => Ok(kind),
            (None, [false, false, false]) => Ok(HealthCheckKind::None),
            (None, [true, false, false]) => Ok(HealthCheckKind::Http),
            (None, [false, true, false]) => Ok(HealthCheckKind::Tcp),
            (None, [false, false, true]) => Ok(HealthCheckKind::Exec),
            (None, _) => Err(SpecError::invalid("health_check.type", "which of them?")),
        }
    }
}

impl From<&health::HealthCheck> for HealthCheck {
    fn from(check: &health::HealthCheck) -> Self {
        let Probe::Exec { command, working_dir } = &check.probe;
        let (command, working_dir) = (command.clone(), working_dir.clone());
        Self {
            kind: Some(HealthCheckKind::Exec),
            exec: Some(ExecCheck { command, working_dir }),
            interval: Some(text(check.interval)),
            timeout: Some(text(check.timeout)),
            start_period: Some(text(check.start_period)),
            failure_threshold: Some(check.failure_threshold.into()),
            success_threshold: Some(check.success_threshold.into()),
            ..Self::default()
        }
    }
}

impl HttpCheck {
    fn check(&self) -> Result<(), SpecError> {
        check_port("health_check.http.port", self.port)?;
        if self.path.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return Err(SpecError::invalid("health_check.http.path", "it must begin with /"));
        }
        if self.expected_status.is_some_and(|status| !(100..=599).contains(&status)) {
            return Err(SpecError::invalid("health_check.http.expected_status", "no status"));
        }
        Ok(())
    }
}

impl ExecCheck {
    fn probe(self) -> Result<Probe, SpecError> {
        let Self { command, working_dir } = self;
        let invalid = |why| Err(SpecError::invalid("health_check.exec.command", why));
        if command.first().is_none_or(String::is_empty) {
            return invalid("it is empty");
        }
        if command.iter().any(|word| word.contains('\0')) {
            return invalid("a NUL byte is in it");
        }
        if working_dir.as_ref().is_some_and(|dir| !dir.starts_with('/') || dir.contains('\0')) {
            let why = "it must begin with / and have no NUL byte";
            return Err(SpecError::invalid("health_check.exec.working_dir", why));
        }
        Ok(Probe::Exec { command, working_dir })
    }
}

impl RestartPolicy {
    /// Checks everything; `None` if it is never started again.
    ///
    /// # Errors
    ///
    /// [`SpecError`], which names the field.
    pub(super) fn parsed(self) -> Result<Option<restart::RestartPolicy>, SpecError> {
        let backoff = span("restart_policy.backoff", self.backoff.as_deref(), BACKOFF)?;
        let stable_after =
            span("restart_policy.stable_after", self.stable_after.as_deref(), STABLE_AFTER)?;
        let max_attempts = u32::try_from(self.max_attempts.unwrap_or_default()).map_err(|_| {
            let why = format!("0 to {} expected", u32::MAX);
            SpecError::invalid("restart_policy.max_attempts", why)
        })?;
        let when = match self.policy {
            None | Some(RestartWhen::Never) => return Ok(None),
            Some(RestartWhen::Always) => restart::RestartWhen::Always,
            Some(RestartWhen::OnFailure) => restart::RestartWhen::OnFailure,
        };
        Ok(Some(restart::RestartPolicy { when, backoff, max_attempts, stable_after }))
    }
}

impl From<&restart::RestartPolicy> for RestartPolicy {
    fn from(policy: &restart::RestartPolicy) -> Self {
        Self {
            policy: Some(match policy.when {
                restart::RestartWhen::Always => RestartWhen::Always,
                restart::RestartWhen::OnFailure => RestartWhen::OnFailure,
            }),
            backoff: Some(text(policy.backoff)),
            max_attempts: Some(policy.max_attempts.into()),
            stable_after: Some(text(policy.stable_after)),
        }
    }
}

/// A duration that may be nothing but not negative.
fn span(field: &'static str, text: Option<&str>, default: &str) -> Result<Duration, SpecError> {
    let text = text.unwrap_or(default);
    duration_asks(field, Some(text))?;
    Ok(parsed_duration(field, text)?.positive().unwrap_or_default())
}

/// As Go prints it.
fn text(duration: Duration) -> String {
    let nanoseconds = i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX);
    GoDuration::from_nanoseconds(nanoseconds).to_string()
}
