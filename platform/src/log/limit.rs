//! Bounds how often one cause is told: what fails at a rate would fill a disk, and hide what else
//! went wrong.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{Level, Metadata};

/// Lines of one cause in [`WINDOW`]: the same place in the code, the same `error`.
const OF_CAUSE: u32 = 5;
/// Lines of one place in the code: errors that name what a caller sent are many causes.
const OF_PLACE: u32 = 25;
const WINDOW: Duration = Duration::from_secs(1);
/// Causes that are told apart; beyond them a place counts as one.
const CAUSES: usize = 256;

/// Counts WARN and ERROR lines; others are never left out.
#[derive(Default)]
pub(crate) struct Limiter {
    hasher: RandomState,
    told: Mutex<HashMap<u64, Told>>,
}

struct Told {
    since: Instant,
    lines: u32,
    left_out: u64,
}

impl Limiter {
    /// Whether to write a line, and how many of its cause were left out since the last.
    pub(crate) fn admit(&self, metadata: &Metadata<'_>, error: &str) -> Option<u64> {
        if *metadata.level() > Level::WARN {
            return Some(0);
        }
        self.admit_at(Instant::now(), metadata, error)
    }

    fn admit_at(&self, now: Instant, metadata: &Metadata<'_>, error: &str) -> Option<u64> {
        let place = self.hasher.hash_one(metadata.callsite());
        let cause = self.hasher.hash_one((metadata.callsite(), error));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() >= CAUSES && !told.contains_key(&cause) {
            told.retain(|_, told| told.left_out > 0 || now - told.since < WINDOW);
        }
        let cause = if told.len() >= CAUSES && !told.contains_key(&cause) {
            place
        } else {
            cause
        };
        let mut left_out = 0;
        for (key, most) in [(cause, OF_CAUSE), (place, OF_PLACE)] {
            let told = told.entry(key).or_insert(Told {
                since: now,
                lines: 0,
                left_out: 0,
            });
            if now - told.since >= WINDOW {
                (told.since, told.lines) = (now, 0);
            }
            if told.lines >= most {
                // with those of its cause that would have been told with it
                told.left_out += 1 + left_out;
                return None;
            }
            told.lines += 1;
            left_out += std::mem::take(&mut told.left_out);
        }
        Some(left_out)
    }
}

#[cfg(test)]
mod tests {
    use tracing::{callsite::Callsite as _, field::FieldSet, metadata::Kind, subscriber::Interest};

    use super::*;

    struct Place;
    static PLACE: Place = Place;
    static METADATA: Metadata<'static> = Metadata::new(
        "place",
        "target",
        Level::WARN,
        None,
        None,
        None,
        FieldSet::new(&[], tracing::callsite::Identifier(&PLACE)),
        Kind::EVENT,
    );
    impl tracing::callsite::Callsite for Place {
        fn set_interest(&self, _: Interest) {}
        fn metadata(&self) -> &Metadata<'_> {
            &METADATA
        }
    }

    #[test]
    fn a_cause_is_told_a_few_times_a_second_and_then_counted() {
        let (limiter, began) = (Limiter::default(), Instant::now());
        let metadata = PLACE.metadata();
        let mut told = Vec::new();
        for ms in (0..3_000).step_by(10) {
            let at = began + Duration::from_millis(ms);
            told.extend(limiter.admit_at(at, metadata, "broken"));
        }
        // five a second; the first of a second says how many were left out
        assert_eq!(told.len(), 15);
        assert_eq!(told.iter().sum::<u64>(), 2 * 95);
        // another cause is not hidden by it, and a thousand of them are as many lines as a place
        // has
        let at = began + Duration::from_secs(10);
        let others = (0..1_000).filter_map(|n| limiter.admit_at(at, metadata, &n.to_string()));
        assert_eq!(others.count(), OF_PLACE as usize);
        assert!(limiter.told.lock().unwrap().len() <= CAUSES + 1);
    }

    #[test]
    fn what_is_no_warning_is_never_left_out() {
        let limiter = Limiter::default();
        tracing::subscriber::with_default(tracing::subscriber::NoSubscriber::new(), || {
            for _ in 0..100 {
                assert_eq!(limiter.admit(&INFO, "x"), Some(0));
            }
        });
    }

    static INFO: Metadata<'static> = Metadata::new(
        "place",
        "target",
        Level::INFO,
        None,
        None,
        None,
        FieldSet::new(&[], tracing::callsite::Identifier(&PLACE)),
        Kind::EVENT,
    );
}
