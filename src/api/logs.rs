//! `/instances/{id}/logs`: lines as server-sent events.
//!
//! Each event is one line: `data:` and the line as a JSON string, quoted and escaped, because
//! clients decode it as JSON. There is no last event; the stream ends.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;

use crate::api::App;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::key::Key;
use crate::api::query::{Query, QueryError};
use crate::instances::follow::{LogEnd, LogQuery, LogSource};

/// Lines unless told otherwise.
const TAIL: usize = 100;

/// Tells proxies not to gather what is sent line by line.
const ACCEL_BUFFERING: &str = "x-accel-buffering";

/// Reads a log: its last lines, then, if asked, each line as it is written.
#[utoipa::path(
    get, path = "/instances/{id}/logs", tag = "instances",
    params(
        ("id" = String, Path, description = "Id, name, or the beginning of an id"),
        ("tail" = Option<usize>, Query, description = "Lines from the end; 100 if omitted"),
        ("follow" = Option<bool>, Query, description = "Go on until the client goes away"),
        (
            "source" = Option<String>, Query,
            description = "app (console), vmm (its machine) or hypeman (the server about it)"
        ),
        (
            "until" = Option<String>, Query,
            description = "Stopped: a followed log ends with the instance. Not in the original"
        ),
    ),
    responses(
        (status = 200, body = String, content_type = "text/event-stream"),
        (status = "default", body = ErrorBody),
    ),
)]
pub(super) async fn read(
    State(app): State<App>,
    Key(key): Key,
    query: Query,
) -> Result<Response, ApiError> {
    let source = match query.value("source").unwrap_or("app") {
        "app" => LogSource::App,
        "vmm" => LogSource::Vmm,
        "hypeman" => LogSource::Server,
        _ => {
            let expected = "app, vmm or hypeman";
            return Err(QueryError::Malformed { name: "source", expected }.into());
        }
    };
    let until = match (query.flag("follow")?.unwrap_or_default(), query.value("until")) {
        (false, _) => LogEnd::Now,
        (true, None) => LogEnd::Never,
        (true, Some(state)) if state.eq_ignore_ascii_case("stopped") => LogEnd::Stopped,
        (true, Some(_)) => {
            return Err(QueryError::Malformed { name: "until", expected: "Stopped" }.into());
        }
    };
    let tail = query.count("tail")?.unwrap_or(TAIL);
    let lines = app.instances.logs(&key, LogQuery { source, tail, until }).await?;
    let events = lines.map(|lines| Ok::<_, Infallible>(events(&lines)));
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (CONNECTION, HeaderValue::from_static("keep-alive")),
    ];
    let accel = [(ACCEL_BUFFERING, "no")];
    Ok((headers, accel, Body::from_stream(events)).into_response())
}

fn events(lines: &[String]) -> Bytes {
    let mut text = String::new();
    for line in lines {
        text.push_str("data: ");
        text.push_str(&serde_json::Value::from(line.as_str()).to_string());
        text.push_str("\n\n");
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_json_string_in_an_event() {
        let lines = ["one".to_owned(), "a \"b\"\u{1b}[0m\0".to_owned()];

        let expected = "data: \"one\"\n\ndata: \"a \\\"b\\\"\\u001b[0m\\u0000\"\n\n";
        assert_eq!(events(&lines), expected);
    }
}
