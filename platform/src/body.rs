//! The body of a request, in bounded memory and time.

use std::time::Duration;

use axum::{
    body::{Body, HttpBody as _},
    response::Response,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::BodyExt as _;

use crate::http::problem;

/// What one body may take.
#[derive(Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) bytes: usize,
    /// What is read and forgotten of a body over the limit. A client that is cut off while it
    /// writes never sees why.
    pub(crate) discarded: usize,
    /// For the whole of it to arrive.
    pub(crate) time: Duration,
}

/// The bytes of a body.
///
/// # Errors
/// The answer to one that is too large, too slow or broken off.
pub(crate) async fn receive(
    headers: &HeaderMap,
    body: Body,
    bounds: Bounds,
) -> Result<Vec<u8>, Response> {
    // `100 Continue` is sent when the body is first asked for: this one is not
    if headers.contains_key(header::EXPECT) && is_over(&body, bounds.bytes) {
        return Err(too_large());
    }
    match tokio::time::timeout(bounds.time, read(body, bounds)).await {
        Ok(read) => read,
        Err(_) => Err(late()),
    }
}

/// Whether a body has come with its head, as a rule: hyper reads so much at once, and what it has
/// read it can discard.
pub(crate) fn is_small(body: &Body) -> bool {
    body.size_hint().exact().is_some() && !is_over(body, 4_096)
}

/// Whether a body has said that it is longer than `limit`.
fn is_over(body: &Body, limit: usize) -> bool {
    body.size_hint().lower() > limit as u64
}

async fn read(mut body: Body, bounds: Bounds) -> Result<Vec<u8>, Response> {
    let (mut taken, mut seen) = (Vec::new(), 0);
    while let Some(frame) = body.frame().await {
        let unreadable = |_| {
            problem(
                StatusCode::BAD_REQUEST,
                tonic::Code::InvalidArgument,
                "the body could not be read",
            )
        };
        let Ok(data) = frame.map_err(unreadable)?.into_data() else {
            continue;
        };
        seen += data.len();
        if seen <= bounds.bytes {
            taken.extend_from_slice(&data);
        } else if seen > bounds.bytes.max(bounds.discarded) {
            break;
        } else {
            taken = Vec::new();
        }
    }
    if seen <= bounds.bytes {
        return Ok(taken);
    }
    Err(too_large())
}

fn too_large() -> Response {
    let mut refused = problem(
        StatusCode::PAYLOAD_TOO_LARGE,
        tonic::Code::ResourceExhausted,
        "the body is too large",
    );
    close(&mut refused);
    refused
}

fn late() -> Response {
    let mut refused = problem(
        StatusCode::GATEWAY_TIMEOUT,
        tonic::Code::DeadlineExceeded,
        "the body did not arrive in time",
    );
    close(&mut refused);
    refused
}

/// The rest of a body may still be on its way: the connection cannot carry another call.
pub(crate) fn close(response: &mut Response) {
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
}
