//! How long a call may take: the layers of the server say it, handlers pass it on.

use std::time::Duration;

use http::HeaderMap;
use tokio::time::Instant;
use tonic::metadata::AsciiMetadataValue;

use crate::error::{Code, Fault};

/// Until when a call's answer is of use. Handlers pass it on, so that nobody works for a caller who has gone.
#[derive(Clone, Copy, Debug)]
pub struct Deadline(Instant);

impl Deadline {
    /// The deadline that the door gave to this call.
    pub fn of<T>(request: &tonic::Request<T>) -> Deadline {
        // a call that came around the door (there is none today) still gets a bound
        request
            .extensions()
            .get()
            .copied()
            .unwrap_or_else(|| Deadline::after(Duration::from_secs(5)))
    }

    pub(crate) fn at(instant: Instant) -> Deadline {
        Deadline(instant)
    }

    pub fn after(duration: Duration) -> Deadline {
        Deadline(Instant::now() + duration)
    }

    pub fn remaining(&self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    pub fn instant(&self) -> Instant {
        self.0
    }

    pub fn passed(&self) -> bool {
        self.remaining().is_zero()
    }
}

/// How long the caller waits.
pub(crate) fn timeout_of(headers: &HeaderMap) -> Option<Duration> {
    grpc_timeout(headers.get("grpc-timeout")?.to_str().ok()?)
}

/// A caller's deadline, by the header that grpc-gateway has for it.
///
/// # Errors
/// INVALID_ARGUMENT, as grpc-gateway answers what is no time.
pub(crate) fn forwarded(headers: &HeaderMap) -> Result<Option<AsciiMetadataValue>, Fault> {
    let Some(value) = headers.get("grpc-timeout") else {
        return Ok(None);
    };
    let parsed = timeout_of(headers).and_then(|_| value.to_str().ok()?.parse().ok());
    let invalid = || {
        let message = "invalid grpc-timeout: write digits, at most eight, and a unit of HMSmun";
        Fault::new(Code::InvalidArgument, message)
    };
    parsed.map(Some).ok_or_else(invalid)
}

/// A `grpc-timeout` header: at most eight digits and a unit (gRPC over HTTP/2, "Requests").
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(amount * 3600)),
        "M" => Some(Duration::from_secs(amount * 60)),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grpc_timeouts_are_read_as_written() {
        assert_eq!(grpc_timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(grpc_timeout("3S"), Some(Duration::from_secs(3)));
        assert_eq!(
            grpc_timeout("99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in ["", "S", "123456789S", "-1S", "1s", "1", "é", "1é"] {
            assert_eq!(grpc_timeout(bad), None, "{bad}");
        }
    }
}
