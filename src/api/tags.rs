//! Tags: the caller's labels on anything.

use std::collections::BTreeMap;

/// Most tags on one thing.
const TAGS_MAX: usize = 50;

/// Longest key, in characters.
const KEY_CHARS_MAX: usize = 128;

/// Longest value, in characters.
const VALUE_CHARS_MAX: usize = 256;

/// Labels on anything.
pub type Tags = BTreeMap<String, String>;

/// Checks that `tags` keep to the contract.
///
/// # Errors
///
/// [`TagsError`].
pub(super) fn check(tags: &Tags) -> Result<(), TagsError> {
    if tags.len() > TAGS_MAX {
        return Err(TagsError::TooMany { tags: tags.len() });
    }
    for (key, value) in tags {
        let fits = (1..=KEY_CHARS_MAX).contains(&key.chars().count())
            && value.chars().count() <= VALUE_CHARS_MAX
            && key.chars().chain(value.chars()).all(is_tag_char);
        if !fits {
            return Err(TagsError::Malformed { key: key.chars().take(KEY_CHARS_MAX).collect() });
        }
    }
    Ok(())
}

/// Whether `tags` have all of `wanted`.
pub(super) fn have(tags: &Tags, wanted: &Tags) -> bool {
    wanted.iter().all(|(key, value)| tags.get(key) == Some(value))
}

fn is_tag_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || " _.:/=+@-".contains(c)
}

/// Why these are no tags.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TagsError {
    /// Too many of them.
    #[error("There are {tags} tags, {TAGS_MAX} are allowed")]
    TooMany {
        /// How many.
        tags: usize,
    },
    /// One is empty, too long, or has other characters.
    #[error(
        "Tag {key:?} is malformed: keys have 1 to {KEY_CHARS_MAX} and values up to \
         {VALUE_CHARS_MAX} letters, digits, spaces and _ . : / = + @ -"
    )]
    Malformed {
        /// The start of its key.
        key: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(key: &str, value: &str) -> Result<(), TagsError> {
        check(&Tags::from([(key.to_owned(), value.to_owned())]))
    }

    #[test]
    fn tags_have_bounds() {
        assert_eq!(checked("team/a:b=c+d@e-f g.h_i", ""), Ok(()));
        assert_eq!(checked(&"k".repeat(128), &"v".repeat(256)), Ok(()));
        for (key, value) in [
            ("", ""),
            (&"k".repeat(129), ""),
            ("k", &"v".repeat(257)),
            ("k", "a\nb"),
            ("ü", "x"),
            ("k", "a,b"),
        ] {
            assert!(matches!(checked(key, value), Err(TagsError::Malformed { .. })), "{key:?}");
        }
        let many: Tags = (0..51).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(check(&many), Err(TagsError::TooMany { tags: 51 }));
    }
}
