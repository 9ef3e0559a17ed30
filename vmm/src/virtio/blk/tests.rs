//! A disk as its driver sees it, over real files and through both engines.

use std::fs::OpenOptions;
use std::io::Write;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::LazyLock;

use proptest::prelude::*;
use rustix::fs::{Advice, fadvise};

use super::*;
use crate::rate_limiter::{RateLimitSpec, RateSpec};
use crate::testing::{Bench, Buffer, Guest, QueueFixture};

mod limits;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const BOTH: [EngineKind; 2] = [EngineKind::Uring, EngineKind::Direct];

const DISK_BYTES: usize = 8 << 20;

/// A driver with a disk whose sectors differ from each other.
struct Rig<'g> {
    guest: &'g Guest,
    queue: QueueFixture<'g>,
    bench: Bench<Blk>,
    file: File,
}

fn spec(read_only: bool) -> DiskSpec {
    DiskSpec { id: "disk-0".to_owned(), read_only }
}

fn unlimited() -> RateLimiter {
    RateLimiter::new(RateLimitSpec::default(), Instant::now())
}

/// What is on a disk at first.
fn content() -> &'static [u8] {
    static CONTENT: LazyLock<Vec<u8>> = LazyLock::new(|| {
        (0..DISK_BYTES).map(|at| u8::try_from((at / 512 + at) % 251).unwrap()).collect()
    });
    &CONTENT
}

impl<'g> Rig<'g> {
    fn new(guest: &'g Guest, kind: EngineKind, read_only: bool) -> Self {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content()).unwrap();
        Self::over(guest, file, kind, read_only)
    }

    fn over(guest: &'g Guest, file: File, kind: EngineKind, read_only: bool) -> Self {
        Self::limited(guest, file, kind, read_only, &unlimited())
    }

    fn limited(
        guest: &'g Guest,
        file: File,
        kind: EngineKind,
        read_only: bool,
        limiter: &RateLimiter,
    ) -> Self {
        let mut queue = QueueFixture::new(guest, 0, 256);
        let device =
            Blk::with_engine(file.try_clone().unwrap(), &spec(read_only), limiter, kind).unwrap();
        let bench = Bench::new(device, &mut [&mut queue]);
        Self { guest, queue, bench, file }
    }

    fn header(&self, kind: u32, sector: u64) -> Buffer {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.guest.buffer_of(&header)
    }

    fn range(&self, sector: u64, sectors: u32, flags: u32) -> Buffer {
        let mut range = sector.to_le_bytes().to_vec();
        range.extend(sectors.to_le_bytes());
        range.extend(flags.to_le_bytes());
        self.guest.buffer_of(&range)
    }

    /// One request as Linux lays it out, run to its end: its status and used length.
    fn ask(&mut self, kind: u32, sector: u64, out: &[Buffer], into: &[Buffer]) -> (u8, u32) {
        let status = self.guest.buffer_of(&[0xee]);
        let readable = [&[self.header(kind, sector)], out].concat();
        let head = self.queue.offer(&readable, &[into, &[status]].concat());
        self.bench.kick(0);
        let used = self.settle(1);
        assert_eq!(used[0].0, head);
        (self.guest.read(status)[0], used[0].1)
    }

    /// Runs until so many requests are used.
    fn settle(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        let queue = &mut self.queue;
        self.bench.until("an answer", |_| {
            used.extend(queue.used());
            used.len() >= count
        });
        used
    }

    fn on_disk(&self, offset: usize, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        self.file.read_exact_at(&mut read, offset as u64).unwrap();
        read
    }

    /// Empties the page cache, so that a read has to wait for the disk.
    fn go_cold(&self) {
        self.file.sync_all().unwrap();
        fadvise(&self.file, 0, None, Advice::DontNeed).unwrap();
    }
}

#[test]
fn a_disk_says_its_size_its_limits_and_what_it_can() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let writable = Blk::new(file.try_clone().unwrap(), &spec(false), &unlimited()).unwrap();
    let read_only = Blk::new(file, &spec(true), &unlimited()).unwrap();

    let config = writable.config();
    assert_eq!(config[0..8], 2048_u64.to_le_bytes());
    assert_eq!(config[12..16], 254_u32.to_le_bytes(), "seg_max leaves two for header and status");
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[36..40], (1_u32 << 21).to_le_bytes(), "max_discard_sectors");
    assert_eq!(config[40..44], 1_u32.to_le_bytes(), "max_discard_seg");
    assert_eq!(config[56], 1, "write_zeroes_may_unmap");
    assert_eq!(writable.features(), 1 << 2 | 1 << 6 | 1 << 9 | 1 << 10 | 1 << 13 | 1 << 14);
    assert_eq!(read_only.features(), 1 << 2 | 1 << 5 | 1 << 6 | 1 << 10);
    assert_eq!((writable.kind(), writable.queue_sizes()), (2, &[256][..]));
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1000).unwrap();
    let error = Blk::new(file, &spec(false), &unlimited()).unwrap_err();
    assert_eq!(error.to_string(), "Disk \"disk-0\" has 1000 bytes, no multiple of 512");

    let long = DiskSpec { id: "x".repeat(21), read_only: false };
    let error = Blk::new(tempfile::tempfile().unwrap(), &long, &unlimited()).unwrap_err();
    assert_eq!(error.to_string(), "Disk id \"xxxxxxxxxxxxxxxxxxxxx\" is longer than 20 bytes");

    let named = tempfile::NamedTempFile::new().unwrap();
    let file = File::open(named.path()).unwrap();
    let error = Blk::new(file, &spec(false), &unlimited()).unwrap_err();
    assert!(matches!(error, BlkError::ReadOnlyFile { .. }), "{error}");
}

#[test]
fn this_host_has_io_uring_and_new_takes_it() {
    let device = Blk::new(tempfile::tempfile().unwrap(), &spec(false), &unlimited()).unwrap();

    assert_eq!(device.engine(), EngineKind::Uring);
}

#[test]
fn reads_see_the_disk_cached_or_not() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, true);
        for cold in [false, true] {
            if cold {
                rig.go_cold();
            }
            let pieces = [guest.buffer(4096), guest.buffer(512), guest.buffer(64 << 10)];

            assert_eq!(rig.ask(IN, 3, &[], &pieces), (OK, 4096 + 512 + 65536 + 1), "{kind:?}");

            let read = pieces.map(|piece| guest.read(piece)).concat();
            assert!(read == content()[3 * 512..][..read.len()], "{kind:?}, cold: {cold}");
        }
    }
}

#[test]
fn writes_arrive_and_flushes_succeed() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, false);
        let data = [guest.buffer_of(&[0x11; 512]), guest.buffer_of(&[0x22; 1024])];

        assert_eq!(rig.ask(OUT, 100, &data, &[]), (OK, 1), "{kind:?}");
        assert_eq!(rig.ask(FLUSH, 0, &[], &[]), (OK, 1), "{kind:?}");

        assert_eq!(rig.on_disk(51_200, 512), [0x11; 512]);
        assert_eq!(rig.on_disk(51_712, 1024), [0x22; 1024]);
        assert_eq!(rig.on_disk(51_199, 1), content()[51_199..51_200]);
        assert_eq!(rig.on_disk(52_736, 1), content()[52_736..52_737]);
    }
}

/// Without FLUSH the driver takes a finished write for stable; it must work the same.
#[test]
fn a_driver_that_cannot_flush_gets_stable_writes() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, false);
        rig.bench.reset();
        let device =
            Blk::with_engine(rig.file.try_clone().unwrap(), &spec(false), &unlimited(), kind)
                .unwrap();
        rig.queue = QueueFixture::new(&guest, 0, 256);
        rig.bench = Bench::with_features(device, 0, &mut [&mut rig.queue]);
        let data = guest.buffer_of(&[0x33; 512]);

        assert_eq!(rig.ask(OUT, 7, &[data], &[]), (OK, 1));
        let range = rig.range(0, 8, 0);
        assert_eq!(rig.ask(WRITE_ZEROES, 0, &[range], &[]), (UNSUPPORTED, 1));

        assert_eq!(rig.on_disk(7 * 512, 512), [0x33; 512]);
    }
}

/// Framing is the driver's business (virtio 1.3, 2.7.4).
#[test]
fn header_data_and_status_may_be_cut_anywhere() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, false);
        let (header, _) = rig.header(IN, 2);
        let (target, _) = guest.buffer(1025);
        rig.queue.offer(
            &[(header, 1), (header + 1, 0), (header + 1, 9), (header + 10, 6)],
            &[(target, 100), (target + 100, 0), (target + 100, 925)],
        );
        let mut message = guest.read((header, 16));
        message[0] = 1;
        message.extend([0x44; 512]);
        let status = guest.buffer(1);
        rig.queue.offer_indirect(&[guest.buffer_of(&message)], &[status]);

        rig.bench.kick(0);
        let mut written: Vec<u32> = rig.settle(2).into_iter().map(|(_, bytes)| bytes).collect();

        written.sort_unstable();
        assert_eq!(written, [1, 1025], "{kind:?}");
        let answer = guest.read((target, 1025));
        assert_eq!(answer[1024], OK);
        assert_eq!(guest.read(status), [OK]);
        assert_eq!(rig.on_disk(1024, 512), [0x44; 512]);
        assert!(answer[512..1024] == content()[1536..2048]);
    }
}

#[test]
fn the_id_is_given_padded_with_zeroes() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest, EngineKind::Uring, true);
    let (whole, short) = (guest.buffer(20), guest.buffer(4));

    assert_eq!(rig.ask(GET_ID, 0, &[], &[whole]), (OK, 21));
    assert_eq!(rig.ask(GET_ID, 0, &[], &[short]), (OK, 5));

    assert_eq!(guest.read(whole), b"disk-0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.read(short), b"disk");
}

#[test]
fn what_leaves_the_disk_or_makes_no_sense_is_an_error_of_the_request_alone() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, false);
        let sectors = (DISK_BYTES / 512) as u64;
        let sector = guest.buffer(512);
        let half = guest.buffer(256);
        let flagged = rig.range(0, 8, 2);
        let outside = rig.range(sectors - 1, 2, 0);
        let empty = rig.range(sectors, 0, 1);
        let large = rig.range(0, (1 << 21) + 1, 0);
        let two = guest.buffer(32);
        let unmapped = rig.range(0, 8, 1);

        let table = [
            (IN, sectors - 1, vec![], vec![sector], OK),
            (IN, sectors, vec![], vec![sector], IO_ERROR),
            (IN, sectors, vec![], vec![], OK),
            (IN, sectors + 1, vec![], vec![], IO_ERROR),
            (IN, u64::MAX, vec![], vec![sector], IO_ERROR),
            (IN, u64::MAX / 512 + 1, vec![], vec![sector], IO_ERROR),
            (IN, 0, vec![], vec![half], IO_ERROR),
            (OUT, sectors, vec![sector], vec![], IO_ERROR),
            (OUT, 0, vec![half], vec![], IO_ERROR),
            (OUT, 0, vec![], vec![], OK),
            (DISCARD, 0, vec![flagged], vec![], UNSUPPORTED),
            (DISCARD, 0, vec![unmapped], vec![], UNSUPPORTED),
            (DISCARD, 0, vec![outside], vec![], IO_ERROR),
            (DISCARD, 0, vec![two], vec![], IO_ERROR),
            (DISCARD, 0, vec![], vec![], IO_ERROR),
            (WRITE_ZEROES, 0, vec![flagged], vec![], UNSUPPORTED),
            (WRITE_ZEROES, 0, vec![empty], vec![], OK),
            (WRITE_ZEROES, 0, vec![large], vec![], IO_ERROR),
            (2, 0, vec![sector], vec![], UNSUPPORTED),
            (u32::MAX, 0, vec![], vec![], UNSUPPORTED),
        ];
        for (request, at, out, into, status) in table {
            let (answer, written) = rig.ask(request, at, &out, &into);
            assert_eq!(answer, status, "{kind:?}: {request} at {at} {out:?} {into:?}");
            let data: u32 = into.iter().map(|buffer| buffer.1).sum();
            assert_eq!(written, if status == OK { data + 1 } else { 1 });
        }
        assert!(rig.on_disk(0, DISK_BYTES) == content(), "nothing was written");
    }
}

#[test]
fn a_request_without_a_header_gets_an_answer_and_one_without_a_status_a_fault() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest, EngineKind::Uring, false);
    let status = guest.buffer_of(&[0xee]);
    rig.queue.offer(&[guest.buffer(15)], &[status]);
    rig.bench.kick(0);
    assert_eq!(rig.settle(1).len(), 1);
    assert_eq!(guest.read(status), [IO_ERROR]);

    let header = rig.header(IN, 0);
    rig.queue.offer(&[header], &[]);
    let fault = rig.bench.service(0).unwrap_err();

    assert_eq!(
        fault.to_string(),
        "Driver broke the protocol of queue 0: a request has no byte for its status"
    );
}

#[test]
fn a_read_only_disk_is_never_changed() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, true);
        let sector = guest.buffer_of(&[0x55; 512]);
        let range = rig.range(0, 8, 0);

        assert_eq!(rig.ask(OUT, 0, &[sector], &[]), (IO_ERROR, 1));
        assert_eq!(rig.ask(DISCARD, 0, &[range], &[]), (UNSUPPORTED, 1));
        assert_eq!(rig.ask(WRITE_ZEROES, 0, &[range], &[]), (UNSUPPORTED, 1));
        assert_eq!(rig.ask(FLUSH, 0, &[], &[]), (UNSUPPORTED, 1));

        assert!(rig.on_disk(0, DISK_BYTES) == content());
    }
}

#[test]
fn discard_gives_disk_space_back_and_zeroes_only_if_allowed() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, false);
        rig.file.sync_all().unwrap();
        let blocks = |rig: &Rig<'_>| rig.file.metadata().unwrap().blocks();
        let before = blocks(&rig);
        let (first, second, third) =
            (rig.range(0, 2048, 0), rig.range(2048, 2048, 1), rig.range(4096, 2048, 0));

        assert_eq!(rig.ask(DISCARD, 0, &[first], &[]), (OK, 1), "{kind:?}");
        let discarded = blocks(&rig);
        assert_eq!(rig.ask(WRITE_ZEROES, 0, &[second], &[]), (OK, 1), "{kind:?}");
        let unmapped = blocks(&rig);
        assert_eq!(rig.ask(WRITE_ZEROES, 0, &[third], &[]), (OK, 1), "{kind:?}");
        let zeroed = blocks(&rig);

        assert!(discarded + 2000 <= before, "{before} -> {discarded}");
        assert!(unmapped + 2000 <= discarded, "{discarded} -> {unmapped}");
        assert!(zeroed + 100 > unmapped, "{unmapped} -> {zeroed}");
        assert!(rig.on_disk(0, 3 << 20).iter().all(|byte| *byte == 0));
        assert!(rig.on_disk(3 << 20, 5 << 20) == content()[3 << 20..]);
        assert_eq!(rig.file.metadata().unwrap().len(), DISK_BYTES as u64);
    }
}

/// A disk that ends early is the host's fault; the guest learns of it as of a bad sector.
#[test]
fn a_file_cut_short_under_the_disk_is_an_io_error() {
    for kind in BOTH {
        let guest = Guest::new();
        let mut rig = Rig::new(&guest, kind, true);
        rig.file.set_len(1024).unwrap();
        let buffer = guest.buffer(4096);

        assert_eq!(rig.ask(IN, 0, &[], &[buffer]), (IO_ERROR, 1), "{kind:?}");
        assert_eq!(rig.ask(IN, 64, &[], &[buffer]), (IO_ERROR, 1), "{kind:?}");
    }
}

/// /dev/full takes no writes; its size is zero, so a disk is made of it behind the device's back.
#[test]
fn a_host_without_space_is_an_io_error() {
    for kind in BOTH {
        let guest = Guest::new();
        let file = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        let mut rig = Rig::over(&guest, file, kind, false);
        rig.bench.device.disk.sectors = 8;
        let data = guest.buffer(4096);

        assert_eq!(rig.ask(OUT, 0, &[data], &[]), (IO_ERROR, 1), "{kind:?}");
    }
}

#[test]
fn a_full_queue_of_cold_reads_is_answered_without_waiting() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest, EngineKind::Uring, true);
    rig.go_cold();
    let mut asked = Vec::new();
    for number in 0..85_u64 {
        let (buffer, status) = (guest.buffer(4096), guest.buffer_of(&[0xee]));
        let header = rig.header(IN, (number * 97 % 2000) * 8);
        let head = rig.queue.offer(&[header], &[buffer, status]);
        asked.push((head, number * 97 % 2000, buffer, status));
    }
    assert_eq!(rig.queue.room(), 1);

    rig.bench.kick(0);
    let used = rig.settle(85);

    assert_eq!(used.len(), 85);
    for (head, block, buffer, status) in asked {
        assert!(used.contains(&(head, 4097)), "{head} is used once, in any order");
        assert_eq!(guest.read(status), [OK]);
        let offset = usize::try_from(block).unwrap() * 4096;
        assert!(guest.read(buffer) == content()[offset..][..4096]);
    }
}

#[test]
fn a_descriptor_in_flight_cannot_be_made_available_again() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest, EngineKind::Uring, false);
    let header = rig.header(FLUSH, 0);
    let head = rig.queue.offer(&[header], &[guest.buffer(1)]);
    rig.queue.publish(head);

    let fault = rig.bench.service(0).unwrap_err();

    assert_eq!(
        fault.to_string(),
        "Driver broke the protocol of queue 0: a request in flight is available again"
    );
    rig.bench.reset();
}

#[test]
fn drain_answers_everything_and_reset_forgets_everything() {
    let guest = Guest::new();
    let mut rig = Rig::new(&guest, EngineKind::Uring, false);
    let offer_writes = |rig: &mut Rig<'_>| {
        for number in 0..60 {
            let data = guest.buffer_of(&[number; 4096]);
            let header = rig.header(OUT, u64::from(number) * 8);
            rig.queue.offer(&[header, data], &[guest.buffer(1)]);
        }
        rig.bench.kick(0);
    };

    offer_writes(&mut rig);
    assert_eq!(rig.bench.drain().unwrap().again, 0);
    assert_eq!(rig.queue.used().len(), 60);
    assert_eq!(rig.on_disk(59 * 4096, 4096), [59; 4096]);

    offer_writes(&mut rig);
    let before = rig.queue.used().len();
    rig.bench.reset();
    assert_eq!(rig.bench.watched(), 0);
    assert_eq!(rig.bench.round(0).unwrap(), Served::NOTHING, "nothing is left to wake up for");
    assert_eq!(rig.queue.used().len() + before, before, "the ring is not touched by a reset");
}

#[test]
fn state_is_the_shape_of_the_disk() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();

    let state = Blk::new(file, &spec(true), &unlimited()).unwrap().save();

    assert_eq!(state, DeviceState::Blk(BlkState { sectors: 8, read_only: true }));
}

/// One descriptor as a hostile driver would write it, for a guest of [`HOSTILE_BYTES`]: most near
/// the headers at [`HEADERS`], some at memory's end or far outside.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let header = (0..8_u64, prop_oneof![8 => Just(16), 1 => 0..20_u32], 0..2_u16)
        .prop_map(|(number, length, flags)| (HEADERS + number * 64, length, flags));
    let address = prop_oneof![
        8 => DATA..DATA + (512 << 10),
        1 => HOSTILE_BYTES - 600..HOSTILE_BYTES + 100,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => 0..40_u32,
        4 => Just(512),
        2 => Just(4096),
        2 => 0..70_000_u32,
        1 => any::<u32>(),
    ];
    let flags = prop_oneof![12 => 0..4_u16, 1 => 4..8_u16];
    let data = (address, length, flags);
    (prop_oneof![1 => header, 2 => data], 0..20_u16)
        .prop_map(|((address, length, flags), next)| (address, length, flags, next))
}

/// Kind and sector of a request: most of a kind that exists, at a sector that does.
fn request() -> impl Strategy<Value = (u32, u64)> {
    let kinds = vec![IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES];
    let kind = prop_oneof![6 => prop::sample::select(kinds), 1 => any::<u32>()];
    (kind, prop_oneof![6 => 0..2040_u64, 1 => any::<u64>()])
}

/// What a driver in its right mind has as descriptor `index`: chains of a header, two pieces of
/// data that are read or written alike, and a status.
fn tame(index: u16, (address, length, ..): (u64, u32, u16, u16)) -> (u64, u32, u16, u16) {
    let chain = index / 4;
    let data = DATA + (address % 512) * 1024;
    match index % 4 {
        0 => (HEADERS + u64::from(chain) * 64, 16, 1, index + 1),
        1 => (data, length % 4 * 256, 1 | ((chain & 1) * 2), index + 1),
        2 => (data, length % 3 * 512, 1 | ((chain & 1) * 2), index + 1),
        _ => (DATA + (600 << 10), 1, 2, 0),
    }
}

const HOSTILE_BYTES: u64 = 2 << 20;
const HEADERS: u64 = 512 << 10;
const DATA: u64 = 1 << 20;

/// Where a hostile driver's descriptors let the device write.
fn writable(table: &[(u64, u32, u16, u16)]) -> impl Iterator<Item = Range<usize>> {
    table.iter().filter(|(_, _, flags, _)| flags & 2 != 0).filter_map(|(address, length, _, _)| {
        let end = address.saturating_add(u64::from(*length)).min(HOSTILE_BYTES);
        let range = usize::try_from(*address).unwrap()..usize::try_from(end).unwrap();
        (!range.is_empty()).then_some(range)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a driver writes into its descriptors, the device answers or faults, and memory it
    /// was not given for writing stays as it was.
    #[test]
    fn a_hostile_driver_gets_answers_or_a_fault(
        kind in prop::sample::select(&BOTH[..]),
        table in prop::collection::vec((descriptor(), prop::bool::weighted(0.92)), 16),
        requests in prop::collection::vec(request(), 8),
        heads in prop::sample::subsequence(vec![0_u16, 4, 8, 12], 1..=4),
        odd_head in prop::option::weighted(0.2, 0..18_u16),
    ) {
        let guest = Guest::with_bytes(HOSTILE_BYTES);
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let mut rig = Rig::over(&guest, file, kind, false);
        for (number, (request, sector)) in (0..).zip(&requests) {
            let header = guest.read(rig.header(*request, *sector));
            guest.write((HEADERS + number * 64, 16), &header);
        }
        let table: Vec<_> = (0..)
            .zip(table)
            .map(|(index, (wild, is_tame))| if is_tame { tame(index, wild) } else { wild })
            .collect();
        rig.queue.fill_table(&table);
        let everything = (0, u32::try_from(HOSTILE_BYTES).unwrap());
        for head in heads.into_iter().chain(odd_head) {
            rig.queue.publish(head);
        }
        let before = guest.read(everything);

        let mut fault = rig.bench.service(0).err();
        while fault.is_none() && rig.queue.unanswered() {
            fault = rig.bench.round(1000).err();
        }
        rig.bench.reset();

        let mut after = guest.read(everything);
        for range in writable(&table) {
            after[range.clone()].copy_from_slice(&before[range]);
        }
        rig.queue.mask_used_ring(&before, &mut after);
        prop_assert!(before == after, "memory that was not writable has changed");
    }
}
