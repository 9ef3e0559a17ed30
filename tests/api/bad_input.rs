//! What no client of good will sends: too much, too many, and what is no text.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Method, StatusCode};
use futures_util::future::join_all;
use ovum::images::digest::Digest;
use ovum::instances::follow::FOLLOWERS_MAX;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use tokio::io::AsyncReadExt;
use tokio::time;

use crate::process::{Conversation, Process};
use crate::{Server, keep_stopped};

/// Clients that want to follow one log at the same time.
const CLIENTS: usize = 10_000;

/// Of those, so many knock at once.
const CLIENTS_AT_ONCE: usize = 250;

/// What all of them may cost the server: a connection, a task and two open files for each that is
/// served, and nothing for those that are not.
const GROWTH_BYTES_MAX: u64 = FOLLOWERS_MAX as u64 * (128 << 10);

#[tokio::test]
async fn ten_thousand_followers_are_served_up_to_the_limit_and_refused_beyond() {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).unwrap();
    let dir = Server::start().await.stop().await;
    keep_stopped(&dir, "one", &Digest::of(b"any").to_string());
    let path = dir.path().join("data/instances/one/console.log");
    let mut log = File::create(&path).unwrap();
    log.write_all(b"first\n").unwrap();
    let server = Process::start(dir).await;
    let follow = async || server.ask("GET", "/instances/one/logs?follow=true", b"").await;
    drop(follow().await);
    let (bytes_before, files_before) = (server.resident_bytes(), server.open_files());

    let (mut followers, mut refused) = (Vec::new(), Vec::new());
    for _ in 0..CLIENTS / CLIENTS_AT_ONCE {
        let asked = join_all((0..CLIENTS_AT_ONCE).map(|_| follow())).await;
        let (served, rest) =
            asked.into_iter().partition::<Vec<_>, _>(|one| one.status == StatusCode::OK);
        followers.extend(served);
        refused.extend(rest);
    }
    let grown = server.resident_bytes().saturating_sub(bytes_before);
    for one in &mut refused {
        assert_eq!(one.status, StatusCode::TOO_MANY_REQUESTS);
        let message = "1024 logs are followed already: try again when one of them has ended";
        assert_eq!(one.json().await, json!({ "code": "rate_limited", "message": message }));
        assert_eq!(one.stream.read(&mut [0]).await.unwrap(), 0, "the connection is closed");
    }
    log.write_all(b"second\n").unwrap();
    for one in &mut followers {
        one.until("data: \"second\"\n\n").await;
    }
    let list = server.ask("GET", "/instances", b"").await;

    assert_eq!((followers.len(), refused.len()), (FOLLOWERS_MAX, CLIENTS - FOLLOWERS_MAX));
    assert_eq!(list.status, StatusCode::OK, "the others are served as before");
    assert!(grown < GROWTH_BYTES_MAX, "the server grew by {grown} bytes");
    drop((followers, refused, list));
    let deadline = Instant::now() + Duration::from_secs(60);
    while server.open_files() > files_before {
        assert!(Instant::now() < deadline, "{} files are open", server.open_files());
        time::sleep(Duration::from_millis(20)).await;
    }
    let again: Vec<Conversation> = join_all((0..FOLLOWERS_MAX).map(|_| follow())).await;
    assert!(again.iter().all(|one| one.status == StatusCode::OK), "every place is free again");
}

#[tokio::test]
async fn a_hundred_megabytes_of_json_are_refused_and_not_kept() {
    let server = Process::start(Server::start().await.stop().await).await;
    server.ask("GET", "/instances", b"").await;
    let before = server.resident_bytes();
    let mut body = br#"{"name":"a","image":"b","env":{"A":""#.to_vec();
    body.resize(100_000_000, b'x');

    let mut answer = server.ask("POST", "/instances", &body).await;

    let grown = server.resident_bytes().saturating_sub(before);
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let message = format!("Body is larger than {} bytes", 2 << 20);
    assert_eq!(answer.json().await, json!({ "code": "Payload Too Large", "message": message }));
    assert!(grown < 8 << 20, "the server grew by {grown} bytes");
}

#[tokio::test]
async fn a_path_that_is_no_text_is_refused_like_everything_else() {
    let server = Server::start().await;
    let routes = [
        (Method::GET, "/instances/%FF"),
        (Method::PATCH, "/instances/%FF"),
        (Method::DELETE, "/instances/a%C3%28"),
        (Method::GET, "/instances/%FF/wait?state=Running"),
        (Method::GET, "/instances/%FF/logs"),
        (Method::GET, "/instances/%FF/stat?path=/"),
        (Method::GET, "/instances/%FF/stats"),
        (Method::POST, "/instances/%FF/stop"),
        (Method::POST, "/instances/%FF/start"),
        (Method::GET, "/instances/%FF/exec"),
        (Method::GET, "/instances/%FF/cp"),
        (Method::GET, "/images/%FF"),
        (Method::DELETE, "/images/%ED%A0%80"),
        (Method::POST, "/images/%FF/tag"),
    ];

    for (method, path) in routes {
        let answer = server.send(method, path, Body::from(r#"{"ttl":"1h","target":"a"}"#)).await;

        answer.says(StatusCode::BAD_REQUEST, "Bad Request");
        assert!(answer.message().contains("UTF-8"), "{path}: {answer:?}");
    }
}

/// Where a text is looked for, what is none names nothing.
#[tokio::test]
async fn bytes_that_are_no_text_are_refused_in_bodies_and_find_nothing_in_queries() {
    let server = Server::start().await;

    let body = Body::from(&b"{\"name\":\"\xff\",\"image\":\"b\"}"[..]);
    let body = server.send(Method::POST, "/instances", body).await;
    let name = server.get("/images/%25FF").await;
    let query = server.get("/instances?tags[a]=%FF").await;

    body.says(StatusCode::BAD_REQUEST, "Bad Request");
    name.says(StatusCode::BAD_REQUEST, "invalid_name");
    assert_eq!((query.status, query.body), (StatusCode::OK, json!([])));
}
