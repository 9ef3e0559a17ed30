//! Memory that the guest is asked to give up, and gets back when the time is over.

use crate::control::{Order, Reply, Status};
use crate::instances::owner::Owner;
use crate::instances::reclaim::{Hold, Moved, ReclaimError};

impl Owner {
    /// Has the guest give up so much of its memory, or nothing any more; returns how it stands so
    /// far.
    ///
    /// Written down first: whoever dies in between leaves a guest that is released in time.
    pub(super) async fn reclaim(&mut self, hold: Option<Hold>) -> Result<Moved, ReclaimError> {
        if self.worker.is_none() {
            return Err(ReclaimError::NotRunning);
        }
        self.update(|record| record.hold = hold)?;
        self.publish();
        self.memory_order(&Order::Inflate { bytes: hold.map_or(0, |hold| hold.bytes) }).await
    }

    /// What the guest got, and what it has given up so far.
    pub(super) async fn count_moved(&mut self) -> Result<Moved, ReclaimError> {
        self.memory_order(&Order::Status).await
    }

    /// The time is over: the guest may have its memory again.
    pub(super) async fn release(&mut self) {
        // The record keeps the hold until the worker was told, so that it is tried again.
        match self.memory_order(&Order::Inflate { bytes: 0 }).await {
            Ok(_) => {
                self.record.hold = None;
                self.save();
                self.publish();
            }
            Err(error) => {
                tracing::warn!(id = self.record.id, %error, "Failed to give memory back");
                self.hush();
            }
        }
    }

    async fn memory_order(&mut self, order: &Order) -> Result<Moved, ReclaimError> {
        let Some(worker) = &mut self.worker else { return Err(ReclaimError::NotRunning) };
        match worker.order(order).await? {
            Reply::Done(Status { plugged_bytes, given_bytes, .. }) => {
                Ok(Moved { plugged_bytes, given_bytes })
            }
            Reply::Failed { .. } | Reply::Event(_) => Err(ReclaimError::NotRunning),
        }
    }
}
