//! Archives as tools write them, and as an enemy would.

use std::fs;
use std::io::Write;
use std::pin::Pin;
use std::task::{Context, Poll};

use serde_json::json;
use tokio::io::ReadBuf;

use super::*;
use crate::images::room::Room;
use crate::images::testing::layout::Layout;
use crate::images::testing::{TarBuilder, header, run};
use crate::tar::testing::gzip;

struct Store {
    dir: tempfile::TempDir,
    blobs: Blobs,
}

impl Store {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path(), Room::new(dir.path(), 0).unwrap()).unwrap();
        Self { dir, blobs }
    }

    async fn read(&self, archive: &[u8]) -> Result<Vec<ArchivedImage>, ArchiveError> {
        let result = read(archive, &self.blobs, 64 << 20).await;
        assert_eq!(fs::read_dir(self.dir.path().join("tmp")).unwrap().count(), 0);
        result.map(|(images, _)| images)
    }
}

async fn found(archive: &[u8]) -> Result<Vec<ArchivedImage>, ArchiveError> {
    Store::new().read(archive).await
}

fn names(images: &[ArchivedImage]) -> Vec<Vec<String>> {
    images.iter().map(|image| image.names.iter().map(ToString::to_string).collect()).collect()
}

fn image(layout: &mut Layout, content: &str) -> Digest {
    layout.image("linux/amd64", vec![TarBuilder::new().file("content", content)])
}

/// What `docker save` wrote before version 25.
fn saved(config: &str, tags: &[&str], layers: &[&[u8]]) -> TarBuilder {
    let paths: Vec<String> = (0..layers.len()).map(|index| format!("l{index}/layer.tar")).collect();
    let manifest = json!([{ "Config": "config.json", "RepoTags": tags, "Layers": paths }]);
    let start = TarBuilder::new().file("config.json", config);
    let all = paths.iter().zip(layers).fold(start, |tar, (path, layer)| tar.file(path, layer));
    all.file("manifest.json", manifest.to_string())
}

fn config(layers: &[&[u8]]) -> String {
    let diff_ids: Vec<Digest> = layers.iter().map(|layer| Digest::of(layer)).collect();
    json!({
        "os": "linux",
        "architecture": "amd64",
        "config": { "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string()
}

#[tokio::test]
async fn a_layout_gives_its_images_with_their_names() {
    let mut layout = Layout::new();
    let (one, two) = (image(&mut layout, "one"), image(&mut layout, "two"));
    layout.name(one, "docker.io/library/one:v1");
    layout.name(one, "also/one:v2");
    layout.name(two, "latest");

    let store = Store::new();
    let images = store.read(&layout.archive()).await.unwrap();

    assert_eq!(images.iter().map(|image| image.manifest.digest).collect::<Vec<_>>(), [one, two]);
    let expected: [&[&str]; 2] = [&["docker.io/also/one:v2", "docker.io/library/one:v1"], &[]];
    assert_eq!(names(&images), expected);
    assert!(images[0].manifest.blobs().all(|blob| store.blobs.has(blob)));
}

#[tokio::test]
async fn compressed_archives_are_the_same() {
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "one:v1");
    let plain = layout.archive();

    let images = found(&plain).await.unwrap();

    assert_eq!(found(&gzip(&plain)).await.unwrap(), images);
    assert_eq!(found(&zstd::encode_all(&plain[..], 1).unwrap()).await.unwrap(), images);
}

#[tokio::test]
async fn an_index_gives_our_platform() {
    let mut layout = Layout::new();
    let ours = image(&mut layout, "one");
    let arm = layout.image("linux/arm64", vec![]);
    let both = layout.index(&[("linux/arm64", arm), ("linux/amd64", ours)]);
    layout.name(both, "multi:v1");
    let mut only_arm = Layout::new();
    let arm = only_arm.image("linux/arm64", vec![]);
    only_arm.name(arm, "arm:v1");

    let images = found(&layout.archive()).await.unwrap();
    let error = found(&only_arm.archive()).await.unwrap_err();

    assert_eq!(images[0].manifest.digest, ours);
    assert_eq!(error.to_string(), "Image has no linux/amd64, only linux/arm64");
}

#[tokio::test]
async fn what_docker_saved_becomes_an_image_with_a_manifest() {
    let layers =
        [TarBuilder::new().file("a", "1").build(), TarBuilder::new().file("b", "2").build()];
    let layers: Vec<&[u8]> = layers.iter().map(Vec::as_slice).collect();
    let archive = saved(&config(&layers), &["app:v1", "other/app:v2"], &layers).build();
    let store = Store::new();

    let images = store.read(&archive).await.unwrap();

    let expected: [&[&str]; 1] = [&["docker.io/library/app:v1", "docker.io/other/app:v2"]];
    assert_eq!(names(&images), expected);
    assert_eq!(images[0].configuration.config.cmd, ["sh"]);
    let mut manifest = Vec::new();
    store.blobs.read(&images[0].manifest.digest).unwrap().read_to_end(&mut manifest).unwrap();
    let Ok(Document::Manifest(manifest)) = Document::parse(&manifest) else { panic!() };
    assert_eq!(manifest, images[0].manifest);
    assert_eq!(store.read(&archive).await.unwrap(), images, "the digest is always the same");
}

/// Layers that images share are links in what docker saved.
#[tokio::test]
async fn links_in_an_archive_are_followed_within_it() {
    let layer = TarBuilder::new().file("a", "1").build();
    let config = config(&[&layer, &layer, &layer]);
    let manifest = json!([{
        "Config": "config.json",
        "RepoTags": ["app:v1"],
        "Layers": ["x/layer.tar", "y/layer.tar", "./z.tar"],
    }]);
    let archive = TarBuilder::new()
        .file("config.json", config)
        .file("x/layer.tar", &layer)
        .symlink("y/layer.tar", "../x/layer.tar")
        .hard_link("z.tar", "y/layer.tar")
        .file("manifest.json", manifest.to_string());

    let images = found(&archive.build()).await.unwrap();

    assert_eq!(images[0].manifest.layers[0], images[0].manifest.layers[2]);
}

/// From version 25 on docker writes both forms into one archive.
#[tokio::test]
async fn both_forms_in_one_archive_are_one_image_with_all_names() {
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "latest");
    let text = String::from_utf8(layout.blobs[&one].clone()).unwrap();
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    let path = document["config"]["digest"].as_str().unwrap().replace("sha256:", "blobs/sha256/");
    let manifest = json!([{ "Config": path, "RepoTags": ["app:v1"], "Layers": [] }]);
    let files = layout.files().into_iter();
    let archive = files
        .fold(TarBuilder::new(), |tar, (path, content)| tar.file(path, content))
        .file("manifest.json", manifest.to_string());

    let images = found(&archive.build()).await.unwrap();

    assert_eq!(images[0].manifest.digest, one);
    assert_eq!(names(&images), [["docker.io/library/app:v1"]]);
}

/// An archive that another program wrote, from the same layout.
#[tokio::test]
async fn what_skopeo_writes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "it");
    let from = format!("oci:{}:it", layout.write(&dir.path().join("layout")).display());
    let copy = |kind: &str| {
        let path = dir.path().join(kind);
        let to = format!("{kind}:{}:app:v1", path.display());
        let output = run("skopeo", "skopeo", &["--insecure-policy", "copy", "-q", &from, &to]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read(path).unwrap()
    };

    let oci = found(&copy("oci-archive")).await.unwrap();
    let docker = found(&copy("docker-archive")).await.unwrap();

    for images in [&oci, &docker] {
        assert_eq!(names(images), [["docker.io/library/app:v1"]]);
        assert_eq!(images[0].configuration.config.entrypoint, ["/init"]);
    }
    assert_eq!(oci[0].configuration.diff_ids, docker[0].configuration.diff_ids);
}

#[tokio::test]
async fn what_is_no_image_archive_is_refused() {
    let config = config(&[]);
    for archive in [
        b"".to_vec(),
        TarBuilder::new().file("a", "b").build(),
        TarBuilder::new().file("manifest.json", "[]").build(),
        TarBuilder::new().file("index.json", r#"{"schemaVersion":2,"manifests":[]}"#).build(),
    ] {
        assert!(matches!(found(&archive).await, Err(ArchiveError::NotAnArchive)));
    }
    assert!(matches!(found(b"rubbish").await, Err(ArchiveError::Tar(_))));
    assert!(matches!(found(&[0x1f, 0x8b, 1, 2]).await, Err(ArchiveError::Tar(_))));
    let bad_name = saved(&config, &["UPPER CASE"], &[]).build();
    assert!(matches!(found(&bad_name).await, Err(ArchiveError::Name { .. })));
    let wrong = TarBuilder::new().file("manifest.json", r#"{"a":1}"#).build();
    assert!(matches!(found(&wrong).await, Err(ArchiveError::Manifest(_))));
}

#[tokio::test]
async fn what_an_archive_lacks_is_named() {
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "one:v1");
    let is_layer = |content: &Vec<u8>| content.starts_with(&[0x1f, 0x8b]);
    let layer = *layout.blobs.iter().find(|(_, content)| is_layer(content)).unwrap().0;
    layout.blobs.remove(&layer);

    let error = found(&layout.archive()).await.unwrap_err();

    assert_eq!(error.to_string(), format!("Archive lacks {layer}"));
}

#[tokio::test]
async fn content_under_another_digest_is_refused() {
    let path = format!("blobs/sha256/{}", Digest::of(b"one").hex());
    let archive = TarBuilder::new().file(path, "two").build();

    let error = found(&archive).await.unwrap_err();

    assert!(matches!(error, ArchiveError::Blob(BlobError::Mismatch { .. })), "{error:?}");
}

/// Paths of an archive are looked up, never written to.
#[tokio::test]
async fn paths_out_of_the_archive_reach_nothing() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("target");
    let up = format!("{}{}", "../".repeat(20), target.display());
    let archive = TarBuilder::new()
        .file(target.to_str().unwrap(), "x")
        .file(&up, "x")
        .symlink("link", outside.path().to_str().unwrap())
        .file("link/target", "x")
        .symlink("index.json", "/etc/passwd")
        .symlink("manifest.json", "manifest.json")
        .build();

    assert!(matches!(found(&archive).await, Err(ArchiveError::NotAnArchive)));

    assert!(!target.exists());
}

#[tokio::test]
async fn an_archive_is_bounded_in_bytes() {
    let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
    let head = header(b'0', b"f", b"", 1 << 40, &TarBuilder::new(), (0, 0));
    encoder.write_all(&head).unwrap();
    for _ in 0..128 {
        encoder.write_all(&[0; 1 << 20]).unwrap();
    }
    let bomb = encoder.finish().unwrap();

    let error = found(&bomb).await.unwrap_err();

    assert_eq!(error.to_string(), format!("Archive is larger than {} bytes", 64 << 20));
}

#[tokio::test]
async fn an_archive_that_ends_early_is_refused() {
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "one:v1");
    let archive = layout.archive();

    for length in [100, 530, 1500] {
        let error = found(&archive[..length]).await.unwrap_err();
        assert!(
            matches!(error, ArchiveError::Io(_) | ArchiveError::Tar(TarError::Io(_))),
            "{length}: {error:?}"
        );
    }
}

/// A client that goes away in the middle.
struct Broken<'a>(&'a [u8]);

impl AsyncRead for Broken<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.0.is_empty() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let length = self.0.len().min(buffer.remaining());
        buffer.put_slice(&self.0[..length]);
        self.0 = &self.0[length..];
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_client_that_goes_away_is_told_from_an_end() {
    let mut layout = Layout::new();
    let one = image(&mut layout, "one");
    layout.name(one, "one:v1");
    let archive = layout.archive();
    let store = Store::new();

    // All but the end of the archive: without the error it would be whole.
    let error = read(Broken(&archive[..archive.len() - 1024]), &store.blobs, 64 << 20).await;

    assert!(error.is_err(), "{error:?}");
    assert_eq!(fs::read_dir(store.dir.path().join("tmp")).unwrap().count(), 0);
}
