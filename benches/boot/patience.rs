//! How long a boot may take until it is given up and begun anew.
//!
//! An emulated processor that counts (`dev/in-host --count`) lost its way in about one of fifty
//! boots, until its emulator was mended (`dev/host/src/emulator.rs`), and does so where that is
//! another: the guest waits for ever for a lock that it holds itself. That is no boot, and no
//! figure. Meanwhile a second of that host takes minutes, so what stands still is not waited for
//! long, and not asked to end.

use std::collections::BTreeMap;
use std::time::Duration;

use ovum_test_host::{TestHost, kill_workers};
use tokio::time;

/// How many are given up until the run is, where clocks count; by time none may be.
const GIVEN_UP_MAX: u32 = 20;

/// What was given up, and when the next is.
pub(crate) struct Patience {
    one: Duration,
    most: u32,
    /// How many boots of whom.
    pub(crate) given_up: BTreeMap<String, u32>,
}

impl Patience {
    /// A boot by counts takes less than half a second of that host's; by time it takes a few, and
    /// a crowd a minute.
    pub(crate) fn new(counts: bool) -> Self {
        let (one, most) = if counts { (2, GIVEN_UP_MAX) } else { (120, 0) };
        Self { one: Duration::from_secs(one), most, given_up: BTreeMap::new() }
    }

    /// What `boot` makes of so many `guests` of `whom`.
    pub(crate) async fn with<T>(
        &mut self,
        whom: &str,
        guests: usize,
        host: &TestHost,
        boot: impl AsyncFn() -> T,
    ) -> T {
        let long = if guests == 1 { self.one } else { self.one * 5 };
        loop {
            if let Ok(done) = time::timeout(long, boot()).await {
                return done;
            }
            *self.given_up.entry(whom.to_owned()).or_default() += 1;
            let all: u32 = self.given_up.values().sum();
            assert!(all <= self.most, "guests stand still: {:?}", self.given_up);
            eprintln!("{whom} is not there after {} s: given up, and begun anew", long.as_secs());
            kill_workers();
            host.clear().await;
        }
    }
}
