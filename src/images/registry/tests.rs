//! Pulls from a real registry, and from one that behaves as badly as registries do.

use std::fs;
use std::io;
use std::iter;
use std::net::TcpListener;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::Request;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};

use super::*;
use crate::images::room::{Room, RoomError};
use crate::images::testing::TarBuilder;
use crate::images::testing::layout::Layout;
use crate::images::testing::server::{PASSWORD, Scripted, TestRegistry, USER};

struct Pull {
    dir: tempfile::TempDir,
    blobs: Blobs,
}

impl Pull {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(dir.path(), Room::new(dir.path(), 0).unwrap()).unwrap();
        Self { dir, blobs }
    }

    async fn pull(&self, name: &str, auth: Auth) -> Result<Resolved, RegistryError> {
        let registry = Registry::new(&name.parse().unwrap(), auth, &[])?;
        let resolved = registry.resolve().await?;
        registry.download(&resolved.manifest, &self.blobs, |_| {}).await?;
        Ok(resolved)
    }

    /// No temporary file is left, and what has a name is whole.
    fn assert_clean(&self) {
        assert_eq!(fs::read_dir(self.dir.path().join("tmp")).unwrap().count(), 0);
        for entry in fs::read_dir(self.dir.path().join("blobs/sha256")).unwrap() {
            let entry = entry.unwrap();
            let content = fs::read(entry.path()).unwrap();
            assert_eq!(Digest::of(&content).hex(), entry.file_name().to_str().unwrap());
        }
    }
}

async fn anonymous(name: &str) -> Result<Resolved, RegistryError> {
    let pull = Pull::new();
    let result = pull.pull(name, Auth::Anonymous).await;
    pull.assert_clean();
    result
}

fn someone(password: &str) -> Auth {
    Auth::As(Credentials::Password { username: USER.to_owned(), password: password.to_owned() })
}

/// Bytes that do not compress, so that layers are as long as they look.
fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    iter::repeat_with(next).take(bytes).collect()
}

fn image(layout: &mut Layout) -> Digest {
    let layers = vec![
        TarBuilder::new().file("a", noise(3 << 20)),
        TarBuilder::new().file("b", noise(100)),
        TarBuilder::new().file("a", "twice"),
        TarBuilder::new().file("a", "twice"),
    ];
    layout.image("linux/amd64", layers)
}

#[tokio::test]
async fn an_image_is_pulled_whole() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "some/image:v1");
    let pull = Pull::new();
    let name = format!("{}/some/image:v1", registry.host);

    let resolved = pull.pull(&name, Auth::Anonymous).await.unwrap();

    assert_eq!(resolved.manifest.digest, digest);
    assert_eq!(resolved.configuration.config.entrypoint, ["/init"]);
    assert_eq!(resolved.manifest.layers.len(), 4);
    for blob in resolved.manifest.blobs() {
        assert!(pull.blobs.has(blob));
    }
    pull.assert_clean();
}

#[tokio::test]
async fn progress_grows_to_the_whole() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "image:v1");
    let pull = Pull::new();
    let name = format!("{}/image:v1", registry.host).parse().unwrap();
    let client = Registry::new(&name, Auth::Anonymous, &[]).unwrap();
    let resolved = client.resolve().await.unwrap();
    let told = Mutex::new(Vec::new());

    client
        .download(&resolved.manifest, &pull.blobs, |bytes| told.lock().unwrap().push(bytes))
        .await
        .unwrap();

    let told = told.into_inner().unwrap();
    assert_eq!(told.len(), 3, "{told:?}");
    assert!(told.is_sorted() && *told.last().unwrap() <= resolved.manifest.packed_bytes());
}

#[tokio::test]
async fn our_platform_is_taken_out_of_an_index() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let ours = image(&mut layout);
    let theirs = layout.image("linux/arm64", vec![TarBuilder::new().file("arm", "")]);
    let index = layout.index(&[("linux/arm64", theirs), ("linux/amd64", ours)]);
    registry.push(&layout, index, "multi:v1");

    let by_tag = anonymous(&format!("{}/multi:v1", registry.host)).await.unwrap();
    let by_digest = anonymous(&format!("{}/multi@{index}", registry.host)).await.unwrap();
    let exact = anonymous(&format!("{}/multi@{ours}", registry.host)).await.unwrap();

    for resolved in [by_tag, by_digest, exact] {
        assert_eq!(resolved.manifest.digest, ours);
    }
}

#[tokio::test]
async fn a_missing_platform_is_told_with_what_there_is() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let arm = layout.image("linux/arm64", vec![]);
    let index = layout.index(&[("linux/arm64", arm)]);
    registry.push(&layout, arm, "arm:single");
    registry.push(&layout, index, "arm:index");

    for tag in ["single", "index"] {
        let error = anonymous(&format!("{}/arm:{tag}", registry.host)).await.unwrap_err();
        assert!(
            matches!(&error, RegistryError::Manifest(ManifestError::Platform { available })
                if available == &["linux/arm64"]),
            "{tag}: {error:?}"
        );
    }
}

#[tokio::test]
async fn what_is_not_there_is_not_found() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "image:v1");
    let other = Digest::of(b"other");

    for name in ["image:v2".to_owned(), "none:v1".to_owned(), format!("image@{other}")] {
        let error = anonymous(&format!("{}/{name}", registry.host)).await.unwrap_err();
        assert!(matches!(error, RegistryError::NotFound { .. }), "{name}: {error:?}");
    }
}

#[tokio::test]
async fn a_private_registry_wants_the_right_password() {
    let registry = TestRegistry::start_private().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "image:v1");
    let name = format!("{}/image:v1", registry.host);

    let pull = Pull::new();
    let right = pull.pull(&name, someone(PASSWORD)).await.unwrap();
    assert_eq!(right.manifest.digest, digest);
    for wrong in [Auth::Anonymous, someone("wrong"), Auth::As(Credentials::Token("t".into()))] {
        let error = Pull::new().pull(&name, wrong).await.unwrap_err();
        assert!(matches!(error, RegistryError::Unauthorised { .. }), "{error:?}");
        let text = format!("{error} {error:?}");
        assert!(!text.contains("wrong") && !text.contains(PASSWORD), "{text}");
    }
}

#[tokio::test]
async fn corrupted_content_is_refused_and_not_kept() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "image:v1");
    let name = format!("{}/image:v1", registry.host);
    let layer = anonymous(&name).await.unwrap().manifest.layers[0].digest;
    let path = registry.blob_path(layer);
    let good = fs::read(&path).unwrap();

    let mut flipped = good.clone();
    flipped[1000] ^= 1;
    fs::write(&path, flipped).unwrap();
    let error = anonymous(&name).await.unwrap_err();
    assert!(
        matches!(
            error,
            RegistryError::Blob(BlobError::Mismatch { expected, .. }) if expected == layer
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_corrupted_manifest_is_refused() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "image:v1");
    let path = registry.blob_path(digest);
    let changed = fs::read_to_string(&path).unwrap() + " ";
    fs::write(&path, changed).unwrap();

    let error = anonymous(&format!("{}/image@{digest}", registry.host)).await.unwrap_err();

    // The registry notices itself, or we do.
    assert!(
        matches!(
            error,
            RegistryError::Blob(BlobError::Mismatch { .. })
                | RegistryError::NotFound { .. }
                | RegistryError::Unexpected { .. }
        ),
        "{error:?}"
    );
}

/// An image of one layer served by a scripted server: its manifest, and what to do for the layer.
struct Script {
    layout: Layout,
    manifest: Digest,
    layer: Digest,
}

impl Script {
    fn new() -> Self {
        let mut layout = Layout::new();
        let manifest =
            layout.image("linux/amd64", vec![TarBuilder::new().file("a", noise(200_000))]);
        let is_layer = |content: &&Vec<u8>| content.starts_with(&[0x1f, 0x8b]);
        let layer = Digest::of(layout.blobs.values().find(is_layer).unwrap());
        Self { layout, manifest, layer }
    }

    /// What an honest registry answers.
    fn answer(&self, path: &str) -> Response {
        if path == "/v2/" {
            return StatusCode::OK.into_response();
        }
        let last = path.rsplit('/').next().unwrap();
        let digest = if last == "v1" { self.manifest } else { last.parse().unwrap() };
        match self.layout.blobs.get(&digest) {
            Some(content) => content.clone().into_response(),
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }

    fn is_layer(&self, request: &Request) -> bool {
        request.uri().path().ends_with(&self.layer.to_string())
    }
}

#[tokio::test]
async fn truncated_content_is_told_as_such() {
    let script = Script::new();
    let server = Scripted::start(move |request| {
        if script.is_layer(request) {
            return vec![0; 1000].into_response();
        }
        script.answer(request.uri().path())
    });
    let server = server.await;

    let error = anonymous(&format!("{}/image:v1", server.host)).await.unwrap_err();

    assert!(
        matches!(error, RegistryError::Blob(BlobError::Truncated { written_bytes: 1000, .. })),
        "{error:?}"
    );
}

#[tokio::test]
async fn endless_content_is_cut_off() {
    let script = Script::new();
    let server = Scripted::start(move |request| {
        if script.is_layer(request) {
            let zeros = stream::repeat_with(|| Ok::<_, io::Error>(vec![0_u8; 1 << 16]));
            return Response::new(Body::from_stream(zeros));
        }
        script.answer(request.uri().path())
    });
    let server = server.await;

    let error = anonymous(&format!("{}/image:v1", server.host)).await.unwrap_err();

    assert!(matches!(error, RegistryError::Blob(BlobError::TooLong { .. })), "{error:?}");
}

#[tokio::test]
async fn endless_documents_are_cut_off() {
    let server = Scripted::start(|_| {
        let spaces = stream::repeat_with(|| Ok::<_, io::Error>(vec![b' '; 1 << 16]));
        Response::new(Body::from_stream(spaces))
    });
    let server = server.await;

    let error = anonymous(&format!("{}/image:v1", server.host)).await.unwrap_err();

    assert!(matches!(error, RegistryError::TooLarge { limit_bytes: MANIFEST_BYTES_MAX }));
}

/// Twice the connection breaks in the middle, twice the server fails, then it works.
#[tokio::test]
async fn what_may_pass_is_tried_again() {
    let script = Script::new();
    let tries = AtomicUsize::new(0);
    let server = Scripted::start(move |request| {
        if !script.is_layer(request) {
            return script.answer(request.uri().path());
        }
        match tries.fetch_add(1, Ordering::Relaxed) {
            0 | 1 => {
                let half = stream::iter([
                    Ok(vec![0_u8; 10_000]),
                    Err(io::Error::other("the cable was pulled")),
                ]);
                Response::new(Body::from_stream(half))
            }
            2 => StatusCode::BAD_GATEWAY.into_response(),
            3 => (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")]).into_response(),
            _ => script.answer(request.uri().path()),
        }
    });
    let server = server.await;
    let told = Mutex::new(0);
    let pull = Pull::new();
    let name = format!("{}/image:v1", server.host).parse().unwrap();
    let client = Registry::new(&name, Auth::Anonymous, &[]).unwrap();
    let resolved = client.resolve().await.unwrap();

    let on_progress = |bytes| *told.lock().unwrap() = bytes;
    client.download(&resolved.manifest, &pull.blobs, on_progress).await.unwrap();

    assert!(pull.blobs.has(&resolved.manifest.layers[0]));
    pull.assert_clean();
}

#[tokio::test]
async fn a_rate_limit_is_told_as_such() {
    let server = Scripted::start(|_| {
        (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "0")]).into_response()
    });
    let server = server.await;

    let error = anonymous(&format!("{}/image:v1", server.host)).await.unwrap_err();

    assert!(matches!(error, RegistryError::RateLimited { .. }), "{error:?}");
}

#[tokio::test]
async fn no_registry_is_unreachable() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap();
    drop(listener);

    let refused = anonymous(&format!("{host}/image:v1")).await.unwrap_err();
    let unknown = anonymous("no-such-host.invalid/image:v1").await.unwrap_err();

    assert!(matches!(refused, RegistryError::Unreachable { .. }), "{refused:?}");
    assert!(matches!(unknown, RegistryError::Unreachable { .. }), "{unknown:?}");
}

/// A registry that dies in the middle of a layer, and its successor does not come.
#[tokio::test]
async fn a_registry_that_dies_leaves_no_half_blobs() {
    let mut registry = Some(TestRegistry::start().await);
    let host = registry.as_ref().unwrap().host.clone();
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.as_ref().unwrap().push(&layout, digest, "image:v1");
    let pull = Pull::new();
    let name = format!("{host}/image:v1").parse().unwrap();
    let client = Registry::new(&name, Auth::Anonymous, &[]).unwrap();
    let resolved = client.resolve().await.unwrap();

    drop(registry.take());
    let error = client.download(&resolved.manifest, &pull.blobs, |_| {}).await.unwrap_err();

    assert!(
        matches!(error, RegistryError::Unreachable { .. } | RegistryError::Interrupted { .. }),
        "{error:?}"
    );
    pull.assert_clean();
}

/// Tokens are fetched with the password, used, and fetched again when they expire.
#[tokio::test]
async fn a_token_is_fetched_and_used() {
    let script = Script::new();
    let host = Arc::new(Mutex::new(String::new()));
    let shown = Arc::clone(&host);
    let uses = AtomicUsize::new(0);
    let server = Scripted::start(move |request| {
        let header = request.headers().get("authorization").map(|value| value.to_str().unwrap());
        if request.uri().path() == "/token" {
            let query = request.uri().query().unwrap();
            assert!(query.contains("scope=repository%3Asome%2Fimage%3Apull"), "{query}");
            assert!(query.contains("service=here"), "{query}");
            return match header {
                Some("Basic c29tZW9uZTpzZWNyZXQ=") => r#"{"token":"good"}"#.into_response(),
                None => r#"{"access_token":"nobody"}"#.into_response(),
                _ => StatusCode::UNAUTHORIZED.into_response(),
            };
        }
        // The first token expires after one use.
        let expired = uses.fetch_add(1, Ordering::Relaxed) == 2;
        if header == Some("Bearer good") && !expired {
            return script.answer(request.uri().path());
        }
        let realm = format!("http://{}/token", shown.lock().unwrap());
        let challenge = format!("Bearer realm=\"{realm}\",service=\"here\",scope=\"other\"");
        (StatusCode::UNAUTHORIZED, [("www-authenticate", challenge)]).into_response()
    });
    let server = server.await;
    host.lock().unwrap().clone_from(&server.host);
    let name = format!("{}/some/image:v1", server.host);

    Pull::new().pull(&name, someone(PASSWORD)).await.unwrap();

    for wrong in [Auth::Anonymous, someone("wrong"), Auth::As(Credentials::Token("bad".into()))] {
        let error = Pull::new().pull(&name, wrong).await.unwrap_err();
        assert!(matches!(error, RegistryError::Unauthorised { .. }), "{error:?}");
    }
    let given = Auth::As(Credentials::Token("good".into()));
    Pull::new().pull(&name, given).await.unwrap();
}

#[tokio::test]
async fn a_full_disk_is_told_before_anything_is_written() {
    let registry = TestRegistry::start().await;
    let mut layout = Layout::new();
    let digest = image(&mut layout);
    registry.push(&layout, digest, "image:v1");
    let dir = tempfile::tempdir().unwrap();
    let blobs = Blobs::open(dir.path(), Room::new(dir.path(), 1 << 60).unwrap()).unwrap();
    let pull = Pull { dir, blobs };

    let name = format!("{}/image:v1", registry.host);
    let error = pull.pull(&name, Auth::Anonymous).await.unwrap_err();

    assert!(
        matches!(error, RegistryError::Blob(BlobError::Room(RoomError::Full { .. }))),
        "{error:?}"
    );
    pull.assert_clean();
}
