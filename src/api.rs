//! The HTTP surface: the table of routes, one line each.
//!
//! A handler extracts, calls, shapes, and lies in the file of its noun with its bodies. Who may
//! call it is said here, beside its name. The document at `/spec.json` is made of the same table.

use std::any::Any;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::Request;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use tokio::time;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;

use crate::api::error::ApiError;
use crate::api::instances::texts::Texts;
use crate::config::Limits;
use crate::devices::Devices;
use crate::images::Images;
use crate::instances::Instances;
use crate::resources::Resources;
use crate::token::{Scope, Secret};
use crate::volumes::Volumes;

mod auth;
mod body;
mod capabilities;
mod cp;
pub mod devices;
mod document;
pub mod error;
mod exec;
mod health;
pub mod images;
pub mod instances;
mod key;
mod logs;
mod query;
mod reclaim;
pub mod resources;
mod socket;
pub mod stat;
pub mod stats;
pub mod tags;
pub mod volumes;

/// How long a request may take. A wait ends just before, by itself.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// Parts of the contract that are not there yet, and are refused as that: that nothing is there is
/// what clients take a 404 for.
const PENDING: [&str; 8] =
    ["builders", "builds", "ingresses", "pushes", "resources", "snapshots", "v2", "volumes"];
const PENDING_OF_INSTANCE: [&str; 7] =
    ["auto-standby", "fork", "restore", "snapshot-schedule", "snapshots", "standby", "volumes"];

/// What handlers work with. Clones are the same.
#[derive(Debug, Clone)]
pub struct App {
    /// The images of this host.
    pub images: Images,
    /// The instances of this host.
    pub instances: Instances,
    /// The volumes of this host.
    pub volumes: Volumes,
    /// The devices of this host.
    pub devices: Devices,
    /// What this host has to give.
    pub resources: Resources,
    /// What tokens are signed with.
    pub secret: Secret,
    /// What a request may ask for.
    pub limits: Limits,
    /// What was written of instances.
    pub texts: Texts,
}

/// Everything the server answers.
pub fn router(app: App) -> Router {
    let (router, document) = table(&app).split_for_parts();
    let document = serde_json::to_value(document::finished(document)).unwrap_or_default();
    let json: Bytes = document.to_string().into();
    let yaml: Bytes = document::yaml(&document).into();
    let typed = |media, text: Bytes| ([(CONTENT_TYPE, HeaderValue::from_static(media))], text);
    router
        .route("/spec.json", get(async move || typed("application/json", json)))
        .route("/spec.yaml", get(async move || typed("application/vnd.oai.openapi", yaml)))
        .route("/swagger", get(async || Html(document::PAGE)))
        .fallback(no_such_route)
        .method_not_allowed_fallback(no_such_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(CorsLayer::permissive())
        .with_state(app)
}

#[rustfmt::skip]
fn table(app: &App) -> OpenApiRouter<App> {
    let to = |scope, route| bounded(auth::allow(app, scope, route));
    let to_stream = |scope, route| auth::allow(app, scope, route);
    OpenApiRouter::with_openapi(document::head())
        .routes(bounded(routes!(health::health)))
        .routes(to(Scope::RESOURCE_READ, routes!(capabilities::read)))
        .routes(to(Scope::RESOURCE_READ, routes!(resources::read)))
        .routes(to(Scope::INSTANCE_WRITE, routes!(reclaim::reclaim)))
        .routes(to(Scope::IMAGE_READ, routes!(images::list)))
        .routes(to(Scope::IMAGE_WRITE, routes!(images::create)))
        .routes(to_stream(Scope::IMAGE_WRITE, routes!(images::load)))
        .routes(to(Scope::IMAGE_READ, routes!(images::read)))
        .routes(to(Scope::IMAGE_DELETE, routes!(images::delete)))
        .routes(to(Scope::IMAGE_WRITE, routes!(images::tag)))
        .routes(to(Scope::INSTANCE_READ, routes!(instances::list)))
        .routes(to(Scope::INSTANCE_WRITE, routes!(instances::create)))
        .routes(to(Scope::INSTANCE_READ, routes!(instances::read)))
        .routes(to(Scope::INSTANCE_WRITE, routes!(instances::update)))
        .routes(to(Scope::INSTANCE_DELETE, routes!(instances::delete)))
        .routes(to(Scope::INSTANCE_READ, routes!(instances::wait)))
        .routes(to(Scope::INSTANCE_READ, routes!(stats::read)))
        .routes(to(Scope::INSTANCE_WRITE, routes!(instances::stop)))
        .routes(to(Scope::INSTANCE_WRITE, routes!(instances::start)))
        .routes(to(Scope::VOLUME_WRITE, routes!(instances::volumes::attach)))
        .routes(to(Scope::VOLUME_WRITE, routes!(instances::volumes::detach)))
        .routes(to_stream(Scope::INSTANCE_READ, routes!(logs::read)))
        .routes(to(Scope::INSTANCE_READ, routes!(stat::read)))
        .routes(to_stream(Scope::INSTANCE_WRITE, routes!(exec::exec)))
        .routes(to_stream(Scope::INSTANCE_WRITE, routes!(cp::cp)))
        .routes(to(Scope::VOLUME_READ, routes!(volumes::list)))
        .routes(to(Scope::VOLUME_WRITE, routes!(volumes::create)))
        .routes(to_stream(Scope::VOLUME_WRITE, routes!(volumes::create_from_archive)))
        .routes(to(Scope::VOLUME_READ, routes!(volumes::read)))
        .routes(to(Scope::VOLUME_DELETE, routes!(volumes::delete)))
        .routes(to(Scope::DEVICE_READ, routes!(devices::available)))
        .routes(to(Scope::DEVICE_READ, routes!(devices::list)))
        .routes(to(Scope::DEVICE_WRITE, routes!(devices::register)))
        .routes(to(Scope::DEVICE_READ, routes!(devices::read)))
        .routes(to(Scope::DEVICE_DELETE, routes!(devices::delete)))
}

/// A route whose requests end, one way or the other, within [`REQUEST_TIMEOUT`].
fn bounded(route: UtoipaMethodRouter<App>) -> UtoipaMethodRouter<App> {
    let bound = async |request: Request, next: Next| match time::timeout(
        REQUEST_TIMEOUT,
        next.run(request),
    )
    .await
    {
        Ok(response) => response,
        Err(_elapsed) => ApiError::timed_out().into_response(),
    };
    route.map(|route| route.route_layer(middleware::from_fn(bound)))
}

async fn no_such_route(method: Method, uri: Uri) -> ApiError {
    match uri.path().split('/').skip(1).collect::<Vec<_>>()[..] {
        [noun, ..] if PENDING.contains(&noun) => ApiError::not_there_yet(&method, uri.path()),
        ["instances", _, part, ..] if PENDING_OF_INSTANCE.contains(&part) => {
            ApiError::not_there_yet(&method, uri.path())
        }
        _ => ApiError::of_status(StatusCode::NOT_FOUND, format!("no such route: {}", uri.path())),
    }
}

async fn no_such_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::of_status(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// A handler that panics is a bug of ours; it costs its own request only.
#[expect(clippy::needless_pass_by_value, reason = "the signature that the layer asks for")]
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    tracing::error!(text, "A handler panicked");
    ApiError::panicked().into_response()
}
