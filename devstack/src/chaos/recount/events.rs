//! Events: every committed change is in the log at least once, the first occurrences of an order's changes in their order,
//! and in Notifications exactly once; nothing is in either that was not committed.

use std::collections::{BTreeMap, BTreeSet};

use super::Findings;
use crate::chaos::{log::Event, snapshot::Snapshot};

/// The log against the histories.
pub(super) fn published(snapshot: &Snapshot, findings: &mut Findings) {
    let log = &snapshot.log;
    if log.dropped > 0 {
        let dropped = log.dropped;
        findings.wrong(format!(
            "the broker dropped {dropped} records: the log is no witness"
        ));
    }
    if log.dead_letters > 0 {
        findings.wrong(format!("{} dead letters", log.dead_letters));
    }
    if snapshot.outbox > 0 {
        findings.wrong(format!("{} events wait in the outbox", snapshot.outbox));
    }
    let mut firsts: BTreeMap<i64, Vec<i64>> = BTreeMap::new();
    let mut partitions: BTreeMap<i64, BTreeSet<i32>> = BTreeMap::new();
    for record in &log.records {
        let event = match &record.event {
            Ok(event) => event,
            Err(error) => {
                findings.wrong(format!("an event cannot be read: {error}"));
                continue;
            }
        };
        if record.key != event.order.to_string() {
            let (order, key) = (event.order, &record.key);
            findings.wrong(format!("an event of order {order} has the key {key}"));
        }
        committed(snapshot, event, findings);
        partitions
            .entry(event.order)
            .or_default()
            .insert(record.partition);
        let seen = firsts.entry(event.order).or_default();
        if !seen.contains(&event.sequence) {
            seen.push(event.sequence);
        }
    }
    for (order, partitions) in partitions.iter().filter(|(_, found)| found.len() > 1) {
        findings.wrong(format!("order {order} is in the partitions {partitions:?}"));
    }
    for (order, history) in &snapshot.changes {
        let seen = firsts.get(order).map_or(&[][..], Vec::as_slice);
        for change in history.iter().filter(|step| !seen.contains(&step.sequence)) {
            let (sequence, to) = (change.sequence, change.to.as_str());
            findings.lost(format!(
                "event {sequence} ({to}) of order {order} is not in Kafka"
            ));
        }
        if !seen.is_sorted() {
            findings.wrong(format!("the events of order {order} came as {seen:?}"));
        }
    }
}

fn committed(snapshot: &Snapshot, event: &Event, findings: &mut Findings) {
    let (order, sequence) = (event.order, event.sequence);
    let history = snapshot.changes.get(&order);
    let change = history.and_then(|steps| steps.iter().find(|step| step.sequence == sequence));
    let user = snapshot.orders.get(&order).map(|order| order.user);
    let as_committed =
        change.is_some_and(|change| change.to.as_str() == event.status) && user == Some(event.user);
    if !as_committed {
        findings.wrong(format!("the event {event:?} was never committed"));
    }
}

/// Notifications against the histories.
pub(super) fn saved(snapshot: &Snapshot, findings: &mut Findings) {
    let mut copies: BTreeMap<(i64, i64), u32> = BTreeMap::new();
    for message in &snapshot.messages {
        let (order, sequence) = (message.order, message.sequence);
        *copies.entry((order, sequence)).or_default() += 1;
        let event = Event {
            user: message.user,
            order,
            status: message.status.clone(),
            sequence,
        };
        committed(snapshot, &event, findings);
    }
    for (order, history) in &snapshot.changes {
        for change in history {
            let sequence = change.sequence;
            match copies.get(&(*order, sequence)) {
                Some(1) => {}
                Some(copies) => findings.duplicated(format!(
                    "message {sequence} of order {order} is there {copies} times"
                )),
                None => findings.lost(format!(
                    "event {sequence} of order {order} is not in Notifications"
                )),
            }
        }
    }
}

/// Records that say again what one before them said.
pub(crate) fn repeats(snapshot: &Snapshot) -> usize {
    let mut seen = BTreeSet::new();
    let events = snapshot.log.records.iter();
    let events = events.filter_map(|record| record.event.as_ref().ok());
    events
        .filter(|event| !seen.insert((event.order, event.sequence)))
        .count()
}
