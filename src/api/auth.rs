//! Who may call what: a bearer token with the scope of the route.

use axum::extract::Request;
use axum::http::header::AUTHORIZATION;
use axum::middleware::{self, Next};
use axum::response::Response;
use utoipa_axum::router::{UtoipaMethodRouter, UtoipaMethodRouterExt};

use crate::api::App;
use crate::api::error::{ApiError, AuthError};
use crate::token::{Identity, Scope, Secret};

/// The route, for those only whose token has `scope`.
pub(super) fn allow(
    app: &App,
    scope: Scope,
    route: UtoipaMethodRouter<App>,
) -> UtoipaMethodRouter<App> {
    let secret = app.secret.clone();
    let check = move |request: Request, next: Next| {
        let checked = authorise(&secret, &request, scope);
        async move {
            let identity = checked?;
            tracing::debug!(user = identity.user, uri = %request.uri(), "Request");
            Ok::<Response, ApiError>(next.run(request).await)
        }
    };
    route.map(|route| route.route_layer(middleware::from_fn(check)))
}

fn authorise(secret: &Secret, request: &Request, scope: Scope) -> Result<Identity, AuthError> {
    let header = request.headers().get(AUTHORIZATION).ok_or(AuthError::NoHeader)?;
    let (scheme, token) =
        header.to_str().ok().and_then(|text| text.split_once(' ')).ok_or(AuthError::Format)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(AuthError::Format);
    }
    let identity = secret.verify(token.trim())?;
    if identity.may(scope) { Ok(identity) } else { Err(AuthError::Scope { scope }) }
}
