//! The OpenAPI document: what the table of routes cannot say about itself, and how it is shown.

use serde_json::Value;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathItem};

/// The version of the contract that is spoken, not of this program.
pub(super) const CONTRACT_VERSION: &str = "0.3.0";

/// A page that shows the document, without anything from elsewhere.
pub(super) const PAGE: &str = include_str!("document.html");

/// Prefix of a route that takes slashes in its last parameter, as the router writes it.
const WILDCARD: &str = "{*name}";

/// Title and security: what stands above the routes.
pub(super) fn head() -> OpenApi {
    let bearer = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    let components = ComponentsBuilder::new().security_scheme("bearer", bearer).build();
    OpenApiBuilder::new()
        .info(InfoBuilder::new().title("ovum").version(CONTRACT_VERSION).build())
        .components(Some(components))
        .security(Some([SecurityRequirement::new("bearer", Vec::<String>::new())]))
        .build()
}

/// The document as clients read it: an image name is one parameter, whatever slashes it has, and
/// tagging, which the router finds by the end of the name, is a path of its own.
pub(super) fn finished(mut document: OpenApi) -> OpenApi {
    let paths = &mut document.paths.paths;
    let wild: Vec<String> = paths.keys().filter(|path| path.contains(WILDCARD)).cloned().collect();
    for path in wild {
        let Some(mut item) = paths.remove(&path) else { continue };
        let path = path.replace(WILDCARD, "{name}");
        if let Some(tag) = item.post.take() {
            let mut tagging = PathItem::default();
            tagging.post = Some(tag);
            paths.insert(format!("{path}/tag"), tagging);
        }
        paths.insert(path, item);
    }
    document
}

/// The document as YAML. Strings are quoted as in JSON, which YAML 1.2 takes as it is.
pub(super) fn yaml(value: &Value) -> String {
    let mut text = String::new();
    write_yaml(value, 0, &mut text);
    text
}

fn write_yaml(value: &Value, depth: usize, text: &mut String) {
    let item = |head: &str, value: &Value, text: &mut String| {
        text.push_str(&"  ".repeat(depth));
        text.push_str(head);
        let is_block = match value {
            Value::Array(list) => !list.is_empty(),
            Value::Object(map) => !map.is_empty(),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
        };
        if is_block {
            text.push('\n');
            write_yaml(value, depth + 1, text);
        } else {
            text.push(' ');
            text.push_str(&value.to_string());
            text.push('\n');
        }
    };
    match value {
        Value::Object(map) => map
            .iter()
            .for_each(|(key, value)| item(&format!("{}:", Value::from(key.as_str())), value, text)),
        Value::Array(list) => list.iter().for_each(|value| item("-", value, text)),
        scalar => text.push_str(&scalar.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn yaml_has_a_line_for_each_value() {
        let value = json!({ "a": { "b": [1, "x: y", [], { "c": null }] }, "d": {} });

        assert_eq!(
            yaml(&value),
            "\"a\":\n  \"b\":\n    - 1\n    - \"x: y\"\n    - []\n    -\n      \"c\": null\n\
             \"d\": {}\n"
        );
    }
}
