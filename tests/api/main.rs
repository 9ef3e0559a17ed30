//! The HTTP surface against a real server on a folder of its own, without KVM: everything up to
//! the start of a worker.

#![expect(clippy::unwrap_used, reason = "a step that fails is a test that fails")]

mod bad_input;
mod process;

use std::fs;
use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Method, Request, StatusCode};
use futures_util::future::join_all;
use ovum::api;
use ovum::config::{CapacityConfig, Config, HotplugConfig, ImagesConfig, Limits};
use ovum::images::digest::Digest;
use ovum::server::Opened;
use ovum::token::Secret;
use ovum_test_host::image::tiny_archive;
use rusqlite::Connection;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task;
use tower::ServiceExt;

const SECRET: &str = "the secret of a test";
const HOUR: Duration = Duration::from_secs(3600);

/// The image that is loaded.
const IMAGE: &str = "docker.io/library/tiny:latest";

/// A server, asked without a network in between.
struct Server {
    dir: TempDir,
    router: Router,
    opened: Opened,
    token: String,
}

/// An answer, read to its end.
#[derive(Debug)]
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Value,
}

impl Server {
    async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    async fn start_in(dir: TempDir) -> Self {
        let opened = Opened::open(&config(dir.path())).await.unwrap();
        let router = api::router(opened.app.clone());
        let token = Secret::new(SECRET).mint("test", HOUR, None);
        Self { dir, router, opened, token }
    }

    /// One with an image that is ready.
    async fn with_image() -> Self {
        let server = Self::start().await;
        let path = "/images/from-archive?name=tiny";
        let answer = server.send(Method::POST, path, Body::from(tiny_archive())).await;
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{answer:?}");
        let name = IMAGE.parse().unwrap();
        let image = server.opened.app.images.settled(&name).await.unwrap();
        assert_eq!(image.error, None);
        server
    }

    /// Ends it as a killed one, except that its tasks end; returns its folder.
    async fn stop(self) -> TempDir {
        drop(self.router);
        self.opened.close().await;
        self.dir
    }

    async fn send(&self, method: Method, path: &str, body: Body) -> Answer {
        let authorization = format!("Bearer {}", self.token);
        self.send_as(Some(&authorization), method, path, body).await
    }

    async fn send_as(
        &self,
        authorization: Option<&str>,
        method: Method,
        path: &str,
        body: Body,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let response = self.router.clone().oneshot(request.body(body).unwrap()).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = to_bytes(body, usize::MAX).await.unwrap();
        let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| text());
        Answer { status: parts.status, headers: parts.headers, body }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send(Method::GET, path, Body::empty()).await
    }

    async fn delete(&self, path: &str) -> Answer {
        self.send(Method::DELETE, path, Body::empty()).await
    }

    async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(Method::POST, path, Body::from(body.to_string())).await
    }

    fn instance_folders(&self) -> Vec<String> {
        let folders = fs::read_dir(self.dir.path().join("data/instances")).unwrap();
        folders.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

impl Answer {
    fn says(&self, status: StatusCode, code: &str) {
        assert_eq!((self.status, &self.body["code"]), (status, &json!(code)), "{self:?}");
        let retry = self.headers.get("x-should-retry").map(|value| value.to_str().unwrap());
        assert_eq!(retry, Some("false"), "clients would ask again: {self:?}");
    }

    fn message(&self) -> &str {
        self.body["message"].as_str().unwrap_or_default()
    }
}

/// A configuration whose KVM device is not there.
fn config(dir: &Path) -> Config {
    let kernel = dir.join("vmlinux");
    let agent = dir.join("ovum-agent");
    fs::write(&kernel, b"no kernel").unwrap();
    fs::write(&agent, b"no agent").unwrap();
    Config {
        data_dir: dir.join("data"),
        listen: Vec::new(),
        jwt_secret: Some(SECRET.to_owned()),
        kernel,
        shares_kernel: true,
        agent,
        kvm: dir.join("kvm"),
        limits: Limits { body_bytes_max: 64 << 10, has_network: false, ..Limits::default() },
        images: ImagesConfig {
            insecure_registries: Vec::new(),
            jobs_max: 1,
            packed_bytes_max: 1 << 30,
            unpacked_bytes_max: 1 << 30,
            free_bytes_min: 0,
        },
        capacity: CapacityConfig::default(),
        // A test changes nothing of the machine it runs on.
        network: None,
        hotplug: HotplugConfig::default(),
    }
}

#[tokio::test]
async fn health_and_the_document_need_no_token() {
    let server = Server::start().await;

    let health = server.send_as(None, Method::GET, "/health", Body::empty()).await;
    let document = server.send_as(None, Method::GET, "/spec.json", Body::empty()).await;

    assert_eq!((health.status, health.body), (StatusCode::OK, json!({ "status": "ok" })));
    let paths = document.body["paths"].as_object().unwrap().keys().collect::<Vec<_>>();
    assert_eq!(
        paths,
        [
            "/capabilities",
            "/devices",
            "/devices/available",
            "/devices/{id}",
            "/health",
            "/images",
            "/images/from-archive",
            "/images/{name}",
            "/images/{name}/tag",
            "/instances",
            "/instances/{id}",
            "/instances/{id}/cp",
            "/instances/{id}/exec",
            "/instances/{id}/logs",
            "/instances/{id}/start",
            "/instances/{id}/stat",
            "/instances/{id}/stats",
            "/instances/{id}/stop",
            "/instances/{id}/volumes/{volumeId}",
            "/instances/{id}/wait",
            "/resources",
            "/resources/memory/reclaim",
            "/volumes",
            "/volumes/from-archive",
            "/volumes/{id}",
        ]
    );
    let schemas = &document.body["components"]["schemas"];
    let [upkeep, create] = [0, 1].map(|part| &schemas["CreateInstance"]["allOf"][part]);
    assert_eq!(create["required"], json!(["image", "name"]));
    assert_eq!(create["properties"]["vcpus"]["type"], json!(["integer", "null"]));
    assert_eq!(upkeep["$ref"], "#/components/schemas/UpkeepFields");
    assert_eq!(schemas["UpdateInstance"]["allOf"][0], *upkeep);
    assert_eq!(schemas["UpkeepFields"]["properties"]["ttl"]["type"], json!(["string", "null"]));
}

#[tokio::test]
async fn who_may_do_what_is_said_by_the_token() {
    let server = Server::start().await;
    let get = async |authorization: Option<&str>| {
        let answer = server.send_as(authorization, Method::GET, "/instances", Body::empty()).await;
        (answer.status.as_u16(), answer.body)
    };
    let bearer = |scopes: Option<&str>| {
        let scopes = scopes.map(|scope| vec![scope.to_owned()]);
        format!("bearer {}", Secret::new(SECRET).mint("test", HOUR, scopes))
    };
    let unauthorized = |message: &str| (401, json!({ "code": "Unauthorized", "message": message }));

    assert_eq!(get(None).await, unauthorized("authorization header required"));
    assert_eq!(get(Some("Basic x")).await, unauthorized("invalid authorization header format"));
    assert_eq!(get(Some("Bearer")).await, unauthorized("invalid authorization header format"));
    assert_eq!(get(Some("Bearer x.y.z")).await, unauthorized("invalid token"));
    assert_eq!(get(Some(&bearer(None))).await, (200, json!([])));
    assert_eq!(get(Some(&bearer(Some("instance:read")))).await, (200, json!([])));
    let message = "missing required scope: instance:read";
    let forbidden = (403, json!({ "code": "Forbidden", "message": message }));
    assert_eq!(get(Some(&bearer(Some("image:read")))).await, forbidden);
}

#[tokio::test]
async fn what_the_server_can_do_is_told_to_those_who_may_know() {
    let server = Server::start().await;
    let as_one_with = async |scope: &str| {
        let token = Secret::new(SECRET).mint("test", HOUR, Some(vec![scope.to_owned()]));
        let bearer = format!("Bearer {token}");
        server.send_as(Some(&bearer), Method::GET, "/capabilities", Body::empty()).await
    };

    let told = as_one_with("resource:read").await.body;
    let refused = as_one_with("instance:read").await;

    let features = ["balloon-control", "disk-io-limit", "hotplug-memory", "vsock"];
    let runtime = json!([{ "name": "native", "available": false, "features": features }]);
    assert_eq!(told["runtimes"], runtime, "there is no KVM");
    assert_eq!(told["features"], json!(["devices", "exec", "images", "instances", "logs"]));
    assert_eq!(told["host"], json!({ "os": "linux", "arch": "amd64" }));
    assert_eq!(
        (refused.status, &refused.body["code"]),
        (StatusCode::FORBIDDEN, &json!("Forbidden"))
    );
}

#[tokio::test]
async fn the_document_can_be_read_by_people_too() {
    let server = Server::start().await;
    let get = async |path: &str| server.send_as(None, Method::GET, path, Body::empty()).await;

    let page = get("/swagger").await;
    let yaml = get("/spec.yaml").await;

    assert!(page.body.as_str().unwrap().contains("/spec.json"), "{page:?}");
    assert_eq!(yaml.headers["content-type"], "application/vnd.oai.openapi");
    assert!(yaml.body.as_str().unwrap().contains("\n  \"/instances\":\n"), "{yaml:?}");
}

#[tokio::test]
async fn a_stopped_instance_costs_nothing() {
    let server = stopped_instances(&["one"]).await;

    let stats = server.get("/instances/one/stats").await;

    assert_eq!(
        stats.body,
        json!({
            "instance_id": "one", "instance_name": "name-of-one", "cpu_seconds": 0.0,
            "memory_rss_bytes": 0, "memory_vms_bytes": 0, "network_rx_bytes": 0,
            "network_tx_bytes": 0, "allocated_vcpus": 1, "allocated_memory_bytes": 1 << 30,
        })
    );
    server.get("/instances/two/stats").await.says(StatusCode::NOT_FOUND, "not_found");
}

#[tokio::test]
async fn what_is_not_routed_is_told_in_the_family_of_the_middleware() {
    let server = Server::start().await;

    server.get("/nothing").await.says(StatusCode::NOT_FOUND, "Not Found");
    server.get("/instances/%ff").await.says(StatusCode::BAD_REQUEST, "Bad Request");
    server.get("/images/%ff").await.says(StatusCode::BAD_REQUEST, "Bad Request");
    server.delete("/instances").await.says(StatusCode::METHOD_NOT_ALLOWED, "Method Not Allowed");
    let tagless = server.post("/images/tiny", &json!({ "target": "x" })).await;
    tagless.says(StatusCode::NOT_FOUND, "Not Found");
}

#[tokio::test]
async fn what_the_contract_has_and_this_server_has_not_yet_is_no_404() {
    let server = Server::start().await;

    for path in ["/v2/", "/builds", "/instances/one/standby"] {
        let answer = server.post(path, &json!({})).await;
        answer.says(StatusCode::NOT_IMPLEMENTED, "not_supported");
        assert!(answer.message().contains(path), "{answer:?}");
    }
    server.get("/instances/one/other").await.says(StatusCode::NOT_FOUND, "Not Found");
}

#[tokio::test]
async fn a_body_of_the_wrong_shape_is_told_which_field() {
    let server = Server::start().await;
    for (fields, word) in [
        (json!({ "name": "a", "image": 7 }), "image"),
        (json!({ "name": "a", "image": "b", "env": { "A": 1 } }), "env.A"),
        (json!({ "name": "a", "image": "b", "vcpus": "two" }), "vcpus"),
        (json!({ "name": "a", "image": "b", "hypervisor": "xen" }), "hypervisor"),
        (json!({ "image": "b" }), "name"),
        (json!(["a"]), "expected"),
    ] {
        let answer = server.post("/instances", &fields).await;
        answer.says(StatusCode::BAD_REQUEST, "Bad Request");
        assert!(answer.message().contains(word), "{fields}: {answer:?}");
    }
    let garbage = server.send(Method::POST, "/instances", Body::from("{\"name\"")).await;
    garbage.says(StatusCode::BAD_REQUEST, "Bad Request");
    let large = json!({ "name": "a", "image": "b", "cmd": ["x".repeat(100_000)] });
    let large = server.post("/instances", &large).await;
    large.says(StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large");
}

#[tokio::test]
async fn memory_is_reclaimed_from_nobody_if_nobody_runs() {
    let server = Server::start().await;

    let body = json!({ "reclaim_bytes": 1 << 30, "hold_for": "1m", "dry_run": true });
    let answer = server.post("/resources/memory/reclaim", &body).await;

    assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
    let body = answer.body;
    assert_eq!(body["requested_reclaim_bytes"], 1 << 30);
    assert_eq!((&body["planned_reclaim_bytes"], &body["actions"]), (&json!(0), &json!([])));
    assert!(body["host_available_bytes"].as_u64() > Some(0), "{body}");
    for bad in [json!({ "reclaim_bytes": -1 }), json!({}), json!({ "reclaim_bytes": "much" })] {
        let answer = server.post("/resources/memory/reclaim", &bad).await;
        answer.says(StatusCode::BAD_REQUEST, "Bad Request");
    }
    let bad = json!({ "reclaim_bytes": 1, "hold_for": "2h" });
    let answer = server.post("/resources/memory/reclaim", &bad).await;
    answer.says(StatusCode::BAD_REQUEST, "invalid_request");
}

#[tokio::test]
async fn each_bad_value_has_its_code() {
    let server = Server::start().await;
    for (field, value, status, code) in [
        ("size", json!("1.5GB"), 400, "invalid_size"),
        ("overlay_size", json!("10TB"), 400, "invalid_overlay_size"),
        ("hotplug_size", json!("x"), 400, "invalid_hotplug_size"),
        ("disk_io_bps", json!("x"), 400, "invalid_disk_io_bps"),
        ("vcpus", json!(1000), 400, "invalid_request"),
        ("platform", json!("Linux"), 400, "invalid_platform"),
        ("platform", json!("linux/arm64"), 404, "platform_not_available"),
        ("ttl", json!("soon"), 400, "invalid_ttl"),
        ("network", json!({ "bandwidth_upload": "x" }), 400, "invalid_bandwidth_upload"),
        ("auto_standby", json!({ "enabled": true }), 400, "invalid_auto_standby"),
        ("health_check", json!({ "type": "tcp" }), 400, "invalid_health_check"),
        ("restart_policy", json!({ "backoff": "x" }), 400, "invalid_restart_policy"),
        (
            "snapshot_policy",
            json!({ "standby_compression_delay": "x" }),
            400,
            "invalid_snapshot_policy",
        ),
        ("image", json!("a b"), 400, "invalid_name"),
        ("name", json!("Upper"), 400, "Bad Request"),
        ("tags", json!({ "": "x" }), 400, "invalid_request"),
        ("expires_at", json!("2001-01-01T00:00:00Z"), 400, "invalid_expires_at"),
        ("health_check", json!({ "tcp": { "port": 1 } }), 400, "invalid_health_check"),
        ("network", json!({ "egress": { "enabled": true } }), 501, "not_supported"),
        ("network", json!({ "enabled": true }), 501, "not_supported"),
    ] {
        let mut body = json!({ "name": "web", "image": "nginx" });
        body[field] = value;
        let answer = server.post("/instances", &body).await;
        answer.says(StatusCode::from_u16(status).unwrap(), code);
        assert!(answer.message().contains(field), "{answer:?}");
    }
    assert_eq!(server.instance_folders(), [""; 0]);
}

#[tokio::test]
async fn an_image_is_read_however_its_name_is_encoded() {
    let server = Server::with_image().await;

    for name in [
        "tiny",
        IMAGE,
        "docker.io%2Flibrary%2Ftiny:latest",
        "docker.io%252Flibrary%252Ftiny:latest",
    ] {
        let answer = server.get(&format!("/images/{name}")).await;
        assert_eq!(answer.status, StatusCode::OK, "{name}: {answer:?}");
        assert_eq!(answer.body["name"], IMAGE);
        assert_eq!(answer.body["status"], "ready");
        assert_eq!(answer.body["cmd"], json!(["/bin/tiny"]));
    }
    server.get("/images/other").await.says(StatusCode::NOT_FOUND, "not_found");
    server.get("/images/A%20B").await.says(StatusCode::BAD_REQUEST, "invalid_name");
    let list = server.get("/images").await.body;
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(server.get("/images?tags[team]=one").await.body, json!([]));
}

#[tokio::test]
async fn a_tag_is_another_name_until_it_is_deleted() {
    let server = Server::with_image().await;
    let tag = async |name: &str, target: &str| {
        server.post(&format!("/images/{name}/tag"), &json!({ "target": target })).await
    };

    let tagged = tag("docker.io%2Flibrary%2Ftiny:latest", "other:v1").await;
    let deleted = server.delete("/images/tiny").await;
    let read = server.get("/images/other:v1").await;

    assert_eq!(tagged.status, StatusCode::CREATED);
    assert_eq!(tagged.body["name"], "docker.io/library/other:v1");
    assert_eq!((deleted.status, deleted.body), (StatusCode::NO_CONTENT, json!("")));
    assert_eq!(read.body["digest"], tagged.body["digest"]);
    tag("tiny", "x").await.says(StatusCode::NOT_FOUND, "not_found");
    let digest = read.body["digest"].as_str().unwrap();
    tag("other:v1", &format!("x@{digest}")).await.says(StatusCode::BAD_REQUEST, "invalid_name");
    server.delete("/images/tiny").await.says(StatusCode::NOT_FOUND, "not_found");
}

/// Nobody listens there, and the answer says where.
#[tokio::test]
async fn a_registry_that_cannot_be_reached_is_named() {
    let server = Server::start().await;

    let answer = server.post("/images", &json!({ "name": "127.0.0.1:1/none:here" })).await;

    assert_eq!(answer.status, StatusCode::INTERNAL_SERVER_ERROR, "{answer:?}");
    assert!(answer.message().contains("127.0.0.1:1"), "{answer:?}");
    assert_eq!(answer.headers.get("x-should-retry"), None, "it may be there next time");
}

#[tokio::test]
async fn a_host_without_kvm_says_so_and_keeps_nothing() {
    let server = Server::with_image().await;
    let body = json!({ "name": "web", "image": "tiny", "size": "128MB", "overlay_size": "64MB" });
    let kvm = server.dir.path().join("kvm");

    let missing = server.post("/instances", &body).await;
    fs::write(&kvm, b"").unwrap();
    let other = server.post("/instances", &body).await;

    for answer in [missing, other] {
        answer.says(StatusCode::INTERNAL_SERVER_ERROR, "internal_error");
        assert!(answer.message().contains(&kvm.display().to_string()), "{answer:?}");
    }
    assert_eq!(server.instance_folders(), [""; 0]);
    assert_eq!(server.get("/instances").await.body, json!([]));
    let deleted = server.delete("/images/tiny").await;
    assert_eq!(deleted.status, StatusCode::NO_CONTENT, "nothing holds the image: {deleted:?}");
}

/// All of them fail, for want of KVM, and none because another one held the name.
#[tokio::test]
async fn a_name_is_free_again_after_a_creation_that_failed() {
    let server = Server::with_image().await;
    let body = json!({ "name": "web", "image": "tiny", "size": "128MB", "overlay_size": "64MB" });

    for _ in 0..3 {
        let answer = server.post("/instances", &body).await;
        answer.says(StatusCode::INTERNAL_SERVER_ERROR, "internal_error");
    }
    let at_once = join_all((0..4).map(|_| server.post("/instances", &body))).await;

    for answer in at_once {
        let code = answer.body["code"].as_str().unwrap();
        assert!(["internal_error", "name_conflict"].contains(&code), "{answer:?}");
    }
    assert_eq!(server.instance_folders(), [""; 0]);
}

#[tokio::test]
async fn an_instance_that_is_not_there_is_not_found() {
    let server = Server::start().await;

    for path in ["/instances/x", "/instances/x/logs", "/instances/x/wait?state=Running"] {
        let answer = server.get(path).await;
        answer.says(StatusCode::NOT_FOUND, "not_found");
        assert_eq!(answer.message(), "resource not found");
    }
    server.delete("/instances/x").await.says(StatusCode::NOT_FOUND, "not_found");
    server.get("/instances?state=running").await.says(StatusCode::BAD_REQUEST, "Bad Request");
    let wait = server.get("/instances/x/wait?state=Somewhere").await;
    wait.says(StatusCode::BAD_REQUEST, "invalid_state");
    let wait = server.get("/instances/x/wait?state=Running&timeout=-1s").await;
    wait.says(StatusCode::BAD_REQUEST, "invalid_timeout");
}

#[tokio::test]
async fn a_second_server_on_the_same_folder_is_refused() {
    let server = Server::start().await;

    let second = Opened::open(&config(server.dir.path())).await;

    let error = second.err().map(|error| error.to_string()).unwrap_or_default();
    assert!(error.contains("in use by another server"), "{error}");
    let dir = server.stop().await;
    assert!(Opened::open(&config(dir.path())).await.is_ok());
}

/// What a killed server leaves of an instance that nobody was told of, and files of nobody.
#[tokio::test]
async fn what_a_killed_server_left_half_made_is_gone_after_the_next_start() {
    let server = Server::with_image().await;
    let dir = server.stop().await;
    let data = dir.path().join("data");
    let digest = Digest::of(b"any");
    let record = |name: &str, phase: &str, end: Value| {
        json!({
            "id": name, "digest": digest.to_string(), "created_at": "2026-01-02T03:04:05Z",
            "phase": phase, "timeline": { "asked": 1 }, "end": end,
            "spec": {
                "name": name, "image": IMAGE, "memory_bytes": 1 << 30, "overlay_bytes": 1 << 30,
                "vcpus": 1, "env": {}, "tags": {}, "hypervisor": "native", "agent": true,
                "entrypoint": [], "cmd": [],
            },
        })
    };
    let ended = json!({
        "at": "2026-01-02T03:05:05Z", "started_at": null,
        "how": { "exit_code": 7, "exit_message": "exit code 7", "error": null },
    });
    let records = Connection::open(data.join("records.db")).unwrap();
    let insert = "INSERT INTO instances (id, name, json) VALUES (?1, ?1, ?2)";
    for (name, phase, end) in [
        ("half-made", "creating", json!(null)),
        ("half-gone", "deleting", json!(null)),
        ("ended", "kept", ended.clone()),
        ("lost", "kept", json!(null)),
        ("half-started", "starting", ended),
        ("half-stopped", "stopping", json!(null)),
    ] {
        records.execute(insert, [name, &record(name, phase, end).to_string()]).unwrap();
        fs::create_dir(data.join("instances").join(name)).unwrap();
    }
    records.execute(insert, ["unreadable", "{}"]).unwrap();
    for name in ["unreadable", "nobodys"] {
        fs::create_dir(data.join("instances").join(name)).unwrap();
    }
    drop(records);

    let server = Server::start_in(dir).await;

    let mut folders = server.instance_folders();
    folders.sort();
    assert_eq!(folders, ["ended", "half-started", "half-stopped", "lost", "unreadable"]);
    let list = server.get("/instances").await.body;
    assert_eq!(list.as_array().unwrap().len(), 4);
    let undone = server.get("/instances/half-started").await.body;
    assert_eq!((&undone["state"], &undone["exit_code"]), (&json!("Stopped"), &json!(7)));
    let finished = server.get("/instances/half-stopped").await.body;
    assert_eq!(finished["state"], "Stopped");
    let ended = server.get("/instances/ended").await.body;
    assert_eq!((&ended["state"], &ended["exit_code"]), (&json!("Stopped"), &json!(7)));
    assert_eq!(ended["stopped_at"], "2026-01-02T03:05:05Z");
    let lost = server.get("/instances/lost").await.body;
    assert_eq!(lost["state"], "Stopped");
    assert!(lost["state_error"].as_str().unwrap().contains("without a word"), "{lost}");
    let wait = server.get("/instances/lost/wait?state=Running").await.body;
    assert_eq!((&wait["state"], &wait["timed_out"]), (&json!("Stopped"), &json!(false)));
    assert_eq!(server.delete("/instances/lost").await.status, StatusCode::NO_CONTENT);
    assert_eq!(server.get("/instances/lost").await.status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn instances_are_found_by_id_name_and_the_beginning_of_an_id() {
    let server = stopped_instances(&["aaa-first", "aab-second"]).await;

    let find = async |key: &str| server.get(&format!("/instances/{key}")).await;

    assert_eq!(find("aaa-first").await.body["name"], "name-of-aaa-first");
    assert_eq!(find("name-of-aab-second").await.body["id"], "aab-second");
    assert_eq!(find("aab").await.body["id"], "aab-second");
    find("aa").await.says(StatusCode::NOT_FOUND, "ambiguous");
    find("b").await.says(StatusCode::NOT_FOUND, "not_found");
}

/// Up to the start of a worker, for want of KVM.
#[tokio::test]
async fn a_start_that_fails_leaves_the_instance_stopped_as_it_was() {
    let server = Server::with_image().await;
    let digest = server.get("/images/tiny").await.body["digest"].as_str().unwrap().to_owned();
    let dir = server.stop().await;
    keep_stopped(&dir, "one", &digest);
    keep_stopped(&dir, "imageless", &Digest::of(b"any").to_string());
    let overlay = dir.path().join("data/instances/one/overlay.ext4");
    let server = Server::start_in(dir).await;
    let start = async |body: &str| {
        server.send(Method::POST, "/instances/one/start", Body::from(body.to_owned())).await
    };

    let stopped = server.send(Method::POST, "/instances/one/stop", Body::empty()).await;
    start("").await.says(StatusCode::INTERNAL_SERVER_ERROR, "internal_error");
    fs::write(overlay, b"").unwrap();
    let without_kvm = start("{}").await;
    without_kvm.says(StatusCode::INTERNAL_SERVER_ERROR, "internal_error");
    start(r#"{"cmd": "sh"}"#).await.says(StatusCode::BAD_REQUEST, "Bad Request");
    start(r#"{"cmd": ["a\u0000b"]}"#).await.says(StatusCode::BAD_REQUEST, "invalid_request");
    start("{").await.says(StatusCode::BAD_REQUEST, "Bad Request");
    let imageless = server.post("/instances/imageless/start", &json!({})).await;
    imageless.says(StatusCode::NOT_FOUND, "not_found");
    server.post("/instances/none/start", &json!({})).await.says(StatusCode::NOT_FOUND, "not_found");

    assert_eq!((stopped.status, &stopped.body["state"]), (StatusCode::OK, &json!("Stopped")));
    assert!(without_kvm.message().contains("kvm"), "{without_kvm:?}");
    let instance = server.get("/instances/one").await.body;
    assert_eq!((&instance["state"], &instance["exit_code"]), (&json!("Stopped"), &json!(0)));
    assert_eq!(instance["stopped_at"], "2026-01-02T03:05:05Z");
}

#[tokio::test]
async fn how_an_instance_is_looked_after_can_be_changed() {
    let server = stopped_instances(&["one"]).await;
    let patch = async |body: Value| {
        server.send(Method::PATCH, "/instances/one", Body::from(body.to_string())).await
    };

    let policy = json!({ "policy": "on_failure", "backoff": "1s", "stable_after": "1m" });
    let check = json!({ "exec": { "command": ["true"] }, "interval": "1m" });
    let changed = patch(json!({ "restart_policy": policy, "health_check": check })).await.body;
    let mortal = patch(json!({ "ttl": "1h" })).await.body;
    let immortal = patch(json!({ "ttl": "0s" })).await.body;
    let bare = patch(json!({
        "health_check": { "type": "none" }, "restart_policy": { "policy": "never" },
    }))
    .await;

    let expected = json!({
        "policy": "on_failure", "backoff": "1s", "max_attempts": 0, "stable_after": "1m0s",
    });
    assert_eq!(changed["restart_policy"], expected);
    assert_eq!(changed["health_check"]["interval"], "1m0s");
    assert_eq!(changed["health_status"]["status"], "unknown", "it does not run");
    assert!(changed.get("restart_status").is_none(), "it ended well: {changed}");
    assert!(mortal["expires_at"].is_string() && immortal["expires_at"].is_null(), "{mortal}");
    assert!(bare.body.get("restart_policy").is_none(), "{bare:?}");
    assert_eq!(bare.body["health_status"]["status"], "disabled");
    patch(json!({})).await.says(StatusCode::BAD_REQUEST, "invalid_request");
    patch(json!({ "env": { "A": "b" } })).await.says(StatusCode::BAD_REQUEST, "invalid_request");
    patch(json!({ "ttl": "x" })).await.says(StatusCode::BAD_REQUEST, "invalid_ttl");
    let nobody = server.send(Method::PATCH, "/instances/two", Body::from(r#"{"ttl":"1h"}"#)).await;
    nobody.says(StatusCode::NOT_FOUND, "not_found");
}

/// Its image is not there, so that no attempt works.
#[tokio::test]
async fn an_instance_that_ended_badly_is_tried_again_and_then_given_up() {
    let server = stopped_instances(&["one"]).await;
    let policy = json!({ "policy": "always", "backoff": "1ms", "max_attempts": 1 });
    let body = Body::from(json!({ "restart_policy": policy }).to_string());

    let mut instance = server.send(Method::PATCH, "/instances/one", body).await.body;
    while instance["restart_status"]["blocked_reason"].is_null() {
        task::yield_now().await;
        instance = server.get("/instances/one").await.body;
    }
    let dir = server.stop().await;
    let server = Server::start_in(dir).await;
    let later = server.get("/instances/one").await.body;
    let body = Body::from(r#"{"restart_policy":{"policy":"never"}}"#);
    let pardoned = server.send(Method::PATCH, "/instances/one", body).await.body;
    server.send(Method::POST, "/instances/one/stop", Body::empty()).await;
    let body = Body::from(r#"{"restart_policy":{"policy":"always","backoff":"1ms"}}"#);
    let stopped = server.send(Method::PATCH, "/instances/one", body).await.body;

    assert_eq!((&instance["state"], &instance["exit_code"]), (&json!("Stopped"), &json!(0)));
    let status = &instance["restart_status"];
    assert_eq!(
        (&status["attempts"], &status["blocked_reason"]),
        (&json!(1), &json!("max_attempts_exceeded"))
    );
    assert!(status["last_attempt_at"].is_string() && status["next_attempt_at"].is_null());
    assert_eq!(&later["restart_status"], status, "another server knows it");
    assert!(pardoned.get("restart_status").is_none(), "{pardoned}");
    assert_eq!(stopped["restart_status"]["blocked_reason"], "manual_stop");
}

#[tokio::test]
async fn an_instance_whose_time_is_over_is_deleted() {
    let server = stopped_instances(&["one", "two"]).await;
    let patch = async |path: &str, body: &str| {
        server.send(Method::PATCH, path, Body::from(body.to_owned())).await
    };

    let soon = patch("/instances/one", r#"{"ttl":"1ms"}"#).await;
    let later = patch("/instances/two", r#"{"ttl":"1h"}"#).await;
    while server.get("/instances/one").await.status == StatusCode::OK {
        task::yield_now().await;
    }
    let dir = server.stop().await;
    let records = Connection::open(dir.path().join("data/records.db")).unwrap();
    let past = "UPDATE instances SET json = json_set(json, '$.expires_at', '2026-01-01T00:00:00Z')";
    records.execute(past, []).unwrap();
    drop(records);
    let server = Server::start_in(dir).await;
    while server.get("/instances/two").await.status == StatusCode::OK {
        task::yield_now().await;
    }

    assert_eq!((soon.status, later.status), (StatusCode::OK, StatusCode::OK));
    assert_eq!(server.instance_folders(), [""; 0]);
}

/// What was written of an instance is written again only as long as it is true.
#[tokio::test]
async fn a_list_has_each_instance_as_it_reads_alone() {
    let server = stopped_instances(&["one", "two", "three"]).await;
    let read = async || {
        let list = server.get("/instances").await;
        assert_eq!(list.headers["content-type"], "application/json");
        let list = list.body.as_array().unwrap().clone();
        for instance in &list {
            let path = format!("/instances/{}", instance["id"].as_str().unwrap());
            assert_eq!(server.get(&path).await.body, *instance);
        }
        list
    };
    let (first, again) = (read().await, read().await);
    assert_eq!((first.len(), &first), (3, &again));

    let body = Body::from(r#"{"ttl":"1h"}"#);
    assert_eq!(server.send(Method::PATCH, "/instances/one", body).await.status, StatusCode::OK);
    let changed = read().await;
    server.delete("/instances/two").await;
    let fewer = read().await;

    let expiring = changed.iter().filter(|instance| !instance["expires_at"].is_null());
    assert_eq!((changed.len(), expiring.count(), fewer.len()), (3, 1, 2));
}

/// What was begun is finished, now or by the next server, and nobody is told that it runs again.
#[tokio::test]
async fn a_half_deleted_instance_can_only_be_deleted() {
    let server = stopped_instances(&["one"]).await;
    let folder = server.dir.path().join("data/instances/one");
    fs::remove_dir(&folder).unwrap();
    fs::write(&folder, "no folder").unwrap();

    let failed = server.delete("/instances/one").await;
    let started = server.post("/instances/one/start", &json!({})).await;
    fs::remove_file(&folder).unwrap();
    let again = server.delete("/instances/one").await;

    assert_eq!(failed.status, StatusCode::INTERNAL_SERVER_ERROR, "{failed:?}");
    started.says(StatusCode::CONFLICT, "invalid_state");
    assert!(started.message().contains("delete it once more"), "{started:?}");
    assert_eq!(again.status, StatusCode::NO_CONTENT, "{again:?}");
    server.get("/instances/one").await.says(StatusCode::NOT_FOUND, "not_found");
}

#[tokio::test]
async fn logs_come_as_events_from_the_end() {
    let server = stopped_instances(&["one"]).await;
    let log = server.dir.path().join("data/instances/one/console.log");
    server.get("/instances/one/logs").await.says(StatusCode::NOT_FOUND, "log_not_found");
    fs::write(log, b"first\r\nsecond \"quoted\"\nlast").unwrap();

    let tail = server.get("/instances/one/logs?tail=2").await;
    let followed = server.get("/instances/one/logs?follow=true&until=Stopped&tail=1").await;

    assert_eq!(tail.headers["content-type"], "text/event-stream");
    assert_eq!(tail.headers["x-accel-buffering"], "no");
    assert_eq!(tail.body, json!("data: \"second \\\"quoted\\\"\"\n\ndata: \"last\"\n\n"));
    assert_eq!(followed.body, json!("data: \"last\"\n\n"));
    for source in ["vmm", "hypeman"] {
        let answer = server.get(&format!("/instances/one/logs?source={source}")).await;
        answer.says(StatusCode::NOT_FOUND, "log_not_found");
    }
    let answer = server.get("/instances/one/logs?source=other").await;
    answer.says(StatusCode::BAD_REQUEST, "Bad Request");
}

/// A server that finds these instances, stopped, when it starts.
async fn stopped_instances(ids: &[&str]) -> Server {
    let dir = Server::start().await.stop().await;
    for id in ids {
        keep_stopped(&dir, id, &Digest::of(b"any").to_string());
    }
    Server::start_in(dir).await
}

/// Writes down an instance that has stopped, into the folder of a server that does not run.
fn keep_stopped(dir: &TempDir, id: &str, digest: &str) {
    let data = dir.path().join("data");
    let records = Connection::open(data.join("records.db")).unwrap();
    let name = format!("name-of-{id}");
    let record = json!({
        "id": id, "digest": digest, "created_at": "2026-01-02T03:04:05Z", "phase": "kept",
        "timeline": {},
        "end": {
            "at": "2026-01-02T03:05:05Z", "started_at": null,
            "how": { "exit_code": 0, "exit_message": "success", "error": null },
        },
        "spec": {
            "name": name, "image": IMAGE, "memory_bytes": 1 << 30, "overlay_bytes": 1 << 30,
            "vcpus": 1, "env": {}, "tags": {}, "hypervisor": "native", "agent": true,
            "entrypoint": [], "cmd": [],
        },
    });
    let insert = "INSERT INTO instances (id, name, json) VALUES (?1, ?2, ?3)";
    records.execute(insert, (id, &name, &record.to_string())).unwrap();
    fs::create_dir(data.join("instances").join(id)).unwrap();
}
