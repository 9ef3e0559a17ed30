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
    assert!(!error.is_empty());
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
