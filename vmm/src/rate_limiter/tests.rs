//! A limiter under a clock that only these tests move.

use rustix::time::timerfd_gettime;

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

fn rate(per_second: u64, burst: u64) -> Option<RateSpec> {
    Some(RateSpec { per_second: NonZeroU64::new(per_second).unwrap(), burst })
}

fn bytes(per_second: u64, burst: u64) -> RateLimitSpec {
    RateLimitSpec { bytes: rate(per_second, burst), operations: None }
}

fn of(bytes: u64) -> Cost {
    Cost { bytes, operations: 1 }
}

/// How long until the gate's timer fires; zero if it is not set.
fn wait(gate: &Gate) -> Duration {
    let Itimerspec { it_value, .. } = timerfd_gettime(gate.timer()).unwrap();
    Duration::try_from(it_value).unwrap()
}

/// Whether the timer was set to about `expected` a moment ago.
fn waits(gate: &Gate, expected: Duration) -> bool {
    let wait = wait(gate);
    wait <= expected && wait + Duration::from_secs(10) > expected && !wait.is_zero()
}

#[test]
fn a_burst_passes_at_once_and_the_rest_when_it_is_earned() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1000, 300), start).gate().unwrap();

    for _ in 0..3 {
        assert!(gate.admits(of(100), start).unwrap());
    }
    assert!(!gate.admits(of(100), start).unwrap());
    assert!(!gate.admits(of(100), start + 100 * MILLISECOND - Duration::from_nanos(1)).unwrap());
    assert!(gate.admits(of(100), start + 100 * MILLISECOND).unwrap());
    assert!(!gate.admits(of(100), start + 100 * MILLISECOND).unwrap());
}

#[test]
fn the_timer_fires_when_the_tokens_suffice() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1000, 0), start).gate().unwrap();
    assert!(wait(&gate).is_zero());

    assert!(!gate.admits(of(60_000), start).unwrap());

    assert!(waits(&gate, Duration::from_secs(60)), "{:?}", wait(&gate));
}

#[test]
fn a_request_larger_than_the_burst_passes_when_it_is_earned() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1000, 100), start).gate().unwrap();

    assert!(!gate.admits(of(5100), start).unwrap());
    assert!(!gate.admits(of(5100), start + 4999 * MILLISECOND).unwrap());
    assert!(gate.admits(of(5100), start + 5000 * MILLISECOND).unwrap());
}

/// Asked for over and over, whenever the timer says so, the rate comes out exactly.
#[test]
fn five_seconds_let_pass_what_the_rate_says() {
    let start = Instant::now();
    let end = start + Duration::from_secs(5);
    let spec = RateSpec::steady(NonZeroU64::new(10_000_000).unwrap());
    let spec = RateLimitSpec { bytes: Some(spec), operations: None };
    let mut gate = RateLimiter::new(spec, start).gate().unwrap();
    let (mut now, mut passed) = (start, 0);

    while now < end {
        if gate.admits(of(128 << 10), now).unwrap() {
            passed += 128 << 10;
        } else {
            now += Duration::from_micros(700);
        }
    }

    assert!((50_000_000..=52_000_000 + (128 << 10)).contains(&passed), "{passed}");
}

/// A driver that asks for the next only when it has the last, from a disk that takes its time.
#[test]
fn one_request_at_a_time_has_the_whole_rate() {
    let start = Instant::now();
    let spec = RateSpec::steady(NonZeroU64::new(10 << 20).unwrap());
    let spec = RateLimitSpec { bytes: Some(spec), operations: None };
    let mut gate = RateLimiter::new(spec, start).gate().unwrap();
    assert!(gate.admits(of(2 << 20), start).unwrap(), "the burst is gone");
    let mut now = start;

    for _ in 0..50 {
        while !gate.admits(of(1 << 20), now).unwrap() {
            now += MILLISECOND;
        }
        now += 90 * MILLISECOND;
    }

    let took = now - start;
    assert!((5000..5100).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn operations_are_limited_whatever_their_size() {
    let start = Instant::now();
    let spec = RateLimitSpec { bytes: rate(1_000_000, 1_000_000), operations: rate(100, 2) };
    let mut gate = RateLimiter::new(spec, start).gate().unwrap();

    assert!(gate.admits(of(0), start).unwrap());
    assert!(gate.admits(of(1), start).unwrap());
    assert!(!gate.admits(of(1), start).unwrap());
    assert!(!gate.admits(of(1), start + 9 * MILLISECOND).unwrap());
    assert!(gate.admits(of(1), start + 10 * MILLISECOND).unwrap());
}

#[test]
fn gates_of_one_limiter_share_its_tokens_in_turn() {
    let start = Instant::now();
    let limiter = RateLimiter::new(bytes(1000, 0), start);
    let mut large = limiter.gate().unwrap();
    let mut small = limiter.gate().unwrap();
    let mut passed = 0;

    assert!(!large.admits(of(1000), start).unwrap());
    assert!(!small.admits(of(10), start).unwrap());

    for ms in 1..=2020 {
        let now = start + ms * MILLISECOND;
        if large.admits(of(1000), now).unwrap() {
            assert_eq!(ms, 1000 * (passed + 1) + 10 * passed, "turn {passed} of the large one");
            passed += 1;
        }
        let turn = small.admits(of(10), now).unwrap();
        assert!(!turn || ms >= 1010, "the small one came second");
    }
    assert_eq!(passed, 2);
}

#[test]
fn what_is_not_used_is_saved_up_to_the_burst() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1000, 300), start).gate().unwrap();
    assert!(gate.admits(of(300), start).unwrap());

    let later = start + Duration::from_secs(3600);

    assert!(gate.admits(of(300), later).unwrap());
    assert!(!gate.admits(of(1), later).unwrap());
}

/// A driver can change a request while it waits.
#[test]
fn a_request_that_grows_pays_the_difference() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1000, 0), start).gate().unwrap();

    assert!(!gate.admits(of(10), start).unwrap());
    assert!(!gate.admits(of(1000), start + 10 * MILLISECOND).unwrap());
    assert!(!gate.admits(of(5), start + 999 * MILLISECOND).unwrap(), "nothing is given back");
    assert!(gate.admits(of(5), start + 1000 * MILLISECOND).unwrap());
}

#[test]
fn a_limit_is_changed_under_those_who_wait() {
    let start = Instant::now();
    let limiter = RateLimiter::new(bytes(10, 0), start);
    let mut gate = limiter.gate().unwrap();
    assert!(!gate.admits(of(1000), start).unwrap());
    assert!(waits(&gate, Duration::from_secs(100)));

    limiter.set(bytes(1000, 0), start);
    assert!(wait(&gate) <= MILLISECOND, "the timer fires now");
    assert!(!gate.admits(of(1000), start).unwrap());
    assert!(waits(&gate, Duration::from_secs(1)));

    limiter.set(RateLimitSpec::default(), start);
    assert!(gate.admits(of(1000), start).unwrap());
    assert!(gate.admits(of(u64::MAX), start).unwrap(), "there is no limit any more");

    limiter.set(bytes(1000, 500), start);
    assert!(gate.admits(of(500), start).unwrap(), "it begins anew, with a burst");
    assert!(!gate.admits(of(500), start).unwrap());
    assert!(gate.admits(of(500), start + 500 * MILLISECOND).unwrap());
}

#[test]
fn a_gate_that_forgets_has_paid_all_the_same() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1000, 0), start).gate().unwrap();
    assert!(!gate.admits(of(1000), start).unwrap());

    gate.forget();

    assert!(!gate.admits(of(1), start + 1000 * MILLISECOND).unwrap());
    assert!(gate.admits(of(1), start + 1001 * MILLISECOND).unwrap());
}

/// The sizes are a guest's.
#[test]
fn no_cost_is_too_large_to_count() {
    let start = Instant::now();
    let mut gate = RateLimiter::new(bytes(1, 0), start).gate().unwrap();

    for _ in 0..3 {
        assert!(!gate.admits(of(u64::MAX), start).unwrap());
        gate.forget();
    }

    assert!(!gate.admits(of(1), start + Duration::from_secs(1 << 40)).unwrap());
}
