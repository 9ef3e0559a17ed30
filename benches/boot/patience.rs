//! How long a boot may take until it is given up and begun anew.
//!
//! An emulated processor that counts (`dev/in-host --count`) loses its way in about one of fifty
//! boots: a timer's interrupt comes to a guest that has interrupts off, and the guest waits for
//! ever for a lock that it holds itself. That is no boot, and no figure.

use std::time::Duration;

use ovum_test_host::TestHost;
use tokio::time;

/// How many are given up until the run is.
const GIVEN_UP_MAX: u32 = 20;

/// What was given up, and when the next is.
pub(crate) struct Patience {
    one: Duration,
    crowd: Duration,
    pub(crate) given_up: u32,
}

impl Patience {
    /// A boot by counts takes less than a second of that host's, by time a few; a crowd twenty
    /// times as much.
    pub(crate) fn new(counts: bool) -> Self {
        let one = Duration::from_secs(if counts { 10 } else { 60 });
        Self { one, crowd: one * 5, given_up: 0 }
    }

    /// What `boot` makes of one guest.
    pub(crate) async fn with_one<T>(&mut self, host: &TestHost, boot: impl AsyncFn() -> T) -> T {
        self.with(self.one, host, boot).await
    }

    /// What `boot` makes of many at once.
    pub(crate) async fn with_crowd<T>(&mut self, host: &TestHost, boot: impl AsyncFn() -> T) -> T {
        self.with(self.crowd, host, boot).await
    }

    async fn with<T>(&mut self, long: Duration, host: &TestHost, boot: impl AsyncFn() -> T) -> T {
        loop {
            if let Ok(done) = time::timeout(long, boot()).await {
                return done;
            }
            self.given_up += 1;
            assert!(self.given_up <= GIVEN_UP_MAX, "guests stand still");
            eprintln!("not there after {} s: given up, and begun anew", long.as_secs());
            host.clear().await;
        }
    }
}
