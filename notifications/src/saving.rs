//! How a batch of events is saved: all at once and, where PostgreSQL refuses some value of the batch, in smaller parts, so
//! that a bad event hurts only itself.

use std::{
    collections::{HashMap, HashSet},
    sync::LazyLock,
    time::Duration,
};

use fail::fail_point;
use platform::{
    grpc::registered,
    pg::{self, Db, Failure, Pool},
};
use prometheus::{Histogram, HistogramOpts};
use tokio::time::Instant;

use crate::{
    event::{Received, Source},
    store,
};

/// How long a batch may be saved in parts before it is interrupted for the broker to be polled, and for a stop to be noticed,
/// which a round more than this must not keep for longer than the grace (10 s).
const LONGEST: Duration = Duration::from_secs(3);

static BATCH_SIZE: LazyLock<Histogram> = LazyLock::new(|| {
    let opts = HistogramOpts::new(
        "notifications_histogram_batch_size",
        "Events saved by one transaction.",
    );
    registered(Histogram::with_opts(opts.buckets(vec![
        1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0,
    ])))
});

/// What became of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is new, and in the table.
    Saved,
    /// It was in the table.
    Duplicate,
    /// Another event is in its place.
    Conflict(String),
    /// PostgreSQL refuses what it says.
    Refused(String),
}

/// How far saving came.
pub struct Progress {
    /// Of the first so many records; what became of these is settled for good.
    pub verdicts: Vec<Verdict>,
    /// Why not of all; the rest is to be tried again.
    pub stopped: Option<Stopped>,
}

/// What keeps events from being saved, whatever they say.
#[derive(Debug, thiserror::Error)]
pub enum Stopped {
    /// It is away or has a quarrel with us.
    #[error(transparent)]
    Database(pg::Error),
    /// Much is refused by a database that takes its time: whoever waits for the whole batch would not poll meanwhile.
    #[error("{left} events left after {} s of saving in parts", LONGEST.as_secs())]
    Long {
        /// Neither saved nor refused.
        left: usize,
    },
}

/// Shows what is measured before there is anything to measure.
pub(crate) fn show_metrics() {
    LazyLock::force(&BATCH_SIZE);
}

/// Saves `records`, which are in the order (order, sequence): by one transaction or, where PostgreSQL refuses some value, by
/// several, each of a part and in a round of its own. A part that is refused is halved until what is refused stands alone, one
/// that is saved lets the next be twice as large: of 500 with one bad one about 20 are tried. What one transaction has saved
/// is kept when a later one fails, so that a slow database comes to the end of any batch, whatever its events say.
pub async fn save(pool: &Pool, topic: &str, records: &[&Received]) -> Progress {
    let until = Instant::now() + LONGEST;
    let mut verdicts = Vec::with_capacity(records.len());
    let mut size = records.len();
    let stopped = loop {
        let left = &records[verdicts.len()..];
        if left.is_empty() {
            break None;
        }
        if !verdicts.is_empty() && Instant::now() > until {
            break Some(Stopped::Long { left: left.len() });
        }
        let part = &left[..size.clamp(1, left.len())];
        match pool
            .with_connection(async |db| save_part(db, topic, part).await)
            .await
        {
            Ok(Attempt::Saved(mut saved)) => {
                BATCH_SIZE.observe(part.len() as f64);
                verdicts.append(&mut saved);
                size = part.len() * 2;
            }
            Ok(Attempt::Refused(error)) if part.len() == 1 => {
                BATCH_SIZE.observe(1.0);
                verdicts.push(Verdict::Refused(error));
            }
            Ok(Attempt::Refused(_)) => size = part.len() / 2,
            Err(error) => break Some(Stopped::Database(error)),
        }
    };
    Progress { verdicts, stopped }
}

/// What one transaction came to.
enum Attempt {
    /// Each record has its verdict.
    Saved(Vec<Verdict>),
    /// PostgreSQL refuses a value of some record, nothing is saved.
    Refused(String),
}

async fn save_part(db: &mut Db, topic: &str, part: &[&Received]) -> pg::Result<Attempt> {
    let mut transaction = db.begin_with(store::BEGIN_SAVING).await?;
    match insert(&mut transaction, topic, part).await {
        Ok(verdicts) => {
            fail_point!("events-committing", |_| std::process::abort());
            transaction.commit().await?;
            Ok(Attempt::Saved(verdicts))
        }
        Err(error) if error.failure() == Failure::Refused => {
            transaction.rollback().await?;
            Ok(Attempt::Refused(error.to_string()))
        }
        Err(error) => Err(error),
    }
}

async fn insert(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
) -> pg::Result<Vec<Verdict>> {
    let inserted: HashSet<Source> = store::insert_messages(connection, topic, records)
        .await?
        .into_iter()
        .collect();
    let met: Vec<&Received> = records
        .iter()
        .copied()
        .filter(|record| !inserted.contains(&record.source))
        .collect();
    let mut judged: HashMap<Source, Verdict> = HashMap::with_capacity(met.len());
    if !met.is_empty() {
        for (place, stored) in store::find_saved(connection, topic, &met).await? {
            let Some(record) = met.get(place) else {
                continue;
            };
            let verdict = if record.event.repeats(&stored) {
                Verdict::Duplicate
            } else {
                Verdict::Conflict(format!(
                    "order {} has another event {} already: {:?} of user {}",
                    record.event.order.get(),
                    record.event.sequence,
                    stored.message,
                    stored.user,
                ))
            };
            judged.insert(record.source, verdict);
        }
    }
    records
        .iter()
        .map(|record| {
            if inserted.contains(&record.source) {
                return Ok(Verdict::Saved);
            }
            // neither inserted nor found: its row was deleted in between, the next try inserts it
            judged
                .remove(&record.source)
                .ok_or_else(|| pg::Error::conflict("a message was deleted while it was saved"))
        })
        .collect()
}
