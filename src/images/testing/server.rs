//! Registries to pull from: Debian's `docker-registry`, a real one; and a scripted server for what
//! a real one does only on bad days.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::Request;
use axum::response::Response;
use tokio::net::{TcpListener as AsyncListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::images::digest::Digest;
use crate::images::testing::layout::Layout;
use crate::images::testing::run;

/// How long a registry may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) const USER: &str = "someone";
pub(crate) const PASSWORD: &str = "secret";

/// A running `docker-registry`, with storage of its own. Killed on drop.
#[derive(Debug)]
pub(crate) struct TestRegistry {
    dir: tempfile::TempDir,
    pub(crate) host: String,
    child: Child,
    private: bool,
}

impl TestRegistry {
    /// Open for everybody.
    pub(crate) async fn start() -> Self {
        Self::launch(false).await
    }

    /// Open for [`USER`] with [`PASSWORD`].
    pub(crate) async fn start_private() -> Self {
        Self::launch(true).await
    }

    async fn launch(private: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let host = format!("127.0.0.1:{port}");
        let storage = dir.path().join("storage");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nhttp: {{addr: {host}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\n",
            storage.display()
        );
        if private {
            let htpasswd = run("apache2-utils", "htpasswd", &["-Bbn", USER, PASSWORD]).stdout;
            let path = dir.path().join("htpasswd");
            fs::write(&path, htpasswd).unwrap();
            let path = path.display();
            config += &format!("auth: {{htpasswd: {{realm: test, path: {path}}}}}\n");
        }
        let path = dir.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let child = spawn("docker-registry", &["serve", path.to_str().unwrap()]);
        let registry = Self { dir, host, child, private };
        let deadline = Instant::now() + START_TIMEOUT;
        while TcpStream::connect(&registry.host).await.is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not listen");
            sleep(Duration::from_millis(20)).await;
        }
        registry
    }

    /// Pushes an image or index of `layout` as `name`, with skopeo.
    pub(crate) fn push(&self, layout: &Layout, digest: Digest, name: &str) {
        let dir = tempfile::tempdir().unwrap();
        let mut only = Layout::new();
        only.blobs.clone_from(&layout.blobs);
        only.name(digest, "it");
        let from = format!("oci:{}:it", only.write(dir.path()).display());
        let to = format!("docker://{}/{name}", self.host);
        let user = format!("{USER}:{PASSWORD}");
        let mut args = vec!["--insecure-policy", "copy", "-q", "--all", "--preserve-digests"];
        args.push("--dest-tls-verify=false");
        if self.private {
            args.extend(["--dest-creds", &user]);
        }
        args.extend([from.as_str(), &to]);
        let output = run("skopeo", "skopeo", &args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// The file in the registry's storage that holds a blob.
    pub(crate) fn blob_path(&self, digest: Digest) -> PathBuf {
        let hex = digest.hex();
        let blobs = Path::new("storage/docker/registry/v2/blobs/sha256");
        self.dir.path().join(blobs).join(&hex[..2]).join(hex).join("data")
    }
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

#[expect(clippy::disallowed_methods, reason = "a peer of a test, not a tool of the product")]
fn spawn(package: &str, args: &[&str]) -> Child {
    let mut command = Command::new(package);
    command.args(args).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("this test needs {package}: {error}"))
}

/// A server that answers as told. Stopped on drop.
#[derive(Debug)]
pub(crate) struct Scripted {
    pub(crate) host: String,
    task: JoinHandle<()>,
}

impl Scripted {
    pub(crate) async fn start(
        answer: impl Fn(&Request) -> Response + Send + Sync + 'static,
    ) -> Self {
        let listener = AsyncListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let answer = Arc::new(answer);
        let app = Router::new().fallback(move |request: Request| {
            let answer = Arc::clone(&answer);
            async move { answer(&request) }
        });
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { host, task }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.task.abort();
    }
}
