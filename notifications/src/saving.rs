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
    known::verdict,
    store::saving::{BEGIN_SAVING, find_known, insert_messages, vacate_places},
};

/// How long a batch may be saved in parts before it is interrupted for the broker to be polled, and for a stop to be noticed,
/// which a round more than this must not keep for longer than the grace (10 s).
const LONGEST: Duration = Duration::from_secs(3);
/// Looks at what is known, in one transaction: the first finds what was saved before, the second
/// what the first has inserted or met, a third what took the place of another. More is a race with
/// somebody who deletes.
const PASSES: usize = 4;

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
    let mut transaction = db.begin_with(BEGIN_SAVING).await?;
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

/// Finds what is known and inserts the rest, until each record has its verdict: what is not
/// inserted, because the same event is in the batch too or another replica was faster, is known the
/// next time.
async fn insert(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
) -> pg::Result<Vec<Verdict>> {
    let mut verdicts: Vec<Option<Verdict>> = vec![None; records.len()];
    for _ in 0..PASSES {
        let open: Vec<usize> = (0..records.len())
            .filter(|at| verdicts[*at].is_none())
            .collect();
        if open.is_empty() {
            break;
        }
        let asked: Vec<&Received> = open.iter().map(|at| records[*at]).collect();
        let known = find_known(connection, &asked).await?;
        let mut fresh = Vec::with_capacity(open.len());
        let mut users = HashMap::new();
        for (at, known) in open.into_iter().zip(known) {
            let event = &records[at].event;
            verdicts[at] = verdict(event, &known);
            // of two users who are new to an order the first has it; the other is judged in the
            // next pass
            let user = event.user.get();
            if verdicts[at].is_none() && *users.entry(event.order.get()).or_insert(user) == user {
                fresh.push(at);
            }
        }
        if !fresh.is_empty() {
            insert_fresh(connection, topic, records, &fresh, &mut verdicts).await?;
        }
    }
    let verdicts: Option<Vec<Verdict>> = verdicts.into_iter().collect();
    // its row was deleted, or its place taken, in between
    verdicts.ok_or_else(|| pg::Error::conflict("messages changed while others were saved"))
}

async fn insert_fresh(
    connection: &mut Db,
    topic: &str,
    records: &[&Received],
    fresh: &[usize],
    verdicts: &mut [Option<Verdict>],
) -> pg::Result<()> {
    let given: Vec<&Received> = fresh.iter().map(|at| records[*at]).collect();
    let inserted = insert_messages(connection, topic, &given).await?;
    let inserted: HashSet<Source> = inserted.into_iter().collect();
    let mut displaced = Vec::new();
    for at in fresh {
        let record = records[*at];
        if inserted.contains(&record.source) {
            verdicts[*at] = Some(Verdict::Saved);
        } else if record.event.sequence == 0 {
            displaced.push(record);
        }
    }
    if !displaced.is_empty() {
        vacate_places(connection, topic, &displaced).await?;
    }
    Ok(())
}
