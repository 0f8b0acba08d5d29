//! What the inbox has read and not committed yet, until each event of it is saved or dead-lettered, or its partition is gone.

use std::collections::{BTreeMap, BTreeSet};

use platform::kafka;
use rdkafka::{
    Message as _,
    message::{BorrowedMessage, OwnedMessage},
};
use time::OffsetDateTime;

use crate::{
    event::{Event, Received, to_microsecond},
    letter::{Cause, Letter, headers},
};

/// What has been read and is not committed yet.
#[derive(Default)]
pub(crate) struct Hand {
    pub(crate) events: Vec<(Received, OwnedMessage)>,
    pub(crate) letters: Vec<Letter>,
    /// By partition, the offset to go on from.
    pub(crate) next: BTreeMap<i32, i64>,
    /// By partition, the offset of the record that comes next, if none is missing.
    expected: BTreeMap<i32, i64>,
    /// Where another one came.
    pub(crate) jumps: Vec<Jump>,
}

/// Reading went on elsewhere than it had come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Jump {
    pub(crate) partition: i32,
    pub(crate) expected: i64,
    pub(crate) offset: i64,
}

impl Hand {
    pub(crate) fn len(&self) -> usize {
        self.events.len() + self.letters.len()
    }

    pub(crate) fn add(&mut self, message: &BorrowedMessage<'_>) {
        let (partition, offset) = (message.partition(), message.offset());
        self.next.insert(partition, offset + 1);
        let expected = self.expected.insert(partition, offset + 1);
        if let Some(expected) = expected.filter(|expected| *expected != offset) {
            self.jumps.push(Jump {
                partition,
                expected,
                offset,
            });
        }
        let record = headers::detach(message);
        match Event::parse(message.payload()) {
            Ok(event) => {
                let received = Received {
                    at: event.occurred_at.unwrap_or_else(|| kafka_time(message)),
                    event,
                    source: (partition, offset),
                    traceparent: kafka::traceparent(&record)
                        .filter(|text| is_trace_context(text))
                        .map(str::to_owned),
                };
                self.events.push((received, record));
            }
            Err(error) => {
                let letter = Letter::new(record, Cause::Unreadable, &error.to_string());
                self.letters.push(letter);
            }
        }
    }

    /// The partitions whose letters are not kept yet.
    pub(crate) fn partitions_of_letters(&self) -> BTreeSet<i32> {
        self.letters
            .iter()
            .map(|letter| letter.record.partition())
            .collect()
    }

    /// What may be committed: of a partition all that was read, or nothing as long as a letter of
    /// it is not kept.
    pub(crate) fn take_next(&mut self) -> BTreeMap<i32, i64> {
        let held = self.partitions_of_letters();
        let (left, next) = std::mem::take(&mut self.next)
            .into_iter()
            .partition(|(partition, _)| held.contains(partition));
        self.next = left;
        next
    }

    /// Notes where reading begins.
    pub(crate) fn expect(&mut self, offsets: BTreeMap<i32, i64>) {
        self.expected.extend(offsets);
    }

    /// Abandons what came from partitions that are no longer ours: whoever has them now reads it from the last commit.
    pub(crate) fn forget(&mut self, partitions: &[i32]) {
        if partitions.is_empty() {
            return;
        }
        self.events
            .retain(|(received, _)| !partitions.contains(&received.source.0));
        self.letters
            .retain(|letter| !partitions.contains(&letter.record.partition()));
        let others = |partition: &i32| !partitions.contains(partition);
        self.next.retain(|partition, _| others(partition));
        self.expected.retain(|partition, _| others(partition));
        self.jumps.retain(|jump| others(&jump.partition));
    }
}

/// Kafka's time of a record; now, for a record of a format that has none.
fn kafka_time(message: &BorrowedMessage<'_>) -> OffsetDateTime {
    let millis = message.timestamp().to_millis().filter(|millis| *millis > 0);
    let at = millis.and_then(|millis| {
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(millis) * 1_000_000).ok()
    });
    to_microsecond(at.unwrap_or_else(OffsetDateTime::now_utc))
}

/// Whether a header says what W3C has it say (Trace Context, version 00). Any other is as good as none: PostgreSQL would
/// refuse a NUL in it, and with that a good event.
fn is_trace_context(text: &str) -> bool {
    let fits = |(at, byte): (usize, u8)| match at {
        2 | 35 | 52 => byte == b'-',
        _ => byte.is_ascii_hexdigit(),
    };
    text.len() == 55 && text.bytes().enumerate().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trace_context_is_kept() {
        let context = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(is_trace_context(context));
        for other in [
            "",
            "nonsense",
            &context[..54],
            &format!("{context}0"),
            &context.replace('-', "0"),
            &context.replace('f', "\0"),
            &context.replace("af", "é"),
            &context.replace("af", "-g"),
        ] {
            assert!(!is_trace_context(other), "{other:?}");
        }
    }
}
