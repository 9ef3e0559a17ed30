//! Rate limits: how much devices may do in a second.
//!
//! A [`RateLimiter`] has a bucket for bytes and one for operations. Each device, or each direction
//! of one, waits at a [`Gate`] of its own; gates of one limiter share its buckets.
//!
//! Whoever comes to a gate pays at once, and passes when all that was paid so far has been earned.
//! So the moment to wake up at is known to the nanosecond, gates pass in the order in which they
//! paid, and a large request cannot be overtaken for ever by small ones.
//!
//! Nothing here looks at a clock: callers say what time it is.

use std::io;
use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::io::read;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};

/// Parts of a token that are counted: at n tokens in a second, n of them are earned in each
/// nanosecond, so that nothing is ever rounded away.
const PARTS: u128 = 1_000_000_000;

/// Of a steady rate, what one part of a second in so many gives may come at once. It is also how
/// long a driver with one request at a time may take between two without losing any of its rate:
/// a second's tenth is too short for large requests to a slow disk. It is 4 % of five seconds.
const BURSTS_PER_SECOND: u64 = 5;

/// How much in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateSpec {
    /// On average.
    pub per_second: NonZeroU64,
    /// Saved up at most while nothing is done, to be used at once.
    pub burst: u64,
}

impl RateSpec {
    /// `per_second` with little of a burst.
    pub fn steady(per_second: NonZeroU64) -> Self {
        Self { per_second, burst: per_second.get() / BURSTS_PER_SECOND }
    }
}

/// What a limiter limits; without either there is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimitSpec {
    /// Bytes moved.
    pub bytes: Option<RateSpec>,
    /// Requests, or packets, whatever their size.
    pub operations: Option<RateSpec>,
}

/// What one request costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cost {
    /// Bytes it moves.
    pub bytes: u64,
    /// Operations it is.
    pub operations: u64,
}

/// A limit that several devices share. Clones are the same limit.
#[derive(Debug, Clone)]
pub struct RateLimiter(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Whether there is any limit: asked for each request, by devices that mostly have none.
    limits: AtomicBool,
    /// Held for a few additions and to set timers; no other lock is taken meanwhile.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes: Bucket,
    operations: Bucket,
    /// Timers of the gates.
    timers: Vec<Weak<OwnedFd>>,
}

impl RateLimiter {
    /// A limiter with full buckets.
    pub fn new(spec: RateLimitSpec, now: Instant) -> Self {
        let state = State {
            bytes: Bucket::new(spec.bytes, now),
            operations: Bucket::new(spec.operations, now),
            timers: Vec::new(),
        };
        let limits = AtomicBool::new(spec != RateLimitSpec::default());
        Self(Arc::new(Shared { limits, state: Mutex::new(state) }))
    }

    /// Limits to something else from now on. Whoever waits is woken and looks again.
    pub fn set(&self, spec: RateLimitSpec, now: Instant) {
        let mut state = self.state();
        state.bytes.set(spec.bytes, now);
        state.operations.set(spec.operations, now);
        self.0.limits.store(spec != RateLimitSpec::default(), Ordering::Relaxed);
        state.timers.retain(|timer| timer.strong_count() > 0);
        for timer in state.timers.iter().filter_map(Weak::upgrade) {
            // A timer refuses nothing but times that are none.
            let _ = arm(&timer, Duration::from_nanos(1));
        }
    }

    /// A new place to wait.
    ///
    /// # Errors
    ///
    /// What timerfd_create(2) says.
    pub fn gate(&self) -> io::Result<Gate> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = Arc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?);
        self.state().timers.push(Arc::downgrade(&timer));
        Ok(Gate { limiter: self.clone(), timer, paid: None })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Counters are never half written.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where one device waits for its turn, one request at a time.
#[derive(Debug)]
pub struct Gate {
    limiter: RateLimiter,
    timer: Arc<OwnedFd>,
    /// The request that waits.
    paid: Option<Paid>,
}

/// A request that has paid.
#[derive(Debug, Clone, Copy, Default)]
struct Paid {
    cost: Cost,
    /// What each bucket must have earned.
    bytes_due: u128,
    operations_due: u128,
}

impl Gate {
    /// Whether the next request may go. If not, ask again for the same one when [`Gate::timer`] is
    /// readable; one that has grown meanwhile pays for the difference.
    ///
    /// # Errors
    ///
    /// What timerfd_settime(2) says.
    pub fn admits(&mut self, cost: Cost, now: Instant) -> io::Result<bool> {
        if self.paid.is_none() && !self.limiter.0.limits.load(Ordering::Relaxed) {
            return Ok(true);
        }
        let before = self.paid.take().unwrap_or_default();
        let mut state = self.limiter.state();
        let State { bytes, operations, .. } = &mut *state;
        let new_bytes = cost.bytes.saturating_sub(before.cost.bytes);
        let new_operations = cost.operations.saturating_sub(before.cost.operations);
        let paid = Paid {
            cost: Cost {
                bytes: cost.bytes.max(before.cost.bytes),
                operations: cost.operations.max(before.cost.operations),
            },
            bytes_due: before.bytes_due.max(bytes.pay(new_bytes, now)),
            operations_due: before.operations_due.max(operations.pay(new_operations, now)),
        };
        let wait = bytes.until(paid.bytes_due).max(operations.until(paid.operations_due));
        if wait.is_zero() {
            return Ok(true);
        }
        self.paid = Some(paid);
        // Under the lock: a change of the limit, which sets the timer too, comes before or after.
        arm(&self.timer, wait)?;
        Ok(false)
    }

    /// Readable when a request that was not admitted has its turn, or should ask again.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Makes the timer unreadable until it is set again.
    pub fn acknowledge(&self) {
        let mut expirations = [0; 8];
        // It fails if the timer was set anew meanwhile, and then there is nothing to do.
        let _ = read(&*self.timer, &mut expirations);
    }

    /// Forgets the request that waits. What it paid stays paid, or else a driver could come first
    /// by coming often.
    pub fn forget(&mut self) {
        self.paid = None;
        self.acknowledge();
    }
}

/// Sets `timer` to fire once, `wait` from now.
fn arm(timer: &OwnedFd, wait: Duration) -> io::Result<()> {
    let it_value = Timespec::try_from(wait).map_err(io::Error::other)?;
    let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
    let value = Itimerspec { it_interval, it_value };
    timerfd_settime(timer, TimerfdTimerFlags::empty(), &value)?;
    Ok(())
}

/// Tokens. Both counts only ever grow, so that what was due once is not due again after a change.
#[derive(Debug)]
struct Bucket {
    rate: Option<RateSpec>,
    /// Parts of tokens earned so far: never more than those spent and a burst.
    earned: u128,
    /// Parts of tokens spent so far, by those who wait, too.
    spent: u128,
    /// Until when they are counted.
    at: Instant,
}

impl Bucket {
    fn new(rate: Option<RateSpec>, now: Instant) -> Self {
        let mut bucket = Self { rate: None, earned: 0, spent: 0, at: now };
        bucket.set(rate, now);
        bucket
    }

    fn set(&mut self, rate: Option<RateSpec>, now: Instant) {
        self.earn(now);
        match (self.rate, rate) {
            // Whoever waits may go.
            (_, None) => self.earned = self.earned.max(self.spent),
            (None, Some(rate)) => self.earned = self.full(rate),
            // Debts stay debts.
            (Some(_), Some(rate)) => self.earned = self.earned.min(self.full(rate)),
        }
        self.rate = rate;
    }

    /// Takes `count` tokens; returns what must have been earned before they may be used.
    fn pay(&mut self, count: u64, now: Instant) -> u128 {
        self.earn(now);
        if count == 0 || self.rate.is_none() {
            return 0;
        }
        self.spent = self.spent.saturating_add(u128::from(count).saturating_mul(PARTS));
        self.spent
    }

    /// How long until `due` has been earned.
    fn until(&self, due: u128) -> Duration {
        let missing = due.saturating_sub(self.earned);
        let Some(RateSpec { per_second, .. }) = self.rate else { return Duration::ZERO };
        let wait_ns = missing.div_ceil(per_second.get().into());
        Duration::from_nanos(u64::try_from(wait_ns).unwrap_or(u64::MAX))
    }

    fn earn(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        if let Some(rate) = self.rate {
            let earned = passed.as_nanos().saturating_mul(rate.per_second.get().into());
            self.earned = self.earned.saturating_add(earned).min(self.full(rate));
        }
    }

    fn full(&self, rate: RateSpec) -> u128 {
        self.spent.saturating_add(u128::from(rate.burst).saturating_mul(PARTS))
    }
}

#[cfg(test)]
mod tests;
