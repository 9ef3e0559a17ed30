//! `/capabilities`: what this server can do, and nothing else.

use std::env::consts::{ARCH, OS};

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;

use crate::api::App;
use crate::api::document::CONTRACT_VERSION;
use crate::api::error::ErrorBody;
use crate::api::instances::create::RUNTIME;
use crate::api::instances::view::PLATFORM;

/// Parts of the contract that are there.
const FEATURES: [&str; 5] = ["devices", "exec", "images", "instances", "logs"];

/// What the runtime can do by way of the API.
const RUNTIME_FEATURES: [&str; 4] = ["balloon-control", "disk-io-limit", "hotplug-memory", "vsock"];

/// What it can do where the host can give devices away.
const GPU_PASSTHROUGH: &str = "gpu-passthrough";

/// What this server can do.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Capabilities {
    server: ServerView,
    host: HostView,
    default_runtime: DefaultRuntime,
    runtimes: Vec<Runtime>,
    features: [&'static str; FEATURES.len()],
    images: Platforms,
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<NetworkView>,
}

/// The program.
#[derive(Debug, Serialize, ToSchema)]
struct ServerView {
    version: &'static str,
    api_version: &'static str,
}

/// The host.
#[derive(Debug, Serialize, ToSchema)]
struct HostView {
    os: &'static str,
    arch: &'static str,
}

/// What an instance runs on unless told otherwise.
#[derive(Debug, Serialize, ToSchema)]
struct DefaultRuntime {
    name: &'static str,
    available: bool,
}

/// What an instance can run on.
#[derive(Debug, Serialize, ToSchema)]
struct Runtime {
    name: &'static str,
    available: bool,
    features: Vec<&'static str>,
}

/// Which images can be run.
#[derive(Debug, Serialize, ToSchema)]
struct Platforms {
    default_platform: &'static str,
    platforms: [&'static str; 1],
}

/// How instances reach others.
#[derive(Debug, Serialize, ToSchema)]
struct NetworkView {
    /// `nat`: with the host's address.
    model: &'static str,
    guest_to_guest: bool,
    gateway: String,
    subnet: String,
}

/// Says what this server can do.
#[utoipa::path(
    get, path = "/capabilities", tag = "resources",
    responses((status = 200, body = Capabilities), (status = "default", body = ErrorBody)),
)]
pub(super) async fn read(State(app): State<App>) -> Json<Capabilities> {
    let (name, available) = (RUNTIME, app.instances.can_run());
    let mut features = RUNTIME_FEATURES.to_vec();
    if app.devices.can_lend() {
        features.push(GPU_PASSTHROUGH);
        features.sort_unstable();
    }
    // As Go calls it, which clients know.
    let arch = if ARCH == "x86_64" { "amd64" } else { ARCH };
    Json(Capabilities {
        server: ServerView { version: env!("CARGO_PKG_VERSION"), api_version: CONTRACT_VERSION },
        host: HostView { os: OS, arch },
        default_runtime: DefaultRuntime { name, available },
        runtimes: vec![Runtime { name, available, features }],
        features: FEATURES,
        network: app.instances.subnet().map(|subnet| NetworkView {
            model: "nat",
            guest_to_guest: false,
            gateway: subnet.gateway().to_string(),
            subnet: subnet.to_string(),
        }),
        images: Platforms { default_platform: PLATFORM, platforms: [PLATFORM] },
    })
}
