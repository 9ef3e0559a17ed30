//! The OpenAPI document: what the table of routes cannot say about itself.

use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, InfoBuilder, OpenApi, OpenApiBuilder, PathItem};

/// The version of the contract that is spoken, not of this program.
const CONTRACT_VERSION: &str = "0.3.0";

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
