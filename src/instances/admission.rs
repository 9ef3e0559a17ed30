//! Admission: how many machines of this host boot at the same time.
//!
//! A boot is work for a processor from its request to its workload, with hardly a wait in it: of
//! more at once than there are processors all are late together. So boots take turns in the order
//! in which they were asked for. The last is no later for it, and all others are earlier (0018).
//!
//! A guest cannot keep others waiting: its turn is over when its workload runs, when it ends, or
//! after [`TURN_MAX`], whichever comes first. Each turn that runs out halves the time of the next
//! until a boot ends in [`TURN_MAX`] again: however many guests in a row never speak, they keep the
//! others for twice [`TURN_MAX`], and a little each. Whoever has waited for [`WAIT_MAX`] boots
//! beside the others, as all would without turns.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::instances::BootError;

/// How long a boot keeps its turn at most: many times what one takes where KVM is real.
const TURN_MAX: Duration = Duration::from_secs(5);

/// The part of that which a turn keeps at least, however many before it have run out.
const TURN_MIN_PART: u32 = 100;

/// How long a boot waits for its turn: clients wait a minute for an answer, and half of that is the
/// launch's.
const WAIT_MAX: Duration = Duration::from_secs(25);

/// Who boots now, and who waits.
#[derive(Debug)]
pub(super) struct Admission {
    turns: Arc<Semaphore>,
    length: Arc<Length>,
    wait_max: Duration,
}

/// A boot, which keeps others waiting until this is dropped, if not less long.
#[derive(Debug)]
pub(super) struct Turn {
    /// None beside others: nobody waits for that.
    _over: Option<DropGuard>,
}

/// How long the next turn may be.
#[derive(Debug)]
struct Length {
    max: Duration,
    next: Mutex<Duration>,
}

impl Admission {
    /// As many at once as this host has processors.
    pub(super) fn for_host() -> Self {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        Self::new(processors, TURN_MAX, WAIT_MAX)
    }

    fn new(turns: usize, turn_max: Duration, wait_max: Duration) -> Self {
        let length = Arc::new(Length { max: turn_max, next: Mutex::new(turn_max) });
        Self { turns: Arc::new(Semaphore::new(turns)), length, wait_max }
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
        tokio::spawn(hold(permit, over.clone(), Arc::clone(&self.length)));
        Ok(Turn { _over: Some(over.drop_guard()) })
    }

    /// Nobody boots any more; whoever waits is told.
    pub(super) fn close(&self) {
        self.turns.close();
    }
}

async fn hold(permit: OwnedSemaphorePermit, over: CancellationToken, length: Arc<Length>) {
    let given = length.next();
    if time::timeout(given, over.cancelled()).await.is_err() {
        tracing::debug!("A boot takes long; the next begins beside it");
        length.ran_out(given);
        drop(permit);
        let rest = length.max.saturating_sub(given);
        if time::timeout(rest, over.cancelled()).await.is_err() {
            return;
        }
    }
    length.was_enough(given * 2);
}

impl Length {
    fn next(&self) -> Duration {
        *self.lock()
    }

    /// A turn of this length was not enough. Of those that were given it together one is counted.
    fn ran_out(&self, given: Duration) {
        let mut next = self.lock();
        if *next == given {
            *next = (given / 2).max(self.max / TURN_MIN_PART);
        }
    }

    /// A boot has ended that took no longer than the longest turn: nobody need be given less than
    /// this.
    fn was_enough(&self, least: Duration) {
        let mut next = self.lock();
        *next = least.clamp(*next, self.max);
    }

    fn lock(&self) -> MutexGuard<'_, Duration> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

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
    async fn many_that_never_speak_hold_others_up_for_little_longer_than_two() {
        const SILENT: u32 = 40;
        let turn_max = Duration::from_millis(100);
        let admission = Admission::new(1, turn_max, EVER);
        let begun = Instant::now();

        let mut silent = Vec::new();
        for _ in 0..SILENT {
            silent.push(admission.turn().await.unwrap());
        }
        drop(admission.turn().await.unwrap());

        // At their full length it were forty.
        let waited = begun.elapsed();
        assert!((turn_max..turn_max * 8).contains(&waited), "{waited:?}");
    }

    #[tokio::test]
    async fn boots_that_are_only_slow_have_long_turns_again() {
        const SLOW: Duration = Duration::from_millis(40);
        const BOOTS: u32 = 8;
        let turn_max = Duration::from_secs(2);
        let admission = Admission::new(1, turn_max, EVER);
        *admission.length.lock() = turn_max / TURN_MIN_PART;

        for _ in 0..BOOTS {
            let turn = admission.turn().await.unwrap();
            time::sleep(SLOW).await;
            drop(turn);
        }

        let _after = admission.turn().await.unwrap();
        assert!(admission.length.next() > SLOW, "{:?}", admission.length);
    }

    #[test]
    fn the_length_of_a_turn_comes_back() {
        let length = Length { max: TURN_MAX, next: Mutex::new(TURN_MAX) };
        let shortest = TURN_MAX / TURN_MIN_PART;

        length.ran_out(TURN_MAX);
        length.ran_out(TURN_MAX);
        assert_eq!(length.next(), TURN_MAX / 2, "two that began together");
        (0..20).for_each(|_| length.ran_out(length.next()));
        assert_eq!(length.next(), shortest);
        length.was_enough(shortest * 2);
        assert_eq!(length.next(), shortest * 2);
        length.was_enough(TURN_MAX * 2);
        assert_eq!(length.next(), TURN_MAX);
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
