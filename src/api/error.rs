//! The only place where a domain error becomes a status.
//!
//! Two families share one body. What never reaches a handler (no token, no such route, a body of
//! the wrong shape) has the reason phrase of its status as `code`; what a handler says has a word
//! in snake case that clients match on. Clients of the original retry 409 and 5xx by themselves,
//! so an answer that would be the same again says `x-should-retry: false`.

use std::borrow::Cow;
use std::error::Error;

use axum::Json;
use axum::http::header::CONNECTION;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::body::BodyError;
use crate::api::instances::create::SpecError;
use crate::api::query::QueryError;
use crate::api::tags::TagsError;
use crate::causes::chain;
use crate::images::archive::ArchiveError;
use crate::images::blobs::BlobError;
use crate::images::manifest::ManifestError;
use crate::images::reference::ReferenceError;
use crate::images::registry::RegistryError;
use crate::images::room::RoomError;
use crate::images::{DeleteError as ImageDeleteError, ReadyError, RequestError, TagError};
use crate::instances::follow::LogError;
use crate::instances::inside::InsideError;
use crate::instances::inside::agent::AgentError;
use crate::instances::reclaim::HostMemoryError;
use crate::instances::record::ReserveError;
use crate::instances::stats::StatsError;
use crate::instances::{
    BootError, CreateError, DeleteError, EndError, FindError, NetworkError, OrderError,
    RecordError, StartError, StopError, UpkeepError,
};
use crate::token::{Scope, TokenError};

mod devices;
mod volumes;

const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// An error on its way to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: Cow<'static, str>,
    message: String,
    may_pass: bool,
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What kind of error, for programs.
    pub code: String,
    /// What happened, for people.
    pub message: String,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let (code, message) = (Cow::Borrowed(code), message.into());
        Self { status, code, message, may_pass: false }
    }

    /// An error that is no handler's.
    pub fn of_status(status: StatusCode, message: impl Into<String>) -> Self {
        Self::new(status, status.canonical_reason().unwrap_or("Error"), message)
    }

    /// A handler took too long.
    pub fn timed_out() -> Self {
        Self { may_pass: true, ..Self::of_status(StatusCode::GATEWAY_TIMEOUT, "request timed out") }
    }

    /// A handler broke.
    pub fn panicked() -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "the server has a bug")
    }

    /// A part of the contract that is not there yet.
    pub fn not_there_yet(method: &Method, path: &str) -> Self {
        let message = format!("Not supported yet: {method} {path}");
        Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported", message)
    }

    /// There is no such image.
    pub fn no_image(name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", format!("Image {name} is not on this host"))
    }

    fn bad(code: &'static str, error: &impl Error) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, chain(error))
    }

    fn conflict(code: &'static str, error: &impl Error) -> Self {
        Self::new(StatusCode::CONFLICT, code, chain(error))
    }

    fn missing(code: &'static str, error: &impl Error) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, chain(error))
    }

    /// What the host, not the client, has to mend. The client is its operator: the whole chain of
    /// causes goes out, and once into the log.
    pub fn internal(error: &impl Error) -> Self {
        let message = chain(error);
        tracing::error!(error = message, "Request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// The next server can be asked.
    fn closing(error: &impl Error) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "internal_error", chain(error)).may_pass()
    }

    /// Why an instance has no network: the host cannot have any, or no more of them.
    fn of_network(error: &NetworkError) -> Self {
        match error {
            NetworkError::Exhausted { .. } => Self::conflict("insufficient_resources", error),
            NetworkError::Off
            | NetworkError::Collision { .. }
            | NetworkError::Foreign { .. }
            | NetworkError::Denied
            | NetworkError::Tap { .. }
            | NetworkError::Filter(_) => {
                Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported", chain(error))
            }
            NetworkError::Host { .. } => Self::internal(error),
        }
    }

    fn may_pass(self) -> Self {
        Self { may_pass: true, ..self }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let Self { status, code, message, may_pass } = self;
        let mut response =
            (status, Json(ErrorBody { code: code.into_owned(), message })).into_response();
        if !may_pass {
            response.headers_mut().insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        // Who is one too many must not go on costing a connection.
        if status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

/// Why a request has no business here.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// No header.
    #[error("authorization header required")]
    NoHeader,
    /// Not `Bearer` and a token.
    #[error("invalid authorization header format")]
    Format,
    /// The token.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Valid, but not for this.
    #[error("missing required scope: {scope}")]
    Scope {
        /// What it lacks.
        scope: Scope,
    },
}

impl From<AuthError> for ApiError {
    fn from(error: AuthError) -> Self {
        let (status, message) = match &error {
            AuthError::NoHeader | AuthError::Format => {
                (StatusCode::UNAUTHORIZED, error.to_string())
            }
            AuthError::Token(TokenError::Invalid(_)) => {
                (StatusCode::UNAUTHORIZED, "invalid token".to_owned())
            }
            AuthError::Token(TokenError::OtherKind) => {
                (StatusCode::UNAUTHORIZED, "invalid token type".to_owned())
            }
            AuthError::Scope { .. } => (StatusCode::FORBIDDEN, error.to_string()),
        };
        Self::of_status(status, message)
    }
}

impl From<BodyError> for ApiError {
    fn from(error: BodyError) -> Self {
        match &error {
            BodyError::TooLarge { .. } => {
                Self::of_status(StatusCode::PAYLOAD_TOO_LARGE, chain(&error))
            }
            BodyError::Shape { .. } | BodyError::Broken(_) => {
                Self::of_status(StatusCode::BAD_REQUEST, chain(&error))
            }
        }
    }
}

impl From<QueryError> for ApiError {
    fn from(error: QueryError) -> Self {
        match &error {
            QueryError::Malformed { .. } => Self::of_status(StatusCode::BAD_REQUEST, chain(&error)),
            QueryError::State(_) => Self::bad("invalid_state", &error),
            QueryError::Timeout { .. } => Self::bad("invalid_timeout", &error),
        }
    }
}

impl From<TagsError> for ApiError {
    fn from(error: TagsError) -> Self {
        Self::bad("invalid_request", &error)
    }
}

impl From<ReferenceError> for ApiError {
    fn from(error: ReferenceError) -> Self {
        Self::bad("invalid_name", &error)
    }
}

impl From<SpecError> for ApiError {
    fn from(error: SpecError) -> Self {
        match &error {
            SpecError::Schema { .. } => Self::of_status(StatusCode::BAD_REQUEST, chain(&error)),
            SpecError::Image(_) => Self::bad("invalid_name", &error),
            SpecError::Tags(_) => Self::bad("invalid_request", &error),
            SpecError::Platform { .. } => Self::bad("invalid_platform", &error),
            SpecError::OtherPlatform { .. } => Self::missing("platform_not_available", &error),
            SpecError::Invalid { field, .. } => Self::bad(invalid_code(field), &error),
            SpecError::NotSupported { .. } => {
                Self::new(StatusCode::NOT_IMPLEMENTED, "not_supported", chain(&error))
            }
        }
    }
}

/// The code that the contract has for a bad value of `field`.
fn invalid_code(field: &str) -> &'static str {
    match field {
        "size" => "invalid_size",
        "hotplug_size" => "invalid_hotplug_size",
        "overlay_size" => "invalid_overlay_size",
        "disk_io_bps" => "invalid_disk_io_bps",
        "network.bandwidth_download" => "invalid_bandwidth_download",
        "network.bandwidth_upload" => "invalid_bandwidth_upload",
        "ttl" => "invalid_ttl",
        "expires_at" => "invalid_expires_at",
        field if field.starts_with("auto_standby") => "invalid_auto_standby",
        field if field.starts_with("health_check") => "invalid_health_check",
        field if field.starts_with("restart_policy") => "invalid_restart_policy",
        field if field.starts_with("snapshot_policy") => "invalid_snapshot_policy",
        _ => "invalid_request",
    }
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match &error {
            RequestError::Platform { .. } => Self::bad("invalid_platform", &error),
            RequestError::TooLarge { .. } => Self::bad("invalid_request", &error),
            RequestError::Registry(source) => registry_error(source),
            RequestError::Blob(BlobError::Room(RoomError::Full { .. })) => {
                Self::conflict("insufficient_resources", &error)
            }
            RequestError::Blob(_) | RequestError::Host(_) => Self::internal(&error),
        }
    }
}

fn registry_error(error: &RegistryError) -> ApiError {
    match error {
        RegistryError::NotFound { .. } => ApiError::missing("not_found", error),
        // Registries say this of what does not exist, too.
        RegistryError::Unauthorised { .. } => ApiError::missing("not_found", error),
        RegistryError::RateLimited { .. } => {
            ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", chain(error)).may_pass()
        }
        RegistryError::Manifest(ManifestError::Platform { .. }) => {
            ApiError::missing("platform_not_available", error)
        }
        RegistryError::Unreachable { .. }
        | RegistryError::TimedOut { .. }
        | RegistryError::Unexpected { .. }
        | RegistryError::Interrupted { .. } => ApiError::internal(error).may_pass(),
        RegistryError::TooLarge { .. }
        | RegistryError::Manifest(
            ManifestError::Json(_)
            | ManifestError::Unsupported { .. }
            | ManifestError::TooManyLayers { .. }
            | ManifestError::LayerCount { .. }
            | ManifestError::TooMuchText,
        )
        | RegistryError::Blob(_)
        | RegistryError::Credentials { .. }
        | RegistryError::Setup(_) => ApiError::internal(error),
    }
}

impl From<ImageDeleteError> for ApiError {
    fn from(error: ImageDeleteError) -> Self {
        match &error {
            ImageDeleteError::Missing { .. } => Self::missing("not_found", &error),
            ImageDeleteError::InUse { .. } => Self::conflict("conflict", &error),
            ImageDeleteError::Host(_) => Self::internal(&error),
        }
    }
}

impl From<TagError> for ApiError {
    fn from(error: TagError) -> Self {
        match &error {
            TagError::Missing { .. } => Self::missing("not_found", &error),
            TagError::NotReady { .. } => Self::conflict("image_not_ready", &error),
            TagError::TargetIsDigest { .. } => Self::bad("invalid_name", &error),
            TagError::Host(_) => Self::internal(&error),
        }
    }
}

impl From<ArchiveError> for ApiError {
    fn from(error: ArchiveError) -> Self {
        match &error {
            ArchiveError::TooLarge { .. } => {
                Self::new(StatusCode::PAYLOAD_TOO_LARGE, "archive_too_large", chain(&error))
            }
            ArchiveError::Manifest(ManifestError::Platform { .. }) => {
                Self::missing("platform_not_available", &error)
            }
            ArchiveError::NotAnArchive
            | ArchiveError::Missing { .. }
            | ArchiveError::Name { .. }
            | ArchiveError::Unnamed
            | ArchiveError::Several { .. }
            | ArchiveError::DocumentTooLarge { .. }
            | ArchiveError::TooManyFiles
            | ArchiveError::Manifest(
                ManifestError::Json(_)
                | ManifestError::Unsupported { .. }
                | ManifestError::TooManyLayers { .. }
                | ManifestError::LayerCount { .. }
                | ManifestError::TooMuchText,
            )
            | ArchiveError::Tar(_)
            | ArchiveError::Io(_) => Self::bad("invalid_source", &error),
            ArchiveError::Blob(BlobError::Room(RoomError::Full { .. })) => {
                Self::conflict("insufficient_resources", &error)
            }
            ArchiveError::Blob(_) | ArchiveError::Host(_) => Self::internal(&error),
        }
    }
}

impl From<FindError> for ApiError {
    fn from(error: FindError) -> Self {
        let (code, message) = match error {
            FindError::Missing => ("not_found", "resource not found"),
            FindError::Ambiguous => ("ambiguous", "multiple resources match, use full ID"),
        };
        Self::new(StatusCode::NOT_FOUND, code, message)
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        match error {
            CreateError::Request(error) => error.into(),
            CreateError::ImageMissing { .. } => Self::missing("not_found", &error),
            CreateError::ImageNotReady { .. } | CreateError::ImageFailed { .. } => {
                Self::bad("image_not_ready", &error)
            }
            CreateError::Boot(error) => error.into(),
            CreateError::Reserve(ReserveError::NameTaken { .. }) => {
                Self::conflict("name_conflict", &error)
            }
            CreateError::OverlaySize(_) => Self::bad("invalid_overlay_size", &error),
            CreateError::Volume(error) => error.into(),
            CreateError::Attach(error) => error.into(),
            CreateError::Want(error) => error.into(),
            CreateError::Claim(error) => error.into(),
            CreateError::NoSpace(_)
            | CreateError::Shortage(_)
            | CreateError::Reserve(ReserveError::NoSpace { .. }) => {
                Self::conflict("insufficient_resources", &error)
            }
            CreateError::Reserve(ReserveError::Store { .. })
            | CreateError::Images(_)
            | CreateError::File { .. }
            | CreateError::Disk(_) => Self::internal(&error),
        }
    }
}

impl From<BootError> for ApiError {
    fn from(error: BootError) -> Self {
        if let BootError::Devices(error) = error {
            return error.into();
        }
        match &error {
            BootError::NothingToRun | BootError::TooMuchText(_) => {
                Self::bad("invalid_request", &error)
            }
            BootError::Closing => Self::closing(&error),
            BootError::Network(error) => Self::of_network(error),
            BootError::Devices(_)
            | BootError::File { .. }
            | BootError::Headers { .. }
            | BootError::Initramfs(_)
            | BootError::Worker(_) => Self::internal(&error),
        }
    }
}

impl From<OrderError> for ApiError {
    fn from(error: OrderError) -> Self {
        match &error {
            OrderError::Find(error) => (*error).into(),
            OrderError::Closing => Self::closing(&error),
        }
    }
}

impl From<RecordError> for ApiError {
    fn from(error: RecordError) -> Self {
        Self::internal(&error).may_pass()
    }
}

impl From<EndError> for ApiError {
    fn from(error: EndError) -> Self {
        match &error {
            EndError::Stuck { .. } | EndError::Worker { .. } => Self::internal(&error).may_pass(),
        }
    }
}

impl From<StopError> for ApiError {
    fn from(error: StopError) -> Self {
        match error {
            StopError::Order(error) => error.into(),
            StopError::Refused { .. } => Self::conflict("invalid_state", &error),
            StopError::Record(error) => error.into(),
            StopError::End(error) => error.into(),
        }
    }
}

impl From<StartError> for ApiError {
    fn from(error: StartError) -> Self {
        match error {
            StartError::Order(error) => error.into(),
            StartError::Refused { .. } | StartError::HalfDeleted => {
                Self::conflict("invalid_state", &error)
            }
            StartError::Image(ReadyError::Missing { .. }) => Self::missing("not_found", &error),
            StartError::Image(ReadyError::NotReady { .. } | ReadyError::Host(_))
            | StartError::Disk(_) => Self::internal(&error),
            StartError::Shortage(_) => Self::conflict("insufficient_resources", &error),
            StartError::Boot(error) => error.into(),
            StartError::Record(error) => error.into(),
        }
    }
}

impl From<UpkeepError> for ApiError {
    fn from(error: UpkeepError) -> Self {
        match error {
            UpkeepError::Order(error) => error.into(),
            UpkeepError::Expired { .. } => Self::conflict("instance_expired", &error),
            UpkeepError::NoAgent | UpkeepError::NoNetwork => {
                Self::bad("invalid_health_check", &error)
            }
            UpkeepError::Shortage(_) => Self::conflict("insufficient_resources", &error),
            UpkeepError::Worker(_) => Self::internal(&error),
            UpkeepError::Record(error) => error.into(),
        }
    }
}

impl From<DeleteError> for ApiError {
    fn from(error: DeleteError) -> Self {
        match error {
            DeleteError::Devices(error) => error.into(),
            DeleteError::Order(error) => error.into(),
            DeleteError::Record(error) => error.into(),
            DeleteError::End(error) => error.into(),
            DeleteError::Folder { .. } => Self::internal(&error).may_pass(),
        }
    }
}

impl From<InsideError> for ApiError {
    fn from(error: InsideError) -> Self {
        match &error {
            InsideError::Find(error) => (*error).into(),
            InsideError::NotRunning { .. } => Self::conflict("invalid_state", &error),
        }
    }
}

impl From<AgentError> for ApiError {
    fn from(error: AgentError) -> Self {
        Self::internal(&error)
    }
}

impl From<StatsError> for ApiError {
    fn from(error: StatsError) -> Self {
        match &error {
            StatsError::Find(error) => (*error).into(),
            StatsError::Worker { .. } => Self::internal(&error),
        }
    }
}

impl From<HostMemoryError> for ApiError {
    fn from(error: HostMemoryError) -> Self {
        Self::internal(&error)
    }
}

impl From<LogError> for ApiError {
    fn from(error: LogError) -> Self {
        match &error {
            LogError::Find(error) => (*error).into(),
            LogError::TooMany => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", chain(&error)).may_pass()
            }
            LogError::NoLog => Self::missing("log_not_found", &error),
            LogError::Io { .. } => Self::internal(&error),
        }
    }
}
