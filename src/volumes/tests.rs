//! Volumes on a folder of their own, their files looked at by e2fsprogs.

use std::future::poll_fn;
use std::os::unix::fs::FileExt;
use std::pin::pin;
use std::process::{Command, Output};
use std::task::Poll;

use rusqlite::Connection;
use tokio::io::duplex;
use tokio::task::yield_now;

use super::*;
use crate::os::capacity::used_bytes;
use crate::os::tool::E2FSCK;
use crate::ratio::Ratio;
use crate::resources::{Configured, Kind, Ratios, ResourcesSpec};
use crate::tar::testing::{TarBuilder, header};

struct Host {
    dir: tempfile::TempDir,
    store: Store,
    resources: Resources,
    volumes: Volumes,
}

impl Host {
    fn new() -> Self {
        Self::in_dir(tempfile::tempdir().unwrap(), None)
    }

    fn in_dir(dir: tempfile::TempDir, total_gib_max: Option<u64>) -> Self {
        let one = Ratio::whole(1);
        let resources = Resources::new(ResourcesSpec {
            data_dir: dir.path().to_owned(),
            images_dir: dir.path().join("images"),
            blobs_dir: dir.path().join("blobs"),
            ratios: Ratios { cpu: one, memory: one, disk: one, network: one, disk_io: one },
            configured: Configured { disk_bytes: Some(100 << 30), ..Configured::default() },
        });
        let store = Store::open(&dir.path().join("records.db")).unwrap();
        let volumes = Volumes::open(VolumesSpec {
            dir: dir.path().join("volumes"),
            store: store.clone(),
            resources: resources.clone(),
            free_bytes_min: 0,
            total_gib_max,
        })
        .unwrap();
        Self { dir, store, resources, volumes }
    }

    fn folders(&self) -> Vec<String> {
        let folders = fs::read_dir(self.dir.path().join("volumes")).unwrap();
        let mut names: Vec<_> =
            folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn data(&self, id: &str) -> PathBuf {
        self.dir.path().join("volumes").join(id).join(DATA)
    }

    fn promised_bytes(&self) -> u64 {
        self.resources.report().statuses[&Kind::Disk].allocated
    }

    /// Adds the record of an instance, as far as attachments are concerned.
    fn add_instance(&self, id: &str) {
        let insert = "INSERT INTO instances (id, name, json) VALUES (?1, ?1, '{}')";
        self.store.transact(|records| records.execute(insert, [id])).unwrap();
    }

    fn attach(&self, volume: &str, instance: &str, read_only: bool) -> Result<(), AttachError> {
        let attachment = Attachment {
            instance_id: instance.to_owned(),
            mount_path: "/data".to_owned(),
            read_only,
        };
        self.store.transact(|records| attach(records, volume, &attachment))
    }
}

fn spec(id: &str, name: &str, size_gib: u64) -> VolumeSpec {
    let id = Some(id.parse().unwrap());
    VolumeSpec { id, name: name.parse().unwrap(), size_gib, tags: BTreeMap::new() }
}

#[expect(clippy::disallowed_methods, reason = "an oracle of a test, not a tool of the product")]
fn run(tool: &str, args: &[&str]) -> Output {
    Command::new(tool).args(args).output().expect("this test needs e2fsprogs")
}

fn assert_sound(path: &Path) {
    let fsck = run("e2fsck", &["-fn", path.to_str().unwrap()]);
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stdout));
}

/// What debugfs says to `command`.
fn debugfs(path: &Path, command: &str) -> String {
    let output = run("debugfs", &["-w", "-R", command, path.to_str().unwrap()]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn a_volume_is_a_sound_file_system_of_its_own_that_costs_almost_nothing() {
    let host = Host::new();

    for id in ["a", "b"] {
        host.volumes.create(spec(id, "data", 10)).await.unwrap();
    }

    let uuid = |id: &str| debugfs(&host.data(id), "show_super_stats -h");
    let uuid = |id| uuid(id).lines().find(|line| line.contains("UUID")).map(str::to_owned);
    for id in ["a", "b"] {
        assert_sound(&host.data(id));
        let bytes = used_bytes(&host.dir.path().join("volumes").join(id));
        assert!(bytes < 2 << 20, "{bytes} bytes");
        assert_eq!(fs::metadata(host.data(id)).unwrap().len(), 10 << 30);
    }
    assert!(uuid("a").is_some() && uuid("a") != uuid("b"));
    assert_eq!(host.promised_bytes(), 20 << 30);
}

#[tokio::test]
async fn a_volume_is_found_by_its_id_before_its_name() {
    let host = Host::new();
    host.volumes.create(spec("one", "two", 1)).await.unwrap();
    host.volumes.create(spec("two", "one", 1)).await.unwrap();
    host.volumes.create(spec("x", "same", 1)).await.unwrap();
    host.volumes.create(spec("y", "same", 1)).await.unwrap();

    assert_eq!(host.volumes.find("one").unwrap().id.as_str(), "one");
    assert_eq!(host.volumes.find("two").unwrap().id.as_str(), "two");
    assert!(matches!(host.volumes.find("same"), Err(FindError::Ambiguous { .. })));
    assert!(matches!(host.volumes.find("none"), Err(FindError::Missing { .. })));
    let taken = host.volumes.create(spec("one", "other", 1)).await;
    assert!(matches!(taken, Err(CreateError::IdTaken { .. })), "{taken:?}");
    assert_eq!(host.volumes.list().unwrap().len(), 4);
    assert_eq!(host.promised_bytes(), 4 << 30, "the refused one took nothing away");
}

#[tokio::test]
async fn one_writes_alone_and_many_read_together() {
    let host = Host::new();
    host.volumes.create(spec("v", "v", 1)).await.unwrap();
    for id in ["a", "b", "c"] {
        host.add_instance(id);
    }

    host.attach("v", "a", true).unwrap();
    host.attach("v", "b", true).unwrap();
    let writer = host.attach("v", "c", false);
    let twice = host.attach("v", "a", true);
    let missing = host.attach("w", "a", true);

    assert!(matches!(writer, Err(AttachError::Taken { how: "to read", .. })), "{writer:?}");
    assert!(matches!(twice, Err(AttachError::Twice { .. })), "{twice:?}");
    assert!(matches!(missing, Err(AttachError::Missing { .. })), "{missing:?}");
    let in_use = host.volumes.delete("v").await;
    assert!(matches!(in_use, Err(DeleteError::InUse { .. })), "{in_use:?}");
    // An instance that goes takes its attachments along.
    let remove = "DELETE FROM instances WHERE id IN ('a', 'b')";
    host.store.transact(|records| records.execute(remove, [])).unwrap();
    host.attach("v", "c", false).unwrap();
    let reader = host.attach("v", "c", true);
    assert!(matches!(reader, Err(AttachError::Twice { .. })), "{reader:?}");
    host.store.transact(|records| detach(records, "v", "c")).unwrap();
    host.volumes.delete("v").await.unwrap();
    assert_eq!((host.folders().len(), host.promised_bytes()), (0, 0));
}

#[tokio::test]
async fn volumes_are_no_larger_together_than_they_may_be() {
    let host = Host::in_dir(tempfile::tempdir().unwrap(), Some(5));
    host.volumes.create(spec("a", "a", 3)).await.unwrap();

    let refused = host.volumes.create(spec("b", "b", 3)).await.unwrap_err();

    let text = "Volumes may take 5GB in all (max_volumes), of which 3GB are taken: 3GB do not fit";
    assert_eq!(refused.to_string(), text);
    let more = host.volumes.create(spec("c", "c", 2)).await;
    assert!(more.is_ok(), "{more:?}");
    let disk = Host::new().volumes.create(spec("d", "d", 101)).await.unwrap_err();
    assert!(matches!(disk, CreateError::Shortage(_)), "{disk:?}");
}

#[tokio::test]
async fn an_archive_becomes_a_volume_as_large_as_it_needs() {
    let host = Host::new();
    let archive = TarBuilder::new()
        .mode(0o640)
        .owner(1000, 1001)
        .file("sub/file", "content")
        .symlink("link", "sub/file")
        .build();

    let volume = host.volumes.create_from_archive(spec("v", "v", 10), archive.as_slice()).await;

    assert_eq!(volume.unwrap().size_gib, 1);
    assert_sound(&host.data("v"));
    assert_eq!(debugfs(&host.data("v"), "cat /sub/file"), "content");
    let stat = debugfs(&host.data("v"), "stat /sub/file");
    assert!(stat.contains("Mode:  0640") && stat.contains("User:  1000"), "{stat}");
    assert!(debugfs(&host.data("v"), "stat /link").contains("sub/file"));
    assert_eq!(host.promised_bytes(), 1 << 30);
    let folder = fs::read_dir(host.dir.path().join("volumes/v")).unwrap().count();
    assert_eq!(folder, 1, "only the disk is left");
}

#[tokio::test]
async fn an_archive_that_is_refused_leaves_nothing() {
    let host = Host::new();
    let hostile = TarBuilder::new().file("good", "x").file("../bad", "x").build();
    let large = TarBuilder::new()
        .raw(&header(b'0', b"f", b"", 2 << 30, &TarBuilder::new(), (0, 0)))
        .unfinished();

    let refused = host.volumes.create_from_archive(spec("v", "v", 1), hostile.as_slice()).await;
    let too_large = host.volumes.create_from_archive(spec("v", "v", 1), large.as_slice()).await;

    assert!(matches!(refused, Err(CreateError::Content(_))), "{refused:?}");
    assert!(matches!(too_large, Err(CreateError::TooLarge { size_gib: 1 })), "{too_large:?}");
    assert_eq!((host.folders().len(), host.promised_bytes()), (0, 0));
    assert_eq!(host.volumes.list().unwrap(), []);
}

#[tokio::test]
async fn a_client_that_goes_away_leaves_nothing() {
    let host = Host::new();
    let (client, server) = duplex(1024);
    let mut making = Box::pin(host.volumes.create_from_archive(spec("v", "v", 1), server));
    poll_fn(|context| {
        assert!(pin!(&mut making).poll(context).is_pending());
        Poll::Ready(())
    })
    .await;

    drop((making, client));
    // The thread that unpacked hears of it, and cleans up.
    while !host.folders().is_empty() || host.promised_bytes() > 0 {
        yield_now().await;
    }

    assert_eq!(host.volumes.list().unwrap(), []);
}

#[tokio::test]
async fn what_a_killed_server_left_is_removed_and_the_rest_is_kept() {
    let host = Host::new();
    for id in ["kept", "half", "going"] {
        host.volumes.create(spec(id, "v", 1)).await.unwrap();
    }
    let Host { dir, store, .. } = host;
    drop(store);
    let records = Connection::open(dir.path().join("records.db")).unwrap();
    for (id, phase) in [("half", "creating"), ("going", "deleting")] {
        let update =
            "UPDATE volumes SET json = replace(json, 'kept\"}', ?2 || '\"}') WHERE id = ?1";
        assert_eq!(records.execute(update, [id, phase]), Ok(1));
    }
    drop(records);
    fs::create_dir_all(dir.path().join("volumes/stray/content")).unwrap();

    let host = Host::in_dir(dir, None);

    assert_eq!(host.folders(), ["kept"]);
    assert_eq!(host.volumes.list().unwrap().len(), 1);
    assert_eq!(host.promised_bytes(), 1 << 30);
}

#[tokio::test]
async fn a_disk_that_is_written_is_read_by_nobody_else() {
    let host = Host::new();
    host.volumes.create(spec("v", "v", 1)).await.unwrap();

    let writer = host.volumes.disk("v", false).await.unwrap();
    assert!(matches!(host.volumes.disk("v", true).await, Err(DiskError::InUse { .. })));
    assert!(matches!(host.volumes.disk("v", false).await, Err(DiskError::InUse { .. })));
    drop(writer);
    let _readers =
        [host.volumes.disk("v", true).await.unwrap(), host.volumes.disk("v", true).await.unwrap()];
    assert!(matches!(host.volumes.disk("v", false).await, Err(DiskError::InUse { .. })));
}

/// Whoever only reads cannot replay a journal: a file that its last writer had synced would be
/// missing.
#[tokio::test]
async fn a_journal_is_emptied_before_a_volume_is_read() {
    let host = Host::new();
    host.volumes.create(spec("v", "v", 1)).await.unwrap();
    let path = host.data("v");
    let script = tempfile::NamedTempFile::new().unwrap();
    // Block 5000 is free; the journal says what it shall become.
    let block = tempfile::NamedTempFile::new().unwrap();
    fs::write(block.path(), vec![b'j'; 4096]).unwrap();
    let commands = format!("jo\njw -b 5000 {}\njc\n", block.path().display());
    fs::write(script.path(), commands).unwrap();
    run("debugfs", &["-w", "-f", script.path().to_str().unwrap(), path.to_str().unwrap()]);
    let is_dirty = || debugfs(&path, "show_super_stats -h").contains("needs_recovery");
    assert!(is_dirty(), "the test's own journal");

    let reader = host.volumes.disk("v", true).await.unwrap();

    assert!(!is_dirty());
    let mut found = [0; 4096];
    reader.read_exact_at(&mut found, 5000 * 4096).unwrap();
    assert_eq!(found, [b'j'; 4096]);
    assert!(E2FSCK.find().is_some());
}
