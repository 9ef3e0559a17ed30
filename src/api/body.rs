//! JSON bodies: bounded, and a wrong one is told which field is wrong.

use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;

use crate::api::App;
use crate::api::error::ApiError;

/// Bytes that are read and thrown away after a body was too large, so that a client that writes
/// before it reads gets to hear so instead of a broken connection.
const DISCARDED_BYTES_MAX: usize = 128 << 20;

/// A JSON body. Its media type is not looked at: some clients send none.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<App> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let bytes = collect(request.into_body(), app.limits.body_bytes_max).await?;
        parsed(&bytes).map(Self)
    }
}

/// A JSON body that may be missing: then it is as if it were `{}`.
#[derive(Debug)]
pub(super) struct OptionalBody<T>(pub(super) T);

impl<T: DeserializeOwned + Default> FromRequest<App> for OptionalBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &App) -> Result<Self, ApiError> {
        let bytes = collect(request.into_body(), app.limits.body_bytes_max).await?;
        if bytes.trim_ascii().is_empty() {
            return Ok(Self(T::default()));
        }
        parsed::<Option<T>>(&bytes).map(|value| Self(value.unwrap_or_default()))
    }
}

fn parsed<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let Json(value) = Json::from_bytes(bytes)
        .map_err(|rejection| BodyError::Shape { why: rejection.body_text() })?;
    Ok(value)
}

async fn collect(body: Body, bytes_max: usize) -> Result<Vec<u8>, BodyError> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(BodyError::Broken)?;
        if bytes.len() + chunk.len() > bytes_max {
            let mut discarded = bytes.len() + chunk.len();
            while discarded < DISCARDED_BYTES_MAX
                && let Some(Ok(chunk)) = stream.next().await
            {
                discarded += chunk.len();
            }
            return Err(BodyError::TooLarge { bytes_max });
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

/// Why there is no body.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    /// It is no JSON, or JSON of another shape.
    #[error("{why}")]
    Shape {
        /// What is wrong and where.
        why: String,
    },
    /// It is larger than any real one.
    #[error("Body is larger than {bytes_max} bytes")]
    TooLarge {
        /// The limit.
        bytes_max: usize,
    },
    /// It did not arrive.
    #[error("Body did not arrive")]
    Broken(#[source] axum::Error),
}
