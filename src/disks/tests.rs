//! Disks checked by e2fsck and by the kernel that mounts them.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Output};

use super::*;

const GIB: u64 = 1 << 30;

/// Runs a tool that the tests need, and says which package has it if it is missing.
#[expect(clippy::disallowed_methods, reason = "an oracle of a test, not a tool of the product")]
fn run(package: &str, tool: &str, args: &[&str]) -> Output {
    match Command::new(tool).args(args).output() {
        Ok(output) => output,
        Err(error) => panic!("this test needs {tool} (Debian package {package}): {error}"),
    }
}

fn assert_sound(disk: &Disk) {
    let fsck = run("e2fsprogs", "e2fsck", &["-fn", disk.path().to_str().unwrap()]);
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_disk_is_a_sound_file_system_that_costs_almost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let disks = Disks::open(&dir.path().join("templates")).unwrap();

    for (name, size_bytes) in [("small", SIZE_BYTES_MIN), ("large", 10 * GIB), ("huge", 4 << 40)] {
        let disk = disks.create(&dir.path().join(name), size_bytes).await.unwrap();

        let stat = disk.file().metadata().unwrap();
        assert_eq!((stat.len(), stat.mode() & 0o777), (size_bytes, 0o600));
        if name != "huge" {
            assert!(stat.blocks() * 512 <= 256 << 10, "{name}: {} bytes", stat.blocks() * 512);
            assert_sound(&disk);
        }
    }
}

/// mkfs.ext4 makes one for each 16 KiB by itself: an archive of small files would not fit.
#[test]
fn there_is_an_inode_for_each_file_of_the_content_and_more() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("content");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("file"), "x").unwrap();
    let content = Content { folder, files: 100_000 };

    let disk = Disks::format(dir.path().join("disk"), GIB, Some(&content)).unwrap();

    assert_sound(&disk);
    let path = disk.path().to_str().unwrap();
    let said = run("e2fsprogs", "debugfs", &["-R", "stats -h", path]).stdout;
    let said = String::from_utf8_lossy(&said);
    let inodes = said.lines().find_map(|line| line.strip_prefix("Inode count:")).unwrap();
    assert!(inodes.trim().parse::<u64>().unwrap() > 120_000, "{inodes}");
}

#[tokio::test]
async fn disks_of_one_size_share_a_template_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let templates = dir.path().join("templates");
    let disks = Disks::open(&templates).unwrap();

    let one = disks.create(&dir.path().join("one"), GIB).await.unwrap();
    one.file().write_all_at(&[0xff; 4096], 0).unwrap();
    let two = disks.create(&dir.path().join("two"), GIB - 1).await.unwrap();

    assert_sound(&two);
    assert_eq!(names(&templates).len(), 1);
    assert_eq!(two.file().metadata().unwrap().len(), GIB);
}

#[tokio::test]
async fn the_kernel_mounts_it_writes_and_finds_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let disks = Disks::open(&dir.path().join("templates")).unwrap();
    let disk = disks.create(&dir.path().join("disk"), GIB).await.unwrap();
    let target = dir.path().join("mnt");
    fs::create_dir(&target).unwrap();
    let (from, to) = (disk.path().to_str().unwrap(), target.to_str().unwrap());
    let mount = || {
        let output = run("mount", "mount", &["-t", "ext4", "-o", "loop", from, to]);
        let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "this test needs root and a loop device: {complaint}");
    };
    let unmount = || assert!(run("mount", "umount", &[to]).status.success());

    mount();
    fs::write(target.join("file"), "content").unwrap();
    unmount();
    mount();
    let content = fs::read_to_string(target.join("file")).unwrap();
    unmount();

    assert_eq!(content, "content");
    assert_sound(&disk);
    let used = disk.file().metadata().unwrap().blocks() * 512;
    assert!(used < 1 << 20, "mounted and written to, it takes {used} bytes");
}

#[tokio::test]
async fn a_disk_that_is_not_kept_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let disks = Disks::open(&dir.path().join("templates")).unwrap();
    let path = dir.path().join("disk");

    drop(disks.create(&path, GIB).await.unwrap());
    assert!(!path.exists());
    disks.create(&path, GIB).await.unwrap().keep();
    assert!(path.exists());

    let error = disks.create(&path, GIB).await.unwrap_err();
    assert!(matches!(error, DiskError::Io { .. }), "{error:?}");
    assert!(path.exists(), "a disk that is there is nobody's to remove");
}

#[tokio::test]
async fn sizes_out_of_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let disks = Disks::open(&dir.path().join("templates")).unwrap();

    for size_bytes in [0, SIZE_BYTES_MIN - 1, SIZE_BYTES_MAX + 1, u64::MAX] {
        let error = disks.create(&dir.path().join("disk"), size_bytes).await.unwrap_err();
        assert!(matches!(error, DiskError::Size { .. }), "{error:?}");
    }
    assert_eq!(names(dir.path()), ["templates"]);
}

#[tokio::test]
async fn half_made_templates_are_removed_at_start_and_whole_ones_kept() {
    let dir = tempfile::tempdir().unwrap();
    let templates = dir.path().join("templates");
    let disks = Disks::open(&templates).unwrap();
    drop(disks.create(&dir.path().join("disk"), GIB).await.unwrap());
    let whole = names(&templates);
    fs::write(templates.join("half.new"), "").unwrap();

    Disks::open(&templates).unwrap();

    assert_eq!(names(&templates), whole);
}

/// On a file system of its own that is full to the last block.
#[tokio::test]
async fn a_full_disk_is_told_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let disks = Disks::open(&dir.path().join("templates")).unwrap();
    drop(disks.create(&dir.path().join("disk"), GIB).await.unwrap());
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let to = small.to_str().unwrap();
    let mounted = run("mount", "mount", &["-t", "tmpfs", "-o", "size=16k", "tmpfs", to]);
    assert!(mounted.status.success(), "this test needs root");

    let error = disks.create(&small.join("disk"), GIB).await.unwrap_err();
    let left = names(&small);
    run("mount", "umount", &[to]);

    assert!(matches!(error, DiskError::NoSpace { .. }), "{error:?}");
    assert_eq!(left, [""; 0]);
}

/// Two machines on one disk would destroy it.
#[tokio::test]
async fn a_disk_is_opened_again_once_nobody_has_it() {
    let dir = tempfile::tempdir().unwrap();
    let disks = Disks::open(&dir.path().join("templates")).unwrap();
    let path = dir.path().join("disk");
    let disk = disks.create(&path, SIZE_BYTES_MIN).await.unwrap();
    let of_worker = disk.file().try_clone().unwrap();
    disk.keep();

    assert!(matches!(Disks::reopen(&path).await, Err(DiskError::InUse { .. })));
    drop(of_worker);
    let first = Disks::reopen(&path).await.unwrap();
    assert!(matches!(Disks::reopen(&path).await, Err(DiskError::InUse { .. })));
    drop(first);
    assert!(Disks::reopen(&path).await.is_ok());
}
