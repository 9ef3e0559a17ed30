//! The wire: what clients of the original rely on.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::cases;
use ovum_test_host::{BUSYBOX, TestHost};

cases![
    health_needs_no_token,
    a_request_without_a_token_is_unauthorized,
    the_specification_lists_the_routes,
    an_instance_is_found_by_id_name_and_prefix,
    a_running_instance_says_so_and_can_be_waited_for,
    logs_follow_while_the_guest_speaks,
    tags_filter_the_list,
    image_names_arrive_in_every_encoding,
    an_image_in_use_is_not_deleted,
];

const SLEEP: [&str; 2] = ["sleep", "1000"];

async fn health_needs_no_token(host: &TestHost) {
    let response = reqwest::get(format!("{}/health", host.server.base_url)).await.unwrap();

    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.text().await.unwrap(), r#"{"status":"ok"}"#);
}

async fn a_request_without_a_token_is_unauthorized(host: &TestHost) {
    let response = reqwest::get(format!("{}/instances", host.server.base_url)).await.unwrap();

    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    let body: Value = response.json().await.unwrap();
    let expected = json!({ "code": "Unauthorized", "message": "authorization header required" });
    assert_eq!(body, expected);
}

async fn the_specification_lists_the_routes(host: &TestHost) {
    let spec = host.server.get("/spec.json").await;

    for path in ["/instances", "/instances/{id}", "/instances/{id}/wait", "/images"] {
        assert!(spec["paths"][path].is_object(), "{path} is missing");
    }
}

async fn an_instance_is_found_by_id_name_and_prefix(host: &TestHost) {
    let body = json!({ "name": "findable", "image": BUSYBOX, "size": "128MB", "cmd": SLEEP });
    let created = host.server.create(body).await;
    let id = created["id"].as_str().unwrap();

    for key in [id, "findable", &id[..8]] {
        let found = host.server.get(&format!("/instances/{key}")).await;
        assert_eq!(found["id"], id);
    }
    assert_eq!(id.len(), 24);
    host.server.delete(id).await;
    let (status, body) = host.server.call(Method::GET, "/instances/findable", None).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(body, json!({ "code": "not_found", "message": "resource not found" }));
}

async fn a_running_instance_says_so_and_can_be_waited_for(host: &TestHost) {
    let body = json!({ "name": "runs", "image": BUSYBOX, "size": "128MB", "cmd": SLEEP });
    let created = host.server.create(body).await;
    let running = host.server.wait("runs", "Running").await;
    let timed_out = host.server.get("/instances/runs/wait?state=stopped&timeout=300ms").await;

    assert!(["Created", "Initializing"].contains(&created["state"].as_str().unwrap()), "{created}");
    assert_eq!(running["vcpus"], 2, "the default");
    assert_eq!(running["size"], "128MB");
    assert_eq!(timed_out, json!({ "state": "Running", "timed_out": true }));
    host.server.delete("runs").await;
}

async fn logs_follow_while_the_guest_speaks(host: &TestHost) {
    let script = "for i in 1 2 3; do echo line $i; sleep 0.3; done; sleep 1000";
    let body = json!({
        "name": "speaks", "image": BUSYBOX, "size": "128MB", "cmd": ["sh", "-c", script],
    });
    host.server.create(body).await;
    host.server.wait("speaks", "Running").await;

    let seen = host.server.follow_until("speaks", "line 3").await;

    assert!(seen.ends_with("data: \"line 2\"\n\ndata: \"line 3\"\n\n"), "{seen:?}");
    host.server.delete("speaks").await;
}

async fn tags_filter_the_list(host: &TestHost) {
    for (name, team) in [("tagged-a", "one"), ("tagged-b", "two")] {
        let tags = json!({ "team": team });
        let body = json!({
            "name": name, "image": BUSYBOX, "size": "128MB", "cmd": SLEEP, "tags": tags,
        });
        host.server.create(body).await;
    }

    let list = host.server.get("/instances?tags%5Bteam%5D=two").await;

    let names: Vec<_> = list.as_array().unwrap().iter().map(|i| &i["name"]).collect();
    assert_eq!(names, ["tagged-b"]);
    host.server.delete("tagged-a").await;
    host.server.delete("tagged-b").await;
}

async fn image_names_arrive_in_every_encoding(host: &TestHost) {
    for name in [BUSYBOX.to_owned(), BUSYBOX.replace('/', "%2F"), BUSYBOX.replace('/', "%252F")] {
        let image = host.server.get(&format!("/images/{name}")).await;
        assert_eq!(image["name"], BUSYBOX, "asked for {name}");
    }
}

async fn an_image_in_use_is_not_deleted(host: &TestHost) {
    let body = json!({ "name": "user", "image": BUSYBOX, "size": "128MB", "cmd": SLEEP });
    host.server.create(body).await;
    let path = format!("/images/{}", BUSYBOX.replace('/', "%2F"));

    let (status, body) = host.server.call(Method::DELETE, &path, None).await;

    assert_eq!((status, &body["code"]), (StatusCode::CONFLICT, &json!("conflict")));
    host.server.delete("user").await;
}
