//! Volumes that come to guests which run, and go.

use std::process::Command;
use std::time::{Duration, Instant};

use ovum_test_host::{BUSYBOX, Server, TestHost, ovum, workers};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;
use crate::crash::data_dir;
use crate::volumes::{body, layered, make, remove, said};

cases![
    a_volume_goes_from_one_running_guest_to_another,
    a_volume_in_use_stays_where_it_is,
    a_layer_leaves_a_running_guest_with_its_volume,
    a_layer_that_is_held_leaves_later,
    readers_that_run_share_a_volume,
    what_is_attached_outlives_server_and_guest,
    a_running_guest_has_as_many_volumes_as_it_has_slots,
    what_a_running_guest_cannot_do_is_refused_and_changes_nothing,
];

/// How long what leaves by itself may take, in one of two emulated hosts on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs for ever.
const IDLE: &str = "sleep 100000";

/// Starts a guest that has `volumes`.
async fn start(server: &Server, name: &str, volumes: Value) {
    server.create(body(name, &volumes, IDLE)).await;
    server.wait(name, "Running").await;
}

async fn attach(server: &Server, name: &str, volume: &str, path: &str) -> (StatusCode, Value) {
    give(server, name, volume, json!({ "mount_path": path })).await
}

async fn give(server: &Server, name: &str, volume: &str, how: Value) -> (StatusCode, Value) {
    server.call(Method::POST, &format!("/instances/{name}/volumes/{volume}"), Some(how)).await
}

async fn detach(server: &Server, name: &str, volume: &str) -> (StatusCode, Value) {
    server.call(Method::DELETE, &format!("/instances/{name}/volumes/{volume}"), None).await
}

/// What a script that must succeed says.
async fn sh(server: &Server, name: &str, script: &str) -> String {
    let ran = server.sh(name, script).await;
    assert_eq!(ran.code, 0, "{script}: {}", ran.text());
    ran.text().to_owned()
}

/// Whether the answer is a conflict with this code that says `why`.
#[track_caller]
fn assert_refused((status, answer): (StatusCode, Value), code: &str, why: &str) {
    assert_eq!((status, &answer["code"]), (StatusCode::CONFLICT, &json!(code)), "{answer}");
    assert!(answer["message"].as_str().unwrap().contains(why), "{answer}");
}

#[track_caller]
fn assert_done((status, answer): &(StatusCode, Value)) {
    assert_eq!(*status, StatusCode::OK, "{answer}");
}

/// Types an `ovum volume` command, which works or says `why` not.
fn type_in(server: &Server, words: &[&str], outcome: Result<(), &str>) {
    let mut command = Command::new(ovum());
    command.arg("volume").args(words);
    command.args(["--base-url", &server.base_url, "--token", server.token()]);
    let output = command.output().expect("ovum runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.success(), outcome.is_ok(), "{words:?}: {said}");
    assert!(outcome.err().is_none_or(|why| said.contains(why)), "{words:?}: {said}");
}

async fn users(server: &Server, volume: &str) -> usize {
    let volume = server.get(&format!("/volumes/{volume}")).await;
    volume["attachments"].as_array().map_or(0, Vec::len)
}

async fn a_volume_goes_from_one_running_guest_to_another(host: &TestHost) {
    let server = &host.server;
    make(server, "moves").await;
    start(server, "from", json!([])).await;
    start(server, "to", json!([])).await;

    let given = attach(server, "from", "moves", "/deep/data").await;
    let mounted =
        sh(server, "from", "grep ' /deep/data ' /proc/mounts; echo kept > /deep/data/file").await;
    let taken = attach(server, "to", "moves", "/data").await;
    let left = detach(server, "from", "moves").await;
    let disks = sh(server, "from", "ls /deep/data; ls /sys/block; cat /proc/mounts").await;
    let moved = attach(server, "to", "moves", "/data").await;
    let seen = sh(server, "to", "cat /data/file").await;

    assert_done(&given);
    assert_eq!(given.1["volumes"][0]["mount_path"], "/deep/data", "{}", given.1);
    assert!(mounted.contains(" ext4 rw"), "{mounted}");
    assert_refused(taken, "conflict", "moves");
    assert_done(&left);
    assert!(left.1.get("volumes").is_none(), "{}", left.1);
    assert!(!disks.contains("file") && !disks.contains("/deep/data"), "{disks}");
    assert_done(&moved);
    assert_eq!(seen, "kept\n");
    server.delete("from").await;
    server.delete("to").await;
    remove(server, "moves").await;
}

async fn a_volume_in_use_stays_where_it_is(host: &TestHost) {
    let server = &host.server;
    make(server, "early").await;
    make(server, "late").await;
    make(server, "under").await;
    // Two that it was started with, one below a layer, and one that came later.
    let volumes = json!([
        { "volume_id": "early", "mount_path": "/early" },
        layered("under", "/under"),
    ]);
    start(server, "busy", volumes).await;
    assert_done(&attach(server, "busy", "late", "/late").await);
    for volume in ["early", "late", "under"] {
        let script = format!(
            "cd /{volume}; echo one > file; mkdir -p /bind-{volume}; \
             sleep 9999 < file > /dev/null 2>&1 & echo $! > /tmp/pid"
        );
        sh(server, "busy", &script).await;

        assert_refused(detach(server, "busy", volume).await, "conflict", "in use");
        let script = format!("echo two >> /{volume}/file; cat /{volume}/file");
        assert_eq!(sh(server, "busy", &script).await, "one\ntwo\n");
        sh(server, "busy", "kill -9 $(cat /tmp/pid)").await;
        sh(server, "busy", &format!("mount -o bind /{volume} /bind-{volume}")).await;
        assert_refused(detach(server, "busy", volume).await, "conflict", "mounted it, too");
        sh(server, "busy", &format!("umount /bind-{volume}; cat /{volume}/file")).await;
        // In a namespace of its own, where a container would have it.
        let script = "unshare -m sleep 9999 > /dev/null 2>&1 & echo $! > /tmp/pid; \
            until [ $(readlink /proc/$!/ns/mnt) != $(readlink /proc/$$/ns/mnt) ]; do :; done";
        sh(server, "busy", script).await;
        assert_refused(detach(server, "busy", volume).await, "conflict", "mounted it, too");
        let script = format!("grep -c ' /{volume} ' /proc/mounts; cat /{volume}/file");
        assert_eq!(sh(server, "busy", &script).await, "1\none\ntwo\n");
        let script = "kill -9 $(cat /tmp/pid); while [ -e /proc/$(cat /tmp/pid) ]; do :; done";
        sh(server, "busy", script).await;
        assert_eq!(users(server, volume).await, 1);

        assert_done(&detach(server, "busy", volume).await);
        assert_eq!(users(server, volume).await, 0);
    }
    server.delete("busy").await;
    for volume in ["early", "late", "under"] {
        remove(server, volume).await;
    }
}

async fn a_layer_leaves_a_running_guest_with_its_volume(host: &TestHost) {
    let server = &host.server;
    make(server, "base").await;
    let at = json!([{ "volume_id": "base", "mount_path": "/data" }]);
    said(server, "first", at.clone(), "echo base > /data/file").await;
    start(server, "above", json!([layered("base", "/data")])).await;
    let all = sh(server, "above", "echo changed > /data/file; ls /sys/block | grep -c vd").await;
    let id = server.get("/instances/above").await["id"].as_str().unwrap().to_owned();
    let layer = server.data_dir.join(format!("instances/{id}/volume-base.ext4"));
    assert_eq!((all.as_str(), layer.exists()), ("5\n", true));

    let left = detach(server, "above", "base").await;
    let seen = sh(server, "above", "ls /data; ls /sys/block | grep -c vd").await;
    let (gone, users) = (!layer.exists(), users(server, "base").await);
    let given = attach(server, "above", "base", "/data").await;
    let base = sh(server, "above", "cat /data/file").await;

    assert_done(&left);
    assert!(left.1.get("volumes").is_none(), "{}", left.1);
    assert_eq!((seen.as_str(), gone, users), ("3\n", true, 0));
    assert_done(&given);
    assert_eq!(base, "base\n");
    server.delete("above").await;
    remove(server, "base").await;
}

/// Root in the guest looks into the layer by its disk.
async fn a_layer_that_is_held_leaves_later(host: &TestHost) {
    let server = &host.server;
    make(server, "base").await;
    start(server, "holder", json!([layered("base", "/data")])).await;
    let script = "for disk in /sys/block/vd*; do grep -q ^l- $disk/serial && layer=${disk##*/}; \
        done; mkdir /mnt; mount -t ext4 /dev/$layer /mnt && cd /mnt/changes && \
        { sleep 9999 > /dev/null 2>&1 & echo $! > /tmp/pid; }";
    sh(server, "holder", script).await;

    assert_refused(detach(server, "holder", "base").await, "conflict", "as soon as");
    let taken = attach(server, "holder", "base", "/other").await;
    assert_refused(taken, "conflict", "as soon as");
    assert_eq!((users(server, "base").await, sh(server, "holder", "ls /data").await.len()), (1, 0));
    sh(server, "holder", "kill -9 $(cat /tmp/pid)").await;
    let began = Instant::now();
    while users(server, "base").await > 0 {
        assert!(began.elapsed() < PATIENCE, "it is never found out");
        time::sleep(Duration::from_millis(200)).await;
    }
    assert_done(&attach(server, "holder", "base", "/data").await);
    server.delete("holder").await;
    remove(server, "base").await;
}

async fn readers_that_run_share_a_volume(host: &TestHost) {
    let server = &host.server;
    make(server, "read").await;
    let at = json!([{ "volume_id": "read", "mount_path": "/data" }]);
    said(server, "writer", at, "echo written > /data/file").await;
    let how = || json!({ "mount_path": "/data", "readonly": true });
    for name in ["one", "two"] {
        start(server, name, json!([])).await;
        assert_done(&give(server, name, "read", how()).await);
    }

    for name in ["one", "two"] {
        let seen = sh(server, name, "cat /data/file; touch /data/x 2>/dev/null || echo refused");
        assert_eq!(seen.await, "written\nrefused\n");
    }
    assert_eq!(users(server, "read").await, 2);
    assert_done(&detach(server, "one", "read").await);
    // What it says to people.
    type_in(server, &["detach", "two", "read"], Ok(()));
    type_in(server, &["detach", "two", "read"], Err("not attached"));
    type_in(server, &["attach", "two", "read:/again:ro"], Ok(()));
    type_in(server, &["attach", "two", "read:/again:ro:overlay=1GB"], Err("overlay"));
    assert_eq!(sh(server, "two", "cat /again/file").await, "written\n");
    for name in ["one", "two"] {
        server.delete(name).await;
    }
    remove(server, "read").await;
}

async fn what_is_attached_outlives_server_and_guest(_: &TestHost) {
    let mut server = Server::start("attached").await;
    server.pull(BUSYBOX).await;
    for id in ["stays", "goes"] {
        make(&server, id).await;
    }
    start(&server, "keeper", json!([{ "volume_id": "goes", "mount_path": "/goes" }])).await;
    assert_done(&attach(&server, "keeper", "stays", "/stays").await);
    assert_done(&detach(&server, "keeper", "goes").await);
    sh(&server, "keeper", "echo one > /stays/file").await;

    server.kill();
    let mut server = Server::start_at(&data_dir("attached")).await;
    let seen = sh(&server, "keeper", "cat /stays/file; grep -c goes /proc/mounts || true").await;
    let volumes = server.get("/instances/keeper").await["volumes"].clone();
    assert_eq!((seen.as_str(), volumes.as_array().map(Vec::len)), ("one\n0\n", Some(1)));
    assert_done(&detach(&server, "keeper", "stays").await);
    assert_done(&attach(&server, "keeper", "stays", "/other").await);
    sh(&server, "keeper", "echo two >> /other/file; sync").await;

    // The guest, without a word.
    let killed = Command::new("pkill").args(["-9", "-x", "ovum-worker"]).status().unwrap();
    assert!(killed.success());
    server.wait("keeper", "Stopped").await;
    assert!(workers().is_empty());
    server.call(Method::POST, "/instances/keeper/start", None).await;
    server.wait("keeper", "Running").await;
    let seen = sh(&server, "keeper", "cat /other/file; ls /stays /goes").await;
    assert_eq!(seen, "one\ntwo\n/goes:\n\n/stays:\n");
    assert_eq!((users(&server, "stays").await, users(&server, "goes").await), (1, 0));
    server.call(Method::POST, "/instances/keeper/stop", None).await;
    assert_done(&detach(&server, "keeper", "stays").await);
    server.delete("keeper").await;
    remove(&server, "stays").await;
    remove(&server, "goes").await;
    server.kill();
}

async fn a_running_guest_has_as_many_volumes_as_it_has_slots(host: &TestHost) {
    let server = &host.server;
    let names: Vec<_> = (0..5).map(|number| format!("slot-{number}")).collect();
    for name in &names {
        make(server, name).await;
    }
    start(server, "slots", json!([])).await;
    for name in &names[..4] {
        assert_done(&attach(server, "slots", name, &format!("/{name}")).await);
    }

    assert_refused(attach(server, "slots", "slot-4", "/slot-4").await, "conflict", "4 to spare");
    assert_done(&detach(server, "slots", "slot-1").await);
    assert_done(&attach(server, "slots", "slot-4", "/slot-4").await);
    // A slot is used as often as it is vacant.
    let began = Instant::now();
    for _ in 0..10 {
        assert_done(&detach(server, "slots", "slot-4").await);
        assert_done(&attach(server, "slots", "slot-4", "/slot-4").await);
    }

    println!("a volume left and came ten times in {:?}", began.elapsed());
    let mounted = sh(server, "slots", "grep -c ' /slot-' /proc/mounts").await;
    assert_eq!(mounted, "4\n");
    server.delete("slots").await;
    for name in &names {
        remove(server, name).await;
    }
}

async fn what_a_running_guest_cannot_do_is_refused_and_changes_nothing(host: &TestHost) {
    let server = &host.server;
    for id in ["free", "inner"] {
        make(server, id).await;
    }
    let volumes = json!([{ "volume_id": "inner", "mount_path": "/data/inner" }]);
    start(server, "picky", volumes).await;
    let mut alone = body("alone", &json!([]), IDLE);
    alone["skip_guest_agent"] = json!(true);
    server.create(alone).await;
    server.wait("alone", "Running").await;
    let disks = sh(server, "picky", "touch /file; ls /sys/block").await;

    let answers = [
        (attach(server, "alone", "free", "/data").await, "invalid_state", "without its agent"),
        (attach(server, "picky", "free", "/data").await, "invalid_state", "hide"),
        (attach(server, "picky", "free", "/file").await, "conflict", "mount the volume on /file"),
    ];
    let (there, _) = attach(server, "picky", "free", "/data/inner").await;
    let (not_there, _) = detach(server, "picky", "free").await;

    for (answer, code, why) in answers {
        assert_refused(answer, code, why);
    }
    assert_eq!((there, not_there), (StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND));
    assert_eq!(users(server, "free").await, 0);
    assert_eq!(sh(server, "picky", "ls /sys/block").await, disks);
    // What was refused has left its slot.
    assert_done(&attach(server, "picky", "free", "/free").await);
    assert_done(&detach(server, "picky", "inner").await);
    for name in ["alone", "picky"] {
        server.delete(name).await;
    }
    for id in ["free", "inner"] {
        remove(server, id).await;
    }
}
