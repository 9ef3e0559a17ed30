//! Many instances that are asked for at once boot in turns.

use std::fs;
use std::thread;
use std::time::Duration;

use chrono::Utc;
use futures_util::future::join_all;
use futures_util::stream::{FuturesUnordered, StreamExt};
use ovum_agent_proto::report::{Phase, Report};
use ovum_test_host::{BUSYBOX, Server, TestHost, workers};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::cases;
use crate::crash::data_dir;

cases![a_crowd_boots_in_turns, who_waits_for_a_turn_is_told_that_the_server_closes];

/// A turn of the server ends after 5 s, and after half of that when one before it has; what it does
/// of a boot before the worker's first event takes less than the rest of it.
const TURN_MIN: Duration = Duration::from_secs(1);

/// Who has waited for 25 s boots beside others: those that have waited for less did not.
const WAIT_SURE_MS: u64 = 24_000;

/// How far a guest's clock may be from its host's: it is set when they differ by a second.
const CLOCK_S_MAX: i64 = 2;

fn processors() -> usize {
    thread::available_parallelism().unwrap().get()
}

/// More than can boot at once.
fn names() -> Vec<String> {
    (1..=2 * processors() + 8).map(|nth| format!("crowd-{nth}")).collect()
}

fn body(name: &str) -> Value {
    json!({ "name": name, "image": BUSYBOX, "size": "128MB", "vcpus": 1, "cmd": ["sleep", "9999"] })
}

/// From the worker's start to the workload's, in nanoseconds.
fn boot_of(server: &Server, instance: &Value) -> (u64, u64) {
    let id = instance["id"].as_str().unwrap();
    let events = server.data_dir.join("instances").join(id).join("events");
    let events = fs::read_to_string(events).unwrap();
    let at = |is_it: &dyn Fn(&Value) -> bool| {
        let mut events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        events.find(|event| is_it(&event["what"])).unwrap()["at_ns"].as_u64().unwrap()
    };
    let runs = Report::Phase(Phase::WorkloadStarted).encode();
    (at(&|what| what["what"] == "launched"), at(&|what| what["word"] == runs))
}

fn queue_ms(instance: &Value) -> u64 {
    instance["phase_durations_ms"]["queue"].as_u64().unwrap()
}

async fn a_crowd_boots_in_turns(host: &TestHost) {
    let server = &host.server;
    let names = names();

    join_all(names.iter().map(|name| server.create(body(name)))).await;
    let crowd = join_all(names.iter().map(|name| server.wait(name, "Running"))).await;

    let last = crowd.iter().max_by_key(|instance| queue_ms(instance)).unwrap();
    let asked_s = Utc::now().timestamp();
    let clock = server.sh(last["name"].as_str().unwrap(), "date +%s").await.output;
    let clock_s: i64 = String::from_utf8(clock).unwrap().trim().parse().unwrap();
    let answered_s = Utc::now().timestamp();
    let here_s = asked_s - CLOCK_S_MAX..=answered_s + CLOCK_S_MAX;
    assert!(here_s.contains(&clock_s), "{clock_s} s in the guest, {here_s:?} here");

    let in_turn = crowd.iter().filter(|instance| queue_ms(instance) < WAIT_SURE_MS);
    let boots: Vec<_> = in_turn.map(|instance| boot_of(server, instance)).collect();
    let turn_ns = u64::try_from(TURN_MIN.as_nanos()).unwrap();
    let most = boots.iter().map(|&(begun, _)| {
        boots
            .iter()
            .filter(|(from, to)| (*from..*to.min(&(from + turn_ns))).contains(&begun))
            .count()
    });
    let most = most.max().unwrap();
    assert!((1..=processors()).contains(&most), "{most} at once: {boots:?}");
    assert!(boots.len() > processors(), "nobody waited for a turn that came: {crowd:?}");
    join_all(names.iter().map(|name| server.delete(name))).await;
}

async fn who_waits_for_a_turn_is_told_that_the_server_closes(_: &TestHost) {
    let dir = data_dir("closes");
    let mut server = Server::start_at(&dir).await;
    server.pull(BUSYBOX).await;
    let names = names();

    let asked = names.iter().map(async |name| {
        let answer = server.attempt(Method::POST, "/instances", body(name).to_string()).await;
        (name.clone(), answer)
    });
    let mut asked: FuturesUnordered<_> = asked.collect();
    let first = asked.next().await.unwrap();
    server.tell_to_end();
    let mut answers: Vec<_> = asked.collect().await;
    answers.push(first);
    server.terminate();

    let (mut accepted, mut unsure) = (Vec::new(), Vec::new());
    let mut refused = 0;
    for (name, answer) in answers {
        match answer {
            Some((StatusCode::CREATED, _)) => accepted.push(name),
            Some((StatusCode::SERVICE_UNAVAILABLE, said)) => {
                assert_eq!(said["message"], "The server is closing");
                refused += 1;
            }
            // Cut off while it booted.
            None => unsure.push(name),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert!(refused > 0, "all were accepted");
    let mut server = Server::start_at(&dir).await;
    let there = server.get("/instances").await;
    let there = there.as_array().unwrap().iter();
    let there: Vec<_> = there.map(|instance| instance["name"].as_str().unwrap()).collect();
    accepted.extend(unsure.into_iter().filter(|name| there.contains(&name.as_str())));
    assert!(accepted.iter().all(|name| there.contains(&name.as_str())), "{accepted:?}: {there:?}");
    assert_eq!((there.len(), workers().len()), (accepted.len(), accepted.len()));
    join_all(accepted.iter().map(|name| server.wait(name, "Running"))).await;
    join_all(accepted.iter().map(|name| server.delete(name))).await;
    server.terminate();
}
