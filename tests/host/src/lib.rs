//! What suites and benches stand on: a registry with real images and a server, both started here.
//!
//! Everything here panics on failure, with what the server said: its callers are tests.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::{Body, Client, Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time;

pub use socket::{Frame, Ran, Socket};

pub mod image;
pub mod lent;
pub mod mappings;
pub mod qemu;
pub mod resident;
mod socket;
#[expect(unsafe_code, reason = "ptrace(2), which rustix does not have")]
pub mod trap;

/// How long a guest may take to do what a case waits for.
const PATIENCE: Duration = Duration::from_secs(150);

/// A registry on loopback that serves the storage of `dev/test-images`.
pub const REGISTRY: &str = "127.0.0.1:5000";

/// The smallest image: busybox and nothing else.
pub const BUSYBOX: &str = "127.0.0.1:5000/busybox:latest";

/// Debian as debootstrap makes it.
pub const DEBIAN: &str = "127.0.0.1:5000/debian:bookworm";

/// Debian with systemd, which is its command.
pub const DEBIAN_SYSTEMD: &str = "127.0.0.1:5000/debian-systemd:bookworm";

/// Debian with what measures disks and networks.
pub const DEBIAN_MEASURE: &str = "127.0.0.1:5000/debian-measure:bookworm";

/// What servers here sign tokens with.
pub const SECRET: &str = "the secret of a test";

/// The machine that the cases run on.
#[derive(Debug)]
pub struct TestHost {
    /// The server that most cases share.
    pub server: Server,
    registry: Child,
}

impl TestHost {
    /// Starts both and pulls the small image.
    pub async fn start() -> Self {
        assert!(Path::new("/dev/kvm").exists(), "No /dev/kvm: run this through dev/in-host");
        let registry = start_registry(&registry_storage(), REGISTRY);
        await_port(REGISTRY).await;
        let host = Self { server: Server::start("main").await, registry };
        host.server.pull(BUSYBOX).await;
        host
    }

    /// No instance, no worker, no file of an instance, no mount or control group of ours.
    pub async fn check_nothing_is_left(&self) {
        assert_eq!(self.server.get("/instances").await, json!([]), "instances are left");
        assert_eq!(self.server.get("/devices").await, json!([]), "devices are left");
        let patience = Instant::now() + Duration::from_secs(5);
        while !workers().is_empty() && Instant::now() < patience {
            time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(workers(), Vec::<String>::new(), "workers are left");
        let instances = self.server.data_dir.join("instances");
        let files: Vec<_> = fs::read_dir(instances).into_iter().flatten().flatten().collect();
        assert!(files.is_empty(), "files are left: {files:?}");
        assert_eq!(taps(), Vec::<String>::new(), "interfaces are left");
        while !groups().is_empty() && Instant::now() < patience {
            time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(groups(), Vec::<PathBuf>::new(), "control groups are left");
        let mounts = fs::read_to_string("/proc/mounts").expect("/proc is mounted");
        let ours = format!(" {}/", self.server.data_dir.display());
        assert!(!mounts.contains(&ours), "mounts are left: {mounts}");
    }

    /// After a failed case: makes room for the next. What its own servers left running ends, too.
    pub async fn clear(&self) {
        let list = self.server.get("/instances").await;
        for instance in list.as_array().into_iter().flatten() {
            let id = instance["id"].as_str().unwrap_or_default();
            self.server.call(Method::DELETE, &format!("/instances/{id}"), None).await;
        }
        let volumes = self.server.get("/volumes").await;
        for volume in volumes.as_array().into_iter().flatten() {
            let id = volume["id"].as_str().unwrap_or_default();
            self.server.call(Method::DELETE, &format!("/volumes/{id}"), None).await;
        }
        let devices = self.server.get("/devices").await;
        for device in devices.as_array().into_iter().flatten() {
            let id = device["id"].as_str().unwrap_or_default();
            self.server.call(Method::DELETE, &format!("/devices/{id}"), None).await;
        }
        kill_workers();
        for group in groups() {
            // The server of the case is gone, and nobody else removes it.
            while group.exists() && fs::remove_dir(&group).is_err() {
                time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Ends both.
    pub async fn stop(mut self) {
        self.server.kill();
        self.registry.kill().expect("the registry was running");
        self.registry.wait().expect("the registry was ours");
    }
}

/// A running `ovum serve`.
#[derive(Debug)]
pub struct Server {
    /// Its data folder.
    pub data_dir: PathBuf,
    /// Where it answers.
    pub base_url: String,
    child: Child,
    client: Client,
    token: String,
}

impl Drop for Server {
    /// A case that fails does not get to end its servers.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts one on a data folder of its own under the data disk.
    pub async fn start(name: &str) -> Self {
        let data_dir = Path::new("/var/lib/ovum").join(name);
        Self::start_at(&data_dir).await
    }

    /// Starts one on `data_dir`, which may be another's that was killed.
    pub async fn start_at(data_dir: &Path) -> Self {
        Self::start_as(data_dir, Command::new(ovum())).await
    }

    /// Starts `ovum` by way of `command`.
    pub async fn start_as(data_dir: &Path, command: Command) -> Self {
        Self::start_other(data_dir, &ovum(), command).await
    }

    /// Starts `program`, another `ovum` than the released one, by way of `command`.
    pub async fn start_other(data_dir: &Path, program: &Path, mut command: Command) -> Self {
        let address = free_address();
        // One processor and a small disk shall not be what a case fails for.
        for name in ["OVUM_OVERCOMMIT_CPU", "OVUM_OVERCOMMIT_MEMORY", "OVUM_OVERCOMMIT_DISK"] {
            if command.get_envs().all(|(set, _)| set != name) {
                command.env(name, "1000");
            }
        }
        if !command.get_envs().any(|(name, _)| name == "OVUM_SUBNET") {
            command.env("OVUM_SUBNET", subnet_of(data_dir));
        }
        let child = command
            .args(["serve", "--listen", &address, "--data-dir"])
            .arg(data_dir)
            .env("OVUM_JWT_SECRET", SECRET)
            .spawn()
            .expect("ovum starts");
        let minted = Command::new(program)
            .args(["token", "--data-dir"])
            .arg(data_dir)
            .env("OVUM_JWT_SECRET", SECRET)
            .output()
            .expect("ovum token runs");
        assert!(minted.status.success(), "{}", String::from_utf8_lossy(&minted.stderr));
        let token = String::from_utf8(minted.stdout).expect("a token is text").trim().to_owned();
        let base_url = format!("http://{address}");
        let client = Client::new();
        await_port(&address).await;
        Self { data_dir: data_dir.to_owned(), base_url, child, client, token }
    }

    /// As the kernel does it when memory is short: no warning, no goodbye.
    pub fn kill(&mut self) {
        self.child.kill().expect("the server was running");
        self.child.wait().expect("the server was ours");
    }

    /// As an operator ends one.
    pub fn terminate(&mut self) {
        self.tell_to_end();
        self.child.wait().expect("the server was ours");
    }

    /// The same, but does not wait for it.
    pub fn tell_to_end(&self) {
        let pid = self.pid().to_string();
        let told = Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs");
        assert!(told.success(), "the server was running");
    }

    /// Sends a request; the answer as JSON, or as text if it is none.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        let (status, text) = self.call_text(method, path, body).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Sends a request; the answer as text.
    pub async fn call_text(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> (StatusCode, String) {
        let url = format!("{}{path}", self.base_url);
        let mut request = self.client.request(method, url).bearer_auth(&self.token);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("the server answers");
        (response.status(), response.text().await.expect("the answer ends"))
    }

    /// Sends a request to a server that may be killed meanwhile; nothing if it was.
    pub async fn attempt(
        &self,
        method: Method,
        path: &str,
        body: impl Into<Body>,
    ) -> Option<(StatusCode, Value)> {
        let url = format!("{}{path}", self.base_url);
        let request = self.client.request(method, url).bearer_auth(&self.token).body(body);
        let response = request.send().await.ok()?;
        let (status, text) = (response.status(), response.text().await.ok()?);
        Some((status, serde_json::from_str(&text).unwrap_or(Value::String(text))))
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What a GET that must succeed answers.
    pub async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, None).await;
        assert_eq!(status, StatusCode::OK, "GET {path}: {body}");
        body
    }

    /// Creates an instance that must be accepted.
    pub async fn create(&self, body: Value) -> Value {
        let (status, answer) = self.call(Method::POST, "/instances", Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        answer
    }

    /// Deletes an instance.
    pub async fn delete(&self, name: &str) {
        let path = format!("/instances/{name}");
        let (status, answer) = self.call(Method::DELETE, &path, None).await;
        assert_eq!(status, StatusCode::NO_CONTENT, "DELETE {path}: {answer}");
    }

    /// Runs a command in an instance, over a WebSocket.
    pub async fn exec(&self, name: &str, request: Value) -> Ran {
        let mut socket = self.socket(&format!("/instances/{name}/exec")).await;
        socket.say(&request.to_string()).await;
        socket.until_exit().await
    }

    /// Runs a shell script in an instance.
    pub async fn sh(&self, name: &str, script: &str) -> Ran {
        self.exec(name, json!({ "command": ["sh", "-c", script], "tty": false })).await
    }

    /// Opens a WebSocket that must be accepted.
    pub async fn socket(&self, path: &str) -> Socket {
        let url = format!("{}{path}", self.base_url.replace("http:", "ws:"));
        Socket::open(&url, &self.token).await.expect("the server upgrades")
    }

    /// What an upgrade that is refused is answered with.
    pub async fn refused_socket(&self, path: &str) -> (u16, Value) {
        let url = format!("{}{path}", self.base_url.replace("http:", "ws:"));
        Socket::open(&url, &self.token).await.expect_err("the server refuses")
    }

    /// Starts an instance that does nothing until it is deleted, and waits until it runs.
    pub async fn start_idle(&self, name: &str, image: &str) {
        self.create(json!({
            "name": name, "image": image, "size": "256MB", "vcpus": 1, "cmd": ["sleep", "100000"],
        }))
        .await;
        self.wait(name, "Running").await;
    }

    /// The token that all requests carry.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// Bytes of memory that the server has, all told.
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("the server runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        kib.and_then(|kib| kib.parse::<u64>().ok()).expect("VmRSS is a number of kB") << 10
    }

    /// Time that the server has had on CPUs, in steps of 10 ms.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id()));
        let stat = stat.expect("the server runs");
        // What follows its name, which may have spaces: the 14th and 15th of all fields.
        let (_, fields) = stat.rsplit_once(')').expect("the name is in parentheses");
        let ticks = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>());
        Duration::from_millis(
            10 * ticks.map(|ticks| ticks.expect("ticks are a number")).sum::<u64>(),
        )
    }

    /// Waits for a state and returns the instance as it is then.
    pub async fn wait(&self, name: &str, state: &str) -> Value {
        let path = format!("/instances/{name}/wait?state={state}&timeout=50s");
        let deadline = Instant::now() + PATIENCE;
        let mut answer = self.get(&path).await;
        while answer["timed_out"] == true && Instant::now() < deadline {
            answer = self.get(&path).await;
        }
        let instance = self.get(&format!("/instances/{name}")).await;
        assert_eq!(answer["state"], state, "{answer}\n{instance}\n{}", self.log(name).await);
        instance
    }

    /// The whole log of an instance, as lines.
    pub async fn log(&self, name: &str) -> String {
        let path = format!("/instances/{name}/logs?tail=100000");
        let (status, text) = self.call_text(Method::GET, &path, None).await;
        assert_eq!(status, StatusCode::OK, "{text}");
        text.lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|line| {
                serde_json::from_str::<String>(line).expect("a line is a JSON string") + "\n"
            })
            .collect()
    }

    /// Follows the log until a line of exactly these words; returns the events seen.
    pub async fn follow_until(&self, name: &str, line: &str) -> String {
        let url = format!("{}/instances/{name}/logs?follow=true&tail=1000", self.base_url);
        let request = self.client.get(url).bearer_auth(&self.token);
        let mut response = request.send().await.expect("the server answers");
        let last = format!("data: {}\n\n", Value::from(line));
        let mut seen = String::new();
        let reading = async {
            while !seen.contains(&last) {
                let chunk = response.chunk().await.expect("the stream goes on");
                let Some(chunk) = chunk else { break };
                seen.push_str(&String::from_utf8_lossy(&chunk));
            }
        };
        let outcome = time::timeout(PATIENCE, reading).await;
        assert!(outcome.is_ok() && seen.contains(&last), "{line:?} never came: {seen}");
        seen
    }

    /// Runs a command to its end and returns its log and the stopped instance; deletes it.
    pub async fn run(&self, name: &str, image: &str, argv: &[&str]) -> (String, Value) {
        let body =
            json!({ "name": name, "image": image, "size": "128MB", "vcpus": 1, "cmd": argv });
        self.run_body(body).await
    }

    /// As [`Self::run`], with any body.
    pub async fn run_body(&self, body: Value) -> (String, Value) {
        let name = body["name"].as_str().expect("a body has a name").to_owned();
        self.create(body).await;
        let instance = self.wait(&name, "Stopped").await;
        let log = self.log(&name).await;
        self.delete(&name).await;
        (log, instance)
    }

    /// Pulls an image and waits until it is ready.
    pub async fn pull(&self, image: &str) -> Value {
        let image = self.pull_to_the_end(image).await;
        assert_eq!(image["status"], "ready", "{image}");
        image
    }

    /// Pulls an image and waits until it is ready or failed.
    pub async fn pull_to_the_end(&self, image: &str) -> Value {
        let body = json!({ "name": image });
        let (status, answer) = self.call(Method::POST, "/images", Some(body)).await;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let path = format!("/images/{}", image.replace('/', "%2F"));
        let deadline = Instant::now() + PATIENCE * 2;
        loop {
            let image = self.get(&path).await;
            if matches!(image["status"].as_str(), Some("ready" | "failed")) {
                return image;
            }
            assert!(Instant::now() < deadline, "{image}");
            time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// A subnet that no server on another data folder has: several of them share this host, which
/// would otherwise have two ways to each guest.
pub fn subnet_of(data_dir: &Path) -> String {
    let mut hasher = DefaultHasher::new();
    data_dir.hash(&mut hasher);
    let [high, low, ..] = hasher.finish().to_le_bytes();
    format!("10.{}.{low}.0/24", 128 + high / 2)
}

/// The checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// One of KVM's counters, over all guests that there are now (Documentation/virt/kvm/api.rst,
/// "KVM_GET_STATS_FD" has the same).
pub fn kvm_counter(name: &str) -> u64 {
    let path = Path::new("/sys/kernel/debug/kvm").join(name);
    let text = fs::read_to_string(&path);
    let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    text.trim().parse().expect("a counter is a number")
}

/// The binary under test.
pub fn ovum() -> PathBuf {
    root().join("target/release/ovum")
}

/// Serves `storage` at `address`.
pub fn start_registry(storage: &Path, address: &str) -> Child {
    let port = address.rsplit(':').next().unwrap_or(address);
    Command::new(root().join("dev/registry"))
        .arg(storage)
        .arg(port)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("dev/registry starts")
}

/// The storage that `dev/test-images` made, handed over by the Makefile.
pub fn registry_storage() -> PathBuf {
    env::var_os("OVUM_TEST_IMAGES")
        .map(PathBuf::from)
        .expect("OVUM_TEST_IMAGES names the folder that dev/test-images printed")
}

/// Waits until something listens at `address`.
pub async fn await_port(address: &str) {
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(address).await.is_err() {
        assert!(Instant::now() < deadline, "Nothing listens at {address}");
        time::sleep(Duration::from_millis(20)).await;
    }
}

/// An address of loopback that nothing listens at now.
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("a bound socket has an address").to_string()
}

/// Command lines of all worker processes.
pub fn workers() -> Vec<String> {
    worker_pids().into_iter().filter_map(command_line).collect()
}

/// Names of all interfaces that lead to guests.
pub fn taps() -> Vec<String> {
    let links = fs::read_dir("/sys/class/net").expect("/sys is mounted").flatten();
    let names = links.filter_map(|link| link.file_name().into_string().ok());
    names.filter(|name| name.starts_with("ov") && !name.starts_with("ovum-")).collect()
}

/// The one in the middle, of an odd number of values.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The control groups of all servers' workers.
pub fn groups() -> Vec<PathBuf> {
    let servers = fs::read_dir("/sys/fs/cgroup/ovum").into_iter().flatten().flatten();
    let groups = servers.flat_map(|server| fs::read_dir(server.path()).into_iter().flatten());
    groups.flatten().map(|group| group.path()).filter(|path| path.is_dir()).collect()
}

/// Kills all workers.
pub fn kill_workers() {
    for pid in worker_pids() {
        // One that ends meanwhile is as good as killed.
        let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
    }
}

/// Process id of the worker there is.
pub fn only_worker() -> u32 {
    let [worker] = worker_pids()[..] else { panic!("another guest's end is in the way") };
    worker
}

/// Process ids of all workers.
pub fn worker_pids() -> Vec<u32> {
    processes("ovum-worker")
}

/// Ids of all processes of this name that run.
pub fn processes(name: &str) -> Vec<u32> {
    let is_named = |pid: &u32| {
        let found = fs::read_to_string(format!("/proc/{pid}/comm"));
        found.is_ok_and(|found| found.trim_end() == name)
    };
    // One that has ended keeps its name until it is reaped, but nothing else.
    let runs = |pid: &u32| command_line(*pid).is_some_and(|line| !line.is_empty());
    fs::read_dir("/proc")
        .expect("/proc is mounted")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| is_named(pid) && runs(pid))
        .collect()
}

fn command_line(pid: u32) -> Option<String> {
    let line = fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
    Some(line.replace('\0', " "))
}
