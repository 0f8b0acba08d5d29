//! How things go wrong, once: a service's error becomes a [`Fault`], a fault becomes a gRPC status with google.rpc
//! details, a status becomes grpc-gateway's HTTP answer. No other file builds a status.

use std::{collections::HashMap, fmt};

use http::StatusCode;
use serde_json::{Value, json};
use tonic::Status;
use tonic_types::{ErrorDetails, FieldViolation, PreconditionViolation, StatusExt as _};

/// `ErrorInfo.domain` of every refusal.
pub const DOMAIN: &str = "marketplace";
/// More violations than this are counted, not listed: over 6 KiB of details break HTTP/2 headers.
pub const LISTED: usize = 50;

/// A process that cannot start: what is wrong, and what to do about it, on one line. Exit code 64.
#[derive(Debug)]
pub struct StartError {
    what: String,
    advice: String,
}

impl StartError {
    pub fn new(what: impl Into<String>, advice: impl Into<String>) -> Self {
        StartError {
            what: what.into(),
            advice: advice.into(),
        }
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", one_line(&self.what), one_line(&self.advice))
    }
}

impl std::error::Error for StartError {}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The gRPC codes that the services answer with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    InvalidArgument,
    Unauthenticated,
    PermissionDenied,
    NotFound,
    AlreadyExists,
    FailedPrecondition,
    Aborted,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    DeadlineExceeded,
    /// The caller has gone.
    Cancelled,
    Internal,
}

impl Code {
    fn grpc(self) -> tonic::Code {
        match self {
            Code::InvalidArgument => tonic::Code::InvalidArgument,
            Code::Unauthenticated => tonic::Code::Unauthenticated,
            Code::PermissionDenied => tonic::Code::PermissionDenied,
            Code::NotFound => tonic::Code::NotFound,
            Code::AlreadyExists => tonic::Code::AlreadyExists,
            Code::FailedPrecondition => tonic::Code::FailedPrecondition,
            Code::Aborted => tonic::Code::Aborted,
            Code::OutOfRange => tonic::Code::OutOfRange,
            Code::ResourceExhausted => tonic::Code::ResourceExhausted,
            Code::Unavailable => tonic::Code::Unavailable,
            Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
            Code::Cancelled => tonic::Code::Cancelled,
            Code::Internal => tonic::Code::Internal,
        }
    }
}

/// An answer that is not OK, as the caller sees it. Nothing internal belongs in it.
#[derive(Clone, Debug)]
pub struct Fault {
    pub code: Code,
    pub message: String,
    pub detail: Detail,
}

/// What a program can read about a fault.
#[derive(Clone, Debug)]
pub enum Detail {
    None,
    /// `google.rpc.BadRequest`
    Fields {
        violations: Vec<Violation>,
        /// How many violations there were besides, beyond those that are kept.
        more: usize,
    },
    /// `google.rpc.ErrorInfo` with a stable reason
    Reason {
        reason: &'static str,
        metadata: Vec<(String, String)>,
    },
    /// `google.rpc.PreconditionFailure`
    Precondition {
        kind: &'static str,
        subject: String,
        description: String,
    },
}

/// One field of a request that is not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The field's path in the message: `items[3].count`.
    pub field: String,
    pub description: String,
}

/// Collects what is wrong with a request, so that its caller hears all of it at once.
#[derive(Debug, Default)]
pub struct Fields(Vec<Violation>);

impl Fields {
    pub fn new() -> Self {
        Fields::default()
    }

    /// Notes a violation unless `holds`.
    pub fn check(&mut self, holds: bool, field: impl Into<String>, description: impl Into<String>) {
        if !holds {
            self.push(field, description);
        }
    }

    pub fn push(&mut self, field: impl Into<String>, description: impl Into<String>) {
        self.0.push(Violation {
            field: field.into(),
            description: description.into(),
        });
    }

    /// # Errors
    /// The violations, if there are any.
    pub fn finish(self) -> Result<(), Vec<Violation>> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(self.0)
        }
    }
}

impl Fault {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Fault {
            code,
            message: message.into(),
            detail: Detail::None,
        }
    }

    /// INVALID_ARGUMENT naming every field; the message is that of the first.
    pub fn invalid(violations: Vec<Violation>) -> Self {
        Fault::invalid_and_more(violations, 0)
    }

    /// [`Fault::invalid`] of which only the first [`LISTED`] were kept, and `more` were not.
    pub fn invalid_and_more(violations: Vec<Violation>, more: usize) -> Self {
        let message = match violations.as_slice() {
            [] => "invalid request".to_owned(),
            [one] => format!("{}: {}", one.field, one.description),
            [first, rest @ ..] => format!(
                "{}: {} (and {} more)",
                first.field,
                first.description,
                rest.len() + more
            ),
        };
        Fault {
            code: Code::InvalidArgument,
            message,
            detail: Detail::Fields { violations, more },
        }
    }
}

impl From<Fault> for Status {
    fn from(fault: Fault) -> Status {
        let code = fault.code.grpc();
        let details = match fault.detail {
            Detail::None => return Status::new(code, fault.message),
            Detail::Fields { violations, more } => {
                let over = violations.len().saturating_sub(LISTED) + more;
                let mut listed: Vec<_> = violations
                    .into_iter()
                    .take(LISTED)
                    .map(|v| FieldViolation::new(v.field, v.description))
                    .collect();
                if over > 0 {
                    listed.push(FieldViolation::new("", format!("and {over} more")));
                }
                ErrorDetails::with_bad_request(listed)
            }
            Detail::Reason { reason, metadata } => ErrorDetails::with_error_info(
                reason,
                DOMAIN,
                metadata.into_iter().collect::<HashMap<_, _>>(),
            ),
            Detail::Precondition {
                kind,
                subject,
                description,
            } => ErrorDetails::with_precondition_failure(vec![PreconditionViolation::new(
                kind,
                subject,
                description,
            )]),
        };
        Status::with_error_details(code, fault.message, details)
    }
}

/// The code's name as Go spells it: a label that existing dashboards use.
pub fn go_name(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::Ok => "OK",
        tonic::Code::Cancelled => "Canceled",
        tonic::Code::Unknown => "Unknown",
        tonic::Code::InvalidArgument => "InvalidArgument",
        tonic::Code::DeadlineExceeded => "DeadlineExceeded",
        tonic::Code::NotFound => "NotFound",
        tonic::Code::AlreadyExists => "AlreadyExists",
        tonic::Code::PermissionDenied => "PermissionDenied",
        tonic::Code::ResourceExhausted => "ResourceExhausted",
        tonic::Code::FailedPrecondition => "FailedPrecondition",
        tonic::Code::Aborted => "Aborted",
        tonic::Code::OutOfRange => "OutOfRange",
        tonic::Code::Unimplemented => "Unimplemented",
        tonic::Code::Internal => "Internal",
        tonic::Code::Unavailable => "Unavailable",
        tonic::Code::DataLoss => "DataLoss",
        tonic::Code::Unauthenticated => "Unauthenticated",
    }
}

/// grpc-gateway's HTTP status for a gRPC code (`runtime.HTTPStatusFromCode`).
pub fn http_status(code: tonic::Code) -> StatusCode {
    match code {
        tonic::Code::Ok => StatusCode::OK,
        tonic::Code::Cancelled => StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST),
        tonic::Code::InvalidArgument
        | tonic::Code::FailedPrecondition
        | tonic::Code::OutOfRange => StatusCode::BAD_REQUEST,
        tonic::Code::NotFound => StatusCode::NOT_FOUND,
        tonic::Code::AlreadyExists | tonic::Code::Aborted => StatusCode::CONFLICT,
        tonic::Code::PermissionDenied => StatusCode::FORBIDDEN,
        tonic::Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        tonic::Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        tonic::Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        tonic::Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        tonic::Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        tonic::Code::Unknown | tonic::Code::Internal | tonic::Code::DataLoss => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

/// grpc-gateway's error body, `{"code":5,"message":"..","details":[..]}`, details as `@type` objects in proto3 JSON.
pub fn json_body(status: &Status) -> Value {
    let details = status.get_error_details();
    let mut listed = Vec::new();
    if let Some(bad) = details.bad_request() {
        let fields: Vec<_> = bad
            .field_violations
            .iter()
            .map(|v| json!({"field": v.field, "description": v.description, "reason": "", "localizedMessage": null}))
            .collect();
        listed.push(json!({"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": fields}));
    }
    if let Some(info) = details.error_info() {
        listed.push(json!({"@type": "type.googleapis.com/google.rpc.ErrorInfo",
            "reason": info.reason, "domain": info.domain, "metadata": info.metadata}));
    }
    if let Some(failure) = details.precondition_failure() {
        let violations: Vec<_> = failure
            .violations
            .iter()
            .map(|v| json!({"type": v.r#type, "subject": v.subject, "description": v.description}))
            .collect();
        listed.push(json!({"@type": "type.googleapis.com/google.rpc.PreconditionFailure", "violations": violations}));
    }
    json!({"code": i32::from(status.code()), "message": status.message(), "details": listed})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_stay_under_the_header_limit() {
        let violations = (0..1000)
            .map(|i| Violation {
                field: format!("items[{i}].count"),
                description: "must be 1 to 65535".into(),
            })
            .collect();
        let status = Status::from(Fault::invalid(violations));
        let listed = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(listed.len(), LISTED + 1);
        assert_eq!(listed[LISTED].description, "and 950 more");
        assert!(
            status.details().len() < 6 * 1024,
            "{}",
            status.details().len()
        );
    }

    #[test]
    fn a_refusal_reads_the_same_over_http() {
        let status = Status::from(Fault {
            code: Code::FailedPrecondition,
            message: "the cart is empty".into(),
            detail: Detail::Reason {
                reason: "EMPTY_CART",
                metadata: vec![("user".into(), "7".into())],
            },
        });
        assert_eq!(http_status(status.code()), StatusCode::BAD_REQUEST);
        assert_eq!(
            json_body(&status),
            json!({"code": 9, "message": "the cart is empty", "details": [{
                "@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "EMPTY_CART", "domain": DOMAIN,
                "metadata": {"user": "7"}}]})
        );
    }

    #[test]
    fn a_start_error_is_one_line() {
        assert_eq!(
            StartError::new("reading\n x", "do\ny").to_string(),
            "reading x: do y"
        );
    }
}
