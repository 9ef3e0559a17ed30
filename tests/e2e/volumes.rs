//! Volumes, seen from inside of guests that come and go.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Stdio};

use futures_util::future::join_all;
use ovum_test_host::{BUSYBOX, Server, TestHost, ovum};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::cases;

cases![
    what_is_written_survives_its_instance_and_readers_share_it,
    an_archive_becomes_a_volume_that_layers_leave_as_it_is,
    volumes_below_each_other_are_all_there,
    an_archive_that_is_hostile_leaves_nothing,
    of_twenty_instances_one_gets_a_volume,
    a_stopped_instance_is_given_a_volume_and_loses_it_again,
    what_a_guest_frees_is_given_back,
];

/// Makes a volume that must be accepted.
pub(crate) async fn make(server: &Server, id: &str) {
    let body = json!({ "name": id, "size_gb": 1, "id": id });
    let (status, answer) = server.call(Method::POST, "/volumes", Some(body)).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
}

/// Removes a volume, and makes sure that nothing of it is left.
pub(crate) async fn remove(server: &Server, id: &str) {
    let path = format!("/volumes/{id}");
    let (status, answer) = server.call(Method::DELETE, &path, None).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
    assert!(!server.data_dir.join("volumes").join(id).exists());
}

/// The volume at `path`, below a layer of 64 MB.
pub(crate) fn layered(volume: &str, path: &str) -> Value {
    json!({ "volume_id": volume, "mount_path": path, "overlay": true, "overlay_size": "64MB" })
}

pub(crate) fn body(name: &str, volumes: &Value, script: &str) -> Value {
    json!({
        "name": name, "image": BUSYBOX, "size": "128MB", "vcpus": 1, "volumes": volumes,
        "overlay_size": "1GB", "cmd": ["sh", "-c", script],
    })
}

/// What `script` says in a guest that has `volumes`.
pub(crate) async fn said(server: &Server, name: &str, volumes: Value, script: &str) -> String {
    let (log, instance) = server.run_body(body(name, &volumes, script)).await;
    assert_eq!(instance["exit_code"], 0, "{log}\n{instance}");
    log
}

async fn what_is_written_survives_its_instance_and_readers_share_it(host: &TestHost) {
    let server = &host.server;
    make(server, "shared").await;
    let at = json!([{ "volume_id": "shared", "mount_path": "/deep/data" }]);
    said(server, "writer", at.clone(), "echo kept > /deep/data/file").await;
    let read_only = json!([{ "volume_id": "shared", "mount_path": "/data", "readonly": true }]);
    let script = "cat /data/file; touch /data/x 2>/dev/null || echo refused; sleep 100000";

    for name in ["one", "two"] {
        server.create(body(name, &read_only, script)).await;
    }
    for name in ["one", "two"] {
        let seen = server.follow_until(name, "refused").await;
        assert!(seen.contains("kept"), "{seen}");
    }
    let (status, refusal) =
        server.call(Method::POST, "/instances", Some(body("three", &at, "true"))).await;
    let (in_use, _) = server.call(Method::DELETE, "/volumes/shared", None).await;
    let volume = server.get("/volumes/shared").await;

    assert_eq!((status, &refusal["code"]), (StatusCode::CONFLICT, &json!("conflict")), "{refusal}");
    assert_eq!(in_use, StatusCode::CONFLICT);
    assert_eq!(volume["attachments"].as_array().map(Vec::len), Some(2), "{volume}");
    server.delete("one").await;
    server.delete("two").await;
    remove(server, "shared").await;
}

async fn volumes_below_each_other_are_all_there(host: &TestHost) {
    let server = &host.server;
    for id in ["outer", "inner", "third"] {
        make(server, id).await;
    }
    let volumes = json!([
        { "volume_id": "inner", "mount_path": "/data/inner" },
        { "volume_id": "third", "mount_path": "/data/inner/third" },
        { "volume_id": "outer", "mount_path": "/data" },
    ]);

    let seen = said(server, "nested", volumes, "grep -c ' /data' /proc/mounts; ls /data").await;

    assert!(seen.starts_with("3\n") && seen.contains("inner"), "{seen}");
    for id in ["outer", "inner", "third"] {
        remove(server, id).await;
    }
}

/// An archive of what `script` makes in an empty folder.
fn archive(script: &str) -> Vec<u8> {
    let packed = Command::new("sh")
        .args(["-euc", "d=$(mktemp -d); cd $d; eval \"$1\"; tar czP *; rm -rf $d", "sh", script])
        .output()
        .expect("sh and tar run");
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    packed.stdout
}

/// An archive of one file of that name, whatever the name is.
fn archive_of(name: &str) -> Vec<u8> {
    let script = "touch x; tar czP --transform \"s,^x$,$1,\" x";
    let packed = Command::new("sh")
        .args(["-euc", &format!("cd $(mktemp -d); {script}"), "sh", name])
        .output()
        .expect("sh and tar run");
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    packed.stdout
}

/// What `ovum volume create` says to an archive on its standard input.
fn upload(server: &Server, id: &str, archive: &[u8]) -> (bool, String) {
    let mut command = Command::new(ovum());
    command
        .args(["volume", "create", id, "--id", id, "--size", "1GB", "--from-archive", "-"])
        .args(["--base-url", &server.base_url, "--token", server.token()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("ovum runs");
    // A server that has refused reads no further.
    let _ = child.stdin.take().expect("stdin is a pipe").write_all(archive);
    let output = child.wait_with_output().expect("ovum ends");
    let said = String::from_utf8_lossy(&output.stderr);
    (output.status.success(), format!("{}: {said}", output.status))
}

async fn an_archive_becomes_a_volume_that_layers_leave_as_it_is(host: &TestHost) {
    let server = &host.server;
    let script = "mkdir sub; echo base > sub/file; chmod 640 sub/file; ln -s sub/file link; \
        chown 1000:1001 sub/file";
    let packed = archive(script);
    let above = json!([layered("full", "/data")]);
    let script = "cd /data; cat link; stat -c '%a %u %g' sub/file; echo layer > link; cat link; \
        df -m /data | tail -n 1 | awk '{ print ($2 < 100) }'";

    let (made, error) = upload(server, "full", &packed);
    let seen = said(server, "layer", above, script).await;
    let disk = server.data_dir.join("volumes/full/data.ext4");
    let below = Command::new("debugfs").args(["-R", "cat /sub/file"]).arg(disk).output().unwrap();

    assert!(made, "{error}");
    assert_eq!(seen, "base\n640 1000 1001\nlayer\n1\n", "the layer has its size");
    assert_eq!(String::from_utf8_lossy(&below.stdout), "base\n");
    remove(server, "full").await;
}

async fn an_archive_that_is_hostile_leaves_nothing(host: &TestHost) {
    let server = &host.server;
    let cut = archive("echo whole > file; seq 100000 > numbers");
    let hostile = [
        ("climbs", archive_of("../x")),
        ("rooted", archive_of("/x")),
        ("device", archive("mknod sda b 8 0")),
        ("leads-out", archive("ln -s ../../../etc/passwd link")),
        ("absolute", archive("ln -s /etc/passwd link")),
        ("truncated", cut[..cut.len() / 2].to_vec()),
        ("noise", vec![b'x'; 10_000]),
    ];

    for (id, packed) in &hostile {
        let (made, error) = upload(server, id, packed);
        assert!(!made, "{id} was accepted");
        assert!(error.contains("ovum:"), "{id}: {error}");
    }

    assert_eq!(server.get("/volumes").await, json!([]));
    let left = fs::read_dir(server.data_dir.join("volumes")).unwrap().count();
    assert_eq!(left, 0, "files are left");
}

async fn of_twenty_instances_one_gets_a_volume(host: &TestHost) {
    let server = &host.server;
    make(server, "wanted").await;
    let at = json!([{ "volume_id": "wanted", "mount_path": "/data" }]);
    let creating = (0..20).map(|number| {
        let body = body(&format!("racer-{number}"), &at, "sleep 100000");
        server.call(Method::POST, "/instances", Some(body))
    });

    let answers = join_all(creating).await;

    let created: Vec<_> = answers.iter().filter(|(status, _)| status.is_success()).collect();
    assert_eq!(created.len(), 1, "{answers:?}");
    let refused = answers.iter().filter(|(_, body)| body["code"] == "conflict").count();
    assert_eq!(refused, 19, "{answers:?}");
    server.delete(created[0].1["id"].as_str().unwrap()).await;
    remove(server, "wanted").await;
}

async fn a_stopped_instance_is_given_a_volume_and_loses_it_again(host: &TestHost) {
    let server = &host.server;
    make(server, "later").await;
    let script = "grep ' /data ' /proc/mounts | cut -d' ' -f2,3; echo looked; sleep 100000";
    server.create(body("changes", &json!([]), script)).await;
    server.wait("changes", "Running").await;
    let path = "/instances/changes/volumes/later";
    let mount = || Some(json!({ "mount_path": "/data" }));

    server.call(Method::POST, "/instances/changes/stop", None).await;
    let (given, instance) = server.call(Method::POST, path, mount()).await;
    let (twice, _) = server.call(Method::POST, path, mount()).await;
    server.call(Method::POST, "/instances/changes/start", None).await;
    server.follow_until("changes", "/data ext4").await;
    server.call(Method::POST, "/instances/changes/stop", None).await;
    let (taken, without) = server.call(Method::DELETE, path, None).await;
    let (gone, _) = server.call(Method::DELETE, path, None).await;

    assert_eq!(given, StatusCode::OK, "{instance}");
    assert_eq!(instance["volumes"][0]["mount_path"], "/data", "{instance}");
    assert!(twice.is_client_error());
    assert_eq!(taken, StatusCode::OK, "{without}");
    assert!(without.get("volumes").is_none(), "{without}");
    assert_eq!(gone, StatusCode::NOT_FOUND);
    server.delete("changes").await;
    remove(server, "later").await;
}

async fn what_a_guest_frees_is_given_back(host: &TestHost) {
    let server = &host.server;
    make(server, "sparse").await;
    let file = server.data_dir.join("volumes/sparse/data.ext4");
    let used_bytes = || fs::metadata(&file).unwrap().blocks() * 512;
    let script = "dd if=/dev/urandom of=/data/big bs=1M count=64 2>/dev/null; sync; echo written; \
        while [ ! -e /go ]; do sleep 0.1; done; rm /data/big; sync; echo removed; \
        sleep 100000";
    let at = json!([{ "volume_id": "sparse", "mount_path": "/data" }]);
    server.create(body("frees", &at, script)).await;
    server.follow_until("frees", "written").await;
    let full = used_bytes();

    server.sh("frees", "touch /go").await;
    server.follow_until("frees", "removed").await;
    server.call(Method::POST, "/instances/frees/stop", None).await;
    let freed = used_bytes();

    assert!(full > 64 << 20, "{full} bytes");
    assert!(freed < full - (48 << 20), "{freed} of {full} bytes are left");
    server.delete("frees").await;
    remove(server, "sparse").await;
}
