//! The official Python SDK against the server: each file of `tests/sdk` is a case.
//!
//! The scripts say what they checked and fail by ending with a status other than 0.

use std::env;
use std::process::{Command, Stdio};

use tokio::task;

use crate::cases;
use ovum_test_host::{BUSYBOX, TestHost, root};

cases![exec_and_cp_are_driven_by_the_sdk];

async fn exec_and_cp_are_driven_by_the_sdk(host: &TestHost) {
    host.server.start_idle("sdk", BUSYBOX).await;
    run(host, "exec_and_cp.py", "sdk").await;
    host.server.delete("sdk").await;
}

/// Runs a script of `tests/sdk` against the shared server.
async fn run(host: &TestHost, script: &str, instance: &str) {
    let python = env::var_os("OVUM_SDK_PYTHON")
        .expect("OVUM_SDK_PYTHON names the interpreter that dev/sdk printed");
    let mut command = Command::new(python);
    command
        .arg(root().join("tests/sdk").join(script))
        .arg(instance)
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
