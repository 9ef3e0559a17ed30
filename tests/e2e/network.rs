//! Networks: what a guest reaches and what reaches it, with real packets, on a host that has an
//! outside (`outside.rs`).

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::time;

use crate::cases;
use crate::outside::{FAR, NEAR, Outside, ip};
use ovum_test_host::{
    BUSYBOX, DEBIAN_MEASURE, Server, TestHost, ovum, subnet_of, taps, worker_pids,
};

cases![
    a_guest_reaches_its_gateway_and_what_lies_behind_it,
    guests_are_apart_and_the_host_reaches_each,
    a_host_keeps_its_own_services_to_itself,
    what_a_guest_forges_goes_nowhere,
    a_bandwidth_is_what_was_asked_for,
    health_is_asked_by_http_and_by_tcp,
    an_instance_may_go_without_and_has_a_new_address_at_each_start,
    addresses_that_are_used_up_or_taken_are_told,
    a_server_that_may_not_set_up_networks_runs_what_needs_none,
    nothing_of_a_network_outlives_who_used_it,
];

/// Rates are kept within this part of what was asked for.
const TOLERANCE: f64 = 0.05;

/// How often a rate is measured before it counts as too low.
const ATTEMPTS_MAX: usize = 5;

/// The rate that is asked for, in megabits per second.
const RATE_MBPS: f64 = 16.0;

fn data_dir(name: &str) -> PathBuf {
    Path::new("/var/lib/ovum").join(name)
}

/// The gateway of a server's guests.
fn gateway(server: &Server) -> String {
    subnet_of(&server.data_dir).replace(".0/24", ".1")
}

/// An idle guest with a network, and the address it has.
async fn start(server: &Server, name: &str) -> String {
    server.start_idle(name, BUSYBOX).await;
    address(server, name).await
}

async fn address(server: &Server, name: &str) -> String {
    let instance = server.get(&format!("/instances/{name}")).await;
    instance["network"]["ip"].as_str().unwrap_or_default().to_owned()
}

/// What a script prints in a guest, in which it must succeed.
async fn sh(server: &Server, name: &str, script: &str) -> String {
    let (code, output) = attempt(server, name, script).await;
    assert_eq!(code, 0, "{script}: {output}");
    output
}

/// What a script in a guest comes to.
async fn attempt(server: &Server, name: &str, script: &str) -> (i64, String) {
    let ran = server.sh(name, script).await;
    (ran.code, String::from_utf8_lossy(&ran.output).into_owned())
}

/// Serves a page in a guest at port 80.
async fn serve_page(server: &Server, name: &str) {
    let script = "mkdir -p /www && echo well > /www/index.html && httpd -p 80 -h /www";
    sh(server, name, script).await;
}

/// What `address` answers to a request, if it does within two seconds.
fn fetch(address: &str) -> Option<String> {
    let patience = Duration::from_secs(2);
    let address = format!("{address}:80").parse().unwrap();
    let mut stream = TcpStream::connect_timeout(&address, patience).ok()?;
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}

async fn a_guest_reaches_its_gateway_and_what_lies_behind_it(_: &TestHost) {
    let outside = Outside::open();
    outside.tell_addresses(8000);
    let names = outside.serve_names();
    let mut command = Command::new(ovum());
    command.env("OVUM_DNS", FAR);
    let mut server = Server::start_as(&data_dir("reaches"), command).await;
    server.pull(BUSYBOX).await;
    let address = start(&server, "reaches").await;
    let instance = server.get("/instances/reaches").await;
    let gateway = gateway(&server);

    let links = sh(&server, "reaches", "ip -o address show dev eth0; ip route").await;
    let resolver = sh(&server, "reaches", "cat /etc/resolv.conf").await;
    let pinged = sh(&server, "reaches", &format!("ping -c 3 -W 5 {gateway}")).await;
    let fetch = format!("wget -q -O - http://{FAR}:8000/");
    let fetched = sh(&server, "reaches", &fetch).await;
    let looked_up = sh(&server, "reaches", "nslookup far.test").await;
    let stats = server.get("/instances/reaches/stats").await;
    let capabilities = server.get("/capabilities").await;

    let mac = instance["network"]["mac"].as_str().unwrap();
    assert!(mac.starts_with("02:00:00:") && mac.len() == 17, "{instance}");
    assert_eq!(instance["network"]["name"], "default");
    assert!(links.contains(&format!("inet {address}/24")), "{links}");
    assert!(links.contains(&format!("default via {gateway} dev eth0")), "{links}");
    assert_eq!(resolver, format!("nameserver {FAR}\n"));
    assert!(pinged.contains("3 packets received"), "{pinged}");
    assert_eq!(fetched, format!("you are {NEAR}\n"), "the host's address stands for the guest's");
    assert!(looked_up.contains(FAR), "{looked_up}");
    assert!(names.asked().contains(&"far.test".to_owned()));
    assert!(stats["network_rx_bytes"].as_u64() > Some(500), "{stats}");
    assert!(stats["network_tx_bytes"].as_u64() > Some(500), "{stats}");
    assert_eq!(capabilities["network"]["gateway"], gateway.as_str());
    server.delete("reaches").await;
    server.kill();
}

async fn guests_are_apart_and_the_host_reaches_each(host: &TestHost) {
    let server = &host.server;
    let outside = Outside::open();
    let one = start(server, "one").await;
    let two = start(server, "two").await;
    for name in ["one", "two"] {
        serve_page(server, name).await;
    }

    let from_host = [&one, &two].map(|address| fetch(address));
    let ping = format!("ping -c 2 -W 1 {two}");
    let (direct, _) = attempt(server, "one", &ping).await;
    // As a guest would that wants to: by way of the gateway.
    let detour = format!("ip route add {two}/32 via {}; {ping}", gateway(server));
    let (by_gateway, _) = attempt(server, "one", &detour).await;
    let (tcp, _) = attempt(server, "one", &format!("nc -w 2 {two} 80 < /dev/null")).await;
    ip(&format!("-n outside route add {} via {NEAR}", subnet_of(&server.data_dir)));
    let target = one.clone();
    let from_outside = outside.enter(move || fetch(&target));

    for answer in from_host {
        assert!(answer.is_some_and(|answer| answer.ends_with("well\n")), "the host is let in");
    }
    assert_ne!((direct, by_gateway), (0, 0));
    assert!(direct != 0 && by_gateway != 0 && tcp != 0, "{direct} {by_gateway} {tcp}");
    assert_eq!(from_outside, None, "the outside is not let in");
    for name in ["one", "two"] {
        server.delete(name).await;
    }
}

async fn a_host_keeps_its_own_services_to_itself(host: &TestHost) {
    let server = &host.server;
    let _outside = Outside::open();
    start(server, "curious").await;
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = service.local_addr().unwrap().port();

    for address in [gateway(server).as_str(), NEAR, "169.254.169.254"] {
        let script = format!("wget -q -O - http://{address}:{port}/");
        let (code, output) = attempt(server, "curious", &script).await;
        assert_ne!(code, 0, "{address}: {output}");
    }
    service.set_nonblocking(true).unwrap();
    assert!(service.accept().is_err(), "nobody came");
    server.delete("curious").await;
}

/// Another address, another interface's: what a guest sends so is dropped on its way, and what it
/// tells in ARP changes nothing for who has the address.
async fn what_a_guest_forges_goes_nowhere(host: &TestHost) {
    let server = &host.server;
    let outside = Outside::open();
    let names = outside.serve_names();
    let victim = start(server, "victim").await;
    let own = start(server, "forger").await;
    serve_page(server, "victim").await;
    let gateway = gateway(server);
    let ask = |name: &str| format!("nslookup {name}.test {FAR}");
    let with_address = |address: &str, script: &str| {
        format!(
            "ip address flush dev eth0; ip address add {address}/24 dev eth0; \
             ip route add default via {gateway}; {script}"
        )
    };

    sh(server, "forger", &ask("honest")).await;
    for (address, name) in [(victim.as_str(), "victims"), ("10.99.0.1", "strange")] {
        attempt(server, "forger", &with_address(address, &ask(name))).await;
    }
    let arp = format!("arping -A -c 2 -I eth0 {victim}; arping -U -c 2 -I eth0 {victim}");
    attempt(server, "forger", &with_address(&victim, &arp)).await;
    let page = fetch(&victim);
    sh(server, "forger", &with_address(&own, &ask("again"))).await;
    let mac = "02:00:00:0b:ad:00";
    let other_mac = format!("ip link set eth0 address {mac}; {}", ask("other-mac"));
    let (code, _) = attempt(server, "forger", &other_mac).await;

    let asked = names.asked();
    assert_eq!(asked, ["again.test", "honest.test"], "and nothing that was forged");
    assert!(page.is_some_and(|page| page.ends_with("well\n")), "the address is still its owner's");
    assert_ne!(code, 0);
    for name in ["victim", "forger"] {
        server.delete(name).await;
    }
}

/// Megabits per second that the guest and the outside see pass.
async fn iperf3(server: &Server, name: &str, direction: &str) -> f64 {
    let script = format!(
        "iperf3 --format m --time 8 --omit 1 {direction} -c {FAR} | awk '/receiver/ {{print $7}}'"
    );
    sh(server, name, &script).await.trim().parse().unwrap()
}

/// Measures a rate: it is never above what was asked for, nor below, unless a host that stands
/// still for a moment is in the way.
async fn reached(what: &str, measure: impl AsyncFn() -> f64) {
    let mut seen = Vec::new();
    while !seen.last().is_some_and(|ratio| *ratio > 1.0 - TOLERANCE) {
        assert!(seen.len() < ATTEMPTS_MAX, "{what}: {seen:?} of what was asked for");
        let ratio = measure().await / RATE_MBPS;
        assert!(ratio < 1.0 + TOLERANCE, "{what}: {ratio} of what was asked for");
        seen.push(ratio);
    }
    println!("{what}: {seen:?} of what was asked for");
}

async fn a_bandwidth_is_what_was_asked_for(host: &TestHost) {
    let server = &host.server;
    let _outside = Outside::open();
    let mut iperf3_server = Command::new("ip")
        .args(["netns", "exec", "outside", "iperf3", "--server"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    server.pull(DEBIAN_MEASURE).await;
    let instance = server
        .create(json!({
            "name": "limited", "image": DEBIAN_MEASURE, "size": "256MB", "vcpus": 1,
            "cmd": ["sleep", "100000"],
            "network": { "bandwidth_download": "16Mbps", "bandwidth_upload": "16Mbps" },
        }))
        .await;
    assert_eq!(instance["network"]["bandwidth_download"], "2000000B/s");
    server.wait("limited", "Running").await;

    reached("upload", async || iperf3(server, "limited", "").await).await;
    reached("download", async || iperf3(server, "limited", "--reverse").await).await;
    iperf3_server.kill().unwrap();
    iperf3_server.wait().unwrap();
    server.delete("limited").await;
}

/// Waits until an instance is as well as this.
async fn until_health(server: &Server, name: &str, status: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let instance = server.get(&format!("/instances/{name}")).await;
        if instance["health_status"]["status"] == status {
            return instance;
        }
        assert!(Instant::now() < deadline, "never {status}: {instance}");
        time::sleep(Duration::from_millis(50)).await;
    }
}

async fn health_is_asked_by_http_and_by_tcp(host: &TestHost) {
    let server = &host.server;
    let policy = json!({
        "interval": "500ms", "timeout": "500ms", "start_period": "0s", "failure_threshold": 1,
    });
    let check = |kind: &str, fields: Value| {
        let mut check = policy.clone();
        check[kind] = fields;
        json!({ "health_check": check })
    };
    let mut body = check("http", json!({ "port": 80, "path": "/index.html" }));
    for (field, value) in [
        ("name", json!("asked")),
        ("image", json!(BUSYBOX)),
        ("size", json!("128MB")),
        ("cmd", json!(["sleep", "100000"])),
    ] {
        body[field] = value;
    }
    server.create(body).await;
    server.wait("asked", "Running").await;

    let refused = until_health(server, "asked", "unhealthy").await;
    serve_page(server, "asked").await;
    let well = until_health(server, "asked", "healthy").await;
    sh(server, "asked", "rm /www/index.html").await;
    let missing = until_health(server, "asked", "unhealthy").await;
    let body = Some(check("tcp", json!({ "port": 80 })));
    let (status, _) = server.call(Method::PATCH, "/instances/asked", body).await;
    let by_tcp = until_health(server, "asked", "healthy").await;

    let error = |instance: &Value| instance["health_status"]["last_error"].to_string();
    assert!(error(&refused).contains("refused"), "{refused}");
    assert_eq!(well["health_check"]["http"]["expected_status"], 200);
    assert!(error(&missing).contains("status 404, 200 expected"), "{missing}");
    assert_eq!(status, StatusCode::OK);
    assert_eq!(by_tcp["health_check"]["type"], "tcp");
    server.delete("asked").await;
}

async fn an_instance_may_go_without_and_has_a_new_address_at_each_start(host: &TestHost) {
    let server = &host.server;
    let body = json!({
        "name": "without", "image": BUSYBOX, "size": "128MB", "cmd": ["ls", "/sys/class/net"],
        "network": { "enabled": false },
    });
    let (links, without) = server.run_body(body).await;
    let first = start(server, "moves").await;
    server.call(Method::POST, "/instances/moves/stop", None).await;
    let stopped = address(server, "moves").await;
    let interfaces = taps();
    server.call(Method::POST, "/instances/moves/start", None).await;
    server.wait("moves", "Running").await;
    let second = address(server, "moves").await;
    let inside = sh(server, "moves", "ip -o -4 address show dev eth0").await;
    let check = json!({ "health_check": { "tcp": { "port": 80 } } });
    let mut refused = json!({ "name": "unreachable", "image": BUSYBOX, "size": "128MB" });
    refused["network"] = json!({ "enabled": false });
    refused["health_check"] = check["health_check"].clone();
    let (status, refusal) = server.call(Method::POST, "/instances", Some(refused)).await;

    assert_eq!(links, "lo\n");
    let network = json!({ "enabled": false, "ip": null, "mac": null });
    assert_eq!(without["network"], network);
    assert_eq!(stopped, first, "the last one is told");
    assert_eq!(interfaces, Vec::<String>::new(), "a machine that has ended has no interface");
    assert_ne!(second, first);
    assert!(inside.contains(&format!("inet {second}/24")), "{inside}");
    assert_eq!(
        (status, &refusal["code"]),
        (StatusCode::BAD_REQUEST, &json!("invalid_health_check"))
    );
    server.delete("moves").await;
}

/// Both are told when an instance is created, and instances that need no address are not held up.
async fn addresses_that_are_used_up_or_taken_are_told(_: &TestHost) {
    let _outside = Outside::open();
    let with_subnet = |subnet: &str| {
        let mut command = Command::new(ovum());
        command.env("OVUM_SUBNET", subnet);
        command
    };
    let body = |name: &str, network: bool| {
        Some(json!({
            "name": name, "image": BUSYBOX, "size": "128MB", "cmd": ["sleep", "1000"],
            "network": { "enabled": network },
        }))
    };

    let mut small = Server::start_as(&data_dir("small"), with_subnet("10.211.0.0/30")).await;
    small.pull(BUSYBOX).await;
    small.create(body("only", true).unwrap()).await;
    let (used_up, why) = small.call(Method::POST, "/instances", body("more", true)).await;
    small.create(body("without", false).unwrap()).await;
    small.delete("only").await;
    small.create(body("next", true).unwrap()).await;
    for name in ["next", "without"] {
        small.delete(name).await;
    }
    small.kill();
    let mut taken = Server::start_as(&data_dir("taken"), with_subnet("192.0.0.0/16")).await;
    taken.pull(BUSYBOX).await;
    let (collides, route) = taken.call(Method::POST, "/instances", body("nowhere", true)).await;
    taken.create(body("without", false).unwrap()).await;
    taken.delete("without").await;
    taken.kill();

    assert_eq!((used_up, &why["code"]), (StatusCode::CONFLICT, &json!("insufficient_resources")));
    let message = why["message"].as_str().unwrap();
    assert!(message.contains("10.211.0.0/30") && message.contains("--subnet"), "{message}");
    assert_eq!((collides, &route["code"]), (StatusCode::NOT_IMPLEMENTED, &json!("not_supported")));
    let message = route["message"].as_str().unwrap();
    assert!(message.contains("192.0.2.0/24 by ovum-near"), "{message}");
    assert!(message.contains("--subnet"), "{message}");
}

async fn a_server_that_may_not_set_up_networks_runs_what_needs_none(_: &TestHost) {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(ovum());
    let mut server = Server::start_as(&data_dir("meek"), command).await;
    server.pull(BUSYBOX).await;
    let mut body = json!({ "name": "meek", "image": BUSYBOX, "size": "128MB", "cmd": ["true"] });

    let (status, refusal) = server.call(Method::POST, "/instances", Some(body.clone())).await;
    body["network"] = json!({ "enabled": false });
    let (_, without) = server.run_body(body).await;

    assert_eq!((status, &refusal["code"]), (StatusCode::NOT_IMPLEMENTED, &json!("not_supported")));
    assert!(refusal["message"].as_str().unwrap().contains("CAP_NET_ADMIN"), "{refusal}");
    assert_eq!(without["exit_code"], 0);
    assert_eq!(server.get("/instances").await, json!([]));
    server.kill();
}

/// Tables of the packet filter and interfaces, but for those that come with an outside.
fn on_host() -> (Vec<String>, Vec<String>) {
    let tables = Command::new("nft").args(["list", "tables"]).output().unwrap();
    let tables = String::from_utf8(tables.stdout).unwrap();
    let links = fs::read_dir("/sys/class/net").unwrap().flatten();
    let mut links: Vec<_> = links.map(|link| link.file_name().into_string().unwrap()).collect();
    links.sort();
    (tables.lines().map(str::to_owned).collect(), links)
}

/// Killed workers and servers, one that closes: what they had is gone, and what others have is not.
async fn nothing_of_a_network_outlives_who_used_it(_: &TestHost) {
    let foreign = "add table inet foreign; add chain inet foreign c { type filter hook input \
                   priority 0; }; add rule inet foreign c counter";
    assert!(Command::new("nft").arg(foreign).status().unwrap().success());
    ip("link add foreign type bridge");
    let dir = data_dir("outlives");
    let before = on_host();
    let mut server = Server::start_at(&dir).await;
    server.pull(BUSYBOX).await;
    let address = start(&server, "stays").await;
    let during = on_host();

    server.kill();
    let mut server = Server::start_at(&dir).await;
    serve_page(&server, "stays").await;
    let page = fetch(&address);
    let found = server.get("/instances/stays").await;
    let interfaces = taps();
    for pid in worker_pids() {
        Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
    }
    server.wait("stays", "Stopped").await;
    let without_worker = taps();
    server.delete("stays").await;
    server.terminate();
    let after = on_host();

    assert_eq!(during.0.len(), before.0.len() + 1, "{during:?}");
    assert_eq!(during.1.len(), before.1.len() + 2, "{during:?}");
    assert_eq!(found["network"]["ip"], address.as_str());
    assert!(page.is_some_and(|page| page.ends_with("well\n")), "it outlived the server");
    assert_eq!((interfaces.len(), without_worker.len()), (1, 0));
    assert_eq!(after, before);
    let rules = Command::new("nft").args(["list", "table", "inet", "foreign"]).output().unwrap();
    assert!(String::from_utf8_lossy(&rules.stdout).contains("counter"));
    ip("link delete foreign");
    assert!(Command::new("nft").arg("delete table inet foreign").status().unwrap().success());
}
