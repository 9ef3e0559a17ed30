//! Devices of the host in guests, and back: those that `dev/in-host --vfio` has.
//!
//! These cases have a host of their own, since one with such devices cannot be saved.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use ovum_test_host::lent::{PCI, nvme};
use ovum_test_host::{BUSYBOX, Server, TestHost, ovum, worker_pids, workers};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::spawn_blocking;
use tokio::time;

use crate::cases;
use crate::crash::{data_dir, settle};
use crate::killed::{Operation, survives_a_kill_at_every_change};

cases![
    a_disk_of_the_host_is_a_guests_and_comes_back,
    of_several_instances_one_gets_a_device,
    a_device_is_lent_while_its_instance_runs,
    a_killed_worker_gives_the_driver_its_device_back,
    a_killed_server_leaves_what_is_lent_to_the_next_one,
    a_server_killed_while_it_lends_or_takes_back_leaves_nothing_lent,
    a_device_is_lent_whole_or_not_at_all,
    a_device_is_taken_back_whole_in_the_end,
    a_device_that_is_pulled_out_ends_its_instance_and_is_shown_as_gone,
    what_the_host_lives_on_is_not_given_away,
    devices_that_cannot_be_had_are_refused_by_name,
    devices_of_a_group_are_one_instances,
    a_part_of_a_device_is_made_for_each_start,
    parts_whose_server_and_worker_died_are_removed,
];

/// The name that a device is registered by.
pub(crate) const NAME: &str = "disk";

/// The kernel of a guest looks for disks while programs run already.
const WAIT_FOR_DISK: &str = "until [ -b /dev/nvme0n1 ]; do usleep 1000; done";

/// How long the host may take to find a device again.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the kernel's sample of a mediated device calls one of its types.
const PROFILE: &str = "Single port serial";

/// Where sysfs lists devices.
const MEDIATED: &str = "/sys/bus/mdev/devices";

/// Who drives a device.
fn driver(address: &str) -> Option<String> {
    let link = fs::read_link(Path::new(PCI).join(address).join("driver")).ok()?;
    Some(link.file_name().unwrap().to_str().unwrap().to_owned())
}

/// Waits until the device is as at first.
pub(crate) async fn await_return(address: &str) {
    let deadline = Instant::now() + PATIENCE;
    while driver(address).as_deref() != Some("nvme") {
        assert!(Instant::now() < deadline, "{address} has driver {:?}", driver(address));
        time::sleep(Duration::from_millis(10)).await;
    }
    let path = Path::new(PCI).join(address).join("driver_override");
    assert_eq!(fs::read_to_string(path).unwrap().trim(), "(null)");
}

/// Does something with the disk of the host, once that has found it.
fn on_host<T>(act: impl Fn(&File) -> io::Result<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let disk = OpenOptions::new().read(true).write(true).open("/dev/nvme0n1");
        match disk.and_then(|disk| act(&disk)) {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < deadline, "no NVMe disk in time: {error}"),
        }
    }
}

fn body(name: &str, script: &str) -> Value {
    json!({
        "name": name, "image": BUSYBOX, "size": "128MB", "vcpus": 1, "overlay_size": "1GB",
        "devices": ["disk"], "cmd": ["sh", "-c", script],
    })
}

pub(crate) fn idle(name: &str) -> Value {
    body(name, "sleep 100000")
}

pub(crate) async fn register(server: &Server, address: &str) -> Value {
    let body = json!({ "pci_address": address, "name": NAME, "tags": { "of": "a test" } });
    let (status, device) = server.call(Method::POST, "/devices", Some(body)).await;
    assert_eq!(status, StatusCode::CREATED, "{device}");
    device
}

pub(crate) async fn forget(server: &Server, name: &str) {
    let (status, answer) = server.call(Method::DELETE, &format!("/devices/{name}"), None).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
}

/// What a command says.
fn said(server: &Server, arguments: &[&str]) -> Output {
    let at = ["--base-url", &server.base_url, "--token", server.token()];
    Command::new(ovum()).args(arguments).args(at).output().unwrap()
}

fn text(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn kill_worker() {
    let worker = worker_pids().pop().unwrap();
    assert!(Command::new("kill").args(["-9", &worker.to_string()]).status().unwrap().success());
}

pub(crate) async fn a_disk_of_the_host_is_a_guests_and_comes_back(host: &TestHost) {
    let server = &host.server;
    let address = nvme();
    on_host(|disk| disk.write_all_at(&[b"from the host\n", &[0; 498][..]].concat(), 0));
    let available = text(&said(server, &["device", "available", "--json"]));
    let register = ["device", "register", "--pci-address", &address, "--name", "disk"];
    let id = text(&said(server, &register));
    let script = format!(
        "{WAIT_FOR_DISK}; head -n 1 /dev/nvme0n1; echo from the guest > /tmp/line
        dd if=/tmp/line of=/dev/nvme0n1 bs=4k seek=1 conv=fsync 2> /dev/null
        grep -c MSIX.*nvme0q /proc/interrupts; ls /sys/bus/pci/devices | wc -l"
    );

    let run = ["run", "--device", "disk", "--memory", "128MB", "--cpus", "1", "--rm", BUSYBOX];
    let at = ["--base-url", &server.base_url, "--token", server.token()];
    let command =
        Command::new(ovum()).args(run).args(at).args(["--", "sh", "-c", &script]).output();
    let seen = text(&command.unwrap());

    let available: Value = serde_json::from_str(&available).unwrap();
    let found = available.as_array().unwrap().iter().find(|one| one["pci_address"] == address);
    assert_eq!(found.unwrap()["current_driver"], "nvme");
    assert_eq!(seen, "from the host\n2\n2\n");
    await_return(&address).await;
    let written = on_host(|disk| {
        let mut line = [0; 14];
        disk.read_exact_at(&mut line, 4096).map(|()| line)
    });
    assert_eq!(&written, b"from the guest");
    let listed = text(&said(server, &["device", "list"]));
    assert!(listed.contains(id.trim()) && listed.contains(&address), "{listed}");
    assert!(text(&said(server, &["device", "get", "disk"])).contains(&address));
    text(&said(server, &["device", "delete", "--id", id.trim()]));
    assert_eq!(server.get("/devices").await, json!([]));
}

async fn of_several_instances_one_gets_a_device(host: &TestHost) {
    let server = &host.server;
    let device = register(server, &nvme()).await;
    let creating = (0..6).map(|number| {
        let body = idle(&format!("racer-{number}"));
        server.call(Method::POST, "/instances", Some(body))
    });

    let answers = join_all(creating).await;

    let created: Vec<_> = answers.iter().filter(|(status, _)| status.is_success()).collect();
    assert_eq!(created.len(), 1, "{answers:?}");
    let refused = answers
        .iter()
        .filter(|(status, body)| *status == StatusCode::CONFLICT && body["code"] == "conflict");
    assert_eq!(refused.count(), 5, "{answers:?}");
    let winner = created[0].1["id"].as_str().unwrap();
    assert_eq!(created[0].1["devices"], json!([device["id"]]));
    assert_eq!(server.get("/devices/disk").await["attached_to"], winner);
    let (status, in_use) = server.call(Method::DELETE, "/devices/disk", None).await;
    assert_eq!((status, &in_use["code"]), (StatusCode::CONFLICT, &json!("in_use")), "{in_use}");
    server.delete(winner).await;
    await_return(&nvme()).await;
    forget(server, "disk").await;
}

async fn a_device_is_lent_while_its_instance_runs(host: &TestHost) {
    let server = &host.server;
    let address = nvme();
    register(server, &address).await;
    let script = format!("{WAIT_FOR_DISK}; echo has it; sleep 100000");
    server.create(body("borrower", &script)).await;
    server.follow_until("borrower", "has it").await;
    let running = server.get("/devices/disk").await;
    let worker = worker_pids().pop().unwrap();
    let limits = fs::read_to_string(format!("/proc/{worker}/limits")).unwrap();
    let asked = json!({ "reclaim_bytes": 1 << 30, "dry_run": true });
    let (_, plan) = server.call(Method::POST, "/resources/memory/reclaim", Some(asked)).await;

    server.call(Method::POST, "/instances/borrower/stop", None).await;
    let stopped = (driver(&address), server.get("/devices/disk").await);
    let (taken, _) = server.call(Method::POST, "/instances", Some(idle("other"))).await;
    let (status, answer) = server.call(Method::POST, "/instances/borrower/start", None).await;
    let again = server.get("/devices/disk").await;

    assert_eq!(running["bound_to_vfio"], true, "{running}");
    let locked = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap();
    assert!(locked.contains(&((128 + 64) << 20).to_string()), "{locked}");
    assert_eq!(plan["actions"], json!([]), "a guest whose memory is pinned gives none: {plan}");
    assert_eq!(stopped.0.as_deref(), Some("nvme"), "a stop returns when it is back");
    assert_eq!(stopped.1["bound_to_vfio"], false);
    assert_eq!(taken, StatusCode::CONFLICT, "it is the instance's also while that has stopped");
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!((&again["bound_to_vfio"], &again["attached_to"]), (&json!(true), &answer["id"]));
    server.delete("borrower").await;
    assert_eq!(driver(&address).as_deref(), Some("nvme"));
    forget(server, "disk").await;
}

async fn a_killed_worker_gives_the_driver_its_device_back(host: &TestHost) {
    let server = &host.server;
    let address = nvme();
    register(server, &address).await;
    server.create(idle("victim")).await;
    server.wait("victim", "Running").await;

    kill_worker();
    await_return(&address).await;

    assert_eq!(server.wait("victim", "Stopped").await["state"], "Stopped");
    server.delete("victim").await;
    forget(server, "disk").await;
}

async fn a_killed_server_leaves_what_is_lent_to_the_next_one(_: &TestHost) {
    let dir = data_dir("lending");
    let mut server = Server::start_at(&dir).await;
    let address = nvme();
    server.pull(BUSYBOX).await;
    register(&server, &address).await;
    server.create(idle("outlives")).await;
    server.wait("outlives", "Running").await;

    server.kill();
    let mut server = Server::start_at(&dir).await;
    let found = (server.get("/instances/outlives").await, driver(&address));
    server.kill();
    kill_worker();
    while !workers().is_empty() {
        time::sleep(Duration::from_millis(20)).await;
    }
    let alone = driver(&address);
    let mut server = Server::start_at(&dir).await;

    assert_eq!((&found.0["state"], found.1.as_deref()), (&json!("Running"), Some("vfio-pci")));
    assert_eq!(alone.as_deref(), Some("vfio-pci"), "nobody was there to give it back");
    await_return(&address).await;
    server.delete("outlives").await;
    forget(&server, "disk").await;
    server.kill();
}

/// At any time: a device is lent if, and only if, there is an instance that runs with it.
async fn a_server_killed_while_it_lends_or_takes_back_leaves_nothing_lent(_: &TestHost) {
    let dir = data_dir("lending-killed");
    let mut server = Server::start_at(&dir).await;
    let address = nvme();
    server.pull(BUSYBOX).await;
    register(&server, &address).await;
    for delay_ms in [5, 60, 250, 700] {
        for (method, path, body) in [
            (Method::POST, "/instances", idle("killed").to_string()),
            (Method::DELETE, "/instances/killed?graceful_shutdown=false", String::new()),
        ] {
            let order = server.attempt(method, path, body);
            let _ = time::timeout(Duration::from_millis(delay_ms), order).await;
            server.kill();
            server = Server::start_at(&dir).await;
            let left = settle(&server).await;
            if left.iter().any(|instance| instance["state"] != "Stopped") {
                assert_eq!(driver(&address).as_deref(), Some("vfio-pci"), "{delay_ms}: {left:?}");
            } else {
                await_return(&address).await;
            }
        }
        server.call(Method::DELETE, "/instances/killed", None).await;
        await_return(&address).await;
    }
    forget(&server, "disk").await;
    server.kill();
}

async fn a_device_is_lent_whole_or_not_at_all(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Borrow).await;
}

async fn a_device_is_taken_back_whole_in_the_end(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Return).await;
}

pub(crate) async fn a_device_that_is_pulled_out_ends_its_instance_and_is_shown_as_gone(
    host: &TestHost,
) {
    let server = &host.server;
    let address = nvme();
    register(server, &address).await;
    let script = format!(
        "{WAIT_FOR_DISK}; echo has it
        while :; do dd if=/dev/nvme0n1 of=/dev/null bs=4k iflag=direct 2> /dev/null; done"
    );
    server.create(body("bereft", &script)).await;
    server.follow_until("bereft", "has it").await;

    let path = Path::new(PCI).join(&address).join("remove");
    spawn_blocking(|| fs::write(path, "1")).await.unwrap().unwrap();
    let stopped = server.wait("bereft", "Stopped").await;
    let (status, refused) = server.call(Method::POST, "/instances/bereft/start", None).await;
    let gone = server.get("/devices/disk").await;
    let listed = text(&said(server, &["device", "list"]));
    fs::write("/sys/bus/pci/rescan", "1").unwrap();
    await_return(&address).await;
    let (started, answer) = server.call(Method::POST, "/instances/bereft/start", None).await;
    let again = server.get("/devices/disk").await;

    let why = format!("The machine failed: Its host takes device {address} away");
    assert_eq!(stopped["state_error"], why, "{stopped}");
    assert!(!status.is_success() && refused.to_string().contains(&address), "{refused}");
    assert_eq!((&gone["gone"], &gone["bound_to_vfio"]), (&json!(true), &json!(false)), "{gone}");
    assert!(listed.contains(&format!("{address} (gone)")), "{listed}");
    assert_eq!(started, StatusCode::OK, "{answer}");
    assert_eq!((&again["gone"], &again["bound_to_vfio"]), (&Value::Null, &json!(true)), "{again}");
    server.delete("bereft").await;
    await_return(&address).await;
    forget(server, "disk").await;
}

/// The address of the device below which a thing of a class is.
fn device_of(class: &str, name: &str) -> String {
    let place = fs::canonicalize(format!("/sys/class/{class}/{name}")).unwrap();
    let mut parts = place.iter().map(|part| part.to_str().unwrap().to_owned()).rev();
    let is_address = |part: &String| part.len() == "0000:00:00.0".len() && part.contains(':');
    parts.find(is_address).unwrap()
}

async fn what_the_host_lives_on_is_not_given_away(host: &TestHost) {
    let server = &host.server;
    for (class, name, why) in [
        ("block", "vda", "its disk vda is mounted at /var/lib/ovum"),
        ("net", "eth0", "its interface eth0 is up"),
    ] {
        let address = device_of(class, name);
        let body = json!({ "pci_address": address });
        let (status, refused) = server.call(Method::POST, "/devices", Some(body)).await;

        assert_eq!((status, &refused["code"]), (StatusCode::CONFLICT, &json!("conflict")));
        assert!(refused["message"].as_str().unwrap().contains(why), "{refused}");
        let available = server.get("/devices/available").await;
        let is_there = available.as_array().unwrap().iter().any(|d| d["pci_address"] == address);
        assert!(!is_there, "{available}");
    }
    // A disk that was registered while nobody used it.
    let address = nvme();
    register(server, &address).await;
    let mount = "mkfs.ext4 -qF /dev/nvme0n1 && mkdir -p /run/lent && mount /dev/nvme0n1 /run/lent";
    on_host(|_| Ok(()));
    assert!(Command::new("sh").args(["-c", mount]).status().unwrap().success());
    let (status, refused) = server.call(Method::POST, "/instances", Some(idle("greedy"))).await;
    assert!(Command::new("umount").arg("/run/lent").status().unwrap().success());

    assert_eq!(status, StatusCode::CONFLICT, "{refused}");
    assert!(refused["message"].as_str().unwrap().contains("mounted at /run/lent"), "{refused}");
    assert_eq!(driver(&address).as_deref(), Some("nvme"));
    forget(server, "disk").await;
}

async fn devices_that_cannot_be_had_are_refused_by_name(host: &TestHost) {
    let server = &host.server;
    let address = nvme();
    let bridge = fs::read_dir(PCI)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read_to_string(path.join("class")).unwrap().starts_with("0x06"));
    let bridge = bridge.unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    for (body, status, code) in [
        (json!({ "pci_address": "../../etc" }), StatusCode::BAD_REQUEST, "invalid_pci_address"),
        (json!({ "pci_address": "0000:7f:1f.7" }), StatusCode::NOT_FOUND, "device_not_found"),
        (json!({ "pci_address": address, "name": "a b" }), StatusCode::BAD_REQUEST, "invalid_name"),
        (json!({ "pci_address": bridge }), StatusCode::CONFLICT, "conflict"),
        (json!({ "name": "disk" }), StatusCode::BAD_REQUEST, "Bad Request"),
    ] {
        let (found, answer) = server.call(Method::POST, "/devices", Some(body)).await;
        assert_eq!((found, &answer["code"]), (status, &json!(code)), "{answer}");
    }
    register(server, &address).await;
    for (fields, status) in [
        (json!({ "devices": ["none"] }), StatusCode::NOT_FOUND),
        (json!({ "devices": ["disk", "disk"] }), StatusCode::BAD_REQUEST),
        (json!({ "devices": [""] }), StatusCode::BAD_REQUEST),
        (json!({ "devices": vec!["disk"; 100] }), StatusCode::BAD_REQUEST),
        (json!({ "devices": [], "gpu": { "profile": "H100-1Q" } }), StatusCode::BAD_REQUEST),
    ] {
        let mut body = idle("refused");
        body.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        let (found, answer) = server.call(Method::POST, "/instances", Some(body)).await;
        assert_eq!(found, status, "{fields}: {answer}");
    }
    // One that vanishes while its instance has stopped.
    server.create(idle("bereft")).await;
    server.call(Method::POST, "/instances/bereft/stop", None).await;
    fs::write(Path::new(PCI).join(&address).join("remove"), "1").unwrap();
    let (status, answer) = server.call(Method::POST, "/instances/bereft/start", None).await;
    let device = server.get("/devices/disk").await;
    fs::write("/sys/bus/pci/rescan", "1").unwrap();

    assert_eq!((status, &answer["code"]), (StatusCode::NOT_FOUND, &json!("device_not_found")));
    assert!(answer["message"].as_str().unwrap().contains(&address), "{answer}");
    assert_eq!(device["bound_to_vfio"], false);
    await_return(&address).await;
    server.delete("bereft").await;
    forget(server, "disk").await;
}

/// Functions of the emulated host's chipset share a group, and nothing drives them.
pub(crate) async fn devices_of_a_group_are_one_instances(host: &TestHost) {
    let server = &host.server;
    let available = server.get("/devices/available").await;
    let mut groups: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for device in available.as_array().unwrap() {
        let (group, address) = (&device["iommu_group"], &device["pci_address"]);
        groups.entry(group.as_u64().unwrap()).or_default().push(address.as_str().unwrap());
    }
    let shared = groups.values().find(|addresses| addresses.len() > 1);
    let shared = shared.expect("functions of the chipset share a group");
    for (address, name) in shared.iter().zip(["first", "second"]) {
        let body = json!({ "pci_address": address, "name": name });
        let (status, device) = server.call(Method::POST, "/devices", Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{device}");
    }
    let with = |name: &str, devices: &[&str]| {
        let mut body = idle(name);
        body["devices"] = json!(devices);
        body
    };

    server.create(with("one", &["first"])).await;
    let (status, refused) =
        server.call(Method::POST, "/instances", Some(with("two", &["second"]))).await;
    server.delete("one").await;
    let both = server.create(with("both", &["first", "second"])).await;
    server.delete("both").await;

    assert_eq!((status, &refused["code"]), (StatusCode::CONFLICT, &json!("conflict")), "{refused}");
    let message = refused["message"].as_str().unwrap();
    assert!(message.contains("second shares its IOMMU group with device first"), "{message}");
    assert_eq!(both["devices"].as_array().map(Vec::len), Some(2), "{both}");
    assert_eq!(shared.iter().filter_map(|address| driver(address)).count(), 0);
    forget(server, "first").await;
    forget(server, "second").await;
}

/// Loads the kernel's sample of a mediated device, which offers serial ports.
fn load_sample() {
    if !Path::new("/sys/class/mtty").exists() {
        let module = env::var_os("OVUM_TEST_MDEV").map(PathBuf::from);
        let module = module.expect("OVUM_TEST_MDEV is what dev/host-modules built");
        assert!(Command::new("insmod").arg(module).status().unwrap().success());
    }
}

fn parts() -> Vec<String> {
    let parts = fs::read_dir(MEDIATED).into_iter().flatten();
    parts.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn with_part(name: &str) -> Value {
    let script = "cat /sys/bus/pci/devices/*/vendor; sleep 100000";
    let mut body = body(name, script);
    body["devices"] = json!([]);
    body["gpu"] = json!({ "profile": PROFILE });
    body
}

pub(crate) async fn a_part_of_a_device_is_made_for_each_start(host: &TestHost) {
    load_sample();
    let server = &host.server;
    let slots = async || {
        let resources = server.get("/resources").await;
        let profiles = resources["gpu"]["profiles"].as_array().unwrap().clone();
        let profile = profiles.into_iter().find(|profile| profile["name"] == PROFILE).unwrap();
        (profile["available"].as_u64().unwrap(), resources["gpu"].clone())
    };
    let (before, _) = slots().await;

    let created = server.create(with_part("partial")).await;
    server.follow_until("partial", "0x4348").await;
    let (meanwhile, gpu) = slots().await;
    let first = parts();
    let (_, stopped) = server.call(Method::POST, "/instances/partial/stop", None).await;
    let between = parts();
    let (_, started) = server.call(Method::POST, "/instances/partial/start", None).await;
    let second = parts();
    server.delete("partial").await;

    assert_eq!(created["gpu"], json!({ "profile": PROFILE, "mdev_uuid": first[0] }));
    assert_eq!((gpu["mode"].as_str(), gpu["used_slots"].as_u64()), (Some("vgpu"), Some(1)));
    assert_eq!(meanwhile, before - 1);
    assert_eq!(stopped["gpu"], json!({ "profile": PROFILE }));
    assert_eq!(between, Vec::<String>::new());
    assert_eq!(started["gpu"]["mdev_uuid"], second[0]);
    assert_ne!(first, second);
    assert_eq!(parts(), Vec::<String>::new());
    assert_eq!(slots().await.0, before);
}

async fn parts_whose_server_and_worker_died_are_removed(_: &TestHost) {
    load_sample();
    let dir = data_dir("parts");
    let mut server = Server::start_at(&dir).await;
    server.pull(BUSYBOX).await;
    server.create(with_part("orphan")).await;
    server.wait("orphan", "Running").await;
    // Somebody else's, which nobody of ours may touch.
    let other = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let kind = "/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-1/create";
    fs::write(kind, other).unwrap();

    server.kill();
    kill_worker();
    while !workers().is_empty() {
        time::sleep(Duration::from_millis(20)).await;
    }
    let left = parts().len();
    let mut server = Server::start_at(&dir).await;

    assert_eq!(left, 2);
    assert_eq!(parts(), [other]);
    assert!(server.get("/instances/orphan").await["gpu"].get("mdev_uuid").is_none());
    server.delete("orphan").await;
    fs::write(Path::new(MEDIATED).join(other).join("remove"), "1").unwrap();
    server.kill();
}
