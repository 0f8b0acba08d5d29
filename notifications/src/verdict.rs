//! What an attempt to tell a message means for it: told, tried again later, given up with a reason, or left as it is.

use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};

use crate::{config::DeliveryConfig, message::Due, telegram::Outcome};

/// What is written down about a message that was due.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// It is told.
    Told,
    /// It failed, and is due again after a while.
    Again {
        /// What it failed with.
        error: String,
        /// How long that is.
        wait: Duration,
    },
    /// It is not tried any more.
    GivenUp {
        /// How often it was.
        attempts: i32,
        /// Why.
        reason: String,
    },
    /// Nothing; everybody waits.
    Paused(Duration),
}

/// What an attempt means for its message.
pub fn judge(due: &Due, outcome: Outcome, config: &DeliveryConfig) -> Verdict {
    let attempts = due.attempts.saturating_add(1);
    match outcome {
        Outcome::Told => Verdict::Told,
        Outcome::Paused(pause) => Verdict::Paused(pause),
        Outcome::Refused(reason) => Verdict::GivenUp {
            attempts,
            reason: clean(&reason),
        },
        Outcome::Failed(error) => {
            let error = clean(&error);
            let failures = u32::try_from(attempts).unwrap_or(u32::MAX);
            if failures >= config.max_attempts {
                let reason = format!("failed {attempts} times, last: {error}");
                return Verdict::GivenUp { attempts, reason };
            }
            let wait = backoff(config.backoff, config.longest_backoff, failures);
            Verdict::Again { error, wait }
        }
    }
}

/// Characters of what others say that are kept.
const KEPT: usize = 500;

/// Text of others as it is stored: PostgreSQL takes no NUL, and a line of the log is one line.
fn clean(text: &str) -> String {
    let printed = |c: char| if c.is_control() { ' ' } else { c };
    text.chars().take(KEPT).map(printed).collect()
}

/// The end of a message that waited for longer than `age`.
pub fn overdue(due: &Due, age: Duration) -> Verdict {
    let last = due
        .last_error
        .as_ref()
        .map(|error| format!(", last: {error}"));
    let reason = format!(
        "older than {} s after {} attempts{}",
        age.as_secs(),
        due.attempts,
        last.unwrap_or_default(),
    );
    Verdict::GivenUp {
        attempts: due.attempts,
        reason,
    }
}

/// Doubled with each failure up to `longest`, plus up to as much again by chance, so that what failed together is not
/// tried together.
pub fn backoff(first: Duration, longest: Duration, failures: u32) -> Duration {
    let mut waits = ExponentialBuilder::default()
        .with_min_delay(first)
        .with_max_delay(longest)
        .with_jitter()
        .without_max_times()
        .build();
    // 2^32 times any first wait is beyond any longest one
    let nth = failures.clamp(1, 32) as usize - 1;
    waits.nth(nth).unwrap_or(longest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(attempts: i32) -> Due {
        Due {
            id: 1,
            order: 42,
            user: 7,
            status: "payed".to_owned(),
            attempts,
            last_error: Some("HTTP 500".to_owned()),
            traceparent: None,
            overdue: false,
        }
    }

    #[test]
    fn failures_end_after_the_last_attempt() {
        let config = DeliveryConfig {
            max_attempts: 3,
            ..DeliveryConfig::default()
        };
        let failed = || Outcome::Failed("HTTP 500".to_owned());
        assert!(matches!(
            judge(&due(0), failed(), &config),
            Verdict::Again { .. }
        ));
        assert!(matches!(
            judge(&due(1), failed(), &config),
            Verdict::Again { .. }
        ));
        let reason = "failed 3 times, last: HTTP 500".to_owned();
        assert_eq!(
            judge(&due(2), failed(), &config),
            Verdict::GivenUp {
                attempts: 3,
                reason
            }
        );
    }

    #[test]
    fn a_pause_is_no_attempt_and_a_refusal_is_final() {
        let config = DeliveryConfig {
            max_attempts: 1,
            ..DeliveryConfig::default()
        };
        let pause = Duration::from_secs(3);
        assert_eq!(
            judge(&due(9), Outcome::Paused(pause), &config),
            Verdict::Paused(pause)
        );
        let reason = "HTTP 400".to_owned();
        let refused = Outcome::Refused(reason.clone());
        assert_eq!(
            judge(&due(0), refused, &config),
            Verdict::GivenUp {
                attempts: 1,
                reason
            }
        );
    }

    #[test]
    fn what_is_too_old_keeps_its_last_error() {
        let Verdict::GivenUp {
            attempts: 2,
            reason,
        } = overdue(&due(2), Duration::from_secs(3600))
        else {
            panic!("given up with its attempts");
        };
        assert_eq!(reason, "older than 3600 s after 2 attempts, last: HTTP 500");
    }

    #[test]
    fn waits_double_up_to_the_longest_with_jitter() {
        let (first, longest) = (Duration::from_secs(5), Duration::from_secs(600));
        for (failures, base) in [
            (0, 5),
            (1, 5),
            (2, 10),
            (3, 20),
            (8, 600),
            (30, 600),
            (u32::MAX, 600),
        ] {
            let wait = backoff(first, longest, failures);
            let base = Duration::from_secs(base);
            assert!(wait >= base && wait <= 2 * base, "{failures}: {wait:?}");
        }
    }
}
