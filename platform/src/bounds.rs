//! What a setting may be. One beyond its bounds would start a service that waits for ever, never,
//! or counts in vain.

use std::{fmt::Debug, time::Duration};

use crate::error::StartError;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Of one wait: a millisecond is the least that PostgreSQL, which counts in them, does not take for
/// none.
const WAIT: (Duration, Duration) = (Duration::from_millis(1), DAY);
/// Of what lasts: until an order expires, a key is forgotten.
const PERIOD: (Duration, Duration) = (
    Duration::from_millis(1),
    Duration::from_secs(3_660 * 24 * 60 * 60),
);

/// Waits for something: 1 ms to a day.
///
/// # Errors
/// The first that is not.
pub fn waits(settings: &[(&str, Duration)]) -> Result<(), StartError> {
    settings
        .iter()
        .try_for_each(|(key, value)| within(key, *value, WAIT))
}

/// Times that things last: 1 ms to ten years.
///
/// # Errors
/// The first that is not.
pub fn periods(settings: &[(&str, Duration)]) -> Result<(), StartError> {
    settings
        .iter()
        .try_for_each(|(key, value)| within(key, *value, PERIOD))
}

/// A number from 1 to its most.
///
/// # Errors
/// The first that is not.
pub fn counts(settings: &[(&str, u64, u64)]) -> Result<(), StartError> {
    settings
        .iter()
        .try_for_each(|(key, value, most)| within(key, *value, (1, *most)))
}

fn within<T: PartialOrd + Debug>(
    key: &str,
    value: T,
    (least, most): (T, T),
) -> Result<(), StartError> {
    if value >= least && value <= most {
        return Ok(());
    }
    Err(StartError::new(
        format!("{key} = {value:?}"),
        format!("write {least:?} to {most:?}"),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_is_told_with_its_bounds() {
        let wrong = |bad: Result<(), StartError>| bad.unwrap_err().to_string();
        for bad in [Duration::ZERO, Duration::from_micros(999), 2 * DAY] {
            let error = wrong(waits(&[("fine", DAY), ("a.wait", bad)]));
            assert!(error.starts_with("a.wait = "), "{error}");
            assert!(error.ends_with("write 1ms to 86400s"), "{error}");
        }
        assert!(periods(&[("a.period", Duration::MAX)]).is_err());
        assert_eq!(wrong(counts(&[("n", 0, 9)])), "n = 0: write 1 to 9");
        assert!(counts(&[("n", 10, 9)]).is_err());
        assert!(counts(&[("n", 9, 9)]).is_ok());
    }
}
