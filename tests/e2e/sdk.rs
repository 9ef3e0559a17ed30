//! The official Python SDK against the server: each file of `tests/sdk` is a case, but for
//! `suite.py`, on which they stand.
//!
//! Each of their cases runs with the synchronous and the asynchronous client. The scripts say what
//! they checked and fail by ending with a status other than 0.

use std::env;
use std::process::{Command, Stdio};

use reqwest::{Method, StatusCode};
use serde_json::json;
use tokio::task;

use crate::cases;
use ovum_test_host::{BUSYBOX, SECRET, TestHost, ovum, root};

cases![
    health_and_rights_are_as_the_sdk_wants_them,
    images_are_driven_by_the_sdk,
    instances_are_driven_by_the_sdk,
    exec_and_cp_are_driven_by_the_sdk,
    volumes_and_resources_are_driven_by_the_sdk,
];

async fn health_and_rights_are_as_the_sdk_wants_them(host: &TestHost) {
    let minted = Command::new(ovum())
        .args(["token", "--scopes=instance:read", "--data-dir"])
        .arg(&host.server.data_dir)
        .env("OVUM_JWT_SECRET", SECRET)
        .output()
        .unwrap();
    let token = String::from_utf8(minted.stdout).unwrap();

    run(host, "server.py", &[token.trim()]).await;
}

async fn images_are_driven_by_the_sdk(host: &TestHost) {
    run(host, "images.py", &[BUSYBOX]).await;
}

async fn instances_are_driven_by_the_sdk(host: &TestHost) {
    run(host, "instances.py", &[BUSYBOX]).await;
}

async fn exec_and_cp_are_driven_by_the_sdk(host: &TestHost) {
    host.server.start_idle("sdk", BUSYBOX).await;
    let ended = json!({ "name": "ended", "image": BUSYBOX, "size": "128MB", "cmd": ["true"] });
    host.server.create(ended).await;
    host.server.wait("ended", "Stopped").await;

    run(host, "exec_and_cp.py", &["sdk", "ended"]).await;

    host.server.delete("sdk").await;
    host.server.delete("ended").await;
}

async fn volumes_and_resources_are_driven_by_the_sdk(host: &TestHost) {
    host.server.start_idle("sdk", BUSYBOX).await;
    let (status, answer) = host.server.call(Method::POST, "/instances/sdk/stop", None).await;
    assert_eq!(status, StatusCode::OK, "{answer}");

    run(host, "volumes_and_resources.py", &["sdk"]).await;

    host.server.delete("sdk").await;
}

/// Runs a script of `tests/sdk` against the shared server.
async fn run(host: &TestHost, script: &str, arguments: &[&str]) {
    let python = env::var_os("OVUM_SDK_PYTHON")
        .expect("OVUM_SDK_PYTHON names the interpreter that dev/sdk printed");
    let mut command = Command::new(python);
    command
        .arg(root().join("tests/sdk").join(script))
        .args(arguments)
        .env("HYPEMAN_BASE_URL", &host.server.base_url)
        .env("HYPEMAN_API_KEY", host.server.token())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::null());
    let output = task::spawn_blocking(move || command.output());
    let output = output.await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    println!("{}", text(&output.stdout));
    assert!(output.status.success(), "{script}: {}", text(&output.stderr));
}
