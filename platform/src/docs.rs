//! The documentation that a service serves of itself: its OpenAPI document, and a page that shows it and tries it out. The
//! page is whole in the executable and may ask nobody but the service that it came from.

use axum::{Router, response::Response, routing::get};
use http::{HeaderValue, StatusCode, header};
use utoipa_swagger_ui::{Config, SwaggerUi};

use crate::http::not_found;

const DOCUMENT: &str = "/openapi.json";
const PAGE: &str = "/docs";

/// Holds the browser to what the page needs: its own origin, styles that its scripts set, and the icons in its style sheet.
const POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'";

/// `/openapi.json` with `document`, and `/docs`.
pub(crate) fn router(document: &'static str) -> Router {
    // unset, the page sends the document's address to a validator on the Internet
    let config = Config::from(DOCUMENT)
        .use_base_layout()
        .validator_url("none")
        .display_request_duration(true);
    let page: Router = SwaggerUi::new(PAGE).config(config).into();
    let json = [(header::CONTENT_TYPE, "application/json")];
    page.layer(axum::middleware::map_response(confine))
        .route(DOCUMENT, get(move || async move { (json, document) }))
}

async fn confine(mut response: Response) -> Response {
    // a path that the page does not have is unknown as any other is
    if response.status() == StatusCode::NOT_FOUND {
        return not_found().await;
    }
    let policy = HeaderValue::from_static(POLICY);
    response
        .headers_mut()
        .insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}
