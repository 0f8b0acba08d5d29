//! The neighbours: LOMS and ProductService. What they say in gRPC ends here; the rest of the service sees its own types
//! and its own errors.

pub mod allowance;
pub mod flights;
pub mod loms;
pub mod products;
pub mod turn;

use std::{future::Future, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use platform::{grpc::Deadline, state_log::StateLog};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::error::Error;

/// Tries once and at most twice more: what is still away then is an outage, not a hiccup.
const RETRIES: usize = 2;
/// A neighbour that restarts is back in about this time; the wait doubles, with jitter.
const FIRST_WAIT: Duration = Duration::from_millis(50);
/// What is known after a failed try still has to reach the caller in time, often past the database: no other try may take
/// this of its time.
const TIME_TO_ANSWER: Duration = Duration::from_millis(50);

/// Repeats an idempotent call while `again` says so and the deadline leaves time for it; `again` says what there is to
/// wait besides, `None` to give up. A call is given its deadline: a try after the first has a little less. One that is cut
/// short by it does not hide why the one before it failed.
async fn retry<T, F>(
    deadline: Deadline,
    again: impl Fn(&Status) -> Option<Duration>,
    mut call: impl FnMut(Deadline) -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut failure = match call(deadline).await {
        Ok(answer) => return Ok(answer),
        Err(status) => status,
    };
    for wait in waits() {
        let Some(wait) = again(&failure).map(|least| least + wait) else {
            break;
        };
        if deadline.remaining() <= wait + TIME_TO_ANSWER {
            break;
        }
        tokio::time::sleep(wait).await;
        let left = deadline.remaining().saturating_sub(TIME_TO_ANSWER);
        match call(Deadline::after(left)).await {
            Ok(answer) => return Ok(answer),
            Err(status) if was_cut_short(&status, deadline) => break,
            Err(status) => failure = status,
        }
    }
    Err(failure)
}

/// The seed is drawn here: without its feature `std` backon draws the same jitter every time.
fn waits() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(FIRST_WAIT)
        .with_max_times(RETRIES)
        .with_jitter_seed(rand::random())
        .with_jitter()
        .build()
}

/// A neighbour that knows of the deadline may give up a little sooner than we do.
fn was_cut_short(status: &Status, deadline: Deadline) -> bool {
    status.code() == Code::DeadlineExceeded && deadline.remaining() <= 2 * TIME_TO_ANSWER
}

static LOMS: StateLog = StateLog::new("loms unavailable", "loms is available again");
static PRODUCTS: StateLog = StateLog::new("products unavailable", "products is available again");

/// Of a neighbour, by its name.
pub(crate) fn state(neighbour: &str) -> &'static StateLog {
    if neighbour == loms::NAME {
        &LOMS
    } else {
        &PRODUCTS
    }
}

/// What a failed call means for our caller.
fn failure(neighbour: &'static str, status: &Status) -> Error {
    let cause = || format!("{:?}: {}", status.code(), status.message());
    match status.code() {
        Code::Unavailable if reason(status) == "STOCK_LOCKED" => Error::StockLocked,
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

/// The stable reason of a refusal; empty when it has none.
fn reason(status: &Status) -> String {
    let info = status.get_details_error_info();
    info.map(|info| info.reason).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future};

    use tokio::time::Instant;

    use super::*;

    const AWAY: fn(&Status) -> Option<Duration> =
        |status| (status.code() == Code::Unavailable).then_some(Duration::ZERO);

    fn away() -> Result<(), Status> {
        Err(Status::unavailable("away"))
    }

    #[test]
    fn waits_double_and_differ() {
        let first: Vec<Vec<_>> = (0..10).map(|_| waits().collect()).collect();
        assert!(first.iter().all(|waits| waits.len() == RETRIES));
        assert!(first.iter().all(|waits| waits[1] >= 2 * FIRST_WAIT));
        assert!(first.iter().any(|waits| waits[0] != first[0][0]));
    }

    #[tokio::test]
    async fn a_hiccup_is_tried_again_and_an_outage_said() {
        let calls = Cell::new(0);
        let answer = retry(Deadline::after(Duration::from_secs(30)), AWAY, |_| {
            calls.set(calls.get() + 1);
            let answer = if calls.get() < 3 { away() } else { Ok(()) };
            future::ready(answer)
        })
        .await;
        assert!(answer.is_ok());
        assert_eq!(calls.replace(0), 3);
        let answer = retry(Deadline::after(Duration::from_secs(30)), AWAY, |_| {
            calls.set(calls.get() + 1);
            future::ready(away())
        })
        .await;
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
        assert_eq!(calls.get(), 1 + RETRIES);
    }

    #[tokio::test]
    async fn a_try_that_is_cut_short_does_not_hide_why() {
        let deadline = Deadline::after(Duration::from_millis(500));
        let first = Cell::new(true);
        let answer = retry(deadline, AWAY, |allowed| {
            let first = first.replace(false);
            async move {
                if first {
                    return away();
                }
                assert!(allowed.instant() < deadline.instant());
                // as beside a neighbour that says nothing
                tokio::time::sleep_until(allowed.instant()).await;
                Err(Status::deadline_exceeded("late"))
            }
        })
        .await;
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
    }

    #[tokio::test]
    async fn what_there_is_to_wait_is_waited_for() {
        let (began, first) = (Instant::now(), Cell::new(true));
        let least = Duration::from_millis(300);
        let busy = |_: &Status| Some(least);
        let answer = retry(Deadline::after(Duration::from_secs(30)), busy, |_| {
            let answer = if first.replace(false) { away() } else { Ok(()) };
            future::ready(answer)
        })
        .await;
        assert!(answer.is_ok());
        assert!(began.elapsed() >= least + FIRST_WAIT);
    }

    // its clock stands: not even a busy machine makes it wait
    #[tokio::test(start_paused = true)]
    async fn nothing_is_tried_when_there_is_no_time_for_it() {
        let began = Instant::now();
        let deadline = Deadline::after(FIRST_WAIT + TIME_TO_ANSWER);
        let answer = retry(deadline, AWAY, |_| future::ready(away())).await;
        assert_eq!(answer.unwrap_err().code(), Code::Unavailable);
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
