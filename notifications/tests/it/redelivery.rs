//! What at-least-once brings: every event three times, in any order, with poison in between.

use std::{
    collections::BTreeMap,
    io::Write as _,
    time::{Duration, Instant},
};

use rand::{SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use serde_json::json;

use crate::{
    kafka::{Kafka, Offsets, PARTITIONS, event, header},
    process::{Replica, config_of},
    test_app::{count, eventually, scaled, seed},
};

const AT: &str = "2026-03-01T10:00:00Z";
/// How often each event comes.
const TIMES: usize = 3;
/// A record of so many is poison.
const POISON: usize = 100;

/// What is no event, or none that can be kept, and the cause that it is to have. What is refused only PostgreSQL finds out;
/// it comes without a sequence and with a status of its own, so that it is no event that is known.
fn poison(number: usize, order: i64) -> (&'static str, String) {
    match number % 5 {
        0 => ("unreadable", r#"{"UserId":7,"OrderID":"#.to_owned()),
        1 => ("unreadable", r#"{"UserId":7,"Status":"new"}"#.to_owned()),
        2 => ("unreadable", event(7, order, -1, "new", AT)),
        // another user, in the place of an event that was there first
        3 => ("conflict", event(8, order, 1, "new", AT)),
        _ => (
            "refused",
            format!(r#"{{"UserId":7,"OrderID":{order},"Status":"failed","Message":"\u0000"}}"#),
        ),
    }
}

#[tokio::test]
async fn every_event_three_times_shuffled_with_poison() {
    let pool = crate::database().await;
    let kafka = Kafka::new().await;
    let distinct = scaled(10_000).div_ceil(3) * 3;
    let mut records = Vec::new();
    for order in 1..=(distinct / 3) as i64 {
        for (sequence, status) in [(1, "new"), (2, "awaiting payment"), (3, "payed")] {
            let event = event(7, order, sequence, status, AT);
            records.extend(std::iter::repeat_n((order, event), TIMES));
        }
    }
    // one in each partition that poison will be in conflict with
    let first: Vec<_> = (1..=4)
        .map(|order| (order, event(7, order, 1, "new", AT)))
        .collect();
    records.retain(|record| !first.contains(record));
    records.extend(std::iter::repeat_n(&first, TIMES - 1).flatten().cloned());
    let mut causes: BTreeMap<String, usize> = BTreeMap::new();
    for number in 0..records.len() / POISON {
        let order = number as i64 % 4 + 1;
        let (cause, value) = poison(number, order);
        *causes.entry(cause.to_owned()).or_default() += 1;
        records.push((order, value));
    }
    records.shuffle(&mut StdRng::seed_from_u64(seed()));
    records.splice(0..0, first);
    // as many at once as LOMS sends
    for some in records.chunks(1000) {
        kafka.send_all(some).await;
    }

    let replica = Replica::start(&config_of(&pool, &kafka, json!({})));
    let ends = records
        .iter()
        .fold(BTreeMap::new(), |mut ends, (order, _)| {
            *ends
                .entry((order % i64::from(PARTITIONS)) as i32)
                .or_insert(0) += 1;
            ends
        });
    let offsets = kafka.offsets();
    let watch = tokio::task::spawn_blocking(move || longest_stall(&offsets, &ends));
    let (took, stall) = watch.await.expect("watched to the end");

    assert_eq!(
        count(&pool, "true").await as usize,
        distinct,
        "messages are the distinct events"
    );
    let poisons = causes.values().sum();
    let letters = kafka.dead_letters(poisons);
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for letter in &letters {
        *found
            .entry(header(letter, "dead_letter.cause").expect("a cause"))
            .or_default() += 1;
    }
    assert_eq!(found, causes);

    let repeats = distinct * (TIMES - 1);
    for (series, expected) in [
        ("notifications_counter_saved_total", distinct),
        ("notifications_counter_duplicates_total", repeats),
        ("notifications_counter_dead_letters_total", poisons),
        // what cannot be read is not part of what is saved
        (
            "notifications_histogram_batch_size_sum",
            records.len() - causes["unreadable"],
        ),
    ] {
        let counted: f64 = replica.metrics(series).await.values().sum();
        assert_eq!(counted as usize, expected, "{series}");
    }
    eventually(
        "the lag is back to nothing in every partition",
        async || {
            let lag = replica.metrics("notifications_consumer_lag").await;
            lag.len() == PARTITIONS as usize && lag.values().all(|lag| *lag == 0.0)
        },
    )
    .await;
    replica.stop();
    // not println: the figure is to be seen when all is well, too
    writeln!(
        std::io::stderr(),
        "{} records, {poisons} of them poison, in {took:.1?}: no partition stood still for more than {stall:.0?}",
        records.len(),
    )
    .expect("written");
    assert!(stall < Duration::from_secs(1), "{stall:?}");
}

/// Watches the group from its first commit to the last: how long that took, and the longest that a partition with
/// records left made no progress.
fn longest_stall(offsets: &Offsets, ends: &BTreeMap<i32, i64>) -> (Duration, Duration) {
    let deadline = Instant::now() + Duration::from_secs(120);
    let mut began = None;
    let mut at: BTreeMap<i32, (i64, Instant)> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    loop {
        let committed = offsets.committed();
        let now = Instant::now();
        assert!(now < deadline, "not in time: {committed:?} of {ends:?}");
        // where it begins is committed before anything is read
        if committed.values().all(|next| *next == 0) {
            continue;
        }
        let start = *began.get_or_insert(now);
        for (partition, end) in ends {
            let next = committed.get(partition).copied().unwrap_or(0);
            let (last, since) = *at.entry(*partition).or_insert((0, start));
            if next != last {
                at.insert(*partition, (next, now));
            }
            if last != *end {
                longest = longest.max(now - since);
            }
        }
        if committed == *ends {
            return (now - start, longest);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
