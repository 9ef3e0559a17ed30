//! Memory that guests give up for a while, because the host needs it.
//!
//! Who gives how much is a plan ([`plan`]); each guest's owner carries its part out and writes down
//! until when, so that a guest gets its memory back whatever becomes of this server.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::time::{self, Instant};

use crate::fleet::{HostMemory, worker};
use crate::instances::owner::Order;
use crate::instances::state::State;
use crate::instances::{Instance, Instances, OrderError, RecordError};

/// No guest is brought below this, however large it is: its own programs need it.
const FLOOR_BYTES: u64 = 512 << 20;

/// No guest gives up more than half of its memory.
const FLOOR_PART: u64 = 2;

/// How long guests may take to give up what they are asked for. They go on afterwards.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often they are looked at meanwhile.
const INTERVAL: Duration = Duration::from_millis(100);

/// The host is short of memory below one part in so many.
const PRESSURE_PART: u64 = 10;

/// What is asked of all guests together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReclaimSpec {
    /// How much they shall have given up in the end; nothing gives everything back.
    pub bytes: u64,
    /// For how long.
    pub hold: Duration,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// What a guest has been asked to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// How much.
    pub bytes: u64,
    /// Until when.
    pub until: DateTime<Utc>,
}

/// How a guest's memory differs from what it booted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    /// What was added, in bytes.
    pub plugged_bytes: u64,
    /// What it has given up, in bytes.
    pub given_bytes: u64,
}

/// What came of it.
#[derive(Debug)]
pub struct Reclaimed {
    /// The host's memory afterwards.
    pub host: HostMemory,
    /// Until when guests do without; nothing, if none does.
    pub until: Option<DateTime<Utc>>,
    /// Each running guest's part.
    pub parts: Vec<Part>,
}

/// One guest's part.
#[derive(Debug)]
pub struct Part {
    /// The guest.
    pub instance: Arc<Instance>,
    /// What it has: what it booted with, and what was added. In bytes.
    pub assigned_bytes: u64,
    /// Below this it is not brought, in bytes.
    pub floor_bytes: u64,
    /// What it is to give up, in bytes.
    pub planned_bytes: u64,
    /// What it has given up; nothing, if it was not asked.
    pub given: Option<Result<u64, ReclaimError>>,
}

/// Why a guest was not asked.
#[derive(Debug, thiserror::Error)]
pub enum ReclaimError {
    /// It has no owner any more.
    #[error(transparent)]
    Order(#[from] OrderError),
    /// It has ended.
    #[error("The instance does not run")]
    NotRunning,
    /// It was not written down.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its worker.
    #[error("Failed to tell the worker")]
    Worker(#[from] worker::OrderError),
}

/// How much memory the host has is not known.
#[derive(Debug, thiserror::Error)]
#[error("Failed to look at the host's memory")]
pub struct HostMemoryError(#[source] io::Error);

impl HostMemory {
    /// Whether the host is short of memory.
    pub fn is_short(&self) -> bool {
        self.available_bytes < self.total_bytes / PRESSURE_PART
    }
}

impl Instances {
    /// Has the running guests give up memory, each by what it has beyond its floor.
    ///
    /// # Errors
    ///
    /// [`HostMemoryError`]. What is wrong with one guest is told with its part.
    pub async fn reclaim(&self, spec: &ReclaimSpec) -> Result<Reclaimed, HostMemoryError> {
        // Devices reach all of a guest's memory: it has none to give.
        let can_give = |instance: &Arc<Instance>| {
            instance.state == State::Running && !instance.spec.is_pinned()
        };
        let running: Vec<_> = self.list().into_iter().filter(can_give).collect();
        let assigned = join_all(running.iter().map(|instance| self.assigned(instance))).await;
        let part = |((instance, assigned_bytes), (floor_bytes, planned_bytes))| Part {
            instance,
            assigned_bytes,
            floor_bytes,
            planned_bytes,
            given: None,
        };
        let plan = plan(spec.bytes, &assigned);
        let parts = running.into_iter().zip(assigned).zip(plan);
        let mut parts: Vec<Part> = parts.map(part).collect();
        let until = (spec.bytes > 0).then(|| Utc::now() + spec.hold);
        if !spec.dry_run {
            join_all(parts.iter_mut().map(|part| self.ask(part, until))).await;
        }
        let host = HostMemory::read().map_err(HostMemoryError)?;
        Ok(Reclaimed { host, until, parts })
    }

    /// What a guest has. Of one that cannot be asked only what it booted with is certain.
    async fn assigned(&self, instance: &Instance) -> u64 {
        let moved = self.order(&instance.id, |done| Order::CountMoved { done }).await;
        let moved: Result<Moved, ReclaimError> = moved;
        let plugged_bytes = moved.map_or(0, |moved| moved.plugged_bytes);
        instance.spec.memory_bytes.saturating_add(plugged_bytes)
    }

    /// Asks one guest, and waits a moment for it.
    async fn ask(&self, part: &mut Part, until: Option<DateTime<Utc>>) {
        let deadline = Instant::now() + PATIENCE;
        let bytes = part.planned_bytes;
        let hold = until.filter(|_| bytes > 0).map(|until| Hold { bytes, until });
        let id = part.instance.id.clone();
        let mut given: Result<Moved, ReclaimError> =
            self.order(&id, |done| Order::Reclaim { hold, done }).await;
        while given.as_ref().is_ok_and(|moved| moved.given_bytes != bytes)
            && Instant::now() < deadline
        {
            time::sleep(INTERVAL).await;
            given = self.order(&id, |done| Order::CountMoved { done }).await;
        }
        part.given = Some(given.map(|moved| moved.given_bytes));
    }
}

/// Floor and part of each guest, for guests of `assigned` bytes that shall give up `bytes` in all,
/// or as much as they can: by what each has beyond its floor, in whole MiB.
fn plan(bytes: u64, assigned: &[u64]) -> Vec<(u64, u64)> {
    let floor = |assigned: u64| (assigned / FLOOR_PART).max(FLOOR_BYTES).min(assigned);
    let spare: u128 = assigned.iter().map(|&bytes| u128::from(bytes - floor(bytes))).sum();
    let wanted = u128::from(bytes).min(spare);
    let part = |&assigned: &u64| {
        let own = assigned - floor(assigned);
        let exact = (wanted * u128::from(own)).checked_div(spare).unwrap_or(0);
        let exact = u64::try_from(exact).unwrap_or(own);
        (floor(assigned), exact.next_multiple_of(1 << 20).min(own))
    };
    assigned.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn parts(mib: u64, assigned: &[u64]) -> Vec<u64> {
        let assigned: Vec<_> = assigned.iter().map(|mib| mib * MIB).collect();
        plan(mib * MIB, &assigned).iter().map(|(_, part)| part / MIB).collect()
    }

    #[test]
    fn each_gives_by_what_it_has_to_spare_and_none_goes_below_its_floor() {
        assert_eq!(parts(300, &[1024, 2048, 256]), [100, 200, 0]);
        assert_eq!(parts(1_000_000, &[1024, 2048, 256, 600]), [512, 1024, 0, 88]);
        assert_eq!(parts(0, &[1024, 2048]), [0, 0]);
        assert_eq!(parts(1, &[1024, 1024]), [1, 1], "rounded up to whole MiB");
        assert_eq!(parts(100, &[]), [0_u64; 0]);
        assert_eq!(parts(100, &[512, 64]), [0, 0]);
        assert_eq!(plan(u64::MAX, &[u64::MAX])[0].1, u64::MAX / 2 + 1);
    }
}
