//! Images arrive whole or not at all.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::cases;
use ovum_test_host::{
    BUSYBOX, Server, TestHost, await_port, free_address, registry_storage, start_registry,
};

cases![
    a_second_pull_of_a_ready_image_is_immediate,
    a_registry_that_does_not_answer_is_named,
    a_layer_with_wrong_bytes_is_refused,
    a_truncated_layer_is_refused,
    a_broken_config_is_refused,
    a_registry_that_dies_in_the_middle_fails_the_pull,
    an_image_for_another_architecture_is_refused_by_name,
];

async fn a_second_pull_of_a_ready_image_is_immediate(host: &TestHost) {
    let first = host.server.pull(BUSYBOX).await;
    let second = host.server.pull(BUSYBOX).await;

    assert_eq!(first["digest"], second["digest"]);
    assert_eq!(first["cmd"], json!(["sh"]));
}

async fn a_registry_that_does_not_answer_is_named(host: &TestHost) {
    let address = free_address();
    let name = format!("{address}/busybox:latest");

    let image = pull_without_assurance(&host.server, &name).await;

    assert!(image.contains(&address), "{image}");
}

async fn a_layer_with_wrong_bytes_is_refused(_: &TestHost) {
    let error = pull_spoilt(|storage| {
        let layer = largest_blob(storage, "busybox");
        let mut bytes = fs::read(&layer).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&layer, bytes).unwrap();
    });

    let error = error.await;
    assert!(error.contains("digest"), "{error}");
}

async fn a_truncated_layer_is_refused(_: &TestHost) {
    let error = pull_spoilt(|storage| {
        let layer = largest_blob(storage, "busybox");
        let bytes = fs::read(&layer).unwrap();
        fs::write(&layer, &bytes[..bytes.len() / 2]).unwrap();
    });

    let error = error.await.to_lowercase();
    let told = ["digest", "truncated", "short", "size", "ended"];
    assert!(told.iter().any(|word| error.contains(word)), "{error}");
}

async fn a_broken_config_is_refused(_: &TestHost) {
    let error = pull_spoilt(|storage| {
        let config = smallest_blob(storage, "busybox");
        let bytes = fs::read(&config).unwrap();
        fs::write(&config, vec![b'{'; bytes.len()]).unwrap();
    });

    let error = error.await;
    assert!(error.contains("digest") && error.contains("sha256:"), "{error}");
}

async fn a_registry_that_dies_in_the_middle_fails_the_pull(host: &TestHost) {
    let address = free_address();
    let mut registry = start_registry(&registry_storage(), &address);
    await_port(&address).await;
    let name = format!("{address}/debian:bookworm");
    let body = json!({ "name": name });
    host.server.call(Method::POST, "/images", Some(body)).await;

    registry.kill().unwrap();
    registry.wait().unwrap();
    let error = pull_without_assurance(&host.server, &name).await;

    assert!(error.contains(&address), "{error}");
}

async fn an_image_for_another_architecture_is_refused_by_name(host: &TestHost) {
    let dir = tempfile::tempdir().unwrap();
    let storage = dir.path().join("storage");
    fs::create_dir(&storage).unwrap();
    let address = free_address();
    let mut registry = start_registry(&storage, &address);
    await_port(&address).await;
    let name = format!("{address}/foreign:latest");
    let pushed = Command::new("skopeo")
        .args(["copy", "-q", "--insecure-policy", "--dest-tls-verify=false"])
        .arg(format!("docker-archive:{}", foreign_archive(dir.path()).display()))
        .arg(format!("docker://{name}"))
        .status()
        .unwrap();
    assert!(pushed.success());

    let error = pull_without_assurance(&host.server, &name).await;

    registry.kill().unwrap();
    registry.wait().unwrap();
    assert!(error.contains("linux/amd64") && error.contains("linux/arm64"), "{error}");
}

/// What `docker save` writes for an image of one empty layer, for arm64.
fn foreign_archive(dir: &Path) -> PathBuf {
    let tar = |archive: &Path, names: &[&str]| {
        let mut command = Command::new("tar");
        command.arg("-C").arg(dir).arg("-cf").arg(archive).args(names);
        assert!(command.status().unwrap().success());
    };
    let layer = dir.join("layer.tar");
    fs::create_dir(dir.join("etc")).unwrap();
    tar(&layer, &["etc"]);
    let sum = Command::new("sha256sum").arg(&layer).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let diff_id = format!("sha256:{}", sum.split_whitespace().next().unwrap());
    let config = json!({
        "architecture": "arm64", "os": "linux", "config": { "Cmd": ["sh"] },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["foreign:latest"],
        "Layers": ["layer.tar"] }]);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    let archive = dir.join("foreign.tar");
    tar(&archive, &["manifest.json", "config.json", "layer.tar"]);
    archive
}

/// Pulls busybox from a registry whose storage was spoilt; returns the error.
async fn pull_spoilt(spoil: impl FnOnce(&Path)) -> String {
    let storage = tempfile::tempdir().unwrap();
    let copied = Command::new("cp")
        .args(["-a", "--no-target-directory"])
        .arg(registry_storage())
        .arg(storage.path())
        .status()
        .unwrap();
    assert!(copied.success());
    spoil(storage.path());
    let address = free_address();
    let mut registry = start_registry(storage.path(), &address);
    await_port(&address).await;
    // A server of its own: the shared one has these blobs and would not ask for them.
    let mut server = Server::start("spoilt").await;
    let error = pull_without_assurance(&server, &format!("{address}/busybox:latest")).await;
    server.kill();
    registry.kill().unwrap();
    registry.wait().unwrap();
    error
}

/// Pulls what cannot be had; returns what is said about it and removes the record.
async fn pull_without_assurance(server: &Server, name: &str) -> String {
    let body = json!({ "name": name });
    let (status, answer) = server.call(Method::POST, "/images", Some(body)).await;
    if status != StatusCode::ACCEPTED {
        return message(&answer);
    }
    let image = server.pull_to_the_end(name).await;
    assert_eq!(image["status"], "failed", "{image}");
    let path = format!("/images/{}", name.replace('/', "%2F"));
    server.call(Method::DELETE, &path, None).await;
    message(&image["error"])
}

fn message(answer: &Value) -> String {
    answer["message"].as_str().or(answer.as_str()).unwrap_or_default().to_owned()
}

fn blobs(storage: &Path, repository: &str) -> Vec<PathBuf> {
    let links = format!("docker/registry/v2/repositories/{repository}/_layers/sha256");
    let links = fs::read_dir(storage.join(links)).unwrap().map(Result::unwrap);
    let hex = links.map(|link| link.file_name().into_string().unwrap());
    let mut paths: Vec<PathBuf> = hex
        .map(|hex| {
            storage.join("docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
        })
        .collect();
    paths.sort_by_key(|path| fs::metadata(path).unwrap().len());
    paths
}

fn largest_blob(storage: &Path, repository: &str) -> PathBuf {
    blobs(storage, repository).pop().expect("a repository has blobs")
}

fn smallest_blob(storage: &Path, repository: &str) -> PathBuf {
    blobs(storage, repository).into_iter().next().expect("a repository has blobs")
}
