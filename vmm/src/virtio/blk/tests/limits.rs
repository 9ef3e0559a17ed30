//! Disks with a limit: requests wait for their turn, and none is lost.

use super::*;

/// Reads of 64 KiB by a driver that asks for all at once, under a limit.
#[test]
fn a_limit_holds_requests_back_until_they_are_earned_and_loses_none() {
    for kind in BOTH {
        let guest = Guest::new();
        let file = tempfile::tempfile().unwrap();
        file.set_len(DISK_BYTES as u64).unwrap();
        let per_second = NonZeroU64::new(16 << 20).unwrap();
        let bytes = Some(RateSpec { per_second, burst: 1 << 20 });
        let start = Instant::now();
        let limiter = RateLimiter::new(RateLimitSpec { bytes, operations: None }, start);
        let mut rig = Rig::limited(&guest, file, kind, false, &limiter);
        let into = guest.buffer(64 << 10);
        let count = 64;

        for _ in 0..count {
            let readable = [rig.header(IN, 0)];
            let status = guest.buffer(1);
            rig.queue.offer(&readable, &[into, status]);
        }
        rig.bench.kick(0);
        let used = rig.settle(count);

        assert!(used.iter().all(|(_, written)| *written == (64 << 10) + 1), "{used:?}");
        let took = start.elapsed();
        // 4 MiB, of which one is the burst.
        assert!((187..400).contains(&took.as_millis()), "{kind:?}: {took:?}");
        rig.bench.reset();
        assert_eq!(rig.bench.watched(), 0);
    }
}

#[test]
fn a_limit_that_is_lifted_lets_all_go_at_once() {
    let guest = Guest::new();
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES as u64).unwrap();
    let bytes = Some(RateSpec::steady(NonZeroU64::MIN));
    let limiter = RateLimiter::new(RateLimitSpec { bytes, operations: None }, Instant::now());
    let mut rig = Rig::limited(&guest, file, EngineKind::Uring, false, &limiter);
    for _ in 0..8 {
        let readable = [rig.header(IN, 0)];
        rig.queue.offer(&readable, &[guest.buffer(512), guest.buffer(1)]);
    }
    rig.bench.kick(0);
    assert_eq!(rig.queue.used(), [], "512 bytes at a byte in a second");

    limiter.set(RateLimitSpec::default(), Instant::now());

    assert_eq!(rig.settle(8).len(), 8);
}

#[test]
fn a_reset_leaves_no_request_waiting_for_its_turn() {
    let guest = Guest::new();
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES as u64).unwrap();
    let bytes = Some(RateSpec { per_second: NonZeroU64::MIN, burst: 512 });
    let limiter = RateLimiter::new(RateLimitSpec { bytes, operations: None }, Instant::now());
    let mut rig = Rig::limited(&guest, file, EngineKind::Uring, false, &limiter);
    assert_eq!(rig.ask(IN, 0, &[], &[guest.buffer(512)]).0, OK);
    let readable = [rig.header(IN, 0)];
    rig.queue.offer(&readable, &[guest.buffer(512), guest.buffer(1)]);
    rig.bench.kick(0);

    rig.bench.reset();

    assert_eq!(rig.bench.watched(), 0);
    assert_eq!(rig.queue.used(), []);
}
