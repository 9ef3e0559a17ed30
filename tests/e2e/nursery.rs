//! Where workers come from, and what they have in common.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use ovum_test_host::mappings::Mapping;
use ovum_test_host::{BUSYBOX, Server, TestHost, only_worker, processes};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::time;

use crate::cases;
use crate::crash::settle;

cases![
    a_worker_is_a_child_of_its_server_and_is_reaped,
    eight_workers_share_a_layout_and_the_ninth_has_another,
    a_worker_that_crashes_is_the_last_with_its_layout,
    a_nursery_that_does_not_answer_is_replaced,
    a_creation_given_up_before_a_worker_is_born_leaves_nothing,
    a_nursery_ends_with_its_server,
];

const NURSERY: &str = "ovum-nursery";
const SIBLINGS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(20);

async fn start(name: &str) -> Server {
    let server = Server::start(name).await;
    server.pull_to_the_end(BUSYBOX).await;
    server
}

async fn boot(server: &Server) -> u32 {
    let body =
        json!({ "name": "born", "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "1000"] });
    server.create(body).await;
    server.wait("born", "Running").await;
    only_worker()
}

/// Where the program of a new worker lies.
async fn layout(server: &Server) -> u64 {
    let lies = program(boot(server).await);
    server.delete("born").await;
    lies
}

fn program(worker: u32) -> u64 {
    Mapping::all_of(worker).first().expect("a process has mappings").range.start
}

/// All processes that a server has started, or that were started for it.
fn children(server: &Server) -> Vec<u32> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // One may end meanwhile, which is no child then.
    let is_child = |pid: &u32| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains(&format!("\nPPid:\t{}\n", server.pid()))
    };
    pids.filter(is_child).collect()
}

fn kill(signal: &str, pid: u32) {
    let status = Command::new("kill").args([signal, &pid.to_string()]).status();
    assert!(status.unwrap().success());
}

/// Returns once a process has ended, and been reaped.
async fn gone(pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    while fs::exists(format!("/proc/{pid}")).unwrap() {
        assert!(Instant::now() < deadline, "process {pid} is still there");
        time::sleep(Duration::from_millis(20)).await;
    }
}

/// The nursery of a server, which has its name a little later than it is there.
async fn nursery_of(server: &Server) -> u32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut named = processes(NURSERY);
        let children = children(server);
        named.retain(|pid| children.contains(pid));
        if let [nursery] = named[..] {
            return nursery;
        }
        assert!(Instant::now() < deadline, "a server has one nursery");
        time::sleep(Duration::from_millis(20)).await;
    }
}

async fn a_worker_is_a_child_of_its_server_and_is_reaped(host: &TestHost) {
    let worker = boot(&host.server).await;
    let children = children(&host.server);

    host.server.delete("born").await;

    assert!(children.contains(&worker), "{worker} is not among {children:?}");
    gone(worker).await;
}

async fn eight_workers_share_a_layout_and_the_ninth_has_another(_: &TestHost) {
    let mut server = start("siblings").await;

    let mut layouts = Vec::new();
    for _ in 0..=SIBLINGS {
        layouts.push(layout(&server).await);
    }

    let (siblings, next) = layouts.split_at(SIBLINGS);
    assert!(siblings.iter().all(|layout| *layout == siblings[0]), "{layouts:x?}");
    assert_ne!(next[0], siblings[0], "{layouts:x?}");
    server.kill();
}

async fn a_worker_that_crashes_is_the_last_with_its_layout(_: &TestHost) {
    let mut server = start("crashes").await;

    let mut layouts = Vec::new();
    for signal in ["-KILL", "-ILL", "-ABRT"] {
        let worker = boot(&server).await;
        layouts.push(program(worker));
        kill(signal, worker);
        server.wait("born", "Stopped").await;
        server.delete("born").await;
    }
    layouts.push(layout(&server).await);

    let [killed, crashed, aborted, last] = layouts[..] else { panic!("four guests had booted") };
    assert_eq!(killed, crashed, "who kills it is the host");
    assert_ne!(crashed, aborted);
    assert_ne!(aborted, last);
    server.kill();
}

async fn a_nursery_that_does_not_answer_is_replaced(_: &TestHost) {
    let mut server = start("deaf").await;

    for signal in ["-KILL", "-STOP"] {
        let deaf = nursery_of(&server).await;
        kill(signal, deaf);
        let worker = boot(&server).await;
        gone(deaf).await;
        server.delete("born").await;
        gone(worker).await;
    }

    assert_eq!(children(&server), [nursery_of(&server).await], "others are left");
    server.kill();
}

async fn a_creation_given_up_before_a_worker_is_born_leaves_nothing(_: &TestHost) {
    let mut server = start("given-up").await;
    kill("-STOP", nursery_of(&server).await);
    let body = json!({ "name": "unborn", "image": BUSYBOX, "size": "128MB" });

    // Long enough for all that comes before a birth, and shorter than a nursery is waited for.
    let creation = server.call(Method::POST, "/instances", Some(body));
    let given_up = time::timeout(Duration::from_secs(3), creation).await.is_err();

    assert!(given_up, "a stopped process has forked");
    assert_eq!(settle(&server).await, Vec::<Value>::new());
    server.kill();
}

async fn a_nursery_ends_with_its_server(_: &TestHost) {
    let mut server = Server::start("childless").await;
    let nursery = nursery_of(&server).await;

    server.kill();

    gone(nursery).await;
}
