//! Tags as they are typed: KEY=VALUE, or KEY alone.

use crate::api::tags::Tags;

/// The tags that were typed; the later of two with the same key holds.
pub(super) fn parsed(texts: &[String]) -> Tags {
    let pairs = texts.iter().map(|text| text.split_once('=').unwrap_or((text, "")));
    pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_may_be_alone_and_a_value_may_have_an_equals_sign() {
        let tags = parsed(&["a=b=c", "alone", "a=later"].map(str::to_owned));

        let pairs: Vec<_> = tags.iter().map(|(key, value)| (&**key, &**value)).collect();
        assert_eq!(pairs, [("a", "later"), ("alone", "")]);
    }
}
