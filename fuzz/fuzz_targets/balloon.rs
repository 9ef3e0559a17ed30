//! A balloon and a driver that is an enemy: gives up what it does not have, and takes it again.

#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_fuzz::guest::{HostileGuest, Move};
use ovum_vmm::virtio::balloon::{Balloon, PAGE_BYTES};

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 64;

#[derive(Debug, Arbitrary)]
enum Step {
    Guest(Move),
    /// Pages that are given up or taken again.
    Pages {
        queue: bool,
        pages: Vec<u32>,
        cut: u8,
    },
    /// Free memory, as a descriptor says where.
    Report {
        queue: u8,
        address: u64,
        length: u32,
    },
    /// The host would like to have so much.
    Inflate {
        bytes: u64,
    },
}

fuzz_target!(|steps: Vec<Step>| {
    let device = Balloon::new().unwrap();
    let handle = device.handle();
    let mut guest = HostileGuest::new(device);
    for step in steps.into_iter().take(STEPS_MAX) {
        match step {
            Step::Guest(step) => guest.make(step),
            Step::Pages { queue, pages, cut } => {
                let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
                guest.offer(queue.into(), &list, cut.into(), 0);
                guest.kick(queue.into());
            }
            Step::Report { queue, address, length } => {
                let index = 0;
                guest.make(Move::Describe { queue, index, address, length, flags: 2, next: 0 });
                guest.make(Move::Publish { queue, head: index.into() });
                guest.kick(queue);
            }
            Step::Inflate { bytes } => {
                handle.inflate(bytes);
                guest.round();
            }
        }
        assert!(handle.given_bytes() <= u64::from(u32::MAX) * PAGE_BYTES);
    }
    guest.finish();
});
