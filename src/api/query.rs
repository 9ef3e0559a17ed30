//! Query parameters: decoded once, then asked for by name.
//!
//! Tags come as `tags[key]=value` (deepObject), the brackets encoded or not. Parameters that
//! nobody asks for are ignored, as the original does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::str::FromStr;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use percent_encoding::percent_decode_str;

use crate::duration::DurationError;
use crate::instances::state::StateNameError;

/// The parameters of one request, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Query(Vec<(String, String)>);

impl Query {
    /// Reads what follows the question mark.
    pub(super) fn parse(text: &str) -> Self {
        let pairs = text.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
                .map(|(name, value)| (decoded(name), decoded(value)))
                .collect(),
        )
    }

    /// The value of `name`; of several the last.
    pub(super) fn value(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The value of `name`, which is `true` or `false`.
    ///
    /// # Errors
    ///
    /// [`QueryError::Malformed`].
    pub(super) fn flag(&self, name: &'static str) -> Result<Option<bool>, QueryError> {
        self.parsed(name, "true or false")
    }

    /// The value of `name`, which is a whole number, not negative.
    ///
    /// # Errors
    ///
    /// [`QueryError::Malformed`].
    pub(super) fn count(&self, name: &'static str) -> Result<Option<usize>, QueryError> {
        self.parsed(name, "a whole number, not negative,")
    }

    fn parsed<T: FromStr>(
        &self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<Option<T>, QueryError> {
        let malformed = |_| QueryError::Malformed { name, expected };
        self.value(name).map(|text| text.parse().map_err(malformed)).transpose()
    }

    /// The tags asked for.
    pub(super) fn tags(&self) -> BTreeMap<String, String> {
        let tag = |name: &str| Some(name.strip_prefix("tags[")?.strip_suffix(']')?.to_owned());
        self.0.iter().filter_map(|(name, value)| Some((tag(name)?, value.clone()))).collect()
    }
}

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        Ok(Self::parse(parts.uri.query().unwrap_or_default()))
    }
}

fn decoded(text: &str) -> String {
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}

/// Why a parameter is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum QueryError {
    /// It is of another type.
    #[error("Parameter {name} is malformed: {expected} expected")]
    Malformed {
        /// Which.
        name: &'static str,
        /// What it should be.
        expected: &'static str,
    },
    /// There is no such state, or none that can be waited for.
    #[error("Parameter state names no state to wait for")]
    State(#[source] StateNameError),
    /// It is no duration, or none that can be waited.
    #[error("Parameter timeout is not a duration longer than 0")]
    Timeout {
        /// Why, if it is none at all.
        #[source]
        source: Option<DurationError>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_come_with_brackets_encoded_or_not() {
        let query = Query::parse("tags[team]=back+end&tags%5Benv%5D=a%3Db&state=Running&x&=y&&");

        let tags = query.tags().into_iter().collect::<Vec<_>>();
        assert_eq!(tags, [("env".into(), "a=b".into()), ("team".into(), "back end".into())]);
        assert_eq!(query.value("state"), Some("Running"));
        assert_eq!(query.value("x"), Some(""));
        assert_eq!(query.value("none"), None);
    }

    #[test]
    fn a_value_of_another_type_is_refused_by_name() {
        let query = Query::parse("tail=-1&follow=yes");

        let error = query.count("tail").unwrap_err().to_string();
        assert_eq!(error, "Parameter tail is malformed: a whole number, not negative, expected");
        assert!(query.flag("follow").is_err());
        assert_eq!(query.flag("other").unwrap(), None);
    }
}
