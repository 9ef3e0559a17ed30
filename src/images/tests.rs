//! The life of images from outside: asked for, loaded, tagged, deleted, interrupted.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use rusqlite::Connection;
use tokio::io::{AsyncWriteExt, duplex};
use tokio::time::{sleep, timeout};

use super::*;
use crate::images::registry::Credentials;
use crate::images::testing::TarBuilder;
use crate::images::testing::layout::Layout;
use crate::images::testing::server::{PASSWORD, Scripted, TestRegistry, USER};
use crate::images::testing::{Mount, listing};

/// Longer than anything here takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A host with images. Opened again on the same folder it is the next server.
struct Host {
    dir: tempfile::TempDir,
    images: Images,
}

impl Host {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = open(dir.path()).await;
        Self { dir, images }
    }

    /// Ends the server as a signal would and starts the next one.
    async fn restart(self) -> Self {
        self.images.close().await;
        let images = open(self.dir.path()).await;
        Self { images, ..self }
    }

    fn files(&self, folder: &str) -> usize {
        fs::read_dir(self.dir.path().join(folder)).unwrap().count()
    }

    async fn pull(&self, name: &str) -> Image {
        self.images.request(spec(name)).await.unwrap();
        self.settled(name).await
    }

    async fn settled(&self, name: &str) -> Image {
        let name = reference(name);
        let settled = self.images.settled(&name);
        timeout(PATIENCE, settled).await.expect("it takes too long").unwrap()
    }
}

async fn open(dir: &Path) -> Images {
    let spec = ImagesSpec {
        dir: dir.to_owned(),
        insecure_registries: Vec::new(),
        jobs_max: 1,
        limits: Limits { free_bytes_min: 0, ..Limits::default() },
    };
    let connection = Connection::open(dir.join("records")).unwrap();
    Images::open(spec, Records::new(connection).unwrap()).await.unwrap()
}

fn reference(name: &str) -> Reference {
    name.parse().unwrap()
}

fn spec(name: &str) -> ImageSpec {
    ImageSpec { name: reference(name), platform: None, credentials: None, tags: BTreeMap::new() }
}

fn image(layout: &mut Layout, content: &str) -> Digest {
    let base = TarBuilder::new().file("etc/base", "base").file("gone", "x");
    let top = TarBuilder::new().file("content", content).file(".wh.gone", "");
    layout.image("linux/amd64", vec![base, top])
}

const NOBODY: fn(&Digest) -> bool = |_| false;

#[tokio::test]
async fn an_image_becomes_a_root_disk() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;

    let asked = host.images.request(spec(&name)).await.unwrap();
    let ready = host.settled(&name).await;

    assert_eq!((asked.digest, asked.name.to_string()), (digest, name.clone()));
    assert!(matches!(asked.status, ImageStatus::Pending | ImageStatus::Pulling));
    assert_eq!((ready.status, ready.error), (ImageStatus::Ready, None));
    assert_eq!(ready.platform, "linux/amd64");
    assert_eq!(ready.config.entrypoint, ["/init"]);
    let disk = host.images.ready(&reference(&name)).unwrap();
    assert_eq!((disk.digest, disk.config), (digest, ready.config));
    let on_disk = fs::metadata(&disk.path).unwrap();
    assert_eq!(ready.size_bytes, Some(on_disk.blocks() * 512));
    assert_eq!(disk.file.metadata().unwrap().ino(), on_disk.ino());
    let mount = Mount::new(&disk.path);
    let paths: Vec<String> = listing(mount.path())
        .iter()
        .map(|line| line.split(' ').next().unwrap().to_owned())
        .collect();
    assert_eq!(paths, ["/", "/content", "/etc", "/etc/base"]);
    assert_eq!(host.files("tmp"), 0);
}

#[tokio::test]
async fn by_digest_the_image_of_a_tag_is_found() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let host = Host::new().await;
    host.pull(&format!("{}/app:v1", registry.host)).await;

    let by_digest = reference(&format!("{}/app@{digest}", registry.host));

    assert_eq!(host.images.get(&by_digest).unwrap().digest, digest);
    assert_eq!(host.images.ready(&by_digest).unwrap().digest, digest);
    assert_eq!(host.images.get(&reference(&format!("{}/other@{digest}", registry.host))), None);
}

/// A scripted registry that counts blobs and can hold them back.
struct Gate {
    server: Scripted,
    blobs: Arc<AtomicUsize>,
    open: Arc<AtomicBool>,
}

impl Gate {
    async fn new(layout: Layout, tags: &'static [(&'static str, Digest)]) -> Self {
        let blobs = Arc::new(AtomicUsize::new(0));
        let open = Arc::new(AtomicBool::new(false));
        let (count, gate) = (Arc::clone(&blobs), Arc::clone(&open));
        let answer = move |request: &Request| -> Response {
            let last = request.uri().path().rsplit('/').next().unwrap();
            if last.is_empty() {
                return "".into_response();
            }
            let tag = tags.iter().find(|(tag, _)| *tag == last).map(|(_, digest)| *digest);
            let digest = tag.unwrap_or_else(|| last.parse().unwrap());
            let content = layout.blobs[&digest].clone();
            if !content.starts_with(&[0x1f, 0x8b]) {
                return content.into_response();
            }
            count.fetch_add(1, Ordering::Relaxed);
            // Nothing comes until the gate is open.
            let gate = Arc::clone(&gate);
            let body = stream::once(async move {
                while !gate.load(Ordering::Relaxed) {
                    sleep(Duration::from_millis(5)).await;
                }
                Ok::<_, io::Error>(content)
            });
            Response::new(Body::from_stream(body))
        };
        Self { server: Scripted::start(answer).await, blobs, open }
    }

    fn name(&self, tag: &str) -> String {
        format!("{}/app:{tag}", self.server.host)
    }
}

fn leak(tags: Vec<(&'static str, Digest)>) -> &'static [(&'static str, Digest)] {
    Box::leak(tags.into_boxed_slice())
}

#[tokio::test]
async fn requests_for_one_digest_share_the_work() {
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    let gate = Gate::new(layout, leak(vec![("one", digest), ("two", digest)])).await;
    let host = Host::new().await;

    let mut asked = Vec::new();
    for tag in ["one", "one", "two", "one"] {
        asked.push(host.images.request(spec(&gate.name(tag))).await.unwrap());
    }
    gate.open.store(true, Ordering::Relaxed);
    let one = host.settled(&gate.name("one")).await;
    let two = host.settled(&gate.name("two")).await;

    assert!(asked.iter().all(|image| image.digest == digest));
    assert_eq!((one.status, two.status), (ImageStatus::Ready, ImageStatus::Ready));
    assert_eq!(gate.blobs.load(Ordering::Relaxed), 2, "each layer once");
    assert_eq!(host.images.list().len(), 2);
    let again = host.images.request(spec(&gate.name("one"))).await.unwrap();
    assert_eq!(again.status, ImageStatus::Ready);
}

#[tokio::test]
async fn waiting_images_have_places_and_watchers_see_all_steps() {
    let mut layout = Layout::new();
    let digests = ["1", "2", "3"].map(|content| image(&mut layout, content));
    let tags = leak(vec![("a", digests[0]), ("b", digests[1]), ("c", digests[2])]);
    let gate = Gate::new(layout, tags).await;
    let host = Host::new().await;
    for tag in ["a", "b", "c"] {
        host.images.request(spec(&gate.name(tag))).await.unwrap();
    }
    let mut watch = host.images.watch(&reference(&gate.name("a"))).unwrap();
    watch.wait_for(|image| image.status == ImageStatus::Pulling).await.unwrap();

    let place = |tag| host.images.get(&reference(&gate.name(tag))).unwrap().queue_position;
    assert_eq!((place("a"), place("b"), place("c")), (None, Some(1), Some(2)));
    assert!(watch.borrow().progress.unwrap().total_bytes > 0);

    host.images.delete(&reference(&gate.name("b")), NOBODY).await.unwrap();
    assert_eq!((place("a"), place("c")), (None, Some(1)));
    gate.open.store(true, Ordering::Relaxed);
    for tag in ["a", "c"] {
        let image = host.settled(&gate.name(tag)).await;
        assert_eq!((image.status, image.progress), (ImageStatus::Ready, None));
        assert_eq!(image.queue_position, None);
    }
}

#[tokio::test]
async fn a_deleted_pull_is_cancelled_and_leaves_nothing() {
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    let gate = Gate::new(layout, leak(vec![("one", digest)])).await;
    let host = Host::new().await;
    host.images.request(spec(&gate.name("one"))).await.unwrap();
    let mut watch = host.images.watch(&reference(&gate.name("one"))).unwrap();
    watch.wait_for(|image| image.status == ImageStatus::Pulling).await.unwrap();

    host.images.delete(&reference(&gate.name("one")), NOBODY).await.unwrap();

    watch.changed().await.unwrap_err();
    assert_eq!(host.images.list(), []);
    host.images.close().await;
    assert_eq!(host.files("images"), 0);
}

#[tokio::test]
async fn a_failure_is_told_with_its_causes_and_can_be_tried_again() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let wrong = TarBuilder::new().file("../out", "x");
    let digest = layout.image("linux/amd64", vec![wrong]);
    registry.push(&layout, digest, "bad:v1");
    let name = format!("{}/bad:v1", registry.host);
    let host = Host::new().await;

    let failed = host.pull(&name).await;

    let why = "Failed to apply layer 0: Refused entry \"../out\": It has a `..` component";
    assert_eq!((failed.status, failed.error.as_deref()), (ImageStatus::Failed, Some(why)));
    assert!(matches!(
        host.images.ready(&reference(&name)),
        Err(ReadyError::NotReady { status: ImageStatus::Failed, .. })
    ));
    assert_eq!(host.files("tmp"), 0);
    let again = host.images.request(spec(&name)).await.unwrap();
    assert_ne!(again.status, ImageStatus::Failed);
    assert_eq!(host.settled(&name).await.error.as_deref(), Some(why));
    let host = host.restart().await;
    assert_eq!(host.settled(&name).await.error.as_deref(), Some(why));
}

#[tokio::test]
async fn a_refused_request_changes_nothing() {
    let registry = TestRegistry::start().await;
    let host = Host::new().await;
    let name = format!("{}/none:v1", registry.host);

    let missing = host.images.request(spec(&name)).await.unwrap_err();
    let platform = Some("linux/arm64".to_owned());
    let arm = host.images.request(ImageSpec { platform, ..spec(&name) }).await.unwrap_err();

    assert!(matches!(missing, RequestError::Registry(RegistryError::NotFound { .. })));
    assert!(matches!(arm, RequestError::Platform { platform } if platform == "linux/arm64"));
    assert_eq!(host.images.list(), []);
}

/// While the new content of a moved tag is on its way, the old content keeps serving.
#[tokio::test]
async fn a_moved_tag_serves_its_old_content_until_the_new_is_ready() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let (old, new) = (image(&mut layout, "old"), image(&mut layout, "new"));
    let bad = layout.image("linux/amd64", vec![TarBuilder::new().file("../out", "x")]);
    registry.push(&layout, old, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    let created_at = host.pull(&name).await.created_at;

    registry.push(&layout, bad, "app:v1");
    assert_eq!(host.pull(&name).await.status, ImageStatus::Failed);
    assert_eq!(host.images.ready(&reference(&name)).unwrap().digest, old);
    let host = host.restart().await;
    assert_eq!(host.images.ready(&reference(&name)).unwrap().digest, old);
    registry.push(&layout, new, "app:v1");
    let moved = host.pull(&name).await;

    assert_eq!((moved.digest, moved.created_at), (new, created_at));
    assert_eq!(host.images.ready(&reference(&name)).unwrap().digest, new);
    assert_eq!(host.images.root_disk(&old).unwrap().digest, old, "nobody collected it");
    assert_eq!(host.images.collect(|digest| *digest == old).await.unwrap(), 0);
    assert_eq!(host.images.collect(NOBODY).await.unwrap(), 1);
    assert!(matches!(host.images.root_disk(&old), Err(ReadyError::Missing { .. })));
    assert_eq!(host.images.ready(&reference(&name)).unwrap().digest, new);
}

#[tokio::test]
async fn an_image_in_use_is_not_deleted_but_its_spare_names_are() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    host.pull(&name).await;
    let (name, spare) = (reference(&name), reference("spare"));
    host.images.tag(&name, &spare).unwrap();

    host.images.delete(&name, |_| true).await.unwrap();
    let in_use = host.images.delete(&spare, |used| *used == digest).await.unwrap_err();
    assert!(matches!(in_use, DeleteError::InUse { .. }));
    let held = host.images.ready(&spare).unwrap();
    let in_hand = host.images.delete(&spare, NOBODY).await.unwrap_err();
    assert!(matches!(in_hand, DeleteError::InUse { .. }));
    drop(held);
    host.images.delete(&spare, NOBODY).await.unwrap();

    let missing = host.images.delete(&spare, NOBODY).await.unwrap_err();
    assert!(matches!(missing, DeleteError::Missing { .. }));
    assert_eq!((host.files("images"), host.files("blobs/sha256"), host.files("tmp")), (0, 0, 0));
    assert_eq!(host.restart().await.images.list(), []);
}

#[tokio::test]
async fn tags_are_given_and_moved_here_alone() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let (one, two) = (image(&mut layout, "one"), image(&mut layout, "two"));
    registry.push(&layout, one, "app:one");
    registry.push(&layout, two, "app:two");
    let host = Host::new().await;
    let names = ["one", "two"].map(|tag| format!("{}/app:{tag}", registry.host));
    for name in &names {
        host.pull(name).await;
    }
    let mine = reference("mine:latest");

    let first = host.images.tag(&reference(&names[0]), &mine).unwrap();
    let moved = host.images.tag(&reference(&names[1]), &mine).unwrap();

    assert_eq!((first.digest, moved.digest), (one, two));
    assert_eq!(moved.created_at, first.created_at);
    let host = host.restart().await;
    assert_eq!(host.images.ready(&mine).unwrap().digest, two);
    let no = host.images.tag(&reference("none"), &mine).unwrap_err();
    assert!(matches!(no, TagError::Missing { .. }));
    let digest = mine.at(&one);
    let no = host.images.tag(&mine, &digest).unwrap_err();
    assert!(matches!(no, TagError::TargetIsDigest { .. }));
}

#[tokio::test]
async fn labels_stay_unless_new_ones_come() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    let tags = BTreeMap::from([("team".to_owned(), "a".to_owned())]);

    host.images.request(ImageSpec { tags: tags.clone(), ..spec(&name) }).await.unwrap();
    let kept = host.pull(&name).await;
    let host = host.restart().await;

    assert_eq!(kept.tags, tags);
    assert_eq!(host.images.get(&reference(&name)).unwrap().tags, tags);
}

#[tokio::test]
async fn an_interrupted_pull_goes_on_in_the_next_server() {
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    let gate = Gate::new(layout, leak(vec![("one", digest)])).await;
    let host = Host::new().await;
    host.images.request(spec(&gate.name("one"))).await.unwrap();
    let mut watch = host.images.watch(&reference(&gate.name("one"))).unwrap();
    watch.wait_for(|image| image.status == ImageStatus::Pulling).await.unwrap();

    let host = host.restart().await;
    gate.open.store(true, Ordering::Relaxed);
    let image = host.settled(&gate.name("one")).await;

    assert_eq!((image.status, image.digest), (ImageStatus::Ready, digest));
    assert_eq!(image.config.entrypoint, ["/init"]);
}

/// Credentials of a request are used for its pull and die with the server.
#[tokio::test]
async fn credentials_are_not_kept_over_a_restart() {
    let registry = TestRegistry::start_private().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    let credentials =
        Some(Credentials::Password { username: USER.to_owned(), password: PASSWORD.to_owned() });
    let with = || ImageSpec { credentials: credentials.clone(), ..spec(&name) };
    // An interrupted one: the row is there, its layers are not.
    host.images.request(with()).await.unwrap();
    host.settled(&name).await;
    let mut row = host.images.inner.records.with(ImageRecord::list).unwrap().remove(0);
    row.state = records::RecordState::Unfinished;
    row.serves = None;
    host.images.keep(&row).unwrap();
    host.images.close().await;
    fs::remove_dir_all(host.dir.path().join("images")).unwrap();
    let manifest = Roots::manifest(&host.images.inner.blobs, &digest).unwrap();
    for layer in &manifest.layers {
        fs::remove_file(host.dir.path().join("blobs/sha256").join(layer.digest.hex())).unwrap();
    }

    let host = host.restart().await;
    let image = host.images.get(&reference(&name)).unwrap();

    assert_eq!(image.status, ImageStatus::Failed);
    assert!(image.error.unwrap().contains("ask again"));
    let records = fs::read(host.dir.path().join("records")).unwrap();
    let wal = fs::read(host.dir.path().join("records-wal")).unwrap_or_default();
    for bytes in [records, wal] {
        assert!(!bytes.windows(PASSWORD.len()).any(|window| window == PASSWORD.as_bytes()));
    }
    host.images.request(with()).await.unwrap();
    assert_eq!(host.settled(&name).await.status, ImageStatus::Ready);
}

#[tokio::test]
async fn what_a_killed_server_left_is_removed_and_what_it_finished_stays() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    host.pull(&name).await;
    let dir = host.dir.path();
    fs::create_dir_all(dir.join("tmp/image-half")).unwrap();
    fs::write(dir.join("tmp/image-half/root.erofs"), "half").unwrap();
    fs::write(dir.join("tmp/blob-half"), "half").unwrap();
    let nameless = dir.join("images").join(Digest::of(b"x").hex());
    fs::create_dir(&nameless).unwrap();
    fs::write(dir.join("images/rubbish"), "").unwrap();

    let host = host.restart().await;

    assert_eq!((host.files("tmp"), host.files("images")), (0, 1));
    assert_eq!(host.images.get(&reference(&name)).unwrap().status, ImageStatus::Ready);
    assert_eq!(host.images.ready(&reference(&name)).unwrap().digest, digest);
}

#[tokio::test]
async fn a_lost_root_disk_is_made_again_from_its_blobs() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    host.pull(&name).await;
    drop(registry);
    let root = fs::read(host.images.inner.roots.path(&digest)).unwrap();
    fs::remove_dir_all(host.dir.path().join("images")).unwrap();

    let host = host.restart().await;
    let image = host.settled(&name).await;

    assert_eq!(image.status, ImageStatus::Ready);
    assert_eq!(fs::read(host.images.inner.roots.path(&digest)).unwrap(), root, "byte for byte");
}

#[tokio::test]
async fn an_archive_gives_the_same_root_disk_as_a_pull() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    layout.name(digest, "loaded/app:v1");
    let (puller, loader) = (Host::new().await, Host::new().await);
    puller.pull(&format!("{}/app:v1", registry.host)).await;

    let loaded = loader.images.load(&layout.archive()[..], None, BTreeMap::new()).await.unwrap();
    let image = loader.settled("loaded/app:v1").await;

    assert_eq!(loaded.len(), 1);
    assert_eq!((image.status, image.digest), (ImageStatus::Ready, digest));
    let root = |host: &Host| fs::read(host.images.inner.roots.path(&digest)).unwrap();
    assert!(root(&puller) == root(&loader), "the files differ");
}

#[tokio::test]
async fn a_given_name_goes_to_the_only_image_of_an_archive() {
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "bare-tag");
    let host = Host::new().await;
    let load = |layout: &Layout, name: Option<&str>| {
        let (archive, name) = (layout.archive(), name.map(reference));
        let images = host.images.clone();
        async move { images.load(&archive[..], name, BTreeMap::new()).await }
    };

    let unnamed = load(&layout, None).await.unwrap_err();
    let named = load(&layout, Some("mine")).await.unwrap();
    let other = reference("mine").at(&Digest::of(b"other")).to_string();
    let wrong = load(&layout, Some(&other)).await.unwrap_err();
    let two = image(&mut layout, "two");
    layout.name(two, "x/two:v1");
    let several = load(&layout, Some("mine")).await.unwrap_err();

    assert!(matches!(unnamed, ArchiveError::Unnamed));
    assert_eq!(named[0].name, reference("mine"));
    assert!(matches!(wrong, ArchiveError::Name { .. }));
    assert!(matches!(several, ArchiveError::Several { images: 2 }));
    assert_eq!(host.settled("mine").await.status, ImageStatus::Ready);
    host.images.delete(&reference("mine"), NOBODY).await.unwrap();
    assert_eq!((host.files("blobs/sha256"), host.files("tmp")), (0, 0));
}

/// An upload that stands still holds nobody up, and its blobs are not swept from under it.
#[tokio::test]
async fn a_slow_upload_stops_neither_deletes_nor_pulls() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout, "hello");
    registry.push(&layout, digest, "app:v1");
    layout.name(digest, "loaded:v1");
    let name = format!("{}/app:v1", registry.host);
    let host = Host::new().await;
    let archive = layout.archive();
    let (mut client, server) = duplex(1024);
    let images = host.images.clone();
    let loading =
        tokio::spawn(async move { images.load(server, None, BTreeMap::new()).await.unwrap() });
    let (start, rest) = archive.split_at(archive.len() - 1100);

    client.write_all(start).await.unwrap();
    host.pull(&name).await;
    host.images.delete(&reference(&name), NOBODY).await.unwrap();
    client.write_all(rest).await.unwrap();
    drop(client);

    let loaded = timeout(PATIENCE, loading).await.unwrap().unwrap();
    assert_eq!(loaded[0].digest, digest);
    assert_eq!(host.settled("loaded:v1").await.status, ImageStatus::Ready);
}
