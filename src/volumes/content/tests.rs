//! Archives that tools make, and archives that nobody should unpack.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use super::*;
use crate::tar::testing::{TarBuilder, gzip, header};

const GIB: u64 = 1 << 30;

/// A folder to unpack into, beside a file that no archive shall reach.
struct Place {
    dir: tempfile::TempDir,
    room: Room,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("into")).unwrap();
        fs::write(dir.path().join("outside"), "untouched").unwrap();
        let room = Room::new(dir.path(), 0).unwrap();
        Self { dir, room }
    }

    fn unpack(&self, packed: &[u8], bytes_max: u64) -> Result<Measure, ContentError> {
        let bounds = Bounds { bytes_max, room: &self.room, is_abandoned: &|| false };
        let outcome = unpack_into(packed, &self.dir.path().join("into"), &bounds);
        let outside = fs::read_to_string(self.dir.path().join("outside")).unwrap();
        assert_eq!(outside, "untouched", "the archive reached a file of the host");
        assert_eq!(fs::read_dir(self.dir.path()).unwrap().count(), 2, "a file appeared outside");
        outcome
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("into").join(name)
    }
}

/// What is said of an archive of more than nothing.
fn refusal(archive: TarBuilder) -> String {
    let place = Place::new();
    let error = place.unpack(&gzip(&archive.build()), GIB).unwrap_err();
    error.to_string()
}

#[test]
fn files_come_with_all_that_is_said_of_them() {
    let place = Place::new();
    let archive = TarBuilder::new()
        .mode(0o750)
        .owner(1000, 1001)
        .mtime(1_700_000_000)
        .dir("sub/")
        .mode(0o4711)
        .owner(7, 8)
        .mtime(1_600_000_000)
        .file("./sub/program", "#!")
        .file("deep/er/file", vec![b'x'; 10_000])
        .symlink("sub/up", "../deep/er/file")
        .hard_link("again", "deep/er/file")
        .fifo("pipe")
        .file("sub/program-2", "old")
        .file("sub/program-2", "new");

    let measure = place.unpack(&gzip(&archive.build()), GIB).unwrap();

    let (dir, program) = (fs::metadata(place.path("sub")).unwrap(), place.path("sub/program"));
    assert_eq!((dir.mode() & 0o7777, dir.uid(), dir.gid()), (0o750, 1000, 1001));
    assert_eq!(dir.mtime(), 1_700_000_000);
    let meta = fs::metadata(program).unwrap();
    assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (0o4711, 7, 8));
    assert_eq!(meta.mtime(), 1_600_000_000);
    assert_eq!(fs::read(place.path("sub/up")).unwrap().len(), 10_000);
    assert_eq!(fs::metadata(place.path("again")).unwrap().nlink(), 2);
    assert_eq!(fs::read_to_string(place.path("sub/program-2")).unwrap(), "new");
    // 8 entries and 2 directories that none of them describes; content in blocks.
    assert_eq!(measure.files, 8);
    assert_eq!(measure.bytes, (8 + 2 + 1 + 3 + 1 + 1) * 4096);
}

#[test]
fn each_packing_is_unpacked_and_nothing_else() {
    let plain = TarBuilder::new().file("a", "b").build();
    for packed in [plain.clone(), gzip(&plain), zstd::encode_all(plain.as_slice(), 1).unwrap()] {
        assert_eq!(Place::new().unpack(&packed, GIB).unwrap().files, 1);
    }
    for nothing in [Vec::new(), gzip(b""), TarBuilder::new().build()] {
        let refused = Place::new().unpack(&nothing, GIB);
        assert!(matches!(refused, Err(ContentError::NotAnArchive)), "{refused:?}");
    }
    let refused = Place::new().unpack(&[b'x'; 4096], GIB);
    assert!(matches!(refused, Err(ContentError::Tar(_))), "{refused:?}");
}

#[test]
fn names_that_lead_out_are_refused() {
    for path in ["../outside", "/outside", "a/../../outside", "a/..", ".."] {
        let text = refusal(TarBuilder::new().file(path, "x"));
        assert!(text.contains("Refused entry"), "{path}: {text}");
    }
}

#[test]
fn links_that_lead_out_are_refused() {
    for target in ["../outside", "/outside", "sub/../../outside", "", "sub/.."] {
        let text = refusal(TarBuilder::new().symlink("link", target));
        assert!(text.contains("Refused entry") || text.contains("tar"), "{target:?}: {text}");
    }
    // A link to the top would make each `..` behind it one too many.
    let chain = TarBuilder::new().symlink("top", ".").symlink("out", "top/top/../../outside");
    assert!(refusal(chain).contains("leads out"));
    for target in ["../outside", "/outside", "missing", "sub/../../outside"] {
        let text = refusal(TarBuilder::new().hard_link("link", target));
        assert!(text.contains("Refused entry"), "{target:?}: {text}");
    }
}

/// The oldest trick: a link first, then a file below it.
#[test]
fn nothing_is_written_through_a_link() {
    let below = TarBuilder::new().dir("sub/").symlink("link", "sub").file("link/file", "x");
    assert!(refusal(below).contains("a file or a link"));

    let dir = TarBuilder::new().dir("sub/").symlink("link", "sub").dir("link/");
    assert!(refusal(dir).contains("a file or a link"));

    let linked = TarBuilder::new().dir("sub/").symlink("link", "sub").hard_link("x", "link/y");
    assert!(refusal(linked).contains("Refused entry"));

    let place = Place::new();
    let replaced = TarBuilder::new().file("target", "old").symlink("link", "target");
    place.unpack(&gzip(&replaced.file("link", "new").build()), GIB).unwrap();
    assert_eq!(fs::read_to_string(place.path("target")).unwrap(), "old");
    assert!(fs::symlink_metadata(place.path("link")).unwrap().is_file());
}

#[test]
fn devices_are_refused() {
    for kind in [b'3', b'4'] {
        assert!(refusal(TarBuilder::new().device(kind, "sda", 8, 0)).contains("no devices"));
    }
}

#[test]
fn an_archive_that_ends_early_is_refused_wherever_it_ends() {
    let whole = gzip(&TarBuilder::new().file("a", vec![7; 5000]).file("b", "c").build());
    for length in (1..whole.len()).step_by(7) {
        let refused = Place::new().unpack(&whole[..length], GIB);
        assert!(refused.is_err(), "{length} of {} bytes were enough", whole.len());
    }
}

/// A few kilobytes that unpack to more than anybody has.
#[test]
fn a_bomb_ends_at_the_size_of_the_volume() {
    let announced = TarBuilder::new()
        .raw(&header(b'0', b"big", b"", 1 << 40, &TarBuilder::new(), (0, 0)))
        .unfinished();
    let small_files =
        (0..2000).fold(TarBuilder::new(), |archive, n| archive.file(format!("{n}"), "x"));
    let zeros = gzip(&TarBuilder::new().file("zeros", vec![0; 16 << 20]).build());
    let tail = [TarBuilder::new().file("a", "b").build(), vec![0; 32 << 20]].concat();
    let headers = (0..40).fold(TarBuilder::new(), |archive, _| {
        archive.entry(b'g', b"", b"", &vec![b'x'; 1 << 19], (0, 0))
    });

    for packed in
        [gzip(&announced), gzip(&small_files.build()), zeros, gzip(&tail), gzip(&headers.build())]
    {
        let place = Place::new();
        let refused = place.unpack(&packed, 8 << 20);

        assert!(matches!(refused, Err(ContentError::TooLarge { .. })), "{refused:?}");
        let written = fs::metadata(place.path("zeros")).map_or(0, |file| file.len());
        assert!(written <= 8 << 20, "{written} bytes were written");
    }
}

#[test]
fn a_tree_that_is_too_deep_is_refused() {
    let deep = vec!["d"; DEPTH_MAX + 1].join("/");

    assert!(refusal(TarBuilder::new().file(deep, "x")).contains("too many directories"));
    assert!(refusal(TarBuilder::new().file("n".repeat(256), "x")).contains("too long"));
}

#[test]
fn nobody_unpacks_for_a_client_that_is_gone() {
    let place = Place::new();
    let archive = gzip(&TarBuilder::new().file("a", "b").build());
    let bounds = Bounds { bytes_max: GIB, room: &place.room, is_abandoned: &|| true };

    let outcome = unpack_into(archive.as_slice(), &place.path(""), &bounds);

    assert!(matches!(outcome, Err(ContentError::Abandoned)), "{outcome:?}");
}

#[test]
fn a_disk_without_room_is_told_before_it_is_full() {
    let place = Place::new();
    let room = Room::new(place.dir.path(), u64::MAX / 2).unwrap();
    let archive = gzip(&TarBuilder::new().file("a", "b").build());
    let bounds = Bounds { bytes_max: GIB, room: &room, is_abandoned: &|| false };

    let outcome = unpack_into(archive.as_slice(), &place.path(""), &bounds);

    assert!(matches!(outcome, Err(ContentError::Room(RoomError::Full { .. }))), "{outcome:?}");
}

#[test]
fn directories_without_write_permission_still_get_their_files() {
    let place = Place::new();
    let archive = TarBuilder::new().mode(0o500).dir("closed/").file("closed/file", "x");

    place.unpack(&gzip(&archive.build()), GIB).unwrap();

    let mode = fs::metadata(place.path("closed")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o500);
}

/// mkfs.ext4 would be busy with it for minutes.
#[test]
fn a_directory_with_too_many_names_is_told_by_the_first_that_is_too_much() {
    let many = |count: usize, folder: &str| {
        (0..count).fold(TarBuilder::new(), |tar, number| {
            let name = format!("{folder}/{number:0>88}");
            tar.symlink(&name, "x")
        })
    };

    assert!(refusal(many(5462, "f")).contains("divide"), "96 bytes each");
    let place = Place::new();
    assert_eq!(place.unpack(&gzip(&many(5461, "f").build()), GIB).unwrap().files, 5461);
}
