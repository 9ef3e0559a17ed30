//! What a path says about which thing is meant: an id or a name, decoded once.

use axum::extract::{FromRequestParts, Path};
use axum::http::StatusCode;
use axum::http::request::Parts;

use crate::api::error::ApiError;

/// The parameter of a path. One that is no text is told as every other error.
#[derive(Debug)]
pub(super) struct Key(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Key {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Path::from_request_parts(parts, state).await {
            Ok(Path(key)) => Ok(Self(key)),
            Err(rejection) => {
                Err(ApiError::of_status(StatusCode::BAD_REQUEST, rejection.body_text()))
            }
        }
    }
}
