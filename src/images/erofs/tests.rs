//! Images checked by two who did not write them: `fsck.erofs` and the kernel.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::fs::statvfs;

use super::*;
use crate::images::digest::Digest;
use crate::images::layers::{Layer, Watch, merge};
use crate::images::room::Room;
use crate::images::testing::{Mount, TarBuilder, layer, listing, run};

const UUID: [u8; 16] = [7; 16];

struct Always;

impl Watch for Always {
    fn is_cancelled(&self) -> bool {
        false
    }
}

/// An image file, checked by fsck.erofs.
struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    fn of(layers: Vec<Layer>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let image = Self { dir };
        let file =
            File::options().read(true).write(true).create_new(true).open(image.path()).unwrap();
        let mut data = DataArea::new(file, Room::new(image.dir.path(), 0).unwrap());
        let tree = merge(layers, u64::MAX, &mut data, &Always).unwrap();
        finish(data, &tree, UUID).unwrap();
        let fsck = run("erofs-utils", "fsck.erofs", &["--extract", image.path().to_str().unwrap()]);
        assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stderr));
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image.erofs")
    }

    fn bytes(&self) -> Vec<u8> {
        fs::read(self.path()).unwrap()
    }
}

/// Mounted, the image of one layer is what GNU tar makes of the same archive.
fn assert_same_as_tar(archive: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let tar = dir.path().join("layer.tar");
    let extracted = dir.path().join("root");
    fs::write(&tar, archive).unwrap();
    fs::create_dir(&extracted).unwrap();
    let (tar, root) = (tar.to_str().unwrap(), extracted.to_str().unwrap());
    let flags = ["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf", tar, "-C", root];
    let output = run("tar", "tar", &flags);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let image = Image::of(vec![layer(archive)]);
    let mount = Mount::new(&image.path());

    let (expected, found) = (listing(&extracted), listing(mount.path()));
    for (expected, found) in expected.iter().zip(&found) {
        assert_eq!(expected, found);
    }
    assert_eq!(expected.len(), found.len());
}

#[test]
fn every_kind_of_file_is_what_tar_makes_of_it() {
    let mut kinds = TarBuilder::new()
        .mtime(1_000_000_000)
        .mode(0o755)
        .dir("./")
        .mtime(1_700_000_001)
        .mode(0o1777)
        .dir("tmp")
        .mtime(1_700_000_002)
        .mode(0o4755)
        .owner(12, 34)
        .file("tmp/setuid", "x")
        .mtime(1_700_000_003)
        .mode(0o2755)
        .owner(70_000, 4_000_000_000)
        .file("big-owner", "yy")
        .pax("mtime", b"1700000004.123456789")
        .file("fraction", "")
        .mtime(1_700_000_005)
        .symlink("link", "tmp/../fraction")
        .mtime(1_700_000_006)
        .symlink("long-link", "t/".repeat(1500))
        .hard_link("other-name", "tmp/setuid")
        .mtime(1_700_000_007)
        .device(b'3', "null", 1, 3)
        .mtime(1_700_000_008)
        .device(b'4', "disk", 259, 70_000)
        .mtime(1_700_000_009)
        .fifo("pipe");
    // VFS_CAP_REVISION_2 with CAP_DAC_OVERRIDE and CAP_FOWNER: holds a newline.
    let capability = b"\x01\0\0\x02\x0a\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    kinds = kinds
        .mtime(1_700_000_010)
        .pax("SCHILY.xattr.security.capability", capability)
        .pax("SCHILY.xattr.user.name", b"value")
        .pax("SCHILY.xattr.user.empty", b"")
        .file("capable", "z".repeat(5000));

    assert_same_as_tar(&kinds.build());
}

/// Around each size where the layout changes: inline limit, block, buffer.
#[test]
fn files_of_every_size_are_what_tar_makes_of_them() {
    let mut sizes = TarBuilder::new().mtime(1).dir("./");
    for edge in
        [0_usize, 1, 3072, 4032, 4096, 8192, 4096 + 3072, 1 << 20, (1 << 20) + 4096, 3 << 20]
    {
        for size in [edge, edge + 1, edge.max(1) - 1, edge + 2000] {
            let content: Vec<u8> = (0..size).map(|i| u8::try_from(i * 31 % 251).unwrap()).collect();
            sizes = sizes.mtime(size.try_into().unwrap()).file(format!("{edge}-{size}"), content);
        }
    }

    assert_same_as_tar(&sizes.build());
}

#[test]
fn odd_names_are_kept_to_the_byte() {
    let mut odd = TarBuilder::new().mtime(1).dir("./");
    for name in [
        &b"new\nline"[..],
        b"\xff\xfe not utf-8",
        b" leading and trailing ",
        b"!first", // before `.` and `..` in a directory's order
        b"-",
        b"...",
        b"..x",
        b"\x01",
        &[b'n'; 255],
    ] {
        odd = odd.mtime(9).file(name, name);
    }
    odd = odd.mtime(5).dir("e".repeat(255)).mtime(5);
    odd = odd.file([&[b'e'; 255][..], b"/", &[b'f'; 255]].concat(), "deep");
    odd = odd.mtime(5).dir("e".repeat(255));

    assert_same_as_tar(&odd.build());
}

/// Several directory blocks, and some that are full to the byte or one byte more.
#[test]
fn large_directories_are_found_and_listed_whole() {
    let mut large = TarBuilder::new().mtime(1).dir("./");
    for index in 0..1000 {
        large = large.mtime(index).file(format!("many/{index:x}"), index.to_string());
    }
    large = large.mtime(2).dir("many");
    // Entries are 12 bytes and their names. The dots take 27, 112 names of 24 bytes 4032, so that
    // one of 25 bytes fills a block of 4096.
    for (name, lengths) in [("full", vec![25]), ("byte", vec![26]), ("entry", vec![25, 30])] {
        for index in 0..112 {
            large = large.mtime(4).file(format!("{name}/{index:024}"), "");
        }
        for length in lengths {
            large = large.mtime(4).file(format!("{name}/{:l>length$}", ""), "");
        }
        large = large.mtime(3).dir(name);
    }
    large = large.mtime(1).dir("./");

    assert_same_as_tar(&large.build());
}

#[test]
fn attributes_are_what_tar_makes_of_them() {
    let mut archive = TarBuilder::new().mtime(1).dir("./");
    for (size, count) in [(1, 1), (100, 3), (2000, 1), (1000, 3), (3600, 1), (1800, 2)] {
        for index in 0..count {
            archive = archive.pax(&format!("SCHILY.xattr.user.{index}"), &vec![b'v'; size]);
        }
        archive = archive.mtime(2).file(format!("{size}-{count}"), "body".repeat(size % 1009));
    }
    let with_directory = archive
        .pax("SCHILY.xattr.trusted.big", &[7; 3000])
        .mtime(3)
        .dir("dir")
        .mtime(3)
        .file("dir/file", "x")
        .pax("SCHILY.xattr.trusted.big", &[7; 3000])
        .mtime(3)
        .dir("dir");

    assert_same_as_tar(&with_directory.build());
}

/// Beyond what one block holds, where most file systems give up.
#[test]
fn attributes_longer_than_a_block_are_kept() {
    let value = vec![b'h'; 65_535];
    let archive = TarBuilder::new()
        .pax("SCHILY.xattr.user.a", &value[..4000])
        .pax("SCHILY.xattr.user.b", &value[..4000])
        .file("two", "body")
        .pax("SCHILY.xattr.user.huge", &value)
        .file("huge", "body")
        .pax("SCHILY.xattr.user.huge", &value)
        .dir("dir")
        .file("dir/after", "body")
        .build();

    let image = Image::of(vec![layer(&archive)]);
    let mount = Mount::new(&image.path());

    let found = listing(mount.path());
    let shown = |length: usize| format!("{length} {}", Digest::of(&value[..length]).hex());
    let body = format!("x1 4 {}", &Digest::of(b"body").hex()[..8]);
    let (short, huge) = (shown(4000), shown(65_535));
    assert_eq!(
        found,
        [
            "/ 40755 0:0 0.0 x3 /".to_owned(),
            format!("/dir 40755 0:0 0.0 x2 / user.huge={huge}"),
            format!("/dir/after 100644 0:0 0.0 {body}"),
            format!("/huge 100644 0:0 0.0 {body} user.huge={huge}"),
            format!("/two 100644 0:0 0.0 {body} user.a={short} user.b={short}"),
        ]
    );
}

#[test]
fn the_same_layers_give_the_same_bytes() {
    let layers = || {
        let base = (0..300_usize).fold(TarBuilder::new(), |tar, index| {
            tar.mtime(index.try_into().unwrap())
                .file(format!("d{}/f{index}", index % 7), "x".repeat(37 * index))
        });
        let upper =
            TarBuilder::new().file("d1/.wh.f1", "").file("d2/f2", "new").hard_link("l", "d3/f3");
        vec![base.layer(), upper.layer()]
    };

    assert_eq!(Image::of(layers()).bytes(), Image::of(layers()).bytes());
}

/// What an upper layer replaces costs no disk.
#[test]
fn hidden_bodies_are_given_back() {
    let base = TarBuilder::new().file("big", vec![1; 8 << 20]).file("kept", vec![2; 1 << 20]);
    let upper = TarBuilder::new().file(".wh.big", "").file("small", "x");

    let image = Image::of(vec![base.layer(), upper.layer()]);

    let stat = fs::metadata(image.path()).unwrap();
    assert!(stat.len() > 9 << 20, "{}", stat.len());
    assert!(stat.blocks() * 512 < 3 << 19, "{}", stat.blocks() * 512);
    let mount = Mount::new(&image.path());
    assert_eq!(fs::read(mount.path().join("kept")).unwrap(), vec![2; 1 << 20]);
}

#[test]
fn inode_numbers_are_neither_zero_nor_shared() {
    let image = Image::of(vec![TarBuilder::new().file("a", "").file("b/c", "").layer()]);
    let mount = Mount::new(&image.path());
    let inode = |path: &str| fs::metadata(mount.path().join(path)).unwrap().ino();

    let inodes = BTreeSet::from([inode("."), inode("a"), inode("b"), inode("b/c")]);

    assert_eq!(inodes.len(), 4);
    assert!(!inodes.contains(&0));
}

#[test]
fn an_empty_image_is_an_empty_directory() {
    let image = Image::of(vec![]);
    let mount = Mount::new(&image.path());

    assert_eq!(listing(mount.path()), ["/ 40755 0:0 0.0 x2 /"]);
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let file = File::create_new(dir.path().join("image")).unwrap();
    let all = statvfs(dir.path()).unwrap();
    let reserve = all.f_bavail * all.f_frsize;
    let mut data = DataArea::new(file, Room::new(dir.path(), reserve).unwrap());
    let layers = vec![TarBuilder::new().file("f", vec![0; 2 << 20]).layer()];

    let error = merge(layers, u64::MAX, &mut data, &Always).unwrap_err();

    let text = format!("{error:?}");
    assert!(text.contains("Full"), "{text}");
    assert_eq!(fs::metadata(dir.path().join("image")).unwrap().len(), 0);
}
