//! Bad input: each gives one clear error that names what to do, and leaves nothing behind.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use futures_util::future::join_all;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::cases;
use ovum_test_host::{BUSYBOX, Server, TestHost, ovum};

cases![
    sizes_out_of_range_are_refused_by_name,
    wrong_types_are_refused_by_name,
    what_is_not_there_yet_is_refused_by_name,
    a_name_can_be_taken_only_once,
    names_that_are_no_host_names_are_refused,
    a_body_that_never_ends_is_refused,
    a_host_without_kvm_says_so,
    a_disk_without_room_says_so,
    a_full_disk_keeps_nobody_from_ending_what_runs,
    a_second_server_on_the_same_folder_is_refused,
    an_image_that_nobody_has_is_not_found,
    an_overlay_without_room_says_so,
    a_guest_that_panics_as_it_boots_says_so,
];

/// What `POST /instances` says to the usual body with these fields on top.
async fn refusal(host: &TestHost, fields: Value) -> (StatusCode, Value) {
    let mut body = json!({ "name": "refused", "image": BUSYBOX, "size": "128MB" });
    let fields = fields.as_object().expect("fields are an object").clone();
    body.as_object_mut().expect("a body is an object").extend(fields);
    host.server.call(Method::POST, "/instances", Some(body)).await
}

async fn sizes_out_of_range_are_refused_by_name(host: &TestHost) {
    for (field, value, code) in [
        ("size", json!("0"), "invalid_size"),
        ("size", json!("10TB"), "invalid_size"),
        ("size", json!("1.5GB"), "invalid_size"),
        ("size", json!("99999999999999999999GB"), "invalid_size"),
        ("overlay_size", json!("0"), "invalid_overlay_size"),
        ("overlay_size", json!("10TB"), "invalid_overlay_size"),
        ("vcpus", json!(0), "invalid_request"),
        ("vcpus", json!(1000), "invalid_request"),
    ] {
        let (status, body) = refusal(host, json!({ (field): value })).await;

        assert_eq!(status, StatusCode::BAD_REQUEST, "{field} {value}: {body}");
        let message = body["message"].as_str().unwrap_or_default();
        assert!(message.contains(field), "{field} is not named: {body}");
        assert!(body["code"] == code || body["code"] == "Bad Request", "{field} {value}: {body}");
    }
}

async fn wrong_types_are_refused_by_name(host: &TestHost) {
    for (field, value) in
        [("size", json!(5)), ("vcpus", json!("two")), ("env", json!([])), ("cmd", json!("sh"))]
    {
        let (status, body) = refusal(host, json!({ (field): value })).await;

        assert_eq!(status, StatusCode::BAD_REQUEST, "{field}: {body}");
        assert_eq!(body["code"], "Bad Request", "{body}");
        assert!(body["message"].as_str().unwrap_or_default().contains(field), "{body}");
    }
}

async fn what_is_not_there_yet_is_refused_by_name(host: &TestHost) {
    for (field, value) in [
        ("network", json!({ "egress": { "enabled": true } })),
        ("auto_standby", json!({ "enabled": true, "idle_timeout": "5m" })),
    ] {
        let (status, body) = refusal(host, json!({ (field): value })).await;

        assert_eq!(status, StatusCode::NOT_IMPLEMENTED, "{field}: {body}");
        assert_eq!(body["code"], "not_supported", "{body}");
        assert!(body["message"].as_str().unwrap_or_default().contains(field), "{body}");
    }
}

async fn a_name_can_be_taken_only_once(host: &TestHost) {
    let body = json!({ "name": "once", "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "99"] });
    let attempts = (0..4)
        .map(|_| host.server.call(Method::POST, "/instances", Some(body.clone())))
        .collect::<Vec<_>>();

    let answers = join_all(attempts).await;

    let created = answers.iter().filter(|(status, _)| *status == StatusCode::CREATED).count();
    let taken = answers.iter().filter(|(_, body)| body["code"] == "name_conflict").count();
    assert_eq!((created, taken), (1, 3), "{answers:?}");
    host.server.delete("once").await;
}

async fn names_that_are_no_host_names_are_refused(host: &TestHost) {
    let long = "a".repeat(64);
    for name in ["", "Upper", "-dash", "dash-", "under_score", "../up", "a/b", "ü", long.as_str()]
    {
        let (status, body) = refusal(host, json!({ "name": name })).await;

        assert_eq!(status, StatusCode::BAD_REQUEST, "{name:?}: {body}");
        assert!(body["message"].as_str().unwrap_or_default().contains("name"), "{body}");
    }
}

async fn a_body_that_never_ends_is_refused(host: &TestHost) {
    let (status, body) = refusal(host, json!({ "cmd": ["x".repeat(64 << 20)] })).await;

    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE, "{body}");
}

async fn a_host_without_kvm_says_so(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/no-kvm");
    // In a mount namespace of its own the server sees a /dev/kvm that is none.
    let mut command = Command::new("unshare");
    let hide = r#"mount --bind /dev/null /dev/kvm && exec "$0" "$@""#;
    command.args(["--mount", "sh", "-c", hide]).arg(ovum());
    let mut server = Server::start_as(data_dir, command).await;
    server.pull(BUSYBOX).await;

    let body = json!({ "name": "no-kvm", "image": BUSYBOX, "size": "128MB" });
    let (status, answer) = server.call(Method::POST, "/instances", Some(body)).await;

    assert!(status.is_server_error(), "{answer}");
    assert!(answer["message"].as_str().unwrap_or_default().contains("/dev/kvm"), "{answer}");
    assert_eq!(server.get("/instances").await, json!([]));
    server.kill();
}

async fn a_disk_without_room_says_so(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/no-room");
    fs::create_dir_all(data_dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=6m", "none"])
        .arg(data_dir)
        .status()
        .unwrap();
    assert!(mounted.success());
    let mut server = Server::start_at(data_dir).await;

    let body = json!({ "name": ovum_test_host::DEBIAN });
    let (status, answer) = server.call(Method::POST, "/images", Some(body)).await;
    let (failed, error) = if status == StatusCode::ACCEPTED {
        let image = server.pull_to_the_end(ovum_test_host::DEBIAN).await;
        (image["status"] == "failed", image["error"].to_string())
    } else {
        (!status.is_success(), answer["message"].to_string())
    };

    assert!(failed, "{status}: {error}");
    assert!(["space", "room", "free"].iter().any(|word| error.contains(word)), "{error}");
    assert_eq!(server.get("/health").await, json!({ "status": "ok" }));
    server.kill();
    assert!(Command::new("umount").arg(data_dir).status().unwrap().success());
}

/// What runs can be ended, and what is deleted makes room, however full the disk.
async fn a_full_disk_keeps_nobody_from_ending_what_runs(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/full");
    fs::create_dir_all(data_dir).unwrap();
    let tmpfs = ["-t", "tmpfs", "-o", "size=64m", "none"];
    let mounted = Command::new("mount").args(tmpfs).arg(data_dir).status().unwrap();
    assert!(mounted.success());
    let command = {
        let mut command = Command::new(ovum());
        command.env("OVUM_MIN_FREE", "1MB");
        command
    };
    let mut server = Server::start_as(data_dir, command).await;
    server.pull(BUSYBOX).await;
    for name in ["stopped", "deleted"] {
        server.start_idle(name, BUSYBOX).await;
    }
    let filler = data_dir.join("filler");
    let _until_full = Command::new("dd")
        .args(["if=/dev/zero", "bs=4k", "status=none"])
        .arg(format!("of={}", filler.display()))
        .stderr(Stdio::null())
        .status()
        .unwrap();

    let body = json!({ "name": "more", "image": BUSYBOX, "size": "128MB", "cmd": ["true"] });
    let (created, why) = server.call(Method::POST, "/instances", Some(body.clone())).await;
    let (stopped, answer) = server.call(Method::POST, "/instances/stopped/stop", None).await;

    assert_eq!((created, &why["code"]), (StatusCode::CONFLICT, &json!("insufficient_resources")));
    assert!(why["message"].as_str().unwrap_or_default().contains("space"), "{why}");
    assert_eq!((stopped, &answer["state"]), (StatusCode::OK, &json!("Stopped")), "{answer}");
    assert_eq!(server.get("/instances").await.as_array().map(Vec::len), Some(2));
    server.delete("deleted").await;
    server.delete("stopped").await;
    fs::remove_file(&filler).unwrap();
    let (_, instance) = server.run_body(body).await;
    assert_eq!(instance["exit_code"], 0, "{instance}");
    server.kill();
    assert!(Command::new("umount").arg(data_dir).status().unwrap().success());
}

async fn a_second_server_on_the_same_folder_is_refused(host: &TestHost) {
    let second = Command::new(ovum())
        .args(["serve", "--listen", "127.0.0.1:0", "--data-dir"])
        .arg(&host.server.data_dir)
        .output()
        .unwrap();

    assert!(!second.status.success());
    let message = String::from_utf8_lossy(&second.stderr);
    assert!(message.contains("in use") || message.contains("another"), "{message}");
}

async fn an_image_that_nobody_has_is_not_found(host: &TestHost) {
    let name = "127.0.0.1:5000/nothing:here";
    let (status, body) = refusal(host, json!({ "image": name })).await;

    assert_eq!((status, &body["code"]), (StatusCode::NOT_FOUND, &json!("not_found")), "{body}");
    let path = format!("/images/{}", name.replace('/', "%2F"));
    host.server.call(Method::DELETE, &path, None).await;
}

async fn an_overlay_without_room_says_so(_: &TestHost) {
    let data_dir = Path::new("/var/lib/ovum/no-room-for-overlays");
    fs::create_dir_all(data_dir).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64m", "none"])
        .arg(data_dir)
        .status()
        .unwrap();
    assert!(mounted.success());
    let mut command = Command::new(ovum());
    command.env("OVUM_MIN_FREE", "0");
    let mut server = Server::start_as(data_dir, command).await;
    server.pull(BUSYBOX).await;
    fill(&data_dir.join("filler"));

    let body = json!({ "name": "no-room", "image": BUSYBOX, "size": "128MB" });
    let (status, answer) = server.call(Method::POST, "/instances", Some(body)).await;

    assert_eq!(status, StatusCode::CONFLICT, "{answer}");
    assert_eq!(answer["code"], "insufficient_resources", "{answer}");
    assert_eq!(server.get("/instances").await, json!([]));
    let left = fs::read_dir(data_dir.join("instances")).unwrap().count();
    assert_eq!(left, 0, "a folder is left");
    server.kill();
    assert!(Command::new("umount").arg(data_dir).status().unwrap().success());
}

/// Writes until the disk takes no more.
fn fill(path: &Path) {
    let mut file = fs::File::create(path).unwrap();
    while file.write_all(&[0; 4096]).is_ok() {}
}

/// A PID 1 that ends is a panic: here it is a static program that is no agent.
async fn a_guest_that_panics_as_it_boots_says_so(_: &TestHost) {
    let mut command = Command::new(ovum());
    command.env("OVUM_AGENT", "/sbin/ldconfig");
    let mut server = Server::start_as(Path::new("/var/lib/ovum/panics"), command).await;
    server.pull(BUSYBOX).await;

    let (log, instance) = server.run("panics-early", BUSYBOX, &["true"]).await;

    assert_eq!(instance.get("exit_code"), None, "{instance}");
    let error = instance["state_error"].as_str().unwrap_or_default();
    assert!(error.contains("panic") && error.contains("log"), "{instance}");
    assert!(log.contains("Kernel panic"), "{log}");
    server.kill();
}
