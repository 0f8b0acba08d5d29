//! The transaction that saves a batch of events: all at once and, where PostgreSQL refuses some value of the batch, in ever
//! smaller parts, so that a bad event hurts only itself.

use std::collections::{HashMap, HashSet};

use platform::{
    pg::{self, Failure},
    pool::Pool,
};
use sqlx::{Connection as _, PgConnection};

use crate::{
    event::{Received, Source},
    store,
};

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

/// Saves `records`, which are in the order (order, sequence), by one transaction; a verdict for each.
///
/// # Errors
/// The database is away or has a quarrel with us: nothing is saved.
pub async fn save(
    pool: &Pool,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<Verdict>, sqlx::Error> {
    pool.round(async |db| save_together(db, topic, records).await)
        .await
}

async fn save_together(
    db: &mut PgConnection,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<Verdict>, sqlx::Error> {
    let mut transaction = db.begin().await?;
    match insert(&mut transaction, topic, records).await {
        Ok(verdicts) => {
            transaction.commit().await?;
            Ok(verdicts)
        }
        Err(error) if pg::classify(&error) == Failure::Data => {
            transaction.rollback().await?;
            save_apart(db, topic, records).await
        }
        Err(error) => Err(error),
    }
}

/// Halves the batch until what is refused stands alone: of 500 with one bad one about 20 parts are tried, not 500.
async fn save_apart(
    db: &mut PgConnection,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<Verdict>, sqlx::Error> {
    let mut transaction = db.begin().await?;
    let mut verdicts = Vec::with_capacity(records.len());
    // the next one last, so that rows are still locked in the order of the records
    let mut parts = vec![records];
    while let Some(part) = parts.pop() {
        // a savepoint each: the batch is still one commit
        let mut savepoint = transaction.begin().await?;
        match insert(&mut savepoint, topic, part).await {
            Ok(mut verdict) => {
                savepoint.commit().await?;
                verdicts.append(&mut verdict);
            }
            Err(error) if pg::classify(&error) == Failure::Data => {
                savepoint.rollback().await?;
                if part.len() == 1 {
                    verdicts.push(Verdict::Refused(error.to_string()));
                } else {
                    let (first, second) = part.split_at(part.len() / 2);
                    parts.extend([second, first]);
                }
            }
            Err(error) => return Err(error),
        }
    }
    transaction.commit().await?;
    Ok(verdicts)
}

async fn insert(
    connection: &mut PgConnection,
    topic: &str,
    records: &[&Received],
) -> Result<Vec<Verdict>, sqlx::Error> {
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
                .ok_or(sqlx::Error::RowNotFound)
        })
        .collect()
}
