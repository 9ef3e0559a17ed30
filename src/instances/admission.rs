//! Admission: how many machines of this host boot at the same time.
//!
//! A boot is work for a processor from its request to its workload, with hardly a wait in it: of
//! more at once than there are processors all are late together. So boots take turns in the order
//! in which they were asked for. The last is no later for it, and all others are earlier (0018).
//!
//! A guest cannot keep others waiting: its turn is over when its workload runs, when it ends, or
//! after [`TURN_MAX`], whichever comes first; and whoever has waited for [`WAIT_MAX`] boots beside
//! the others, as all would without turns.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::instances::BootError;

/// How long a boot keeps its turn: many times what one takes where KVM is real.
const TURN_MAX: Duration = Duration::from_secs(5);

/// How long a boot waits for its turn.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// Who boots now, and who waits.
#[derive(Debug)]
pub(super) struct Admission {
    turns: Arc<Semaphore>,
    turn_max: Duration,
    wait_max: Duration,
}

/// A boot, which keeps others waiting until this is dropped, if not less long.
#[derive(Debug)]
pub(super) struct Turn {
    /// None beside others: nobody waits for that.
    _over: Option<DropGuard>,
}

impl Admission {
    /// As many at once as this host has processors.
    pub(super) fn for_host() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self::new(processors, TURN_MAX, WAIT_MAX)
    }

    fn new(turns: usize, turn_max: Duration, wait_max: Duration) -> Self {
        Self { turns: Arc::new(Semaphore::new(turns)), turn_max, wait_max }
    }

    /// Waits until it may boot.
    ///
    /// # Errors
    ///
    /// [`BootError::Closing`].
    pub(super) async fn turn(&self) -> Result<Turn, BootError> {
        let turn = Arc::clone(&self.turns).acquire_owned();
        let Ok(permit) = time::timeout(self.wait_max, turn).await else {
            tracing::debug!("A boot has waited long; it begins beside others");
            return Ok(Turn { _over: None });
        };
        let permit = permit.map_err(|_closed| BootError::Closing)?;
        let over = CancellationToken::new();
        tokio::spawn(hold(permit, over.clone(), self.turn_max));
        Ok(Turn { _over: Some(over.drop_guard()) })
    }

    /// Nobody boots any more; whoever waits is told.
    pub(super) fn close(&self) {
        self.turns.close();
    }
}

async fn hold(permit: OwnedSemaphorePermit, over: CancellationToken, turn_max: Duration) {
    if time::timeout(turn_max, over.cancelled()).await.is_err() {
        tracing::debug!("A boot takes long; the next begins beside it");
    }
    drop(permit);
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const EVER: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn who_comes_first_boots_first_and_no_more_at_once_than_there_are_turns() {
        let admission = Admission::new(2, EVER, EVER);
        let (first, _second) = (admission.turn().await.unwrap(), admission.turn().await.unwrap());
        let (mut third, mut fourth) = (Box::pin(admission.turn()), Box::pin(admission.turn()));
        assert!((&mut third).now_or_never().is_none() && (&mut fourth).now_or_never().is_none());

        drop(first);

        let third = third.await.unwrap();
        assert!((&mut fourth).now_or_never().is_none());
        drop(third);
        fourth.await.unwrap();
    }

    #[tokio::test]
    async fn one_that_gives_up_waiting_is_passed_over() {
        let admission = Admission::new(1, EVER, EVER);
        let first = admission.turn().await.unwrap();
        let (mut second, mut third) = (Box::pin(admission.turn()), Box::pin(admission.turn()));
        assert!((&mut second).now_or_never().is_none() && (&mut third).now_or_never().is_none());

        drop(second);
        drop(first);

        third.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_never_speaks_holds_nobody_up_for_good() {
        let admission = Admission::new(1, Duration::from_millis(1), EVER);
        let _silent = admission.turn().await.unwrap();

        admission.turn().await.unwrap();
    }

    #[tokio::test]
    async fn nobody_waits_for_ever() {
        let admission = Admission::new(1, EVER, Duration::from_millis(1));
        let _first = admission.turn().await.unwrap();

        let beside = admission.turn().await.unwrap();
        assert!(beside._over.is_none());
    }

    #[tokio::test]
    async fn whoever_waits_when_the_server_closes_is_told() {
        let admission = Admission::new(1, EVER, EVER);
        let _first = admission.turn().await.unwrap();
        let mut second = Box::pin(admission.turn());
        assert!((&mut second).now_or_never().is_none());

        admission.close();

        assert!(matches!(second.await, Err(BootError::Closing)));
        assert!(matches!(admission.turn().await, Err(BootError::Closing)));
    }
}
