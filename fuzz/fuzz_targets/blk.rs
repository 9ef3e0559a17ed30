//! A disk and a driver that is an enemy: requests that are nearly right, and whatever else.

#![no_main]

use std::fs::File;
use std::num::NonZeroU64;
use std::time::Instant;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_fuzz::guest::{HostileGuest, Move};
use ovum_vmm::rate_limiter::{RateLimitSpec, RateLimiter, RateSpec};
use ovum_vmm::spec::DiskSpec;
use ovum_vmm::virtio::blk::{Blk, EngineKind};
use rustix::fs::{MemfdFlags, memfd_create};

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 64;

/// Some sectors, and so that requests often leave the disk.
const DISK_BYTES: u64 = 64 << 10;

#[derive(Debug, Arbitrary)]
struct Plan {
    uring: bool,
    read_only: bool,
    limit: Option<(NonZeroU64, u16)>,
    steps: Vec<Step>,
}

#[derive(Debug, Arbitrary)]
enum Step {
    Guest(Move),
    /// A request that is nearly right.
    Ask {
        kind: u8,
        sector: Sector,
        data: Vec<u8>,
        cut: u8,
        room: u16,
    },
    /// DISCARD or WRITE_ZEROES.
    Erase {
        zeroes: bool,
        sector: Sector,
        sectors: u32,
        flags: u8,
    },
    /// The host changes its mind.
    Limit {
        limit: Option<(NonZeroU64, u16)>,
    },
}

#[derive(Debug, Arbitrary)]
enum Sector {
    Near(u8),
    Any(u64),
}

impl Sector {
    fn number(&self) -> u64 {
        match *self {
            Self::Near(sector) => sector.into(),
            Self::Any(sector) => sector,
        }
    }
}

fuzz_target!(|plan: Plan| {
    let Plan { uring, read_only, limit, steps } = plan;
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(DISK_BYTES).unwrap();
    let disk = DiskSpec { id: "disk".to_owned(), read_only };
    let limiter = RateLimiter::new(spec(limit), Instant::now());
    let kind = if uring { EngineKind::Uring } else { EngineKind::Direct };
    let device = Blk::with_engine(file.try_clone().unwrap(), &disk, &limiter, kind).unwrap();
    let mut guest = HostileGuest::new(device);
    for step in steps.into_iter().take(STEPS_MAX) {
        match step {
            Step::Guest(step) => guest.make(step),
            Step::Ask { kind, sector, data, cut, room } => {
                let mut request = header(u32::from(kind % 16), sector.number());
                request.extend(data);
                guest.offer(0, &request, cut.into(), room);
                guest.kick(0);
            }
            Step::Erase { zeroes, sector, sectors, flags } => {
                let mut request = header(if zeroes { 13 } else { 11 }, 0);
                request.extend(sector.number().to_le_bytes());
                request.extend(sectors.to_le_bytes());
                request.extend(u32::from(flags).to_le_bytes());
                guest.offer(0, &request, 16, 1);
                guest.kick(0);
            }
            Step::Limit { limit } => {
                limiter.set(spec(limit), Instant::now());
                guest.round();
            }
        }
    }
    guest.finish();
    assert_eq!(file.metadata().unwrap().len(), DISK_BYTES, "a disk has another size");
});

fn spec(limit: Option<(NonZeroU64, u16)>) -> RateLimitSpec {
    let rate = limit.map(|(per_second, burst)| RateSpec { per_second, burst: burst.into() });
    RateLimitSpec { bytes: rate, operations: rate }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}
