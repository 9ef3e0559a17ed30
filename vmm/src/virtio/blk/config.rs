//! What a disk says of itself: the configuration space (virtio 1.3, 5.2.4).

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::request::{RANGE_SECTORS_MAX, RANGES_MAX};

/// Descriptors of a request that hold no data: header and status.
const FRAME_DESCRIPTORS: u16 = 2;

/// The block size the driver is told: a sector, so that a disk of any size has whole blocks.
const BLOCK_BYTES: u32 = 512;

/// Physical block as a power of two of the logical one: 4 KiB, the page cache's grain below.
const PHYSICAL_BLOCK_EXP: u8 = 3;

/// struct virtio_blk_config, up to the fields of the features that are offered.
#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

impl Config {
    pub(super) fn new(sectors: u64, read_only: bool, queue_size: u16) -> Self {
        let erase = u32::from(!read_only);
        let range_sectors = U32::new(RANGE_SECTORS_MAX.saturating_mul(erase));
        let ranges = U32::new(RANGES_MAX.saturating_mul(erase));
        Self {
            capacity: U64::new(sectors),
            size_max: U32::ZERO,
            seg_max: U32::new(queue_size.saturating_sub(FRAME_DESCRIPTORS).into()),
            geometry: [0; 4],
            blk_size: U32::new(BLOCK_BYTES),
            physical_block_exp: PHYSICAL_BLOCK_EXP,
            alignment_offset: 0,
            min_io_size: U16::new(1 << PHYSICAL_BLOCK_EXP),
            opt_io_size: U32::ZERO,
            writeback: 0,
            unused0: 0,
            num_queues: U16::ZERO,
            max_discard_sectors: range_sectors,
            max_discard_seg: ranges,
            discard_sector_alignment: U32::new(erase << PHYSICAL_BLOCK_EXP),
            max_write_zeroes_sectors: range_sectors,
            max_write_zeroes_seg: ranges,
            write_zeroes_may_unmap: u8::from(!read_only),
            unused1: [0; 3],
        }
    }
}

const _: () = assert!(size_of::<Config>() == 60, "the layout is the specification's");
