//! A memory device and a driver that is an enemy: plugs anything, anywhere, and lies in the rest.

#![no_main]

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ovum_fuzz::guest::{HostileGuest, MEMORY_BYTES, Move};
use ovum_vmm::memory::Memory;
use ovum_vmm::virtio::mem::{BLOCK_BYTES, MemDevice};

/// Most steps: more say nothing new.
const STEPS_MAX: usize = 64;

const REGION_START: u64 = 4 << 30;
const REGION_BLOCKS: u64 = 192;

#[derive(Debug, Arbitrary)]
enum Step {
    Guest(Move),
    /// A request that is nearly right.
    Ask {
        kind: u8,
        block: u8,
        blocks: u16,
        off: bool,
        cut: u8,
        room: u8,
    },
    /// A request that is not.
    Header {
        words: [u64; 3],
    },
    /// The host would like another size.
    Resize {
        blocks: u8,
    },
}

fuzz_target!(|steps: Vec<Step>| {
    let memory = Memory::new(MEMORY_BYTES, Vec::new()).unwrap();
    let mem = Arc::clone(memory.mem());
    let region_bytes = REGION_BLOCKS * BLOCK_BYTES;
    let device = MemDevice::new(memory, REGION_START, region_bytes).unwrap();
    let handle = device.handle();
    let mut guest = HostileGuest::over(mem, device);
    for step in steps.into_iter().take(STEPS_MAX) {
        match step {
            Step::Guest(step) => guest.make(step),
            Step::Ask { kind, block, blocks, off, cut, room } => {
                let address = REGION_START + u64::from(block) * BLOCK_BYTES + u64::from(off);
                let words = [u64::from(kind % 5), address, blocks.into()];
                ask(&mut guest, words, cut.into(), u16::from(room % 16));
            }
            Step::Header { words } => ask(&mut guest, words, 0, 10),
            Step::Resize { blocks } => {
                let bytes = u64::from(blocks) * BLOCK_BYTES;
                assert_eq!(handle.resize(bytes).is_ok(), bytes <= region_bytes);
                guest.round();
            }
        }
        assert!(handle.plugged_bytes() <= region_bytes);
    }
    guest.finish();
});

fn ask(guest: &mut HostileGuest, words: [u64; 3], cut: usize, room: u16) {
    let request: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    guest.offer(0, &request, cut, room);
    guest.kick(0);
}
