//! What the owner does by itself when the time has come: deletes what has expired, starts again
//! what shall run, asks whether it is well, forgets attempts once a run was stable, finishes what a
//! guest did not answer to.
//!
//! There is one alarm, the earliest of all; after it, and after anything else that happens, the
//! next is found anew. Times are of the calendar, for they outlive the server.

use std::future;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use tokio::time;

use crate::control::Order;
use crate::fleet::byte_limit;
use crate::instances::health::Probe;
use crate::instances::owner::Owner;
use crate::instances::record::Phase;
use crate::instances::restart::{Blocked, Decision, RestartReason};
use crate::instances::spec::Upkeep;
use crate::instances::state::State;
use crate::instances::{Instance, UpkeepError};

/// Longest sleep: a clock that was set forward is noticed at the latest then.
const SLEEP_MAX: Duration = Duration::from_secs(600);

/// How long nothing is done by itself after something failed.
const QUIET: TimeDelta = TimeDelta::seconds(5);

/// What is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Its time is over.
    Expiry,
    /// It is to be started again.
    Restart,
    /// It is to be asked whether it is well.
    Check,
    /// It has run long enough for attempts to be forgotten.
    Stability,
    /// Its guest may have its memory again.
    Release,
    /// A change of its volumes is to be brought to an end.
    VolumeChange,
}

/// Waits until `alarm`, and says for what; for ever, if there is none.
pub(super) async fn ring(alarm: Option<(DateTime<Utc>, Due)>) -> Due {
    let Some((at, due)) = alarm else { return future::pending().await };
    while let Ok(left) = (at - Utc::now()).to_std()
        && !left.is_zero()
    {
        time::sleep(left.min(SLEEP_MAX)).await;
    }
    due
}

impl Owner {
    /// What is due next.
    pub(super) fn alarm(&self) -> Option<(DateTime<Utc>, Due)> {
        let alarms = [
            (self.record.expires_at, Due::Expiry),
            (self.restart_at(), Due::Restart),
            (self.check_at(), Due::Check),
            (self.stable_at(), Due::Stability),
            (self.record.hold.map(|hold| hold.until), Due::Release),
            (self.unsettled_at(), Due::VolumeChange),
        ];
        let times = alarms.into_iter().filter_map(|(at, due)| Some((at?, due)));
        let (at, due) = times.min_by_key(|(at, _)| *at)?;
        Some((self.quiet_until.map_or(at, |quiet| quiet.max(at)), due))
    }

    /// When it is to be started again by itself.
    pub(super) fn restart_at(&self) -> Option<DateTime<Utc>> {
        let policy = self.record.spec.restart_policy.as_ref()?;
        let has_stopped = self.state == State::Stopped && self.record.phase != Phase::Deleting;
        let end = self.record.end.as_ref().filter(|_| has_stopped)?;
        match policy.decide(&self.record.restart, end) {
            Decision::At(at) => Some(at),
            Decision::Leave | Decision::GiveUp => None,
        }
    }

    /// Now, if a change of its volumes is under way that nobody is at. One whose machine could not
    /// be told is left as it is.
    fn unsettled_at(&self) -> Option<DateTime<Utc>> {
        let is_known = self.state != State::Unknown;
        self.record.volume_change.as_ref().filter(|_| is_known).map(|_| Utc::now())
    }

    fn stable_at(&self) -> Option<DateTime<Utc>> {
        let policy = self.record.spec.restart_policy.as_ref()?;
        let runs = self.state == State::Running && self.record.restart.attempts > 0;
        self.started_at.filter(|_| runs).map(|started_at| policy.stable_at(started_at))
    }

    /// Does what is due; true if there is nothing left to own.
    pub(super) async fn act(&mut self, due: Due) -> bool {
        match due {
            Due::Expiry => {
                tracing::info!(name = %self.record.spec.name, "Instance has expired");
                self.diary.note("expired");
                match self.delete(true).await {
                    Ok(()) => return true,
                    Err(error) => {
                        tracing::error!(id = self.record.id, %error, "Failed to delete");
                        self.hush();
                    }
                }
            }
            Due::Restart => {
                let unhealthy = self.record.end.as_ref().is_some_and(|end| end.unhealthy);
                self.restart(unhealthy.then_some(RestartReason::HealthCheckFailed)).await;
            }
            Due::Check => self.ask(),
            Due::Release => self.release().await,
            Due::VolumeChange => self.finish_volume_change().await,
            Due::Stability => {
                self.record.restart.attempts = 0;
                self.save();
                self.publish();
            }
        }
        false
    }

    /// Something failed that would fail again at once.
    pub(super) fn hush(&mut self) {
        self.quiet_until = Some(Utc::now() + QUIET);
    }

    /// Brings the status of restarting up to date with the end that the record has; does not write
    /// it down.
    pub(super) fn reckon(&mut self) {
        let record = &mut self.record;
        let (Some(policy), Some(end)) = (&record.spec.restart_policy, &record.end) else { return };
        let stable_at = end.started_at.map(|started_at| policy.stable_at(started_at));
        // An attempt that failed after this end is no part of that run.
        let is_later = |at: Option<DateTime<Utc>>| at.is_some_and(|at| at > end.at);
        if stable_at.is_some_and(|at| at <= end.at) && !is_later(record.restart.last_attempt_at) {
            record.restart.attempts = 0;
        }
        if policy.decide(&record.restart, end) == Decision::GiveUp {
            record.restart.blocked = Some(Blocked::MaxAttemptsExceeded);
        }
    }

    /// Changes how the instance is looked after.
    pub(super) async fn look_after(
        &mut self,
        upkeep: Upkeep,
    ) -> Result<Arc<Instance>, UpkeepError> {
        let now = Utc::now();
        if let Some(at) = self.record.expires_at.filter(|&at| at <= now) {
            return Err(UpkeepError::Expired { at });
        }
        let Upkeep { health_check, restart_policy, expiry, disk_io_bps } = upkeep;
        if let Some(Some(check)) = &health_check {
            match check.probe {
                Probe::Exec { .. } if !self.record.spec.agent => return Err(UpkeepError::NoAgent),
                Probe::Http(_) | Probe::Tcp { .. } if self.record.spec.network.is_none() => {
                    return Err(UpkeepError::NoNetwork);
                }
                Probe::Exec { .. } | Probe::Http(_) | Probe::Tcp { .. } => {}
            }
        }
        let bps_of = |limit: Option<NonZeroU64>| limit.map_or(0, NonZeroU64::get);
        let had_bps = bps_of(self.record.spec.disk_io_bps);
        if let (Some(limit), Some(claim)) = (disk_io_bps, &self.claim) {
            claim.change_disk_io(bps_of(limit))?;
        }
        let is_checked_anew = health_check.is_some();
        let kept = self.update(|record| {
            if let Some(check) = health_check {
                record.spec.health_check = check;
            }
            if let Some(policy) = restart_policy {
                record.spec.restart_policy = policy;
                record.restart = record.restart.under_another_policy();
            }
            if let Some(expiry) = expiry {
                record.expires_at = expiry.from(now);
            }
            if let Some(disk_io_bps) = disk_io_bps {
                record.spec.disk_io_bps = disk_io_bps;
            }
        });
        if let (Err(_), Some(claim)) = (&kept, &self.claim) {
            claim.change_disk_io(had_bps)?;
        }
        kept?;
        if let (Some(limit), Some(worker)) = (disk_io_bps, &mut self.worker) {
            let order = Order::LimitDisks { limit: byte_limit(limit) };
            worker.order(&order).await.map_err(UpkeepError::Worker)?;
        }
        if is_checked_anew {
            self.begin_checks();
        }
        self.publish();
        Ok(self.instance())
    }
}
