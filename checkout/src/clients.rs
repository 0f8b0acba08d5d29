//! The neighbours: LOMS and ProductService. What they say in gRPC ends here; the rest of the service sees its own types
//! and its own errors.

pub mod allowance;
pub mod flights;
pub mod loms;
pub mod products;

use std::{future::Future, time::Duration};

use backon::{ExponentialBuilder, Retryable as _};
use platform::grpc::Deadline;
use tonic::{Code, Status};

use crate::error::Error;

/// Tries once and at most twice more: what is still away then is an outage, not a hiccup.
const RETRIES: usize = 2;
/// A neighbour that restarts is back in about this time; the wait doubles, with jitter.
const FIRST_WAIT: Duration = Duration::from_millis(50);

/// Repeats an idempotent call while `again` says so and the deadline leaves time for it.
async fn retry<T, F>(
    deadline: Deadline,
    again: impl Fn(&Status) -> bool,
    call: impl FnMut() -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let waits = ExponentialBuilder::default()
        .with_min_delay(FIRST_WAIT)
        .with_max_times(RETRIES)
        .with_jitter();
    call.retry(waits)
        .when(|status| again(status) && !deadline.passed())
        .await
}

/// What a failed call means for our caller.
fn failure(neighbour: &'static str, status: &Status) -> Error {
    let cause = || format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        // a connection that breaks under a call shows as UNKNOWN or CANCELLED, depending on the moment
        Code::Unavailable | Code::Unknown | Code::Cancelled => Error::NeighbourAway {
            neighbour,
            cause: cause(),
        },
        Code::ResourceExhausted => Error::NeighbourBusy { neighbour },
        Code::DeadlineExceeded => Error::Late {
            waited_for: neighbour,
        },
        _ => Error::NeighbourBroken {
            neighbour,
            cause: cause(),
        },
    }
}
