//! `WWW-Authenticate` (RFC 9110, 11.6.1 "WWW-Authenticate"): what a registry wants to see.

/// A challenge we can answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    /// Name and password with each request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// Where to get it.
        realm: String,
        /// For whom it shall be.
        service: Option<String>,
    },
}

impl Challenge {
    /// Reads one header. Bearer wins over Basic if both are offered.
    pub(super) fn parse(header: &str) -> Option<Self> {
        let mut found = None;
        let mut rest = header.trim_start();
        while !rest.is_empty() {
            let (scheme, after) = rest.split_once(' ').unwrap_or((rest, ""));
            let (parameters, next) = parameters(after);
            let value = |name: &str| {
                let known = parameters.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                known.map(|(_, value)| value.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = value("realm")
            {
                return Some(Self::Bearer { realm, service: value("service") });
            }
            if scheme.eq_ignore_ascii_case("basic") {
                found = Some(Self::Basic);
            }
            rest = next;
        }
        found
    }
}

/// The `key=value` pairs at the start of `text`, and the challenge after them.
fn parameters(mut text: &str) -> (Vec<(String, String)>, &str) {
    let mut found = Vec::new();
    loop {
        text = text.trim_start_matches([' ', ',', '\t']);
        let Some((key, after)) = text.split_once('=') else { return (found, "") };
        // A space in the key: this is the next challenge's scheme.
        if key.contains(' ') {
            return (found, text);
        }
        let (value, rest) = match after.strip_prefix('"') {
            Some(quoted) => unquote(quoted),
            None => {
                let end = after.find([',', ' ']).unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
        };
        found.push((key.to_owned(), value));
        text = rest;
    }
}

/// A quoted string up to its end, and what follows.
fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, char)) = chars.next() {
        match char {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            char => value.push(char),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Option<Challenge> {
        let service = service.map(str::to_owned);
        Some(Challenge::Bearer { realm: realm.to_owned(), service })
    }

    #[test]
    fn challenges_are_read() {
        let read = Challenge::parse;

        assert_eq!(read("Basic realm=\"x, y\""), Some(Challenge::Basic));
        assert_eq!(
            read("Bearer realm=\"https://a/t?x=1\",service=\"reg\",scope=\"repository:a:pull\""),
            bearer("https://a/t?x=1", Some("reg"))
        );
        assert_eq!(read("bearer  realm=https://a , service = x"), bearer("https://a", None));
        assert_eq!(
            read("Basic realm=\"r\", Bearer realm=\"https://b\""),
            bearer("https://b", None)
        );
        assert_eq!(read("Bearer realm=\"a\\\"b\""), bearer("a\"b", None));
        assert_eq!(read("Negotiate"), None);
        assert_eq!(read("Bearer service=\"x\""), None);
        assert_eq!(read(""), None);
        assert_eq!(read("Bearer realm=\"open"), bearer("open", None));
    }

    proptest::proptest! {
        #[test]
        fn no_header_breaks_the_reader(header in "\\PC{0,60}") {
            let _ = Challenge::parse(&header);
        }

        #[test]
        fn no_likely_header_breaks_the_reader(header in "[bB\\\\\",= a-c]{0,40}") {
            let _ = Challenge::parse(&header);
        }
    }
}
