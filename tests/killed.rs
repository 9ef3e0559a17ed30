//! A server that is killed at any of its changes of the data folder leaves one that opens, with
//! all that was acknowledged and nothing that is half made: the operations that need no KVM. Those
//! that do are in `tests/e2e/killed.rs`.
//!
//! Killed at each change in turn, if there are few; else at a sample of them, which a seed shifts.

#![expect(clippy::print_stdout, reason = "the seed, to do the same again")]
#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]
#![expect(clippy::disallowed_methods, reason = "the server is started as a user would")]

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ovum_test_host::Server;
use ovum_test_host::image::tiny_archive;
use ovum_test_host::trap::{Sprung, Trap, places};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time;

/// Kills of one operation, unless OVUM_KILLS says another number.
const ROUNDS_MAX: u64 = 12;

/// How long an image may take to become ready.
const PATIENCE: Duration = Duration::from_secs(60);

const IMAGE: &str = "docker.io/library/tiny:latest";
const OTHER: &str = "docker.io/library/tiny:other";
const VOLUME: &str = "kept";

/// An operation on a server that may be killed meanwhile.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Load,
    Tag,
    Delete,
    MakeVolume,
    FillVolume,
    DeleteVolume,
}

impl Operation {
    /// Does it; true if the server said that it is done.
    async fn run(self, server: &Server) -> bool {
        let image = format!("/images/{}", IMAGE.replace('/', "%2F"));
        let answer = match self {
            Self::Load => {
                let answer = server
                    .attempt(Method::POST, "/images/from-archive?name=tiny", tiny_archive())
                    .await;
                until_settled(server).await;
                answer
            }
            Self::Tag => {
                let body = json!({ "target": OTHER }).to_string();
                server.attempt(Method::POST, &format!("{image}/tag"), body).await
            }
            Self::Delete => server.attempt(Method::DELETE, &image, "").await,
            Self::MakeVolume => {
                let body = json!({ "name": VOLUME, "id": VOLUME, "size_gb": 1 }).to_string();
                server.attempt(Method::POST, "/volumes", body).await
            }
            Self::FillVolume => {
                let path = format!("/volumes/from-archive?name={VOLUME}&id={VOLUME}&size_gb=1");
                server.attempt(Method::POST, &path, tiny_archive()).await
            }
            Self::DeleteVolume => {
                server.attempt(Method::DELETE, &format!("/volumes/{VOLUME}"), "").await
            }
        };
        let makes_volume = matches!(self, Self::MakeVolume | Self::FillVolume);
        match answer {
            Some((status, _)) if status.is_success() => true,
            Some((StatusCode::NOT_FOUND, _))
                if matches!(self, Self::Delete | Self::DeleteVolume) =>
            {
                true
            }
            // Made before the kill, and there.
            Some((StatusCode::CONFLICT, _)) if makes_volume => true,
            Some((status, answer)) => panic!("{self:?}: {status} {answer}"),
            None => false,
        }
    }

    /// What it needs to have been done before.
    fn preparation(self) -> &'static [Self] {
        match self {
            Self::Load | Self::MakeVolume | Self::FillVolume => &[],
            Self::DeleteVolume => &[Self::FillVolume],
            Self::Tag => &[Self::Load],
            Self::Delete => &[Self::Load, Self::Tag],
        }
    }

    /// Whether what the server lists, images and volumes, is what it leads to.
    fn is_done(self, names: &[&str]) -> bool {
        match self {
            Self::Load => names.contains(&IMAGE),
            Self::Tag => names.contains(&OTHER),
            Self::Delete => !names.contains(&IMAGE),
            Self::MakeVolume | Self::FillVolume => names.contains(&VOLUME),
            Self::DeleteVolume => !names.contains(&VOLUME),
        }
    }
}

/// Waits until no image is under way, or the server is dead.
async fn until_settled(server: &Server) {
    let deadline = Instant::now() + PATIENCE;
    while let Some((StatusCode::OK, images)) = server.attempt(Method::GET, "/images", "").await {
        let settled = |image: &Value| matches!(image["status"].as_str(), Some("ready" | "failed"));
        if images.as_array().unwrap().iter().all(settled) {
            return;
        }
        assert!(Instant::now() < deadline, "{images}");
        time::sleep(Duration::from_millis(5)).await;
    }
}

async fn start(dir: &Path) -> Server {
    let program = Path::new(env!("CARGO_BIN_EXE_ovum"));
    let mut command = Command::new(program);
    command.env("RUST_LOG", "error").env("OVUM_MIN_FREE", "1MB").env("HOME", dir);
    // Nobody would take back what a killed one of a folder that is gone had set up.
    command.env("OVUM_NETWORK", "false");
    Server::start_other(dir, program, command).await
}

/// All that is kept, but for what is of one server's life.
fn content(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(dir).unwrap().to_owned();
            if path.is_dir() {
                folders.push(path);
            }
            let is_of_records = name.to_str().unwrap().starts_with("records.db-");
            if !is_of_records {
                found.insert(name);
            }
        }
    }
    found
}

/// A copy of a data folder that no server has.
fn copy(of: &Path) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(of.join(".")).arg(copy.path()).status().unwrap();
    assert!(copied.success());
    copy
}

/// A folder in which `before` was done.
async fn folder(before: &[Operation]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut server = start(dir.path()).await;
    for operation in before {
        assert!(operation.run(&server).await);
    }
    server.kill();
    dir
}

/// Does `operation` in a copy of `base`, with a trap at change number `at`; returns the folder,
/// whether it was acknowledged, and what the trap saw.
async fn killed(base: &Path, operation: Operation, at: u64) -> (TempDir, bool, Sprung) {
    let dir = copy(base);
    let server = start(dir.path()).await;
    let trap = Trap::set(server.pid(), dir.path(), at);
    let acknowledged = operation.run(&server).await;
    let sprung = trap.spring();
    drop(server);
    (dir, acknowledged, sprung)
}

async fn survives_a_kill_at_every_change(operation: Operation) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let number = |name, default| env::var(name).map_or(default, |text| text.parse().unwrap());
    let (seed, rounds_max) = (number("OVUM_KILL_SEED", now), number("OVUM_KILLS", ROUNDS_MAX));
    let base = folder(operation.preparation()).await;
    let (whole, acknowledged, seen) = killed(base.path(), operation, u64::MAX).await;
    assert!(acknowledged);
    let mut server = start(whole.path()).await;
    until_settled(&server).await;
    let expected = content(whole.path());
    server.kill();
    let changes = seen.changes;
    println!("{operation:?}: {changes} changes; OVUM_KILL_SEED={seed} does the same again");
    assert!(changes > 3, "the trap sees nothing: {changes} changes");

    for at in places(changes, rounds_max, seed) {
        let (dir, acknowledged, sprung) = killed(base.path(), operation, at).await;
        let place = format!("{operation:?} killed at change {at}: {:?}", sprung.killed_at);
        let mut server = start(dir.path()).await;
        until_settled(&server).await;
        let images = server.get("/images").await;
        let volumes = server.get("/volumes").await;
        let list = images.as_array().unwrap();
        let both = list.iter().chain(volumes.as_array().unwrap());
        let names: Vec<_> = both.map(|one| one["name"].as_str().unwrap()).collect();
        assert!(!acknowledged || operation.is_done(&names), "{place}, lost: {names:?}");
        assert!(list.iter().all(|image| image["status"] == "ready"), "{place}: {images}");

        assert!(operation.run(&server).await, "{place}: cannot be done again");
        server.kill();
        let mut server = start(dir.path()).await;
        until_settled(&server).await;
        assert_eq!(content(dir.path()), expected, "{place}");
        server.kill();
    }
}

#[tokio::test]
async fn an_image_is_loaded_whole_or_not_at_all() {
    survives_a_kill_at_every_change(Operation::Load).await;
}

#[tokio::test]
async fn a_name_is_given_or_not() {
    survives_a_kill_at_every_change(Operation::Tag).await;
}

#[tokio::test]
async fn an_image_is_deleted_whole_or_not_at_all() {
    survives_a_kill_at_every_change(Operation::Delete).await;
}

#[tokio::test]
async fn a_volume_is_made_whole_or_not_at_all() {
    survives_a_kill_at_every_change(Operation::MakeVolume).await;
}

#[tokio::test]
async fn a_volume_is_filled_whole_or_not_at_all() {
    survives_a_kill_at_every_change(Operation::FillVolume).await;
}

#[tokio::test]
async fn a_volume_is_deleted_whole_or_not_at_all() {
    survives_a_kill_at_every_change(Operation::DeleteVolume).await;
}
