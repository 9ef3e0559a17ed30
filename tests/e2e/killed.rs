//! A server that is killed at any of its changes of the data folder: the operations that need a
//! guest, or a registry. The others are in `tests/killed.rs`, which says more.

use std::env;
use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use ovum_test_host::lent::nvme;
use ovum_test_host::trap::{Sprung, Trap, places};
use ovum_test_host::{BUSYBOX, Server, TestHost, workers};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::cases;
use crate::crash::{data_dir, settle};
use crate::devices;
use crate::volumes::{layered, make};

cases![
    an_instance_is_created_whole_or_not_at_all,
    a_stop_is_finished_or_not_begun,
    a_start_is_done_or_undone,
    an_instance_is_deleted_whole_in_the_end,
    a_pull_is_whole_or_is_done_again,
    a_volume_comes_to_a_running_guest_or_does_not,
    a_volume_leaves_a_running_guest_or_does_not,
];

/// Kills of one operation, unless OVUM_KILLS says another number: a guest boots for each.
const ROUNDS_MAX: u64 = 6;

/// The instance that all of this is about.
const NAME: &str = "killed";

/// The volume that comes and goes.
const VOLUME: &str = "killed-volume";

/// An operation on a server that may be killed meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    Create,
    Stop,
    Start,
    Delete,
    Pull,
    Attach,
    Detach,
    /// A creation with a device of the host, and the end of it.
    Borrow,
    Return,
}

fn instance() -> Value {
    json!({
        "name": NAME, "image": BUSYBOX, "size": "128MB", "vcpus": 1, "cmd": ["sleep", "9999"],
    })
}

impl Operation {
    /// Does it; true if the server said that it is done.
    async fn run(self, server: &Server) -> bool {
        let (method, path, body) = match self {
            Self::Create => (Method::POST, "/instances".to_owned(), instance().to_string()),
            Self::Stop => (Method::POST, format!("/instances/{NAME}/stop"), String::new()),
            Self::Start => (Method::POST, format!("/instances/{NAME}/start"), String::new()),
            Self::Borrow => {
                let mut body = instance();
                body["devices"] = json!([devices::NAME]);
                (Method::POST, "/instances".to_owned(), body.to_string())
            }
            Self::Delete | Self::Return => {
                (Method::DELETE, format!("/instances/{NAME}"), String::new())
            }
            Self::Pull => {
                let body = json!({ "name": BUSYBOX }).to_string();
                (Method::POST, "/images".to_owned(), body)
            }
            Self::Attach => {
                let body = json!({ "mount_path": "/data" }).to_string();
                (Method::POST, format!("/instances/{NAME}/volumes/{VOLUME}"), body)
            }
            Self::Detach => {
                (Method::DELETE, format!("/instances/{NAME}/volumes/{VOLUME}"), String::new())
            }
        };
        let answer = server.attempt(method, &path, body).await;
        if self == Self::Pull {
            until_settled(server).await;
        }
        match answer {
            Some((status, _)) if status.is_success() => true,
            Some((StatusCode::NOT_FOUND, _))
                if matches!(self, Self::Delete | Self::Detach | Self::Return) =>
            {
                true
            }
            // Attached before the kill, and there.
            Some((StatusCode::BAD_REQUEST, _)) if self == Self::Attach => true,
            // Created before the kill, and there.
            Some((StatusCode::CONFLICT, _)) if matches!(self, Self::Create | Self::Borrow) => true,
            Some((status, answer)) => panic!("{self:?}: {status} {answer}"),
            None => false,
        }
    }

    /// Brings the server to where it can be done.
    async fn prepare(self, server: &Server) {
        match self {
            Self::Pull => {
                let path = format!("/images/{}", BUSYBOX.replace('/', "%2F"));
                let (status, answer) = server.call(Method::DELETE, &path, None).await;
                let gone = matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_FOUND);
                assert!(gone, "{answer}");
            }
            Self::Create => drop(server.pull(BUSYBOX).await),
            Self::Borrow | Self::Return => {
                server.pull(BUSYBOX).await;
                devices::register(server, &nvme()).await;
                if self == Self::Return {
                    assert!(Self::Borrow.run(server).await);
                    server.wait(NAME, "Running").await;
                }
            }
            Self::Stop | Self::Start | Self::Delete => {
                server.pull(BUSYBOX).await;
                assert!(Self::Create.run(server).await);
                server.wait(NAME, "Running").await;
                if self == Self::Start {
                    assert!(Self::Stop.run(server).await);
                }
            }
            Self::Attach | Self::Detach => {
                server.pull(BUSYBOX).await;
                make(server, VOLUME).await;
                let mut body = instance();
                if self == Self::Detach {
                    // With a layer: two disks leave, and a file.
                    body["volumes"] = json!([layered(VOLUME, "/data")]);
                }
                server.create(body).await;
                server.wait(NAME, "Running").await;
            }
        }
    }

    /// Whether these instances are what it leads to.
    fn is_done(self, list: &[Value]) -> bool {
        let state = list.first().map(|instance| instance["state"].as_str().unwrap());
        match self {
            Self::Create | Self::Start | Self::Borrow => {
                state.is_some_and(|state| state != "Stopped")
            }
            Self::Stop => state == Some("Stopped"),
            Self::Delete | Self::Pull | Self::Return => state.is_none(),
            Self::Attach | Self::Detach => {
                let volumes = list[0]["volumes"].as_array().map_or(0, Vec::len);
                (volumes == 1) == (self == Self::Attach)
            }
        }
    }

    /// Nothing of it is left for the next round.
    async fn clear(self, server: &Server) {
        assert!(Self::Delete.run(server).await);
        assert_eq!(settle(server).await, Vec::<Value>::new());
        if matches!(self, Self::Attach | Self::Detach) {
            let path = format!("/volumes/{VOLUME}");
            let (status, answer) = server.call(Method::DELETE, &path, None).await;
            assert_eq!(status, StatusCode::NO_CONTENT, "{answer}");
        }
        if matches!(self, Self::Borrow | Self::Return) {
            devices::await_return(&nvme()).await;
            devices::forget(server, devices::NAME).await;
        }
        assert_eq!(workers(), Vec::<String>::new());
        let rests = fs::read_dir(server.data_dir.join("tmp")).unwrap().count();
        assert_eq!(rests, 0, "files in the making are left");
    }
}

/// Waits until no image is under way, or the server is dead.
async fn until_settled(server: &Server) {
    let settled = |image: &Value| matches!(image["status"].as_str(), Some("ready" | "failed"));
    while let Some((StatusCode::OK, images)) = server.attempt(Method::GET, "/images", "").await {
        if images.as_array().unwrap().iter().all(settled) {
            return;
        }
    }
}

/// Does `operation` with a trap at change number `at`; returns whether it was acknowledged, and
/// what the trap saw.
async fn killed(server: Server, operation: Operation, at: u64) -> (bool, Sprung) {
    let trap = Trap::set(server.pid(), &server.data_dir, at);
    let acknowledged = operation.run(&server).await;
    (acknowledged, trap.spring())
}

pub(crate) async fn survives_a_kill_at_every_change(operation: Operation) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let number = |name, default| env::var(name).map_or(default, |text| text.parse().unwrap());
    let (seed, rounds_max) = (number("OVUM_KILL_SEED", now), number("OVUM_KILLS", ROUNDS_MAX));
    let dir = data_dir("killed");
    let server = Server::start_at(&dir).await;
    // Once without a trap: what is made once for all is made, and is no part of what follows.
    operation.prepare(&server).await;
    assert!(operation.run(&server).await);
    operation.clear(&server).await;
    operation.prepare(&server).await;
    let (acknowledged, Sprung { changes, .. }) = killed(server, operation, u64::MAX).await;
    assert!(acknowledged);
    println!("{operation:?}: {changes} changes; OVUM_KILL_SEED={seed} does the same again");
    assert!(changes > 3, "the trap sees nothing: {changes} changes");
    let mut server = Server::start_at(&dir).await;
    settle(&server).await;
    operation.clear(&server).await;

    for at in places(changes, rounds_max, seed) {
        operation.prepare(&server).await;
        let (acknowledged, sprung) = killed(server, operation, at).await;
        let place = format!("{operation:?} killed at change {at}: {:?}", sprung.killed_at);
        server = Server::start_at(&dir).await;
        let list = settle(&server).await;
        assert!(!acknowledged || operation.is_done(&list), "{place}, lost: {list:?}");
        if matches!(operation, Operation::Borrow | Operation::Return) && list.is_empty() {
            devices::await_return(&nvme()).await;
        }
        until_settled(&server).await;
        let images = server.get("/images").await;
        let ready = |image: &Value| image["status"] == "ready";
        assert!(images.as_array().unwrap().iter().all(ready), "{place}: {images}");

        assert!(operation.run(&server).await, "{place}: cannot be done again");
        let list = settle(&server).await;
        assert!(operation.is_done(&list), "{place}: {list:?}");
        if matches!(operation, Operation::Attach | Operation::Detach) {
            let found = server.sh(NAME, "grep -c ' /data ' /proc/mounts; ls /sys/block").await;
            let is_there = found.text().starts_with("1\n");
            assert_eq!(is_there, operation == Operation::Attach, "{place}: {}", found.text());
            let id = list[0]["id"].as_str().unwrap();
            let layer = dir.join(format!("instances/{id}/volume-{VOLUME}.ext4"));
            assert!(!layer.exists(), "{place}: a layer is left");
        }
        operation.clear(&server).await;
    }
    server.kill();
}

async fn an_instance_is_created_whole_or_not_at_all(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Create).await;
}

async fn a_stop_is_finished_or_not_begun(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Stop).await;
}

async fn a_start_is_done_or_undone(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Start).await;
}

async fn an_instance_is_deleted_whole_in_the_end(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Delete).await;
}

async fn a_pull_is_whole_or_is_done_again(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Pull).await;
}

async fn a_volume_comes_to_a_running_guest_or_does_not(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Attach).await;
}

async fn a_volume_leaves_a_running_guest_or_does_not(_: &TestHost) {
    survives_a_kill_at_every_change(Operation::Detach).await;
}
