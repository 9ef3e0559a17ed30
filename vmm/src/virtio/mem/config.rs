//! What a memory device says of itself (virtio 1.3, 5.15.4).

use zerocopy::byteorder::little_endian::{U16, U64};
use zerocopy::{Immutable, IntoBytes};

/// struct virtio_mem_config.
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Config {
    block_size: U64,
    node_id: U16,
    padding: [u8; 6],
    addr: U64,
    region_size: U64,
    usable_region_size: U64,
    plugged_size: U64,
    requested_size: U64,
}

impl Config {
    pub(super) fn new(block_bytes: u64, start: u64, region_bytes: u64) -> Self {
        Self {
            block_size: U64::new(block_bytes),
            node_id: U16::ZERO,
            padding: [0; 6],
            addr: U64::new(start),
            region_size: U64::new(region_bytes),
            usable_region_size: U64::ZERO,
            plugged_size: U64::ZERO,
            requested_size: U64::ZERO,
        }
    }

    pub(super) fn usable_bytes(&self) -> u64 {
        self.usable_region_size.get()
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.plugged_size.get()
    }

    pub(super) fn requested_bytes(&self) -> u64 {
        self.requested_size.get()
    }

    pub(super) fn request(&mut self, bytes: u64) {
        self.requested_size = U64::new(bytes);
    }

    pub(super) fn plug(&mut self, bytes: u64) {
        self.plugged_size = U64::new(bytes);
    }

    pub(super) fn grow_usable(&mut self, bytes: u64) {
        self.set_usable(bytes.max(self.usable_bytes()));
    }

    pub(super) fn set_usable(&mut self, bytes: u64) {
        self.usable_region_size = U64::new(bytes);
    }
}

const _: () = assert!(size_of::<Config>() == 56, "the layout is the specification's");
