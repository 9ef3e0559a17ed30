//! What an image is called: `alpine` becomes `docker.io/library/alpine:latest`, once, at the door.
//!
//! Everything behind the door compares and stores the normalised form, so one image has one name.
//! A reference with a digest names content; its tag, if it had one, says nothing more and is
//! dropped.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::{ParseError, Reference as Parsed};
use percent_encoding::percent_decode_str;

use crate::images::digest::Digest;

/// Longest text looked at: a host name, a repository (255) and a digest fit several times over.
const TEXT_BYTES_MAX: usize = 1024;

/// Most rounds of percent-decoding: clients are seen to encode a name twice.
const DECODE_ROUNDS_MAX: usize = 4;

/// A normalised image name: registry, repository, and a tag or a digest.
///
/// Equal references are equal strings and the other way round.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Reference(Parsed);

impl Reference {
    /// Parses the name in a request path, where `/` may be raw, `%2F` or `%252F`.
    ///
    /// # Errors
    ///
    /// [`ReferenceError`] if what is left after decoding is no reference.
    pub fn from_path(path: &str) -> Result<Self, ReferenceError> {
        let invalid = |source| ReferenceError::Invalid { text: clipped(path), source };
        let mut text = path.to_owned();
        for _ in 0..DECODE_ROUNDS_MAX {
            if text.len() > TEXT_BYTES_MAX {
                return Err(ReferenceError::TooLong { bytes: text.len() });
            }
            let decoded = percent_decode_str(&text)
                .decode_utf8()
                .map_err(|_| invalid(ParseError::ReferenceInvalidFormat))?
                .into_owned();
            if decoded == text {
                break;
            }
            text = decoded;
        }
        text.parse()
    }

    /// As the registry client wants it.
    pub fn as_oci(&self) -> &Parsed {
        &self.0
    }

    /// The registry's host name, with its port if it is not the usual one.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The tag; `None` if the reference is by digest.
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    /// The digest; `None` if the reference is by tag.
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| digest.parse().ok())
    }

    /// Whether both are of the same registry and repository.
    pub fn same_repository(&self, other: &Self) -> bool {
        self.registry() == other.registry() && self.repository() == other.repository()
    }

    /// The same repository at `digest`.
    pub fn at(&self, digest: &Digest) -> Self {
        Self(self.0.clone_with_digest(digest.to_string()))
    }

    /// Where the registry is reached, which for Docker's own is not its name.
    pub fn host(&self) -> &str {
        self.0.resolve_registry()
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(ReferenceError::TooLong { bytes: text.len() });
        }
        let parsed: Parsed = text
            .parse()
            .map_err(|source| ReferenceError::Invalid { text: clipped(text), source })?;
        let Some(digest) = parsed.digest().map(str::to_owned) else {
            return Ok(Self(parsed));
        };
        let digest: Digest = digest.parse().map_err(|_| ReferenceError::Digest { digest })?;
        Ok(Self(parsed.clone_with_digest(digest.to_string())))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The start of `text`, for an error message.
fn clipped(text: &str) -> String {
    const CHARS_MAX: usize = 128;
    text.chars().take(CHARS_MAX).collect()
}

/// Why a text is not an image name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// It breaks the grammar.
    #[error("Invalid image name {text:?}")]
    Invalid {
        /// Its start.
        text: String,
        /// Which rule.
        #[source]
        source: ParseError,
    },
    /// Only SHA-256 digests are supported.
    #[error("Unsupported image digest {digest:?}: sha256 and 64 lower-case hex digits expected")]
    Digest {
        /// The digest.
        digest: String,
    },
    /// It is longer than any image name.
    #[error("Image name of {bytes} bytes is longer than {TEXT_BYTES_MAX}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn normal(text: &str) -> String {
        text.parse::<Reference>().unwrap().to_string()
    }

    #[test]
    fn short_names_get_registry_library_and_tag() {
        assert_eq!(normal("alpine"), "docker.io/library/alpine:latest");
        assert_eq!(normal("alpine:3.20"), "docker.io/library/alpine:3.20");
        assert_eq!(normal("user/app"), "docker.io/user/app:latest");
        assert_eq!(normal("index.docker.io/library/alpine"), "docker.io/library/alpine:latest");
        assert_eq!(normal("localhost:5000/a/b/c"), "localhost:5000/a/b/c:latest");
        assert_eq!(normal("127.0.0.1:5000/app:v1"), "127.0.0.1:5000/app:v1");
    }

    #[test]
    fn a_digest_is_kept_and_makes_the_tag_idle() {
        let digest = format!("docker.io/library/alpine@sha256:{HEX}");

        assert_eq!(normal(&format!("alpine@sha256:{HEX}")), digest);
        assert_eq!(normal(&format!("alpine:3.20@sha256:{HEX}")), digest);
        assert_eq!(digest.parse::<Reference>().unwrap().tag(), None);
    }

    #[test]
    fn a_normal_name_stays_as_it_is() {
        for text in ["alpine", "a.b:1/c/d:e", &format!("x/y@sha256:{HEX}")] {
            assert_eq!(normal(&normal(text)), normal(text));
        }
    }

    #[test]
    fn a_path_is_decoded_until_it_is_stable() {
        for path in [
            "docker.io/library/nginx:alpine",
            "docker.io%2Flibrary%2Fnginx:alpine",
            "docker.io%2flibrary%2fnginx%3Aalpine",
            "docker.io%252Flibrary%252Fnginx:alpine",
            "nginx:alpine",
        ] {
            let reference = Reference::from_path(path).unwrap();
            assert_eq!(reference.to_string(), "docker.io/library/nginx:alpine", "{path}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_name_in_the_text() {
        for text in ["", "UPPER", "a b", "a:b:c:d", "../../etc/passwd", "a@sha256:12", "a/%00", "-"]
        {
            assert!(text.parse::<Reference>().is_err(), "{text}");
            assert!(Reference::from_path(text).is_err(), "{text}");
        }
        let error = "a b".parse::<Reference>().unwrap_err();
        assert_eq!(error.to_string(), "Invalid image name \"a b\"");
        assert!(Reference::from_path("%ff").is_err());
        assert!(Reference::from_path(&"%25".repeat(400)).is_err());
        let upper = format!("a@sha256:{}", HEX.to_uppercase());
        assert!(matches!(upper.parse::<Reference>(), Err(ReferenceError::Digest { .. })));
        let sha512 = format!("a@sha512:{HEX}{HEX}");
        assert!(matches!(sha512.parse::<Reference>(), Err(ReferenceError::Digest { .. })));
    }
}
