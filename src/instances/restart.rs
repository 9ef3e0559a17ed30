//! Starting an instance again by itself: what was tried, and what forbids it.

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};

/// How restarting has gone so far. Part of the record.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartStatus {
    /// Attempts since the instance last ran stably.
    pub attempts: u32,
    /// When the last of them began.
    pub last_attempt_at: Option<DateTime<Utc>>,
    /// Why there are no more.
    pub blocked: Option<Blocked>,
}

/// Why an instance is not started again by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blocked {
    /// Somebody stopped it.
    ManualStop,
}
